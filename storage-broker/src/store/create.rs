//! Creating a disk on an NFS volume, so that whoever finds it knows whether its content is complete.
//!
//! ```text
//!  CREATE guarded, mode 0020, group = token ──► size ──► image, COMMIT ──► mode 0060
//! ```
//!
//! The mode is the mark: a file of mode 0020 is ours to begin anew, one of mode 0060 is a disk. What an
//! earlier try left under an older token of the same machine is first claimed and let settle: writes of
//! that try may still be on their way.

use std::collections::HashSet;
use std::sync::Mutex;

use futures::stream::{FuturesUnordered, StreamExt};

use super::image::{BLOCK_BYTES, Image};
use super::nfs::NfsVolume;
use super::{Existing, NewDisk, VolumeError, judge_existing};
use crate::fence::{DISK_MODE, UNFINISHED_MODE, claimant, data_credential};
use crate::nfs::client::SetAttributes;
use crate::nfs::{Credential, FileHandle, NfsClient, NfsError, Stable, Status};
use crate::volume::DiskPath;
use cluster_model::ids::Token;

/// Blocks of an image on their way at once.
const COPY_IN_FLIGHT: usize = 8;

/// The mode of directories made for disks: who looks for a disk must be able to pass.
const DIRECTORY_MODE: u32 = 0o755;

/// Keeps two requests from making the same disk at once.
struct Busy<'a>(&'a Mutex<HashSet<DiskPath>>, &'a DiskPath);

impl<'a> Busy<'a> {
    fn take(busy: &'a Mutex<HashSet<DiskPath>>, path: &'a DiskPath) -> Result<Self, VolumeError> {
        let mut paths = busy.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !paths.insert(path.clone()) {
            return Err(VolumeError::Busy { path: path.clone() });
        }
        Ok(Busy(busy, path))
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .remove(self.1);
    }
}

impl NfsVolume {
    pub(super) async fn create_disk(&self, disk: &NewDisk) -> Result<(), VolumeError> {
        let _busy = Busy::take(&self.busy, &disk.path)?;
        // Looked at first: a missing image must not leave a disk behind.
        let image = match &disk.image {
            Some(path) => Some(Image::open(path, disk.size_bytes).await?),
            None => None,
        };
        let what = format!("create disk `{}`", disk.path);
        let client = self.client().await?;
        let (directories, name) = disk.path.parts();
        let mut place = client.root().clone();
        for directory in directories {
            place = self
                .directory(&client, &place, directory)
                .await
                .map_err(|error| self.failed(&what, error))?;
        }
        let owner = claimant(self.reference.broker_uid, disk.token);
        let fresh = SetAttributes {
            mode: Some(UNFINISHED_MODE),
            gid: Some(disk.token.gid()),
            size_bytes: None,
        };
        let file = match client.create(owner, &place, name, fresh).await {
            Ok(file) => file,
            Err(error) if error.status() == Some(Status::NFS3ERR_EXIST) => {
                let file = client
                    .lookup(self.broker(), &place, name)
                    .await
                    .map_err(|error| self.failed(&what, error))?;
                match self.existing(&client, &file, disk).await? {
                    Existing::Done => return Ok(()),
                    Existing::GoOn => file,
                    Existing::TakeOver => {
                        let claim = SetAttributes {
                            gid: Some(disk.token.gid()),
                            ..SetAttributes::default()
                        };
                        client
                            .setattr(owner, &file, claim)
                            .await
                            .map_err(|error| self.failed(&what, error))?;
                        tokio::time::sleep(disk.settle).await;
                        client
                            .setattr(owner, &file, fresh)
                            .await
                            .map_err(|error| self.failed(&what, error))?;
                        file
                    }
                    Existing::Foreign(why) => {
                        return Err(VolumeError::Exists {
                            volume: self.name.clone(),
                            path: disk.path.clone(),
                            why,
                        });
                    }
                }
            }
            Err(error) => return Err(self.failed(&what, error)),
        };
        let data = data_credential(self.reference.broker_uid, disk.token);
        // To nothing first: what an interrupted copy left must not show through a hole.
        for size_bytes in [0, disk.size_bytes] {
            let size = SetAttributes {
                size_bytes: Some(size_bytes),
                ..SetAttributes::default()
            };
            client
                .setattr(data, &file, size)
                .await
                .map_err(|error| self.failed(&what, error))?;
        }
        if let Some(image) = image {
            self.copy(&client, data, &file, &image, &what).await?;
        }
        let finished = SetAttributes {
            mode: Some(DISK_MODE),
            ..SetAttributes::default()
        };
        client
            .setattr(owner, &file, finished)
            .await
            .map_err(|error| self.failed(&what, error))?;
        // What the server made of it: some map groups, and then the fence would not hold.
        match self.existing(&client, &file, disk).await? {
            Existing::Done => Ok(()),
            Existing::GoOn | Existing::TakeOver | Existing::Foreign(_) => {
                Err(VolumeError::BadIdentity {
                    volume: self.name.clone(),
                    problem: format!(
                        "the server did not keep owner, group and mode of the new disk `{}`; export it \
                     without all_squash and id mapping",
                        disk.path
                    ),
                })
            }
        }
    }

    async fn directory(
        &self,
        client: &NfsClient,
        place: &FileHandle,
        name: &str,
    ) -> Result<FileHandle, NfsError> {
        let broker = self.broker();
        match client.lookup(broker, place, name).await {
            Err(error) if error.status() == Some(Status::NFS3ERR_NOENT) => {}
            found => return found,
        }
        match client.mkdir(broker, place, name, DIRECTORY_MODE).await {
            // Made by another request meanwhile.
            Err(error) if error.status() == Some(Status::NFS3ERR_EXIST) => {
                client.lookup(broker, place, name).await
            }
            made => made,
        }
    }

    async fn existing(
        &self,
        client: &NfsClient,
        file: &FileHandle,
        disk: &NewDisk,
    ) -> Result<Existing, VolumeError> {
        let what = format!("look at `{}`", disk.path);
        let found = client
            .getattr(self.broker(), file)
            .await
            .map_err(|error| self.failed(&what, error))?;
        let ours = found.is_file
            && found.uid == self.reference.broker_uid
            && matches!(found.mode, DISK_MODE | UNFINISHED_MODE);
        let finished = found.mode == DISK_MODE;
        Ok(judge_existing(
            ours,
            finished,
            found.size_bytes,
            Token::from_gid(found.gid),
            disk,
        ))
    }

    /// Copies an image in, some blocks at a time, and commits it.
    async fn copy(
        &self,
        client: &NfsClient,
        data: Credential,
        file: &FileHandle,
        image: &Image,
        what: &str,
    ) -> Result<(), VolumeError> {
        let restarted = || VolumeError::Restarted {
            volume: self.name.clone(),
            what: what.to_owned(),
        };
        let mut verifier = None;
        let mut on_their_way = FuturesUnordered::new();
        let mut offsets = (0..image.size_bytes).step_by(BLOCK_BYTES);
        loop {
            while on_their_way.len() < COPY_IN_FLIGHT
                && let Some(offset) = offsets.next()
            {
                on_their_way.push(async move {
                    let mut verifiers = Vec::new();
                    let Some(mut block) = image.block(offset).await? else {
                        return Ok(verifiers);
                    };
                    let mut at = offset;
                    while !block.is_empty() {
                        let reply = client
                            .write(data, file, at, &block, Stable::UNSTABLE)
                            .await
                            .map_err(|error| self.failed(what, error))?;
                        verifiers.push(reply.verifier);
                        at += u64::from(reply.count);
                        block = block.slice(reply.count as usize..);
                    }
                    Ok::<_, VolumeError>(verifiers)
                });
            }
            let Some(written) = on_their_way.next().await else {
                break;
            };
            for seen in written? {
                if *verifier.get_or_insert(seen) != seen {
                    return Err(restarted());
                }
            }
        }
        let committed = client
            .commit(data, file)
            .await
            .map_err(|error| self.failed(what, error))?;
        match verifier {
            Some(verifier) if verifier != committed.verifier => Err(restarted()),
            _ => Ok(()),
        }
    }
}
