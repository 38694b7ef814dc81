//! Names: found, listed, made, moved and removed, each durable when it is answered.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, PoisonError};

use nfs3_types::nfs3::nfsstat3;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::super::convert::{now_ns, status_of};
use super::super::files::Node;
use super::super::journal::Record;
use super::super::permission::{Attributes, Caller, Change, READ, SEARCH, WRITE, initial};
use super::tree::{DEPTH_MAX, NODES_MAX, Tree, identity, unknown};
use super::{Export, NAME_BYTES_MAX, OWN_DIRECTORY};

/// One entry of a directory.
#[derive(Debug)]
pub(in crate::nfs_server) struct Listed {
    pub(in crate::nfs_server) name: OsString,
    pub(in crate::nfs_server) node: Arc<Node>,
    pub(in crate::nfs_server) metadata: Metadata,
}

/// How CREATE treats a name that is taken (RFC 1813, section 3.3.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nfs_server) enum Existing {
    /// It is the result.
    Take,
    /// It is an error.
    Refuse,
    /// It is the result if it was made with this verifier.
    TakeIfMadeWith(u64),
}

impl Export {
    /// The entry of a directory with a name.
    pub(in crate::nfs_server) fn lookup(
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

    /// A name as clients may use it.
    fn entry_name<'a>(&self, directory: &Node, name: &'a [u8]) -> Result<&'a OsStr, nfsstat3> {
        if name.len() > NAME_BYTES_MAX {
            return Err(nfsstat3::NFS3ERR_NAMETOOLONG);
        }
        let invalid =
            matches!(name, b"" | b"." | b"..") || name.iter().any(|b| matches!(b, 0 | b'/'));
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
        let path = tree
            .path(&self.root, self.root_inode, directory)?
            .join(name);
        let seen = std::fs::symlink_metadata(path).map_err(|error| status_of(&error))?;
        if super::tree::identity(&seen) != identity {
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
        self.journal
            .put(record)
            .map_err(|error| status_of(&error))?;
        Ok(tree.add(record, metadata.is_dir(), parent, name.to_owned()))
    }

    /// What lies in a directory, in the order of inodes, which is the order of READDIR's cookies.
    pub(in crate::nfs_server) fn list(
        &self,
        directory: &Node,
        caller: &Caller,
    ) -> Result<Vec<Listed>, nfsstat3> {
        demand_directory(directory)?;
        directory.attributes().demand(caller, READ)?;
        let names: Vec<OsString> = self.at_path(directory, |path| {
            std::fs::read_dir(path)?
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect()
        })?;
        let mut listed = Vec::with_capacity(names.len());
        for name in names {
            if self.entry_name(directory, name.as_bytes()).is_err() {
                continue;
            }
            match self.find(directory, &name) {
                Ok((node, metadata)) => listed.push(Listed {
                    name,
                    node,
                    metadata,
                }),
                // Gone since the directory was read, or nothing that is shown.
                Err(nfsstat3::NFS3ERR_NOENT | nfsstat3::NFS3ERR_STALE) => {}
                Err(status) => return Err(status),
            }
        }
        listed.sort_by_key(|entry| entry.node.identity.inode);
        Ok(listed)
    }

    /// CREATE: the file, and whether it is new.
    pub(in crate::nfs_server) fn create(
        &self,
        directory: &Node,
        caller: &Caller,
        name: &[u8],
        wanted: &Change,
        existing: Existing,
    ) -> Result<(Arc<Node>, bool), nfsstat3> {
        self.demand_writable()?;
        let name = self.new_name(directory, caller, name)?;
        if let Some(found) = self.taken(directory, name, existing)? {
            return Ok((found, false));
        }
        let attributes = initial(&directory.attributes(), caller, wanted, 0o600, now_ns())?;
        let verifier = match existing {
            Existing::TakeIfMadeWith(verifier) => verifier,
            Existing::Take | Existing::Refuse => 0,
        };
        let make = |temporary: &Path| {
            let file = OpenOptions::new()
                .create_new(true)
                .write(true)
                .mode(0o600)
                .open(temporary)?;
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
        if fits {
            Ok(Some(node))
        } else {
            Err(nfsstat3::NFS3ERR_EXIST)
        }
    }

    /// MKDIR.
    pub(in crate::nfs_server) fn make_directory(
        &self,
        directory: &Node,
        caller: &Caller,
        name: &[u8],
        wanted: &Change,
    ) -> Result<Arc<Node>, nfsstat3> {
        self.demand_writable()?;
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
        let temporary = self
            .root
            .join(OWN_DIRECTORY)
            .join(format!("new-{:016x}", rand::random::<u64>()));
        let result = self.make_named(
            directory,
            name,
            attributes,
            create_verifier,
            &temporary,
            make,
        );
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
        let record = Record {
            identity,
            generation: rand::random(),
            attributes,
            create_verifier,
        };
        self.journal
            .put(record)
            .map_err(|error| status_of(&error))?;
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
            (
                tree.add(record, metadata.is_dir(), parent, name.to_owned()),
                path,
            )
        };
        sync_directory(&path)?;
        Ok(node)
    }

    /// REMOVE and RMDIR.
    pub(in crate::nfs_server) fn remove(
        &self,
        directory: &Node,
        caller: &Caller,
        name: &[u8],
        is_directory: bool,
    ) -> Result<(), nfsstat3> {
        self.demand_writable()?;
        demand_directory(directory)?;
        let name = self.entry_name(directory, name)?;
        directory.attributes().demand(caller, SEARCH)?;
        let (node, _) = self.find(directory, name)?;
        directory
            .attributes()
            .demand_removal(caller, node.attributes().uid)?;
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
    pub(in crate::nfs_server) fn rename(
        &self,
        caller: &Caller,
        (from_directory, from): (&Node, &[u8]),
        (to_directory, to): (&Node, &[u8]),
    ) -> Result<(), nfsstat3> {
        self.demand_writable()?;
        demand_directory(from_directory)?;
        let from = self.entry_name(from_directory, from)?;
        let to = self.new_name(to_directory, caller, to)?;
        from_directory.attributes().demand(caller, SEARCH)?;
        let (node, _) = self.find(from_directory, from)?;
        from_directory
            .attributes()
            .demand_removal(caller, node.attributes().uid)?;
        let replaced = match self.find(to_directory, to) {
            Ok((replaced, _)) => Some(replaced),
            Err(nfsstat3::NFS3ERR_NOENT) => None,
            Err(status) => return Err(status),
        };
        if let Some(replaced) = &replaced {
            if replaced.identity == node.identity {
                return Ok(());
            }
            to_directory
                .attributes()
                .demand_removal(caller, replaced.attributes().uid)?;
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
        if from_path != to_path {
            sync_directory(&from_path)
        } else {
            Ok(())
        }
    }

    fn demand_depth(&self, directory: &Node) -> Result<(), nfsstat3> {
        let tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
        let depth = tree.depth(self.root_inode, directory)?;
        if depth + 1 < DEPTH_MAX {
            Ok(())
        } else {
            Err(nfsstat3::NFS3ERR_NAMETOOLONG)
        }
    }
}

fn rename_to_free_name(from: &Path, to: &Path) -> io::Result<()> {
    renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE).map_err(io::Error::from)
}

fn sync_directory(path: &Path) -> Result<(), nfsstat3> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| status_of(&error))
}

fn demand_directory(node: &Node) -> Result<(), nfsstat3> {
    if node.is_directory {
        Ok(())
    } else {
        Err(nfsstat3::NFS3ERR_NOTDIR)
    }
}
