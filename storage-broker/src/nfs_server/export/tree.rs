//! What is known of the files under the root: which lies where, and what was there at the start.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use nfs3_types::nfs3::nfsstat3;

use super::super::convert::now_ns;
use super::super::files::Node;
use super::super::journal::{Identity, Record};
use super::super::permission::Attributes;
use super::OWN_DIRECTORY;

/// How deep directories may lie in each other: bounds the walk from a file to the root.
pub(super) const DEPTH_MAX: usize = 64;

/// Files and directories served at most: each takes some hundred bytes of memory.
pub(super) const NODES_MAX: usize = 1 << 20;

/// The names known, and what they stand for.
#[derive(Debug, Default)]
pub(super) struct Tree {
    pub(super) nodes: HashMap<u64, Place>,
}

/// Where a file lies.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) node: Arc<Node>,
    /// Inode of the directory it lies in; the root's is its own.
    pub(super) parent: u64,
    pub(super) name: OsString,
}

impl Tree {
    /// Takes a file in; it replaces what was known of another one with its inode.
    pub(super) fn add(
        &mut self,
        record: Record,
        is_directory: bool,
        parent: u64,
        name: OsString,
    ) -> Arc<Node> {
        let node = Arc::new(Node::new(record, is_directory));
        let place = Place {
            node: node.clone(),
            parent,
            name,
        };
        if let Some(former) = self.nodes.insert(record.identity.inode, place) {
            former.node.close();
        }
        node
    }

    /// The names from the root to a file.
    fn names(&self, root_inode: u64, node: &Node) -> Result<Vec<&OsStr>, nfsstat3> {
        let mut names = Vec::new();
        let mut inode = node.identity.inode;
        if self
            .nodes
            .get(&inode)
            .is_none_or(|place| place.node.generation != node.generation)
        {
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

    /// Where a file lies on this host.
    pub(super) fn path(
        &self,
        root: &Path,
        root_inode: u64,
        node: &Node,
    ) -> Result<PathBuf, nfsstat3> {
        let mut path = root.to_owned();
        path.extend(self.names(root_inode, node)?.into_iter().rev());
        Ok(path)
    }

    /// How many directories a file lies below the root.
    pub(super) fn depth(&self, root_inode: u64, node: &Node) -> Result<usize, nfsstat3> {
        self.names(root_inode, node).map(|names| names.len())
    }

    /// That a file found a moment ago still has that name.
    pub(super) fn demand_at(
        &self,
        node: &Node,
        directory: &Node,
        name: &OsStr,
    ) -> Result<(), nfsstat3> {
        let place = self.nodes.get(&node.identity.inode);
        let same = place.is_some_and(|place| {
            place.node.generation == node.generation
                && place.parent == directory.identity.inode
                && place.name == name
        });
        if same {
            Ok(())
        } else {
            Err(nfsstat3::NFS3ERR_NOENT)
        }
    }
}

/// Takes in what lies below a directory; records that fit no file are left behind.
pub(super) fn scan(
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
            tree.add(
                record,
                metadata.is_dir(),
                directory_inode,
                entry.file_name(),
            );
            if metadata.is_dir() {
                pending.push((entry.path(), metadata.ino(), depth + 1));
            }
        }
    }
    Ok(())
}

/// What the journal says of a file, if it means this one.
pub(super) fn known(records: &mut HashMap<u64, Record>, metadata: &Metadata) -> Option<Record> {
    let identity = identity(metadata);
    records
        .remove(&identity.inode)
        .filter(|record| record.identity == identity)
}

/// The record of a file that came there behind our back: it is whose the disk says it is.
pub(super) fn unknown(metadata: &Metadata) -> Record {
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

/// Which file this is, whatever it is called.
pub(super) fn identity(metadata: &Metadata) -> Identity {
    let born = metadata
        .created()
        .ok()
        .and_then(|born| born.duration_since(UNIX_EPOCH).ok());
    Identity {
        inode: metadata.ino(),
        born_ns: born.map_or(0, |born| u64::try_from(born.as_nanos()).unwrap_or(0)),
    }
}
