//! A volume in a directory of this host. Beside each disk lies a small file that says its token.
//!
//! Nothing below the file system checks tokens here; the record makes the same requests end the
//! same way, and shows an operator who may use a disk.

use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use cluster_model::ids::Token;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use super::image::{BLOCK_BYTES, Image};
use super::{DiskStat, Existing, NewDisk, Probe, VolumeError, VolumeRef, judge_existing};
use crate::disk::open_beneath;
use crate::volume::{DiskPath, IDENTITY_BYTES_MAX, IDENTITY_FILE, Identity};

/// What is known of a disk beside its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    token: Token,
    finished: bool,
}

/// The largest record that is read.
const RECORD_BYTES_MAX: u64 = 4096;

#[derive(Clone, Debug)]
pub(super) struct DirVolume {
    directory: PathBuf,
    name: String,
    reference: VolumeRef,
}

type Result<T> = std::result::Result<T, VolumeError>;

/// The record's path: `a/b.raw` has `a/.baton-b.raw.json`.
fn record_path(path: &DiskPath) -> String {
    let (mut parts, name) = path.parts();
    let record = format!(".baton-{name}.json");
    parts.push(&record);
    parts.join("/")
}

impl DirVolume {
    pub(super) fn new(directory: PathBuf, reference: VolumeRef) -> DirVolume {
        DirVolume {
            name: format!("dir:{}", directory.display()),
            directory,
            reference,
        }
    }

    /// Runs file system work on a blocking thread.
    async fn work<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&DirVolume) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let volume = self.clone();
        match tokio::task::spawn_blocking(move || work(&volume)).await {
            Ok(result) => result,
            Err(error) => Err(self.failed(what)(io::Error::other(error))),
        }
    }

    fn failed(&self, what: &str) -> impl Fn(io::Error) -> VolumeError {
        move |source| VolumeError::from_io(&self.name, what, source)
    }

    fn open(&self, path: &str, flags: OFlag) -> io::Result<std::fs::File> {
        open_beneath(&self.directory, path, flags, file_mode(flags))
    }

    fn read_identity(&self) -> Result<Option<Identity>> {
        let file = match self.open(IDENTITY_FILE, OFlag::O_RDONLY) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed("reading its identity")(error)),
        };
        let content = read_small(&file, IDENTITY_BYTES_MAX as u64)
            .map_err(self.failed("reading its identity"))?;
        Identity::from_json(&content).map_err(|error| VolumeError::BadIdentity {
            volume: self.name.clone(),
            problem: error.to_string(),
        })
    }

    fn check_owner(&self, identity: &Identity) -> Result<()> {
        if identity.cluster_id == self.reference.cluster_id {
            return Ok(());
        }
        let owner = identity
            .cluster_id
            .chars()
            .filter(|c| !c.is_control())
            .take(100)
            .collect();
        Err(VolumeError::OtherCluster {
            volume: self.name.clone(),
            owner,
        })
    }

    fn check_ours(&self) -> Result<()> {
        match self.read_identity()? {
            Some(identity) => self.check_owner(&identity),
            None => Err(VolumeError::NotAdopted {
                volume: self.name.clone(),
            }),
        }
    }

    pub(super) async fn probe(&self) -> Result<Probe> {
        self.work("looking at it", |volume| {
            let identity = volume.read_identity()?;
            let failed = volume.failed("asking for free space");
            let room = nix::sys::statvfs::statvfs(&volume.directory)
                .map_err(|error| failed(error.into()))?;
            let unit = room.fragment_size();
            let writable = nix::unistd::access(&volume.directory, nix::unistd::AccessFlags::W_OK);
            Ok(Probe {
                identity,
                size_bytes: room.blocks().saturating_mul(unit),
                free_bytes: room.blocks_available().saturating_mul(unit),
                writable: writable.is_ok(),
            })
        })
        .await
    }

    pub(super) async fn adopt(&self, volume_uuid: &str) -> Result<String> {
        let uuid = volume_uuid.to_owned();
        self.work("adopting it", move |volume| {
            if let Some(identity) = volume.read_identity()? {
                volume.check_owner(&identity)?;
                return Ok(identity.volume_uuid);
            }
            let identity = Identity {
                cluster_id: volume.reference.cluster_id.clone(),
                volume_uuid: uuid.clone(),
            };
            // Written whole under another name, then linked: it is there with its content or not
            // at all, and of two clusters one succeeds.
            let failed = volume.failed("write its identity file");
            let temporary = volume.directory.join(format!("{IDENTITY_FILE}.{uuid}.new"));
            write_synced(&temporary, &identity.to_json()).map_err(&failed)?;
            let linked = std::fs::hard_link(&temporary, volume.directory.join(IDENTITY_FILE));
            std::fs::remove_file(&temporary).map_err(&failed)?;
            match linked {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(failed(error));
                }
                _ => {}
            }
            sync_directory(&volume.directory).map_err(&failed)?;
            match volume.read_identity()? {
                Some(identity) => {
                    volume.check_owner(&identity)?;
                    Ok(identity.volume_uuid)
                }
                None => Err(VolumeError::BadIdentity {
                    volume: volume.name.clone(),
                    problem: "it cannot be read back".into(),
                }),
            }
        })
        .await
    }

    fn record(&self, path: &DiskPath) -> Result<Option<Record>> {
        let failed = self.failed("reading a disk's record");
        let file = match self.open(&record_path(path), OFlag::O_RDONLY) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let content = read_small(&file, RECORD_BYTES_MAX).map_err(&failed)?;
        serde_json::from_slice(&content)
            .map(Some)
            .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))
    }

    fn set_record(&self, path: &DiskPath, record: Record) -> Result<()> {
        let failed = self.failed("writing a disk's record");
        let place = self.directory.join(record_path(path));
        let temporary = place.with_extension("json.new");
        let content = serde_json::to_vec(&record).unwrap_or_default();
        write_synced(&temporary, &content).map_err(&failed)?;
        std::fs::rename(&temporary, &place).map_err(&failed)?;
        sync_directory(place.parent().unwrap_or(&self.directory)).map_err(&failed)
    }

    fn disk_size(&self, path: &DiskPath) -> Result<Option<u64>> {
        match self
            .open(path.as_str(), OFlag::O_RDONLY)
            .and_then(|file| file.metadata())
        {
            Ok(metadata) if metadata.is_file() => Ok(Some(metadata.len())),
            Ok(_) => Err(VolumeError::Exists {
                volume: self.name.clone(),
                path: path.clone(),
                why: "it is not a regular file",
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed(&format!("looking at `{path}`"))(error)),
        }
    }

    pub(super) async fn create_disk(&self, disk: &NewDisk) -> Result<()> {
        let image = match &disk.image {
            Some(path) => Some(Image::open(path, disk.size_bytes).await?),
            None => None,
        };
        let wanted = disk.clone();
        let what = format!("create disk `{}`", disk.path);
        let file = self
            .work(&what.clone(), move |volume| {
                volume.begin_disk(&wanted, &what)
            })
            .await?;
        let Some((file, taken_over)) = file else {
            return Ok(());
        };
        if taken_over {
            // Writes of the earlier try, on another node, may still be on their way.
            tokio::time::sleep(disk.settle).await;
            file.set_len(0)
                .and_then(|()| file.set_len(disk.size_bytes))
                .map_err(self.failed("emptying an unfinished disk"))?;
        }
        let file = std::sync::Arc::new(file);
        if let Some(image) = image {
            for offset in (0..image.size_bytes).step_by(BLOCK_BYTES) {
                let Some(block) = image.block(offset).await? else {
                    continue;
                };
                let file = file.clone();
                self.work("copying the image", move |volume| {
                    file.write_all_at(&block, offset)
                        .map_err(volume.failed("copying the image"))
                })
                .await?;
            }
        }
        let (path, token) = (disk.path.clone(), disk.token);
        self.work("finishing the disk", move |volume| {
            file.sync_all()
                .map_err(volume.failed("finishing the disk"))?;
            volume.set_record(
                &path,
                Record {
                    token,
                    finished: true,
                },
            )
        })
        .await
    }

    /// The new file and whether an earlier try of another token began it, or `None` when the disk is there
    /// already.
    fn begin_disk(&self, disk: &NewDisk, what: &str) -> Result<Option<(std::fs::File, bool)>> {
        self.check_ours()?;
        let mut taken_over = false;
        let record = self.record(&disk.path)?;
        if let Some(size_bytes) = self.disk_size(&disk.path)? {
            let token = record.map(|record| record.token);
            let finished = record.is_some_and(|record| record.finished);
            match judge_existing(record.is_some(), finished, size_bytes, token, disk) {
                Existing::Done => return Ok(None),
                Existing::GoOn => {}
                Existing::TakeOver => taken_over = true,
                Existing::Foreign(why) => {
                    return Err(VolumeError::Exists {
                        volume: self.name.clone(),
                        path: disk.path.clone(),
                        why,
                    });
                }
            }
        }
        let failed = self.failed(what);
        let (directories, _) = disk.path.parts();
        let parent = self.directory.join(directories.join("/"));
        std::fs::create_dir_all(&parent).map_err(&failed)?;
        // The record first: a file without one is somebody else's.
        self.set_record(
            &disk.path,
            Record {
                token: disk.token,
                finished: false,
            },
        )?;
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_TRUNC;
        let file = self.open(disk.path.as_str(), flags).map_err(&failed)?;
        file.set_len(disk.size_bytes).map_err(&failed)?;
        sync_directory(&parent).map_err(&failed)?;
        Ok(Some((file, taken_over)))
    }

    /// Refuses whoever presents an older token than the disk's.
    fn check_token(&self, path: &DiskPath, offered: Token) -> Result<Option<Record>> {
        let record = self.record(path)?;
        match record {
            Some(Record { token: present, .. }) if present > offered => {
                Err(VolumeError::NewerToken {
                    path: path.clone(),
                    present,
                    offered,
                })
            }
            record => Ok(record),
        }
    }

    pub(super) async fn delete_disk(
        &self,
        path: &DiskPath,
        token: Token,
        since: Token,
    ) -> Result<()> {
        let path = path.clone();
        self.work("deleting a disk", move |volume| {
            volume.check_ours()?;
            let record = volume.check_token(&path, token)?;
            if volume.disk_size(&path)?.is_some() && record.is_none() {
                return Err(VolumeError::Exists {
                    volume: volume.name.clone(),
                    path: path.clone(),
                    why: "it was not made by this cluster",
                });
            }
            if record.is_some_and(|record| record.token < since) {
                return Ok(());
            }
            let failed = volume.failed("deleting a disk");
            for name in [path.as_str(), &record_path(&path)] {
                match std::fs::remove_file(volume.directory.join(name)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(failed(error));
                    }
                    _ => {}
                }
            }
            Ok(())
        })
        .await
    }

    pub(super) async fn stat(&self, path: &DiskPath) -> Result<Option<DiskStat>> {
        let path = path.clone();
        self.work("looking at a disk", move |volume| {
            volume.check_ours()?;
            let Some(size_bytes) = volume.disk_size(&path)? else {
                return Ok(None);
            };
            let metadata = volume
                .open(path.as_str(), OFlag::O_RDONLY)
                .and_then(|file| file.metadata())
                .map_err(volume.failed("looking at a disk"))?;
            let gid = volume
                .record(&path)?
                .map_or(metadata.gid(), |record| record.token.gid());
            Ok(Some(DiskStat {
                size_bytes,
                uid: metadata.uid(),
                gid,
                mode: metadata.mode() & 0o7777,
            }))
        })
        .await
    }

    pub(super) async fn claim(&self, path: &DiskPath, token: Token) -> Result<()> {
        let path = path.clone();
        self.work("claiming a disk", move |volume| {
            volume.check_ours()?;
            volume.require(&path)?;
            volume.check_token(&path, token)?;
            volume.set_record(
                &path,
                Record {
                    token,
                    finished: true,
                },
            )
        })
        .await
    }

    fn require(&self, path: &DiskPath) -> Result<()> {
        match self.disk_size(path)? {
            Some(_) => Ok(()),
            None => Err(VolumeError::NotFound {
                volume: self.name.clone(),
                path: path.clone(),
            }),
        }
    }

    pub(super) async fn verify_and_commit(&self, path: &DiskPath, token: Token) -> Result<()> {
        let path = path.clone();
        self.work("verifying a disk", move |volume| {
            volume.check_ours()?;
            volume.require(&path)?;
            match volume.check_token(&path, token)? {
                Some(Record {
                    token: present,
                    finished: true,
                }) if present == token => {}
                record => {
                    return Err(VolumeError::Verify(crate::fence::VerifyError::NotOurs {
                        path: path.to_string(),
                        token,
                        uid: volume.reference.broker_uid,
                        gid: record.map_or(0, |record| record.token.gid()),
                        mode: 0,
                    }));
                }
            }
            volume
                .open(path.as_str(), OFlag::O_RDWR)
                .and_then(|file| file.sync_all())
                .map_err(volume.failed("putting a disk on stable storage"))
        })
        .await
    }
}

fn file_mode(flags: OFlag) -> Mode {
    if flags.contains(OFlag::O_CREAT) {
        Mode::S_IRUSR | Mode::S_IWUSR
    } else {
        Mode::empty()
    }
}

fn read_small(file: &std::fs::File, bound: u64) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    if length > bound {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the file is too long",
        ));
    }
    let mut content = vec![0; length as usize];
    file.read_exact_at(&mut content, 0)?;
    Ok(content)
}

fn write_synced(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    io::Write::write_all(&mut file, content)?;
    file.sync_all()
}

fn sync_directory(path: &Path) -> io::Result<()> {
    std::fs::File::open(path)?.sync_all()
}
