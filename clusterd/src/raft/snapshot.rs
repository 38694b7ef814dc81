//! Snapshots: plain files that hold the whole state at one position of the log.
//!
//! ```text
//! magic "BATONSN1" | meta length u32 | meta JSON | state length u64 | state JSON | xxh3 u64
//! ```
//! A file is written beside the old one, synced, renamed, and only then does the old one go. The same
//! bytes travel to a node that is too far behind.

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::codec::{DecodeError, Reader};
use super::disk::StoreError;
use super::files::{FileAt, Files, OsFiles};
use super::machine::Machine;
use super::types::{LogId, SnapshotMeta};

/// The largest snapshot taken from a file or a peer, bytes: ten times what the largest cluster that this
/// is designed for needs.
pub(super) const SNAPSHOT_BYTES_MAX: u64 = 1 << 30;
const MAGIC: &[u8; 8] = b"BATONSN1";
const SUFFIX: &str = "snapshot";

/// A snapshot's file content; cloning it is cheap.
#[derive(Clone, Debug)]
pub(super) struct SnapshotData(pub Bytes);

/// What a snapshot says about itself.
#[derive(Serialize, Deserialize)]
struct Header {
    meta: SnapshotMeta,
    /// [`Machine::digest`] of the state: decoding gave back what was encoded.
    digest: u64,
}

/// Writes a state as a snapshot's file content.
pub(super) fn encode(
    meta: &SnapshotMeta,
    state: &impl Machine,
) -> Result<SnapshotData, DecodeError> {
    let json = |error: serde_json::Error| DecodeError::new("snapshot", error.to_string());
    let header = Header {
        meta: meta.clone(),
        digest: state.digest(),
    };
    let header = serde_json::to_vec(&header).map_err(json)?;
    let length = u32::try_from(header.len())
        .map_err(|_| DecodeError::new("snapshot", "its header is over 4 GiB"))?;
    let mut out = Vec::new();
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&header);
    let at = out.len();
    out.extend_from_slice(&[0; 8]);
    serde_json::to_writer(&mut out, state).map_err(json)?;
    let length = (out.len() - at - 8) as u64;
    out[at..at + 8].copy_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&xxh3_64(&out).to_le_bytes());
    Ok(SnapshotData(out.into()))
}

/// Checks a snapshot's bytes and reads what it says about itself, not the state.
fn open(data: &SnapshotData) -> Result<(Header, &[u8]), DecodeError> {
    let bad = |why: &str| DecodeError::new("snapshot", why);
    let Some((covered, checksum)) = data.0.split_last_chunk::<8>() else {
        return Err(bad("too short"));
    };
    if u64::from_le_bytes(*checksum) != xxh3_64(covered) {
        return Err(bad("its checksum is wrong"));
    }
    let mut reader = Reader::new("snapshot", covered);
    if reader.bytes(MAGIC.len())? != MAGIC {
        return Err(bad("it is not a snapshot"));
    }
    let length = reader.u32()? as usize;
    let header =
        serde_json::from_slice(reader.bytes(length)?).map_err(|error| bad(&error.to_string()))?;
    let length = usize::try_from(reader.u64()?).map_err(|_| bad("too long"))?;
    let state = reader.bytes(length)?;
    reader.end()?;
    Ok((header, state))
}

/// Reads the state back and checks that it is the one that was encoded.
pub(super) fn decode<M: Machine>(data: &SnapshotData) -> Result<(SnapshotMeta, M), DecodeError> {
    let (header, state) = open(data)?;
    let state: M = serde_json::from_slice(state)
        .map_err(|error| DecodeError::new("snapshot", error.to_string()))?;
    if state.digest() != header.digest {
        return Err(DecodeError::new(
            "snapshot",
            "the state read is not the state written",
        ));
    }
    Ok((header.meta, state))
}

/// What a snapshot says of itself, and its state.
type Decoded<M> = (SnapshotMeta, M);

/// A directory that holds the newest snapshot.
#[derive(Clone, Debug)]
pub(super) struct SnapshotDir<F = OsFiles> {
    files: F,
    dir: PathBuf,
}

impl<F: Files> SnapshotDir<F> {
    /// Opens `dir` and reads the newest whole snapshot in it, if any.
    pub(super) fn open<M: Machine>(
        files: F,
        dir: &Path,
    ) -> Result<(SnapshotDir<F>, Option<Decoded<M>>), StoreError> {
        let failed = |source| StoreError::Open {
            dir: dir.to_owned(),
            source,
        };
        files.make_dirs(dir).map_err(failed)?;
        // Who named what is here may have been killed before it was durable, and the log is cut by it.
        files.sync_dir(dir).map_err(failed)?;
        let this = SnapshotDir {
            files,
            dir: dir.to_owned(),
        };
        let mut newest: Option<Decoded<M>> = None;
        for path in this.snapshots().map_err(failed)? {
            let data = this.read(&path).map_err(failed)?;
            match decode::<M>(&data) {
                Ok((meta, state)) => {
                    if newest
                        .as_ref()
                        .is_none_or(|(best, _)| best.last_log_id < meta.last_log_id)
                    {
                        newest = Some((meta, state));
                    }
                }
                // Without it the log may still begin at its beginning; if not, opening the log says so.
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "a snapshot is damaged")
                }
            }
        }
        Ok((this, newest))
    }

    /// Writes a snapshot so that it survives a loss of power, then removes older ones.
    pub(super) fn write(&self, meta: &SnapshotMeta, data: &SnapshotData) -> io::Result<()> {
        let path = self.path(meta.last_log_id.as_ref());
        self.files.write_durably(&path, &data.0)?;
        for old in self.snapshots()? {
            // Never a newer one: a snapshot from a peer may have come while this one was built.
            if old < path {
                self.files.remove(&old)?;
            }
        }
        Ok(())
    }

    /// The newest snapshot's content.
    pub(super) fn newest(&self) -> io::Result<Option<(SnapshotMeta, SnapshotData)>> {
        let mut newest: Option<(SnapshotMeta, SnapshotData)> = None;
        for path in self.snapshots()? {
            let data = self.read(&path)?;
            match open(&data).map(|(header, _)| header.meta) {
                Ok(meta)
                    if newest
                        .as_ref()
                        .is_none_or(|(best, _)| best.last_log_id < meta.last_log_id) =>
                {
                    newest = Some((meta, data));
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "a snapshot is damaged")
                }
            }
        }
        Ok(newest)
    }

    fn path(&self, last: Option<&LogId>) -> PathBuf {
        let index = last.map_or(0, |last| last.index);
        self.dir.join(format!("{index:020}.{SUFFIX}"))
    }

    fn snapshots(&self) -> io::Result<Vec<PathBuf>> {
        let mut paths = self.files.list(&self.dir)?;
        paths.retain(|path| {
            path.extension()
                .is_some_and(|extension| extension == SUFFIX)
        });
        Ok(paths)
    }

    fn read(&self, path: &Path) -> io::Result<SnapshotData> {
        let file = self.files.open(path)?;
        let length = file.length()?;
        if length > SNAPSHOT_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{} has {length} bytes, over {SNAPSHOT_BYTES_MAX}",
                    path.display()
                ),
            ));
        }
        let mut content = vec![0; length as usize];
        file.read_exact_at(&mut content, 0)?;
        Ok(SnapshotData(content.into()))
    }
}
