//! The exported directory: which file a handle means, and names made, moved and removed.
//!
//! Files are ordinary files under the root. What a client sees as owner, group and mode is kept in
//! the journal; on the disk everything belongs to the server's own user. A new file is made under a
//! temporary name, its record is made durable, and only then it gets its name, in one step: nobody
//! ever finds a file whose owner is not decided. Symbolic links and devices are not shown.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use nfs3_types::nfs3::{self, ftype3, nfsstat3, nfstime3};
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2};

use super::files::{Node, OpenFiles};
use super::journal::{self, Contents, Identity, Journal, JournalError, Record};
use super::permission::{Attributes, Caller, Change, READ, SEARCH, WRITE, initial};

/// Where the server keeps its own files, inside the root. Clients cannot see it.
pub(super) const OWN_DIRECTORY: &str = ".baton-nfs";

/// The longest name of a file, in bytes.
pub(super) const NAME_BYTES_MAX: usize = 255;

/// How deep directories may lie in each other: bounds the walk from a handle to the root.
const DEPTH_MAX: usize = 64;

/// Files and directories served at most: each takes some hundred bytes of memory.
const NODES_MAX: usize = 1 << 20;

/// The mode of the root when nothing is known of it: anybody may make entries, only owners remove theirs.
const ROOT_MODE: u32 = 0o1777;

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

/// The names known, and what they stand for.
#[derive(Debug, Default)]
struct Tree {
    nodes: HashMap<u64, Place>,
}

#[derive(Debug)]
struct Place {
    node: Arc<Node>,
    /// Inode of the directory it lies in; the root's is its own.
    parent: u64,
    name: OsString,
}

/// An exported directory and everything kept about it.
#[derive(Debug)]
pub(super) struct Export {
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

/// One entry of a directory.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) name: OsString,
    pub(super) node: Arc<Node>,
    pub(super) metadata: Metadata,
}

/// How CREATE treats a name that is taken (RFC 1813, section 3.3.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Existing {
    /// It is the result.
    Take,
    /// It is an error.
    Refuse,
    /// It is the result if it was made with this verifier.
    TakeIfMadeWith(u64),
}

impl Export {
    /// Takes a directory into service.
    pub(super) fn open(root: &Path) -> Result<Export, ExportError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| ExportError::Io { path, source }
        };
        let root = root.canonicalize().map_err(at(root))?;
        let own = root.join(OWN_DIRECTORY);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&own).map_err(at(&own))?;
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

        let Contents { export_id, mut records } = journal::read(&own)?;
        let metadata = std::fs::symlink_metadata(&root).map_err(at(&root))?;
        let mut tree = Tree::default();
        let root_record = known(&mut records, &metadata).unwrap_or_else(|| {
            let record = unknown(&metadata);
            Record { attributes: Attributes { mode: ROOT_MODE, ..record.attributes }, ..record }
        });
        let root_inode = metadata.ino();
        tree.add(root_record, true, root_inode, OsString::new());
        scan(&root, root_inode, &mut tree, &mut records).map_err(at(&root))?;
        let records =
            tree.nodes.values().map(|place| (place.node.identity.inode, place.node.record()));
        let contents = Contents { export_id, records: records.collect() };
        let journal = Journal::begin(&own, contents)?;
        Ok(Export {
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
        if same { Ok(node) } else { Err(nfsstat3::NFS3ERR_STALE) }
    }

    fn node_of(&self, inode: u64) -> Result<Arc<Node>, nfsstat3> {
        let tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
        let place = tree.nodes.get(&inode).ok_or(nfsstat3::NFS3ERR_STALE)?;
        Ok(place.node.clone())
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
        self.metadata(node).map(|metadata| self.wire(node, &metadata))
    }

    /// A file's attributes as they go on the wire, given what the file system says.
    pub(super) fn wire(&self, node: &Node, metadata: &Metadata) -> nfs3::fattr3 {
        let kept = node.attributes();
        let changed = nanoseconds(metadata.ctime(), metadata.ctime_nsec()).max(kept.changed_ns);
        nfs3::fattr3 {
            type_: if node.is_directory { ftype3::NF3DIR } else { ftype3::NF3REG },
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

    /// The entry of a directory with a name.
    pub(super) fn lookup(
        &self,
        directory: &Node,
        caller: &Caller,
        name: &[u8],
    ) -> Result<Arc<Node>, nfsstat3> {
        demand_directory(directory)?;
        directory.attributes().demand(caller, SEARCH)?;
        match name {
            b"." => return self.node_of(directory.identity.inode),
            b".." => return self.parent(directory),
            _ => {}
        }
        let name = self.entry_name(directory, name)?;
        self.find(directory, name).map(|(node, _)| node)
    }

    /// The directory that a directory lies in; the root lies in itself.
    pub(super) fn parent(&self, directory: &Node) -> Result<Arc<Node>, nfsstat3> {
        let parent = {
            let tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
            tree.nodes.get(&directory.identity.inode).ok_or(nfsstat3::NFS3ERR_STALE)?.parent
        };
        self.node_of(parent)
    }

    /// A name as clients may use it.
    fn entry_name<'a>(&self, directory: &Node, name: &'a [u8]) -> Result<&'a OsStr, nfsstat3> {
        if name.len() > NAME_BYTES_MAX {
            return Err(nfsstat3::NFS3ERR_NAMETOOLONG);
        }
        let invalid = matches!(name, b"" | b"." | b"..") || name.iter().any(|b| matches!(b, 0 | b'/'));
        if invalid {
            return Err(nfsstat3::NFS3ERR_INVAL);
        }
        if directory.identity.inode == self.root_inode && name == OWN_DIRECTORY.as_bytes() {
            return Err(nfsstat3::NFS3ERR_ACCES);
        }
        Ok(OsStr::from_bytes(name))
    }

    fn find(&self, directory: &Node, name: &OsStr) -> Result<(Arc<Node>, Metadata), nfsstat3> {
        let metadata =
            self.at_path(directory, |path| std::fs::symlink_metadata(path.join(name)))?;
        if !metadata.is_file() && !metadata.is_dir() {
            return Err(nfsstat3::NFS3ERR_NOENT);
        }
        let node = self.register(directory, name, &metadata)?;
        Ok((node, metadata))
    }

    /// The node of an entry just seen on the disk, which may have come there behind our back.
    fn register(
        &self,
        directory: &Node,
        name: &OsStr,
        metadata: &Metadata,
    ) -> Result<Arc<Node>, nfsstat3> {
        let identity = identity(metadata);
        let parent = directory.identity.inode;
        {
            let tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(place) = tree.nodes.get(&identity.inode)
                && place.node.identity == identity
                && place.parent == parent
                && place.name == name
            {
                return Ok(place.node.clone());
            }
        }
        let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
        // It may have gone, or been moved by a call, since it was seen.
        let path = tree.path(&self.root, self.root_inode, directory)?.join(name);
        let seen = std::fs::symlink_metadata(path).map_err(|error| status_of(&error))?;
        if self::identity(&seen) != identity {
            return Err(nfsstat3::NFS3ERR_STALE);
        }
        if let Some(place) = tree.nodes.get_mut(&identity.inode)
            && place.node.identity == identity
        {
            place.parent = parent;
            place.name = name.to_owned();
            return Ok(place.node.clone());
        }
        if tree.nodes.len() >= NODES_MAX {
            return Err(nfsstat3::NFS3ERR_SERVERFAULT);
        }
        let record = unknown(metadata);
        self.journal.put(record).map_err(|error| status_of(&error))?;
        Ok(tree.add(record, metadata.is_dir(), parent, name.to_owned()))
    }

    /// What lies in a directory, in the order of inodes, which is the order of READDIR's cookies.
    pub(super) fn list(&self, directory: &Node, caller: &Caller) -> Result<Vec<Listed>, nfsstat3> {
        demand_directory(directory)?;
        directory.attributes().demand(caller, READ)?;
        let names: Vec<OsString> = self.at_path(directory, |path| {
            std::fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.file_name())).collect()
        })?;
        let mut listed = Vec::with_capacity(names.len());
        for name in names {
            if self.entry_name(directory, name.as_bytes()).is_err() {
                continue;
            }
            match self.find(directory, &name) {
                Ok((node, metadata)) => listed.push(Listed { name, node, metadata }),
                // Gone since the directory was read, or nothing that is shown.
                Err(nfsstat3::NFS3ERR_NOENT | nfsstat3::NFS3ERR_STALE) => {}
                Err(status) => return Err(status),
            }
        }
        listed.sort_by_key(|entry| entry.node.identity.inode);
        Ok(listed)
    }

    /// CREATE: the file, and whether it is new.
    pub(super) fn create(
        &self,
        directory: &Node,
        caller: &Caller,
        name: &[u8],
        wanted: &Change,
        existing: Existing,
    ) -> Result<(Arc<Node>, bool), nfsstat3> {
        let name = self.new_name(directory, caller, name)?;
        if let Some(found) = self.taken(directory, name, existing)? {
            return Ok((found, false));
        }
        let attributes =
            initial(&directory.attributes(), caller, wanted, 0o600, now_ns())?;
        let verifier = match existing {
            Existing::TakeIfMadeWith(verifier) => verifier,
            Existing::Take | Existing::Refuse => 0,
        };
        let make = |temporary: &Path| {
            let file =
                OpenOptions::new().create_new(true).write(true).mode(0o600).open(temporary)?;
            if let Some(size) = wanted.size {
                file.set_len(size)?;
            }
            file.sync_all()?;
            file.metadata()
        };
        match self.make(directory, name, attributes, verifier, make) {
            Ok(node) => Ok((node, true)),
            // Another call was faster.
            Err(nfsstat3::NFS3ERR_EXIST) => match self.taken(directory, name, existing)? {
                Some(found) => Ok((found, false)),
                None => Err(nfsstat3::NFS3ERR_JUKEBOX),
            },
            Err(status) => Err(status),
        }
    }

    /// What CREATE does about a name that is taken; `None` if it is free.
    fn taken(
        &self,
        directory: &Node,
        name: &OsStr,
        existing: Existing,
    ) -> Result<Option<Arc<Node>>, nfsstat3> {
        let node = match self.find(directory, name) {
            Ok((node, _)) => node,
            Err(nfsstat3::NFS3ERR_NOENT) => return Ok(None),
            Err(status) => return Err(status),
        };
        let fits = match existing {
            Existing::Take => !node.is_directory,
            Existing::Refuse => false,
            Existing::TakeIfMadeWith(verifier) => node.create_verifier == verifier,
        };
        if fits { Ok(Some(node)) } else { Err(nfsstat3::NFS3ERR_EXIST) }
    }

    /// MKDIR.
    pub(super) fn make_directory(
        &self,
        directory: &Node,
        caller: &Caller,
        name: &[u8],
        wanted: &Change,
    ) -> Result<Arc<Node>, nfsstat3> {
        let name = self.new_name(directory, caller, name)?;
        self.demand_depth(directory)?;
        let attributes = initial(&directory.attributes(), caller, wanted, 0o700, now_ns())?;
        self.make(directory, name, attributes, 0, |temporary| {
            std::fs::DirBuilder::new().mode(0o700).create(temporary)?;
            std::fs::symlink_metadata(temporary)
        })
    }

    fn new_name<'a>(
        &self,
        directory: &Node,
        caller: &Caller,
        name: &'a [u8],
    ) -> Result<&'a OsStr, nfsstat3> {
        demand_directory(directory)?;
        let name = self.entry_name(directory, name)?;
        directory.attributes().demand(caller, WRITE | SEARCH)?;
        Ok(name)
    }

    /// Makes something under a temporary name, records whose it is, and gives it its name.
    fn make(
        &self,
        directory: &Node,
        name: &OsStr,
        attributes: Attributes,
        create_verifier: u64,
        make: impl FnOnce(&Path) -> io::Result<Metadata>,
    ) -> Result<Arc<Node>, nfsstat3> {
        let temporary =
            self.root.join(OWN_DIRECTORY).join(format!("new-{:016x}", rand::random::<u64>()));
        let result = self.make_named(directory, name, attributes, create_verifier, &temporary, make);
        if result.is_err() {
            let _ = std::fs::remove_file(&temporary).or_else(|_| std::fs::remove_dir(&temporary));
        }
        result
    }

    fn make_named(
        &self,
        directory: &Node,
        name: &OsStr,
        attributes: Attributes,
        create_verifier: u64,
        temporary: &Path,
        make: impl FnOnce(&Path) -> io::Result<Metadata>,
    ) -> Result<Arc<Node>, nfsstat3> {
        let metadata = make(temporary).map_err(|error| status_of(&error))?;
        let identity = identity(&metadata);
        let record =
            Record { identity, generation: rand::random(), attributes, create_verifier };
        self.journal.put(record).map_err(|error| status_of(&error))?;
        let (node, path) = {
            let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
            if tree.nodes.len() >= NODES_MAX {
                return Err(nfsstat3::NFS3ERR_NOSPC);
            }
            let path = tree.path(&self.root, self.root_inode, directory)?;
            rename_to_free_name(temporary, &path.join(name)).map_err(|error| {
                self.journal.forget(identity);
                status_of(&error)
            })?;
            let parent = directory.identity.inode;
            (tree.add(record, metadata.is_dir(), parent, name.to_owned()), path)
        };
        sync_directory(&path)?;
        Ok(node)
    }

    /// REMOVE and RMDIR.
    pub(super) fn remove(
        &self,
        directory: &Node,
        caller: &Caller,
        name: &[u8],
        is_directory: bool,
    ) -> Result<(), nfsstat3> {
        demand_directory(directory)?;
        let name = self.entry_name(directory, name)?;
        directory.attributes().demand(caller, SEARCH)?;
        let (node, _) = self.find(directory, name)?;
        directory.attributes().demand_removal(caller, node.attributes().uid)?;
        match (node.is_directory, is_directory) {
            (true, false) => return Err(nfsstat3::NFS3ERR_ISDIR),
            (false, true) => return Err(nfsstat3::NFS3ERR_NOTDIR),
            _ => {}
        }
        let path = {
            let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
            tree.demand_at(&node, directory, name)?;
            let path = tree.path(&self.root, self.root_inode, directory)?;
            let entry = path.join(name);
            let removed = if is_directory {
                std::fs::remove_dir(entry)
            } else {
                std::fs::remove_file(entry)
            };
            removed.map_err(|error| status_of(&error))?;
            self.drop_node(&mut tree, &node);
            path
        };
        sync_directory(&path)
    }

    fn drop_node(&self, tree: &mut Tree, node: &Node) {
        tree.nodes.remove(&node.identity.inode);
        node.close();
        self.journal.forget(node.identity);
    }

    /// RENAME: an existing target of the same kind is replaced in the same step.
    pub(super) fn rename(
        &self,
        caller: &Caller,
        (from_directory, from): (&Node, &[u8]),
        (to_directory, to): (&Node, &[u8]),
    ) -> Result<(), nfsstat3> {
        demand_directory(from_directory)?;
        let from = self.entry_name(from_directory, from)?;
        let to = self.new_name(to_directory, caller, to)?;
        from_directory.attributes().demand(caller, SEARCH)?;
        let (node, _) = self.find(from_directory, from)?;
        from_directory.attributes().demand_removal(caller, node.attributes().uid)?;
        let replaced = match self.find(to_directory, to) {
            Ok((replaced, _)) => Some(replaced),
            Err(nfsstat3::NFS3ERR_NOENT) => None,
            Err(status) => return Err(status),
        };
        if let Some(replaced) = &replaced {
            if replaced.identity == node.identity {
                return Ok(());
            }
            to_directory.attributes().demand_removal(caller, replaced.attributes().uid)?;
        }
        let (from_path, to_path) = {
            let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
            tree.demand_at(&node, from_directory, from)?;
            let from_path = tree.path(&self.root, self.root_inode, from_directory)?;
            let to_path = tree.path(&self.root, self.root_inode, to_directory)?;
            if node.is_directory && tree.depth(self.root_inode, to_directory)? + 1 >= DEPTH_MAX {
                return Err(nfsstat3::NFS3ERR_NAMETOOLONG);
            }
            match &replaced {
                Some(replaced) => {
                    tree.demand_at(replaced, to_directory, to)?;
                    std::fs::rename(from_path.join(from), to_path.join(to))
                }
                None => rename_to_free_name(&from_path.join(from), &to_path.join(to)),
            }
            .map_err(|error| status_of(&error))?;
            if let Some(replaced) = &replaced {
                self.drop_node(&mut tree, replaced);
            }
            if let Some(place) = tree.nodes.get_mut(&node.identity.inode) {
                place.parent = to_directory.identity.inode;
                place.name = to.to_owned();
            }
            (from_path, to_path)
        };
        sync_directory(&to_path)?;
        if from_path != to_path { sync_directory(&from_path) } else { Ok(()) }
    }

    fn demand_depth(&self, directory: &Node) -> Result<(), nfsstat3> {
        let tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
        let depth = tree.depth(self.root_inode, directory)?;
        if depth + 1 < DEPTH_MAX { Ok(()) } else { Err(nfsstat3::NFS3ERR_NAMETOOLONG) }
    }
}

impl Tree {
    fn add(&mut self, record: Record, is_directory: bool, parent: u64, name: OsString) -> Arc<Node> {
        let node = Arc::new(Node::new(record, is_directory));
        let place = Place { node: node.clone(), parent, name };
        if let Some(former) = self.nodes.insert(record.identity.inode, place) {
            former.node.close();
        }
        node
    }

    /// The names from the root to a file.
    fn names(&self, root_inode: u64, node: &Node) -> Result<Vec<&OsStr>, nfsstat3> {
        let mut names = Vec::new();
        let mut inode = node.identity.inode;
        if self.nodes.get(&inode).is_none_or(|place| place.node.generation != node.generation) {
            return Err(nfsstat3::NFS3ERR_STALE);
        }
        while inode != root_inode {
            let place = self.nodes.get(&inode).ok_or(nfsstat3::NFS3ERR_STALE)?;
            names.push(place.name.as_os_str());
            inode = place.parent;
            if names.len() > DEPTH_MAX {
                return Err(nfsstat3::NFS3ERR_SERVERFAULT);
            }
        }
        Ok(names)
    }

    fn path(&self, root: &Path, root_inode: u64, node: &Node) -> Result<PathBuf, nfsstat3> {
        let mut path = root.to_owned();
        path.extend(self.names(root_inode, node)?.into_iter().rev());
        Ok(path)
    }

    fn depth(&self, root_inode: u64, node: &Node) -> Result<usize, nfsstat3> {
        self.names(root_inode, node).map(|names| names.len())
    }

    /// That a file found a moment ago still has that name.
    fn demand_at(&self, node: &Node, directory: &Node, name: &OsStr) -> Result<(), nfsstat3> {
        let place = self.nodes.get(&node.identity.inode);
        let same = place.is_some_and(|place| {
            place.node.generation == node.generation
                && place.parent == directory.identity.inode
                && place.name == name
        });
        if same { Ok(()) } else { Err(nfsstat3::NFS3ERR_NOENT) }
    }
}

/// Takes in what lies below a directory; records that fit no file are left behind.
fn scan(
    directory: &Path,
    directory_inode: u64,
    tree: &mut Tree,
    records: &mut HashMap<u64, Record>,
) -> io::Result<()> {
    let mut pending = vec![(directory.to_owned(), directory_inode, 0)];
    while let Some((directory, directory_inode, depth)) = pending.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            let metadata = std::fs::symlink_metadata(entry.path())?;
            let own = depth == 0 && entry.file_name() == OWN_DIRECTORY;
            if own || !metadata.is_file() && !metadata.is_dir() {
                continue;
            }
            if depth + 1 >= DEPTH_MAX || tree.nodes.len() >= NODES_MAX {
                return Err(io::Error::other(format!(
                    "more than {NODES_MAX} files, or directories more than {DEPTH_MAX} deep"
                )));
            }
            let record = known(records, &metadata).unwrap_or_else(|| unknown(&metadata));
            tree.add(record, metadata.is_dir(), directory_inode, entry.file_name());
            if metadata.is_dir() {
                pending.push((entry.path(), metadata.ino(), depth + 1));
            }
        }
    }
    Ok(())
}

/// What the journal says of a file, if it means this one.
fn known(records: &mut HashMap<u64, Record>, metadata: &Metadata) -> Option<Record> {
    let identity = identity(metadata);
    records.remove(&identity.inode).filter(|record| record.identity == identity)
}

/// The record of a file that came there behind our back: it is whose the disk says it is.
fn unknown(metadata: &Metadata) -> Record {
    Record {
        identity: identity(metadata),
        generation: rand::random(),
        attributes: Attributes {
            uid: metadata.uid(),
            gid: metadata.gid(),
            mode: metadata.mode() & 0o7777,
            changed_ns: now_ns(),
        },
        create_verifier: 0,
    }
}

fn identity(metadata: &Metadata) -> Identity {
    let born = metadata.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
    Identity {
        inode: metadata.ino(),
        born_ns: born.map_or(0, |born| u64::try_from(born.as_nanos()).unwrap_or(0)),
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

fn rename_to_free_name(from: &Path, to: &Path) -> io::Result<()> {
    renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE).map_err(io::Error::from)
}

fn sync_directory(path: &Path) -> Result<(), nfsstat3> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(|error| status_of(&error))
}

fn demand_directory(node: &Node) -> Result<(), nfsstat3> {
    if node.is_directory { Ok(()) } else { Err(nfsstat3::NFS3ERR_NOTDIR) }
}

/// Now, in nanoseconds since 1970.
pub(super) fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX - 1)
}

/// A time of the file system in nanoseconds since 1970; times before that are 1970.
pub(super) fn nanoseconds(seconds: i64, nanoseconds: i64) -> u64 {
    let seconds = u64::try_from(seconds).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(nanoseconds).unwrap_or(0))
}

/// A time as it goes on the wire.
pub(super) fn wire_time(ns: u64) -> nfstime3 {
    nfstime3 {
        seconds: u32::try_from(ns / 1_000_000_000).unwrap_or(u32::MAX),
        nseconds: (ns % 1_000_000_000) as u32,
    }
}

/// The status for what the file system under us said.
pub(super) fn status_of(error: &io::Error) -> nfsstat3 {
    use nix::errno::Errno;
    match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
        Errno::EPERM | Errno::EACCES | Errno::EBADF => nfsstat3::NFS3ERR_ACCES,
        Errno::ENOENT => nfsstat3::NFS3ERR_NOENT,
        Errno::EEXIST => nfsstat3::NFS3ERR_EXIST,
        Errno::EXDEV => nfsstat3::NFS3ERR_XDEV,
        Errno::ENOTDIR => nfsstat3::NFS3ERR_NOTDIR,
        Errno::EISDIR => nfsstat3::NFS3ERR_ISDIR,
        Errno::EINVAL => nfsstat3::NFS3ERR_INVAL,
        Errno::EFBIG => nfsstat3::NFS3ERR_FBIG,
        Errno::ENOSPC => nfsstat3::NFS3ERR_NOSPC,
        Errno::EROFS => nfsstat3::NFS3ERR_ROFS,
        Errno::EMLINK => nfsstat3::NFS3ERR_MLINK,
        Errno::ENAMETOOLONG => nfsstat3::NFS3ERR_NAMETOOLONG,
        Errno::ENOTEMPTY => nfsstat3::NFS3ERR_NOTEMPTY,
        Errno::EDQUOT => nfsstat3::NFS3ERR_DQUOT,
        Errno::ESTALE => nfsstat3::NFS3ERR_STALE,
        Errno::EMFILE | Errno::ENFILE => nfsstat3::NFS3ERR_JUKEBOX,
        _ => nfsstat3::NFS3ERR_IO,
    }
}
