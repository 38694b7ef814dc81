//! The results of NFSv3 procedures, onto the wire.

use std::sync::Arc;

use nfs3_types::nfs3::{self, Nfs3Option, Nfs3Result, nfsstat3, post_op_attr, wcc_data};
use nfs3_types::xdr_codec::{Opaque, Pack};

use super::super::export::Export;
use super::super::files::Node;
use super::super::rpc::{self, Refusal};

/// A reply with these results.
pub(in crate::nfs_server) fn reply(xid: u32, results: &impl Pack) -> Result<Vec<u8>, Refusal> {
    let mut reply = rpc::accepted(xid, results.packed_size());
    results.pack(&mut reply).map_err(|_| Refusal::SystemError)?;
    Ok(reply)
}

/// The attributes that a reply carries beside its result; left out when they cannot be had.
pub(in crate::nfs_server) fn attributes(export: &Export, node: &Node) -> post_op_attr {
    export
        .wire_attributes(node)
        .map_or(Nfs3Option::None, Nfs3Option::Some)
}

pub(super) fn after(after: post_op_attr) -> wcc_data {
    wcc_data {
        before: Nfs3Option::None,
        after,
    }
}

pub(super) fn write_failed(status: nfsstat3, file: post_op_attr) -> nfs3::WRITE3res {
    nfs3::WRITE3res::Err((
        status,
        nfs3::WRITE3resfail {
            file_wcc: after(file),
        },
    ))
}

pub(super) fn changed(done: Result<(), nfsstat3>, file: post_op_attr) -> nfs3::SETATTR3res {
    let obj_wcc = after(file);
    match done {
        Ok(()) => nfs3::SETATTR3res::Ok(nfs3::SETATTR3resok { obj_wcc }),
        Err(status) => nfs3::SETATTR3res::Err((status, nfs3::SETATTR3resfail { obj_wcc })),
    }
}

pub(super) fn wire_handle(export: &Export, node: &Node) -> nfs3::nfs_fh3 {
    nfs3::nfs_fh3 {
        data: Opaque::owned(export.handle(node).to_vec()),
    }
}

/// CREATE's results; MKDIR's are the same on the wire.
pub(super) fn created(
    export: &Export,
    directory: Option<Arc<Node>>,
    made: Result<Arc<Node>, nfsstat3>,
) -> nfs3::CREATE3res {
    let of_directory =
        directory.map_or(Nfs3Option::None, |directory| attributes(export, &directory));
    let dir_wcc = after(of_directory);
    match made {
        Ok(node) => nfs3::CREATE3res::Ok(nfs3::CREATE3resok {
            obj: Nfs3Option::Some(wire_handle(export, &node)),
            obj_attributes: attributes(export, &node),
            dir_wcc,
        }),
        Err(status) => nfs3::CREATE3res::Err((status, nfs3::CREATE3resfail { dir_wcc })),
    }
}

/// Two values one after the other.
pub(super) struct Pair<A, B>(pub(super) A, pub(super) B);

impl<A: Pack, B: Pack> Pack for Pair<A, B> {
    fn packed_size(&self) -> usize {
        self.0.packed_size() + self.1.packed_size()
    }

    fn pack(&self, out: &mut impl std::io::Write) -> nfs3_types::xdr_codec::Result<usize> {
        Ok(self.0.pack(out)? + self.1.pack(out)?)
    }
}

pub(super) fn or_failure<T, E>(result: Result<T, nfsstat3>, failure: E) -> Nfs3Result<T, E> {
    match result {
        Ok(value) => Nfs3Result::Ok(value),
        Err(status) => Nfs3Result::Err((status, failure)),
    }
}
