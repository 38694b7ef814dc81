//! READDIR and READDIRPLUS: directories in pieces, with cookies that stay valid while entries come and go.
//!
//! A cookie is made of the inode of the entry it follows, and entries are listed in the order of
//! inodes: a listing goes on where it stopped whatever was removed meanwhile, and across restarts.

use bytes::Bytes;
use nfs3_types::nfs3::{self, Nfs3Option, nfsstat3};
use nfs3_types::xdr_codec::{BoundedList, Opaque};

use super::export::{Export, Listed};
use super::permission::Caller;
use super::procedures::{attributes, handle, reply};
use super::rpc::Refusal;
use crate::nfs::xdr::{Decoder, XdrError};

/// The largest reply to a READDIR, whatever the caller would take.
pub(super) const REPLY_BYTES_MAX: u32 = 256 << 10;

/// What a reply holds beside its entries: status, attributes, verifier, and the end.
const REPLY_HEAD_BYTES: u32 = 128;

/// Cookies of `.` and `..`; those of entries are their inodes plus this many.
const SELF_COOKIE: u64 = 1;
const PARENT_COOKIE: u64 = 2;
const ENTRY_COOKIES: u64 = 2;

/// A piece of a directory, asked for.
pub(super) struct Request {
    directory: Bytes,
    cookie: u64,
    /// The bound on the whole reply.
    bytes_max: u32,
    plus: bool,
}

pub(super) fn decode(arguments: &mut Decoder, plus: bool) -> Result<Request, XdrError> {
    let directory = handle(arguments)?;
    let cookie = arguments.fixed()?;
    let _verifier: nfs3::cookieverf3 = arguments.fixed()?;
    if plus {
        let _names_only = arguments.u32()?;
    }
    Ok(Request {
        directory,
        cookie,
        bytes_max: arguments.u32()?.min(REPLY_BYTES_MAX),
        plus,
    })
}

pub(super) fn execute(
    export: &Export,
    caller: &Caller,
    xid: u32,
    request: &Request,
) -> Result<Vec<u8>, Refusal> {
    if request.plus {
        let result: nfs3::READDIRPLUS3res = match list(export, caller, request, plus_entry) {
            Ok((dir_attributes, entries, eof)) => {
                nfs3::READDIRPLUS3res::Ok(nfs3::READDIRPLUS3resok {
                    dir_attributes,
                    cookieverf: nfs3::cookieverf3::default(),
                    reply: nfs3::dirlistplus3 {
                        entries: entries.into_inner(),
                        eof,
                    },
                })
            }
            Err(status) => {
                nfs3::READDIRPLUS3res::Err((status, nfs3::READDIRPLUS3resfail::default()))
            }
        };
        reply(xid, &result)
    } else {
        let result: nfs3::READDIR3res = match list(export, caller, request, bare_entry) {
            Ok((dir_attributes, entries, eof)) => nfs3::READDIR3res::Ok(nfs3::READDIR3resok {
                dir_attributes,
                cookieverf: nfs3::cookieverf3::default(),
                reply: nfs3::dirlist3 {
                    entries: entries.into_inner(),
                    eof,
                },
            }),
            Err(status) => nfs3::READDIR3res::Err((status, nfs3::READDIR3resfail::default())),
        };
        reply(xid, &result)
    }
}

fn bare_entry(_: &Export, entry: Listed, cookie: u64) -> nfs3::entry3<'static> {
    nfs3::entry3 {
        fileid: entry.node.identity.inode,
        name: name(entry.name),
        cookie,
    }
}

fn plus_entry(export: &Export, entry: Listed, cookie: u64) -> nfs3::entryplus3<'static> {
    let handle = export.handle(&entry.node).to_vec();
    nfs3::entryplus3 {
        fileid: entry.node.identity.inode,
        cookie,
        name_attributes: Nfs3Option::Some(export.wire(&entry.node, &entry.metadata)),
        name_handle: Nfs3Option::Some(nfs3::nfs_fh3 {
            data: Opaque::owned(handle),
        }),
        name: name(entry.name),
    }
}

fn name(name: std::ffi::OsString) -> nfs3::filename3<'static> {
    std::os::unix::ffi::OsStringExt::into_vec(name).into()
}

type Piece<T> = (nfs3::post_op_attr, BoundedList<T>, bool);

fn list<T: nfs3_types::xdr_codec::Pack>(
    export: &Export,
    caller: &Caller,
    request: &Request,
    wire: impl Fn(&Export, Listed, u64) -> T,
) -> Result<Piece<T>, nfsstat3> {
    let directory = export.resolve(&request.directory)?;
    let entries = export.list(&directory, caller)?;
    let parent = export.parent(&directory)?;
    let itself = |name: &str, node: &std::sync::Arc<super::files::Node>| {
        let metadata = export.metadata(node)?;
        Ok(Listed {
            name: name.into(),
            node: node.clone(),
            metadata,
        })
    };
    let dots = [
        (SELF_COOKIE, itself(".", &directory)?),
        (PARENT_COOKIE, itself("..", &parent)?),
    ];
    let with_cookies = entries.into_iter().map(|entry| {
        (
            entry.node.identity.inode.saturating_add(ENTRY_COOKIES),
            entry,
        )
    });
    let mut piece = BoundedList::new(request.bytes_max.saturating_sub(REPLY_HEAD_BYTES) as usize);
    let mut first = true;
    for (cookie, entry) in dots.into_iter().chain(with_cookies) {
        if cookie <= request.cookie {
            continue;
        }
        if piece.try_push(wire(export, entry, cookie)).is_err() {
            // Not even one entry fits into what the caller takes.
            let too_small = Err(nfsstat3::NFS3ERR_TOOSMALL);
            return if first {
                too_small
            } else {
                Ok((attributes(export, &directory), piece, false))
            };
        }
        first = false;
    }
    Ok((attributes(export, &directory), piece, true))
}
