//! The exported directory: which file a handle means, and names made, moved and removed.
//!
//! Files are ordinary files under the root. What a client sees as owner, group and mode is kept in
//! the journal; on the disk everything belongs to the server's own user. A new file is made under a
//! temporary name, its record is made durable, and only then it gets its name, in one step: nobody
//! ever finds a file whose owner is not decided. Symbolic links and devices are not shown.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use nfs3_types::nfs3::{self, ftype3, nfsstat3};
use nix::fcntl::{Flock, FlockArg};

mod names;
mod tree;

pub(super) use names::{Existing, Listed};

use super::convert::{nanoseconds, status_of, wire_time};
use super::files::{Node, OpenFiles};
use super::journal::{self, Contents, Journal, JournalError, Record};
use super::permission::Attributes;
use tree::{Tree, known, scan, unknown};

/// Where the server keeps its own files, inside the root. Clients cannot see it.
pub(super) const OWN_DIRECTORY: &str = ".baton-nfs";

/// The longest name of a file, in bytes.
pub(super) const NAME_BYTES_MAX: usize = 255;

/// The mode of the root when nothing is known of it: anybody may make entries, only owners remove theirs.
const ROOT_MODE: u32 = 0o1777;

/// The length of every handle.
pub(super) const HANDLE_BYTES: usize = 32;

/// Why a directory cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The file system refused.
    #[error("cannot serve {path}: {source}; is it a directory that this user may read and write?")]
    Io {
        /// What could not be read or written.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// Two servers would each keep gates of their own, and the fence would leak.
    #[error("{path} is already served by another server; stop that one first")]
    InUse {
        /// The exported directory.
        path: PathBuf,
    },
    /// The record of owners, groups and modes.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// An exported directory and everything kept about it.
#[derive(Debug)]
pub(super) struct Export {
    read_only: bool,
    root: PathBuf,
    root_inode: u64,
    id: u128,
    tree: RwLock<Tree>,
    pub(super) journal: Journal,
    pub(super) open_files: OpenFiles,
    /// Another value tells clients that data not committed may be lost.
    verifier: AtomicU64,
    // Held until everything else is closed; the kernel lets go of it when the process dies.
    _lock: Flock<File>,
}

impl Export {
    /// Takes a directory into service.
    pub(super) fn open(root: &Path, read_only: bool) -> Result<Export, ExportError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| ExportError::Io { path, source }
        };
        let root = root.canonicalize().map_err(at(root))?;
        let own = root.join(OWN_DIRECTORY);
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&own)
            .map_err(at(&own))?;
        let lock_path = own.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(at(&lock_path))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|_| ExportError::InUse { path: root.clone() })?;
        remove_temporary_files(&own).map_err(at(&own))?;

        let Contents {
            export_id,
            mut records,
            written,
        } = journal::read(&own)?;
        let metadata = std::fs::symlink_metadata(&root).map_err(at(&root))?;
        let mut tree = Tree::default();
        let root_record = known(&mut records, &metadata).unwrap_or_else(|| {
            let record = unknown(&metadata);
            Record {
                attributes: Attributes {
                    mode: ROOT_MODE,
                    ..record.attributes
                },
                ..record
            }
        });
        let root_inode = metadata.ino();
        tree.add(root_record, true, root_inode, Default::default());
        scan(&root, root_inode, &mut tree, &mut records).map_err(at(&root))?;
        let records = tree
            .nodes
            .values()
            .map(|place| (place.node.identity.inode, place.node.record()));
        let contents = Contents {
            export_id,
            records: records.collect(),
            written,
        };
        let journal = Journal::begin(&own, contents)?;
        Ok(Export {
            read_only,
            root,
            root_inode,
            id: export_id,
            tree: RwLock::new(tree),
            journal,
            open_files: OpenFiles::default(),
            verifier: AtomicU64::new(rand::random()),
            _lock: lock,
        })
    }

    /// The root directory.
    pub(super) fn root(&self) -> Result<Arc<Node>, nfsstat3> {
        self.node_of(self.root_inode)
    }

    /// The exported directory on this host.
    pub(super) fn root_path(&self) -> &Path {
        &self.root
    }

    /// The file system id that clients see.
    pub(super) fn filesystem_id(&self) -> u64 {
        self.id as u64
    }

    /// The write verifier: another one after every start, and after every failed sync.
    pub(super) fn verifier(&self) -> [u8; 8] {
        self.verifier.load(Ordering::SeqCst).to_be_bytes()
    }

    /// Tells clients that data they have not committed may be lost.
    pub(super) fn renew_verifier(&self) {
        self.verifier.store(rand::random(), Ordering::SeqCst);
    }

    /// The handle of a file: which export, which inode, and which of the files that had that inode.
    pub(super) fn handle(&self, node: &Node) -> [u8; HANDLE_BYTES] {
        let mut handle = [0; HANDLE_BYTES];
        handle[..16].copy_from_slice(&self.id.to_le_bytes());
        handle[16..24].copy_from_slice(&node.identity.inode.to_le_bytes());
        handle[24..].copy_from_slice(&node.generation.to_le_bytes());
        handle
    }

    /// The file that a handle means.
    pub(super) fn resolve(&self, handle: &[u8]) -> Result<Arc<Node>, nfsstat3> {
        let handle: &[u8; HANDLE_BYTES] =
            handle.try_into().map_err(|_| nfsstat3::NFS3ERR_BADHANDLE)?;
        let (id, rest) = handle.split_at(16);
        let (inode, generation) = rest.split_at(8);
        if id != self.id.to_le_bytes() {
            return Err(nfsstat3::NFS3ERR_STALE);
        }
        let inode = u64::from_le_bytes(inode.try_into().map_err(|_| nfsstat3::NFS3ERR_BADHANDLE)?);
        let node = self.node_of(inode)?;
        let same = generation == node.generation.to_le_bytes();
        if same {
            Ok(node)
        } else {
            Err(nfsstat3::NFS3ERR_STALE)
        }
    }

    fn node_of(&self, inode: u64) -> Result<Arc<Node>, nfsstat3> {
        let tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
        let place = tree.nodes.get(&inode).ok_or(nfsstat3::NFS3ERR_STALE)?;
        Ok(place.node.clone())
    }

    /// Refuses every change of a read-only export.
    pub(super) fn demand_writable(&self) -> Result<(), nfsstat3> {
        if self.read_only {
            return Err(nfsstat3::NFS3ERR_ROFS);
        }
        Ok(())
    }

    /// Where a file lies on this host, for as long as `use_path` runs.
    pub(super) fn at_path<T>(
        &self,
        node: &Node,
        use_path: impl FnOnce(&Path) -> io::Result<T>,
    ) -> Result<T, nfsstat3> {
        let tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
        let path = tree.path(&self.root, self.root_inode, node)?;
        use_path(&path).map_err(|error| status_of(&error))
    }

    /// What the file system says of a file.
    pub(super) fn metadata(&self, node: &Node) -> Result<Metadata, nfsstat3> {
        match node.opened() {
            Some(file) => file.metadata().map_err(|error| status_of(&error)),
            None => self.at_path(node, |path| std::fs::symlink_metadata(path)),
        }
    }

    /// A file's attributes as they go on the wire.
    pub(super) fn wire_attributes(&self, node: &Node) -> Result<nfs3::fattr3, nfsstat3> {
        self.metadata(node)
            .map(|metadata| self.wire(node, &metadata))
    }

    /// A file's attributes as they go on the wire, given what the file system says.
    pub(super) fn wire(&self, node: &Node, metadata: &Metadata) -> nfs3::fattr3 {
        let kept = node.attributes();
        let changed = nanoseconds(metadata.ctime(), metadata.ctime_nsec()).max(kept.changed_ns);
        nfs3::fattr3 {
            type_: if node.is_directory {
                ftype3::NF3DIR
            } else {
                ftype3::NF3REG
            },
            mode: kept.mode,
            nlink: u32::try_from(metadata.nlink()).unwrap_or(u32::MAX),
            uid: kept.uid,
            gid: kept.gid,
            size: metadata.size(),
            used: metadata.blocks().saturating_mul(512),
            rdev: nfs3::specdata3::default(),
            fsid: self.filesystem_id(),
            fileid: node.identity.inode,
            atime: wire_time(nanoseconds(metadata.atime(), metadata.atime_nsec())),
            mtime: wire_time(nanoseconds(metadata.mtime(), metadata.mtime_nsec())),
            ctime: wire_time(changed),
        }
    }

    /// The directory that a directory lies in; the root lies in itself.
    pub(super) fn parent(&self, directory: &Node) -> Result<Arc<Node>, nfsstat3> {
        let parent = {
            let tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
            tree.nodes
                .get(&directory.identity.inode)
                .ok_or(nfsstat3::NFS3ERR_STALE)?
                .parent
        };
        self.node_of(parent)
    }
}

fn remove_temporary_files(own: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(own)? {
        let entry = entry?;
        if entry.file_name().as_bytes().starts_with(b"new-") {
            std::fs::remove_file(entry.path()).or_else(|_| std::fs::remove_dir(entry.path()))?;
        }
    }
    Ok(())
}
