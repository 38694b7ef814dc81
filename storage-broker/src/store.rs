//! The metadata work on volumes: probing, adopting, creating, deleting, claiming and verifying.
//!
//! Each operation may be asked again after a crash or a lost answer, and then ends the same. The
//! connections and file handles kept between calls only save time: nothing is lost with them.

mod create;
pub(crate) mod dir;
mod error;
pub(crate) mod image;
mod nfs;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cluster_model::ids::Token;

use crate::certify::Certificate;
use crate::dialer::Dialer;
use crate::nfs::mount::ask_root;
use crate::tls::ClientTls;
use crate::volume::{DiskPath, DiskPathError, VolumeUrl, VolumeUrlError};

pub use error::VolumeError;
pub use image::ImageError;

/// Volumes kept connected at most; a node has a handful.
const VOLUMES_MAX: usize = 256;

/// The largest disk: 64 TiB, well below what file systems take.
pub const DISK_BYTES_MAX: u64 = 1 << 46;

/// A volume as a request names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VolumeRef {
    /// Where it is.
    pub url: VolumeUrl,
    /// What its server must prove; `None` is plain TCP.
    pub tls: Option<ClientTls>,
    /// Whose it must be.
    pub cluster_id: String,
    /// Who owns its disks.
    pub broker_uid: u32,
}

impl VolumeRef {
    /// Parses what came over the wire; `authority` is the PEM text that vouches for the server, or empty.
    ///
    /// # Errors
    /// When the address is malformed, it and the authority contradict each other, or the uid is one that
    /// servers map to somebody else.
    pub fn parse(
        url: &str,
        authority: &str,
        cluster_id: &str,
        broker_uid: u32,
    ) -> Result<VolumeRef, VolumeError> {
        let url: VolumeUrl = url.parse().map_err(VolumeError::from)?;
        let tls = ClientTls::of_volume(&url, authority)?;
        if cluster_id.is_empty() {
            return Err(VolumeError::NoClusterId);
        }
        // 0 is squashed, 65534 is whom squashed users become, the last is "no change".
        if matches!(url, VolumeUrl::Nfs(_)) && matches!(broker_uid, 0 | 65534 | u32::MAX) {
            return Err(VolumeError::BrokerUid { uid: broker_uid });
        }
        Ok(VolumeRef {
            url,
            tls,
            cluster_id: cluster_id.to_owned(),
            broker_uid,
        })
    }
}

impl From<VolumeUrlError> for VolumeError {
    fn from(error: VolumeUrlError) -> Self {
        VolumeError::Url(error)
    }
}

impl From<DiskPathError> for VolumeError {
    fn from(error: DiskPathError) -> Self {
        VolumeError::Path(error)
    }
}

/// What a look at a volume showed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// Whose it is, and its own id; `None` where it carries no identity.
    pub identity: Option<crate::volume::Identity>,
    /// Room in all.
    pub size_bytes: u64,
    /// Room left.
    pub free_bytes: u64,
    /// Whether the broker may create files.
    pub writable: bool,
}

/// A file as the server says it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskStat {
    /// Bytes.
    pub size_bytes: u64,
    /// Owner.
    pub uid: u32,
    /// Group: carries the token.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
}

/// What a new disk is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDisk {
    /// Where on the volume.
    pub path: DiskPath,
    /// Its size.
    pub size_bytes: u64,
    /// The token that its machine is under now.
    pub token: Token,
    /// The oldest token that its machine ever had: what is under it or a later one is the machine's own.
    pub since: Token,
    /// How long writes of an earlier try, on another node, may still be on their way.
    pub settle: std::time::Duration,
    /// A raw image of this host to copy in.
    pub image: Option<std::path::PathBuf>,
}

/// The volumes that this broker has met.
#[derive(Debug)]
pub struct Store {
    dialer: Dialer,
    /// Whether this host's watchdog is armed, so that `dir:` volumes have class `time`.
    watchdog_armed: bool,
    volumes: Mutex<HashMap<VolumeRef, Arc<nfs::NfsVolume>>>,
}

impl Store {
    /// A store that connects through `dialer`.
    pub fn new(dialer: Dialer, watchdog_armed: bool) -> Store {
        Store {
            dialer,
            watchdog_armed,
            volumes: Mutex::new(HashMap::new()),
        }
    }

    fn open(&self, volume: &VolumeRef) -> Open {
        match &volume.url {
            VolumeUrl::Dir(directory) => {
                Open::Dir(dir::DirVolume::new(directory.clone(), volume.clone()))
            }
            VolumeUrl::Nfs(url) => {
                let mut volumes = self
                    .volumes
                    .lock()
                    .unwrap_or_else(|poisoned| poisoned.into_inner());
                if volumes.len() >= VOLUMES_MAX && !volumes.contains_key(volume) {
                    // They only save time; the next use makes the connection anew.
                    volumes.clear();
                }
                let open = volumes.entry(volume.clone()).or_insert_with(|| {
                    Arc::new(nfs::NfsVolume::new(
                        url.clone(),
                        volume.clone(),
                        self.dialer.with_tls(volume.tls.clone()),
                    ))
                });
                Open::Nfs(open.clone())
            }
        }
    }

    /// Looks at a volume without changing it.
    ///
    /// # Errors
    /// See [`VolumeError`], as for all of these.
    pub async fn probe(&self, volume: &VolumeRef) -> Result<Probe, VolumeError> {
        match self.open(volume) {
            Open::Nfs(open) => open.probe().await,
            Open::Dir(open) => open.probe().await,
        }
    }

    /// The volume with the file handle of its root in its address, asked for in clear: what follows needs no
    /// MOUNT any more. Whoever is on the path at this moment can name another directory of the server, so
    /// it is done once, when a person adds the volume, and what is found there is shown.
    pub async fn pin_root(&self, volume: &VolumeRef) -> Result<VolumeRef, VolumeError> {
        let mut pinned = volume.clone();
        if let VolumeUrl::Nfs(url) = &mut pinned.url {
            let root = ask_root(url, &self.dialer, nfs::CALL_TIMEOUT).await?;
            url.root = Some(root.0[..].into());
        }
        Ok(pinned)
    }

    /// Whether the volume's server says that it offers TLS; `false` for directories, and where nobody says.
    pub async fn offers_tls(&self, volume: &VolumeRef) -> bool {
        match &volume.url {
            VolumeUrl::Dir(_) => false,
            VolumeUrl::Nfs(url) => {
                let asked = self.dialer.offers_tls(&url.host, url.nfs_port()).await;
                asked.unwrap_or(false)
            }
        }
    }

    /// Takes a volume that is nobody's (or already ours), and tries what fence it has. The
    /// certificate names its uuid, which is `volume_uuid` unless it was adopted before.
    pub async fn adopt(
        &self,
        volume: &VolumeRef,
        volume_uuid: &str,
    ) -> Result<(Certificate, String), VolumeError> {
        match self.open(volume) {
            Open::Nfs(open) => {
                let uuid = open.adopt(volume_uuid).await?;
                Ok((open.certify().await?, uuid))
            }
            Open::Dir(open) => {
                let uuid = open.adopt(volume_uuid).await?;
                Ok((crate::certify::certify_directory(self.watchdog_armed), uuid))
            }
        }
    }

    /// Creates a disk, sparse, with an image's content if one is given. Asked again it goes on
    /// where it was; it never touches a disk that is another's.
    pub async fn create_disk(&self, volume: &VolumeRef, disk: &NewDisk) -> Result<(), VolumeError> {
        if disk.size_bytes == 0 || disk.size_bytes > DISK_BYTES_MAX {
            return Err(VolumeError::Size {
                path: disk.path.clone(),
                size_bytes: disk.size_bytes,
            });
        }
        match self.open(volume) {
            Open::Nfs(open) => open.create_disk(disk).await,
            Open::Dir(open) => open.create_disk(disk).await,
        }
    }

    /// Deletes a disk, unless it is under a newer token. One that is not there is deleted already; one
    /// under a token older than `since` was another machine's and is left alone.
    pub async fn delete_disk(
        &self,
        volume: &VolumeRef,
        path: &DiskPath,
        token: Token,
        since: Token,
    ) -> Result<(), VolumeError> {
        match self.open(volume) {
            Open::Nfs(open) => open.delete_disk(path, token, since).await,
            Open::Dir(open) => open.delete_disk(path, token, since).await,
        }
    }

    /// A file's size, owner and group; `None` where there is none. Also finds it in advance, so
    /// that a later claim takes one round trip less.
    pub async fn stat(
        &self,
        volume: &VolumeRef,
        path: &DiskPath,
    ) -> Result<Option<DiskStat>, VolumeError> {
        match self.open(volume) {
            Open::Nfs(open) => open.stat(path).await,
            Open::Dir(open) => open.stat(path).await,
        }
    }

    /// Moves all of a machine's files to `token`: on NFS with one SETATTR each.
    pub async fn claim(
        &self,
        files: &[(VolumeRef, DiskPath)],
        token: Token,
    ) -> Result<(), VolumeError> {
        let (claimed, directories) = self.prepare(files, Some(token)).await?;
        for (directory, path) in directories {
            directory.claim(&path, token).await?;
        }
        Ok(crate::fence::claim(&claimed, token).await?)
    }

    /// After a takeover's settle time: every file is still under `token`, and all that its former
    /// owner wrote is on stable storage.
    pub async fn verify_and_commit(
        &self,
        files: &[(VolumeRef, DiskPath)],
        token: Token,
    ) -> Result<(), VolumeError> {
        let (claimed, directories) = self.prepare(files, None).await?;
        for (directory, path) in directories {
            directory.verify_and_commit(&path, token).await?;
        }
        crate::fence::verify_group(&claimed, token).await?;
        Ok(crate::fence::commit_whole(&claimed, token).await?)
    }

    /// Finds all files. For a claim it also makes sure, before anything is sent once and for all,
    /// that the connection lives, the handles are good, and no file is under a newer token.
    async fn prepare(
        &self,
        files: &[(VolumeRef, DiskPath)],
        claim: Option<Token>,
    ) -> Result<(Vec<crate::fence::Claimed>, Vec<(dir::DirVolume, DiskPath)>), VolumeError> {
        let found = files.iter().map(|(volume, path)| async move {
            match self.open(volume) {
                Open::Nfs(open) => open.prepare(path, claim).await.map(Found::Nfs),
                Open::Dir(open) => Ok(Found::Dir(open, path.clone())),
            }
        });
        let (mut claimed, mut directories) = (Vec::new(), Vec::new());
        for found in futures::future::join_all(found).await {
            match found? {
                Found::Nfs(file) => claimed.push(file),
                Found::Dir(open, path) => directories.push((open, path)),
            }
        }
        Ok((claimed, directories))
    }
}

enum Open {
    Nfs(Arc<nfs::NfsVolume>),
    Dir(dir::DirVolume),
}

enum Found {
    Nfs(crate::fence::Claimed),
    Dir(dir::DirVolume, DiskPath),
}

/// What to do with a file that is already where a disk is to be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Existing {
    /// It is the disk asked for.
    Done,
    /// Its making was interrupted.
    GoOn,
    /// Its making was interrupted under an older token of the same machine.
    TakeOver,
    /// It is something else, which must not be touched.
    Foreign(&'static str),
}

/// Judges a file that is already there, from whose it is, how large, under which token, and
/// whether its content is complete.
fn judge_existing(
    ours: bool,
    finished: bool,
    size_bytes: u64,
    token: Option<Token>,
    wanted: &NewDisk,
) -> Existing {
    if !ours {
        Existing::Foreign("it does not belong to this cluster's broker")
    } else if token.is_none_or(|token| token < wanted.since) {
        Existing::Foreign("it is under a token that this machine never had")
    } else if token > Some(wanted.token) {
        Existing::Foreign("it is under a newer token")
    } else if !finished && token == Some(wanted.token) {
        Existing::GoOn
    } else if !finished {
        Existing::TakeOver
    } else if size_bytes != wanted.size_bytes {
        Existing::Foreign("it has another size")
    } else {
        Existing::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ones_own_unfinished_or_identical_disk_is_taken_for_the_one_asked_for() {
        let wanted = NewDisk {
            path: "d.raw".parse().unwrap(),
            size_bytes: 100,
            token: Token(7),
            since: Token(5),
            settle: std::time::Duration::ZERO,
            image: None,
        };
        let foreign = |existing| matches!(existing, Existing::Foreign(_));
        let ours = Some(Token(7));
        assert_eq!(
            judge_existing(true, true, 100, ours, &wanted),
            Existing::Done
        );
        assert_eq!(
            judge_existing(true, false, 3, ours, &wanted),
            Existing::GoOn
        );
        for earlier in [Some(Token(5)), Some(Token(6))] {
            assert_eq!(
                judge_existing(true, true, 100, earlier, &wanted),
                Existing::Done
            );
            assert_eq!(
                judge_existing(true, false, 100, earlier, &wanted),
                Existing::TakeOver
            );
        }
        for finished in [false, true] {
            let older = Some(Token(4));
            assert!(foreign(judge_existing(true, finished, 100, older, &wanted)));
        }
        assert!(foreign(judge_existing(true, true, 99, ours, &wanted)));
        assert!(foreign(judge_existing(
            true,
            true,
            100,
            Some(Token(8)),
            &wanted
        )));
        assert!(foreign(judge_existing(true, false, 100, None, &wanted)));
        assert!(foreign(judge_existing(false, true, 100, ours, &wanted)));
    }
}
