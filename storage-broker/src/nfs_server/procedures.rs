//! The NFSv3 procedures (RFC 1813): arguments off the wire, the work on a blocking thread, results onto it.

use std::sync::Arc;

use nfs3_types::nfs3::{
    self, NFS_PROGRAM, Nfs3Option, Nfs3Result, nfsstat3, post_op_attr, wcc_data,
};
use nfs3_types::xdr_codec::{Opaque, Void};

mod arguments;
mod results;

pub(super) use arguments::handle;
pub(super) use results::{attributes, reply};

use super::export::{Existing, Export, NAME_BYTES_MAX};
use super::files::Node;
use super::listing;
use super::permission::{Caller, Change, READ, SEARCH, WRITE};
use super::rpc::Refusal;
use crate::nfs::xdr::Decoder;
use arguments::{Plain, Request, decode};
use results::{Pair, after, changed, created, or_failure, wire_handle, write_failed};

/// The largest READ and WRITE.
pub(super) const TRANSFER_BYTES_MAX: u32 = 1 << 20;

/// The bytes that a call's reply may have, where that is more than a little.
pub(super) fn reply_bytes_max(procedure: u32, arguments: &Decoder) -> u32 {
    // The count is the last word of the arguments of all three.
    let count = arguments
        .0
        .last_chunk::<4>()
        .map_or(0, |word| u32::from_be_bytes(*word));
    match NFS_PROGRAM::try_from(procedure) {
        Ok(NFS_PROGRAM::NFSPROC3_READ) => count.min(TRANSFER_BYTES_MAX),
        Ok(NFS_PROGRAM::NFSPROC3_READDIR | NFS_PROGRAM::NFSPROC3_READDIRPLUS) => {
            count.min(listing::REPLY_BYTES_MAX)
        }
        _ => 0,
    }
}

/// Executes one call; the reply, or why there is none.
pub(super) async fn execute(
    export: Arc<Export>,
    caller: Caller,
    xid: u32,
    procedure: u32,
    mut arguments: Decoder,
) -> Result<Vec<u8>, Refusal> {
    let procedure = NFS_PROGRAM::try_from(procedure).map_err(|_| Refusal::ProcedureUnavailable)?;
    let request = decode(procedure, &mut arguments).map_err(|_| Refusal::GarbageArguments)?;
    // The gate is entered here and not on the blocking thread, so that callers who wait for it
    // take no thread. It travels with the request, and is left only when the work is done.
    match request {
        Request::Write {
            file,
            offset,
            stable,
            data,
        } => {
            let node = match export.resolve(&file) {
                Ok(node) => node,
                Err(status) => return reply(xid, &write_failed(status, post_op_attr::None)),
            };
            let gate = node.write_gate().await;
            blocking(move || {
                let count = data.len() as u32;
                // Taken before the data can be lost, so that a loss shows in the COMMIT.
                let verf = nfs3::writeverf3(export.verifier());
                let result = match export.write(gate, &caller, offset, &data, stable) {
                    Ok(metadata) => nfs3::WRITE3res::Ok(nfs3::WRITE3resok {
                        file_wcc: after(Nfs3Option::Some(export.wire(&node, &metadata))),
                        count,
                        committed: stable,
                        verf,
                    }),
                    Err(status) => write_failed(status, attributes(&export, &node)),
                };
                reply(xid, &result)
            })
            .await
        }
        Request::SetAttributes {
            file,
            change,
            guard,
        } => {
            let node = match export.resolve(&file) {
                Ok(node) => node,
                Err(status) => return reply(xid, &changed(Err(status), post_op_attr::None)),
            };
            let gate = node.change_gate().await;
            blocking(move || {
                let done = export.set_attributes(&gate, &caller, &change, guard);
                reply(xid, &changed(done, attributes(&export, &node)))
            })
            .await
        }
        Request::Create {
            directory,
            name,
            change,
            existing,
        } => {
            let made = {
                let (export, caller) = (export.clone(), caller.clone());
                blocking(move || {
                    let directory = export.resolve(&directory);
                    let made = directory
                        .as_ref()
                        .map_err(|status| *status)
                        .and_then(|directory| {
                            export.create(directory, &caller, &name, &change, existing)
                        });
                    Ok((directory.ok(), made))
                })
                .await?
            };
            let (directory, made) = made;
            // What existed already may be cut to size, under the rules of SETATTR.
            let made = match (made, change.size, existing) {
                (Ok((node, false)), Some(size), Existing::Take) => {
                    let gate = node.change_gate().await;
                    let cut = Change {
                        size: Some(size),
                        ..Change::default()
                    };
                    let (export, caller) = (export.clone(), caller.clone());
                    blocking(move || {
                        let cut = export.set_attributes(&gate, &caller, &cut, None);
                        Ok(cut.map(|()| node))
                    })
                    .await?
                }
                (made, _, _) => made.map(|(node, _)| node),
            };
            blocking(move || reply(xid, &created(&export, directory, made))).await
        }
        Request::Plain(plain) => {
            blocking(move || plain_call(&export, &caller, xid, procedure, plain)).await
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    // An error means that the work panicked or the runtime is shutting down.
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(Refusal::SystemError))
}

fn plain_call(
    export: &Export,
    caller: &Caller,
    xid: u32,
    procedure: NFS_PROGRAM,
    plain: Plain,
) -> Result<Vec<u8>, Refusal> {
    match plain {
        Plain::Null => reply(xid, &Void),
        Plain::Of(object) => of_object(export, caller, xid, procedure, &object),
        Plain::Access { object, wanted } => {
            let node = export.resolve(&object);
            let result = node.and_then(|node| {
                let access = access(&node, caller, wanted);
                let obj_attributes = Nfs3Option::Some(export.wire_attributes(&node)?);
                Ok(nfs3::ACCESS3resok {
                    obj_attributes,
                    access,
                })
            });
            reply(xid, &or_failure(result, nfs3::ACCESS3resfail::default()))
        }
        Plain::Read {
            file,
            offset,
            count,
        } => {
            let node = export.resolve(&file);
            let piece = node.and_then(|node| {
                export
                    .read(&node, caller, offset, count)
                    .map(|piece| (node, piece))
            });
            let result = piece.map(|(node, piece)| nfs3::READ3resok {
                file_attributes: Nfs3Option::Some(export.wire(&node, &piece.metadata)),
                count: piece.data.len() as u32,
                eof: piece.eof,
                data: Opaque::owned(piece.data),
            });
            reply(xid, &or_failure(result, nfs3::READ3resfail::default()))
        }
        Plain::Name {
            directory,
            name,
            change,
        } => by_name(export, caller, xid, procedure, &directory, &name, &change),
        Plain::Rename { from, to } => {
            let directories = export
                .resolve(&from.0)
                .and_then(|directory| Ok((directory, export.resolve(&to.0)?)));
            let done = directories
                .as_ref()
                .map_err(|status| *status)
                .and_then(|(f, t)| export.rename(caller, (f, &from.1), (t, &to.1)));
            let (fromdir_wcc, todir_wcc) = match &directories {
                Ok((f, t)) => (after(attributes(export, f)), after(attributes(export, t))),
                Err(_) => (wcc_data::default(), wcc_data::default()),
            };
            let result: nfs3::RENAME3res = match done {
                Ok(()) => Nfs3Result::Ok(nfs3::RENAME3resok {
                    fromdir_wcc,
                    todir_wcc,
                }),
                Err(status) => Nfs3Result::Err((
                    status,
                    nfs3::RENAME3resfail {
                        fromdir_wcc,
                        todir_wcc,
                    },
                )),
            };
            reply(xid, &result)
        }
        Plain::List(request) => listing::execute(export, caller, xid, &request),
        Plain::Unsupported if procedure == NFS_PROGRAM::NFSPROC3_LINK => {
            let of_file: post_op_attr = Nfs3Option::None;
            reply(
                xid,
                &Pair(
                    nfsstat3::NFS3ERR_NOTSUPP,
                    Pair(of_file, wcc_data::default()),
                ),
            )
        }
        Plain::Unsupported => reply(xid, &Pair(nfsstat3::NFS3ERR_NOTSUPP, wcc_data::default())),
    }
}

/// Which of the rights asked for a caller has (ACCESS).
fn access(node: &Node, caller: &Caller, wanted: u32) -> u32 {
    let attributes = node.attributes();
    let right = |right, bits: u32| {
        if attributes.allows(caller, right) {
            bits
        } else {
            0
        }
    };
    let granted = if node.is_directory {
        right(READ, nfs3::ACCESS3_READ)
            | right(SEARCH, nfs3::ACCESS3_LOOKUP)
            | right(
                WRITE | SEARCH,
                nfs3::ACCESS3_MODIFY | nfs3::ACCESS3_EXTEND | nfs3::ACCESS3_DELETE,
            )
    } else {
        right(READ, nfs3::ACCESS3_READ)
            | right(WRITE, nfs3::ACCESS3_MODIFY | nfs3::ACCESS3_EXTEND)
            | right(SEARCH, nfs3::ACCESS3_EXECUTE)
    };
    granted & wanted
}

/// The procedures whose only argument of interest is a handle.
fn of_object(
    export: &Export,
    caller: &Caller,
    xid: u32,
    procedure: NFS_PROGRAM,
    object: &[u8],
) -> Result<Vec<u8>, Refusal> {
    use NFS_PROGRAM as P;
    let node = export.resolve(object);
    let wire = node
        .as_ref()
        .map_err(|status| *status)
        .and_then(|n| export.wire_attributes(n));
    match procedure {
        P::NFSPROC3_GETATTR => {
            let result: nfs3::GETATTR3res = or_failure(
                wire.map(|obj_attributes| nfs3::GETATTR3resok { obj_attributes }),
                Void,
            );
            reply(xid, &result)
        }
        P::NFSPROC3_COMMIT => {
            let result: nfs3::COMMIT3res =
                match node.and_then(|n| export.commit(&n, caller).map(|m| export.wire(&n, &m))) {
                    Ok(wire) => Nfs3Result::Ok(nfs3::COMMIT3resok {
                        file_wcc: after(Nfs3Option::Some(wire)),
                        verf: nfs3::writeverf3(export.verifier()),
                    }),
                    Err(status) => {
                        let file_wcc = after(wire.map_or(Nfs3Option::None, Nfs3Option::Some));
                        Nfs3Result::Err((status, nfs3::COMMIT3resfail { file_wcc }))
                    }
                };
            reply(xid, &result)
        }
        P::NFSPROC3_FSSTAT => {
            let result = wire.and_then(|wire| room(export, Nfs3Option::Some(wire)));
            reply(xid, &or_failure(result, nfs3::FSSTAT3resfail::default()))
        }
        P::NFSPROC3_FSINFO => {
            let result = wire.map(|wire| limits(Nfs3Option::Some(wire)));
            reply(xid, &or_failure(result, nfs3::FSINFO3resfail::default()))
        }
        P::NFSPROC3_PATHCONF => {
            let result = wire.map(|wire| nfs3::PATHCONF3resok {
                obj_attributes: Nfs3Option::Some(wire),
                linkmax: 1,
                name_max: NAME_BYTES_MAX as u32,
                no_trunc: true,
                chown_restricted: true,
                case_insensitive: false,
                case_preserving: true,
            });
            reply(xid, &or_failure(result, nfs3::PATHCONF3resfail::default()))
        }
        _ => {
            // There are no symbolic links here.
            let status = node.err().unwrap_or(nfsstat3::NFS3ERR_INVAL);
            let symlink_attributes = wire.map_or(Nfs3Option::None, Nfs3Option::Some);
            reply(xid, &Pair(status, symlink_attributes))
        }
    }
}

fn room(export: &Export, obj_attributes: post_op_attr) -> Result<nfs3::FSSTAT3resok, nfsstat3> {
    let room = nix::sys::statvfs::statvfs(export.root_path()).map_err(|_| nfsstat3::NFS3ERR_IO)?;
    let unit = room.fragment_size();
    Ok(nfs3::FSSTAT3resok {
        obj_attributes,
        tbytes: room.blocks().saturating_mul(unit),
        fbytes: room.blocks_free().saturating_mul(unit),
        abytes: room.blocks_available().saturating_mul(unit),
        tfiles: room.files(),
        ffiles: room.files_free(),
        afiles: room.files_available(),
        invarsec: 0,
    })
}

fn limits(obj_attributes: post_op_attr) -> nfs3::FSINFO3resok {
    nfs3::FSINFO3resok {
        obj_attributes,
        rtmax: TRANSFER_BYTES_MAX,
        rtpref: TRANSFER_BYTES_MAX,
        rtmult: 4096,
        wtmax: TRANSFER_BYTES_MAX,
        wtpref: TRANSFER_BYTES_MAX,
        wtmult: 4096,
        dtpref: 64 << 10,
        maxfilesize: i64::MAX as u64,
        time_delta: nfs3::nfstime3 {
            seconds: 0,
            nseconds: 1,
        },
        properties: nfs3::FSF3_HOMOGENEOUS | nfs3::FSF3_CANSETTIME,
    }
}

/// The procedures on one name in a directory: LOOKUP, MKDIR, REMOVE, RMDIR.
fn by_name(
    export: &Export,
    caller: &Caller,
    xid: u32,
    procedure: NFS_PROGRAM,
    directory: &[u8],
    name: &[u8],
    change: &Change,
) -> Result<Vec<u8>, Refusal> {
    use NFS_PROGRAM as P;
    let found = export.resolve(directory);
    let dir_attributes = |found: &Result<Arc<Node>, _>| match found {
        Ok(directory) => attributes(export, directory),
        Err(_) => Nfs3Option::None,
    };
    let resolved = || found.as_ref().map_err(|status| *status);
    match procedure {
        P::NFSPROC3_LOOKUP => {
            let node = resolved().and_then(|directory| export.lookup(directory, caller, name));
            let dir_attributes = dir_attributes(&found);
            let result: nfs3::LOOKUP3res = match node {
                Ok(node) => Nfs3Result::Ok(nfs3::LOOKUP3resok {
                    object: wire_handle(export, &node),
                    obj_attributes: attributes(export, &node),
                    dir_attributes,
                }),
                Err(status) => Nfs3Result::Err((status, nfs3::LOOKUP3resfail { dir_attributes })),
            };
            reply(xid, &result)
        }
        P::NFSPROC3_MKDIR => {
            let made = resolved()
                .and_then(|directory| export.make_directory(directory, caller, name, change));
            reply(xid, &created(export, found.ok(), made))
        }
        _ => {
            let is_directory = procedure == P::NFSPROC3_RMDIR;
            let removed = resolved()
                .and_then(|directory| export.remove(directory, caller, name, is_directory));
            let status = removed.err().unwrap_or(nfsstat3::NFS3_OK);
            reply(xid, &Pair(status, after(dir_attributes(&found))))
        }
    }
}
