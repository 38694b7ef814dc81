//! The NFSv3 procedures (RFC 1813): arguments off the wire, the work on a blocking thread, results onto it.

use std::sync::Arc;

use bytes::Bytes;
use nfs3_types::nfs3::{self, NFS_PROGRAM, Nfs3Option, Nfs3Result, nfsstat3, post_op_attr, wcc_data};
use nfs3_types::xdr_codec::{Opaque, Pack, Void};

use super::export::{Existing, Export, NAME_BYTES_MAX};
use super::files::Node;
use super::listing;
use super::permission::{Caller, Change, READ, SEARCH, TimeChange, WRITE};
use super::rpc::{self, Refusal};
use crate::nfs::xdr::{Decoder, XdrError};

/// The largest READ and WRITE.
pub(super) const TRANSFER_BYTES_MAX: u32 = 1 << 20;

/// A name may be sent longer than it may be, to be told so; longer than this it is garbage.
const NAME_FIELD_BYTES_MAX: u32 = 4 * NAME_BYTES_MAX as u32;

/// The bytes that a call's reply may have, where that is more than a little.
pub(super) fn reply_bytes_max(procedure: u32, arguments: &Decoder) -> u32 {
    // The count is the last word of the arguments of all three.
    let count = arguments.0.last_chunk::<4>().map_or(0, |word| u32::from_be_bytes(*word));
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
    let procedure =
        NFS_PROGRAM::try_from(procedure).map_err(|_| Refusal::ProcedureUnavailable)?;
    let request = decode(procedure, &mut arguments).map_err(|_| Refusal::GarbageArguments)?;
    // The gate is entered here and not on the blocking thread, so that callers who wait for it
    // take no thread. It travels with the request, and is left only when the work is done.
    match request {
        Request::Write { file, offset, stable, data } => {
            let node = match export.resolve(&file) {
                Ok(node) => node,
                Err(status) => return reply(xid, &write_failed(status, post_op_attr::None)),
            };
            let gate = node.write_gate().await;
            blocking(move || {
                let count = data.len() as u32;
                let result = match export.write(gate, &node, &caller, offset, &data, stable) {
                    Ok(metadata) => nfs3::WRITE3res::Ok(nfs3::WRITE3resok {
                        file_wcc: after(Nfs3Option::Some(export.wire(&node, &metadata))),
                        count,
                        committed: stable,
                        verf: nfs3::writeverf3(export.verifier()),
                    }),
                    Err(status) => write_failed(status, attributes(&export, &node)),
                };
                reply(xid, &result)
            })
            .await
        }
        Request::SetAttributes { file, change, guard } => {
            let node = match export.resolve(&file) {
                Ok(node) => node,
                Err(status) => return reply(xid, &changed(Err(status), post_op_attr::None)),
            };
            let gate = node.change_gate().await;
            blocking(move || {
                let done = export.set_attributes(gate, &node, &caller, &change, guard);
                reply(xid, &changed(done, attributes(&export, &node)))
            })
            .await
        }
        Request::Create { directory, name, change, existing } => {
            let made = {
                let (export, caller) = (export.clone(), caller.clone());
                blocking(move || {
                    let directory = export.resolve(&directory);
                    let made = directory.as_ref().map_err(|status| *status).and_then(|directory| {
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
                    let cut = Change { size: Some(size), ..Change::default() };
                    let (export, caller) = (export.clone(), caller.clone());
                    blocking(move || {
                        let cut = export.set_attributes(gate, &node, &caller, &cut, None);
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
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(Refusal::SystemError))
}

/// A call's arguments, understood.
enum Request {
    Write { file: Bytes, offset: u64, stable: nfs3::stable_how, data: Bytes },
    SetAttributes { file: Bytes, change: Change, guard: Option<nfs3::nfstime3> },
    Create { directory: Bytes, name: Bytes, change: Change, existing: Existing },
    Plain(Plain),
}

/// Those that need no gate.
enum Plain {
    Null,
    /// GETATTR, FSSTAT, FSINFO, PATHCONF, COMMIT, READLINK.
    Of(Bytes),
    Access { object: Bytes, wanted: u32 },
    Read { file: Bytes, offset: u64, count: u32 },
    Name { directory: Bytes, name: Bytes, change: Change },
    Rename { from: (Bytes, Bytes), to: (Bytes, Bytes) },
    List(listing::Request),
    /// SYMLINK, MKNOD, LINK.
    Unsupported,
}

fn decode(procedure: NFS_PROGRAM, arguments: &mut Decoder) -> Result<Request, XdrError> {
    use NFS_PROGRAM as P;
    Ok(Request::Plain(match procedure {
        P::NFSPROC3_NULL => Plain::Null,
        P::NFSPROC3_GETATTR
        | P::NFSPROC3_FSSTAT
        | P::NFSPROC3_FSINFO
        | P::NFSPROC3_PATHCONF
        | P::NFSPROC3_READLINK
        // The range of a COMMIT is of no interest: all of the file is committed.
        | P::NFSPROC3_COMMIT => Plain::Of(handle(arguments)?),
        P::NFSPROC3_ACCESS => {
            Plain::Access { object: handle(arguments)?, wanted: arguments.u32()? }
        }
        P::NFSPROC3_READ => Plain::Read {
            file: handle(arguments)?,
            offset: arguments.fixed()?,
            count: arguments.u32()?.min(TRANSFER_BYTES_MAX),
        },
        P::NFSPROC3_WRITE => {
            let (file, offset) = (handle(arguments)?, arguments.fixed()?);
            let (count, stable) = (arguments.u32()?, arguments.fixed()?);
            let data = arguments.opaque(TRANSFER_BYTES_MAX)?;
            if data.len() != count as usize {
                return Err(XdrError::BadValue);
            }
            return Ok(Request::Write { file, offset, stable, data });
        }
        P::NFSPROC3_SETATTR => {
            let (file, change) = (handle(arguments)?, change(arguments)?);
            return Ok(Request::SetAttributes { file, change, guard: arguments.optional()? });
        }
        P::NFSPROC3_CREATE => {
            let (directory, name) = entry(arguments)?;
            let (change, existing) = match arguments.fixed()? {
                nfs3::createmode3::UNCHECKED => (change(arguments)?, Existing::Take),
                nfs3::createmode3::GUARDED => (change(arguments)?, Existing::Refuse),
                nfs3::createmode3::EXCLUSIVE => {
                    let verifier = arguments.fixed()?;
                    (Change::default(), Existing::TakeIfMadeWith(verifier))
                }
            };
            return Ok(Request::Create { directory, name, change, existing });
        }
        P::NFSPROC3_LOOKUP | P::NFSPROC3_REMOVE | P::NFSPROC3_RMDIR => {
            let (directory, name) = entry(arguments)?;
            Plain::Name { directory, name, change: Change::default() }
        }
        P::NFSPROC3_MKDIR => {
            let (directory, name) = entry(arguments)?;
            Plain::Name { directory, name, change: change(arguments)? }
        }
        P::NFSPROC3_RENAME => Plain::Rename { from: entry(arguments)?, to: entry(arguments)? },
        P::NFSPROC3_READDIR => Plain::List(listing::decode(arguments, false)?),
        P::NFSPROC3_READDIRPLUS => Plain::List(listing::decode(arguments, true)?),
        P::NFSPROC3_SYMLINK | P::NFSPROC3_MKNOD | P::NFSPROC3_LINK => Plain::Unsupported,
    }))
}

pub(super) fn handle(arguments: &mut Decoder) -> Result<Bytes, XdrError> {
    arguments.opaque(nfs3::NFS3_FHSIZE as u32)
}

fn entry(arguments: &mut Decoder) -> Result<(Bytes, Bytes), XdrError> {
    Ok((handle(arguments)?, arguments.opaque(NAME_FIELD_BYTES_MAX)?))
}

fn change(arguments: &mut Decoder) -> Result<Change, XdrError> {
    let wire: nfs3::sattr3 = arguments.fixed()?;
    let to = |time: nfs3::nfstime3| {
        TimeChange::To(u64::from(time.seconds) * 1_000_000_000 + u64::from(time.nseconds))
    };
    Ok(Change {
        mode: option(wire.mode),
        uid: option(wire.uid),
        gid: option(wire.gid),
        size: option(wire.size),
        accessed: match wire.atime {
            nfs3::set_atime::DONT_CHANGE => TimeChange::Keep,
            nfs3::set_atime::SET_TO_SERVER_TIME => TimeChange::Now,
            nfs3::set_atime::SET_TO_CLIENT_TIME(time) => to(time),
        },
        modified: match wire.mtime {
            nfs3::set_mtime::DONT_CHANGE => TimeChange::Keep,
            nfs3::set_mtime::SET_TO_SERVER_TIME => TimeChange::Now,
            nfs3::set_mtime::SET_TO_CLIENT_TIME(time) => to(time),
        },
    })
}

fn option<T: Pack + nfs3_types::xdr_codec::Unpack>(wire: Nfs3Option<T>) -> Option<T> {
    match wire {
        Nfs3Option::Some(value) => Some(value),
        Nfs3Option::None => None,
    }
}

pub(super) fn reply(xid: u32, results: &impl Pack) -> Result<Vec<u8>, Refusal> {
    let mut reply = rpc::accepted(xid, results.packed_size());
    results.pack(&mut reply).map_err(|_| Refusal::SystemError)?;
    Ok(reply)
}

/// The attributes that a reply carries beside its result; left out when they cannot be had.
pub(super) fn attributes(export: &Export, node: &Node) -> post_op_attr {
    export.wire_attributes(node).map_or(Nfs3Option::None, Nfs3Option::Some)
}

fn after(after: post_op_attr) -> wcc_data {
    wcc_data { before: Nfs3Option::None, after }
}

fn write_failed(status: nfsstat3, file: post_op_attr) -> nfs3::WRITE3res {
    nfs3::WRITE3res::Err((status, nfs3::WRITE3resfail { file_wcc: after(file) }))
}

fn changed(done: Result<(), nfsstat3>, file: post_op_attr) -> nfs3::SETATTR3res {
    let obj_wcc = after(file);
    match done {
        Ok(()) => nfs3::SETATTR3res::Ok(nfs3::SETATTR3resok { obj_wcc }),
        Err(status) => nfs3::SETATTR3res::Err((status, nfs3::SETATTR3resfail { obj_wcc })),
    }
}

fn wire_handle(export: &Export, node: &Node) -> nfs3::nfs_fh3 {
    nfs3::nfs_fh3 { data: Opaque::owned(export.handle(node).to_vec()) }
}

/// CREATE's results; MKDIR's are the same on the wire.
fn created(
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
                Ok(nfs3::ACCESS3resok { obj_attributes, access })
            });
            reply(xid, &or_failure(result, nfs3::ACCESS3resfail::default()))
        }
        Plain::Read { file, offset, count } => {
            let node = export.resolve(&file);
            let piece = node.and_then(|node| {
                export.read(&node, caller, offset, count).map(|piece| (node, piece))
            });
            let result = piece.map(|(node, piece)| nfs3::READ3resok {
                file_attributes: Nfs3Option::Some(export.wire(&node, &piece.metadata)),
                count: piece.data.len() as u32,
                eof: piece.eof,
                data: Opaque::owned(piece.data),
            });
            reply(xid, &or_failure(result, nfs3::READ3resfail::default()))
        }
        Plain::Name { directory, name, change } => {
            by_name(export, caller, xid, procedure, &directory, &name, &change)
        }
        Plain::Rename { from, to } => {
            let directories = export
                .resolve(&from.0)
                .and_then(|directory| Ok((directory, export.resolve(&to.0)?)));
            let done = directories.as_ref().map_err(|status| *status).and_then(|(f, t)| {
                export.rename(caller, (f, &from.1), (t, &to.1))
            });
            let (fromdir_wcc, todir_wcc) = match &directories {
                Ok((f, t)) => (after(attributes(export, f)), after(attributes(export, t))),
                Err(_) => (wcc_data::default(), wcc_data::default()),
            };
            let result: nfs3::RENAME3res = match done {
                Ok(()) => Nfs3Result::Ok(nfs3::RENAME3resok { fromdir_wcc, todir_wcc }),
                Err(status) => {
                    Nfs3Result::Err((status, nfs3::RENAME3resfail { fromdir_wcc, todir_wcc }))
                }
            };
            reply(xid, &result)
        }
        Plain::List(request) => listing::execute(export, caller, xid, &request),
        Plain::Unsupported if procedure == NFS_PROGRAM::NFSPROC3_LINK => {
            let of_file: post_op_attr = Nfs3Option::None;
            reply(xid, &Pair(nfsstat3::NFS3ERR_NOTSUPP, Pair(of_file, wcc_data::default())))
        }
        Plain::Unsupported => {
            reply(xid, &Pair(nfsstat3::NFS3ERR_NOTSUPP, wcc_data::default()))
        }
    }
}

/// Two values one after the other.
struct Pair<A, B>(A, B);

impl<A: Pack, B: Pack> Pack for Pair<A, B> {
    fn packed_size(&self) -> usize {
        self.0.packed_size() + self.1.packed_size()
    }

    fn pack(&self, out: &mut impl std::io::Write) -> nfs3_types::xdr_codec::Result<usize> {
        Ok(self.0.pack(out)? + self.1.pack(out)?)
    }
}

fn or_failure<T, E>(result: Result<T, nfsstat3>, failure: E) -> Nfs3Result<T, E> {
    match result {
        Ok(value) => Nfs3Result::Ok(value),
        Err(status) => Nfs3Result::Err((status, failure)),
    }
}

/// Which of the rights asked for a caller has (ACCESS).
fn access(node: &Node, caller: &Caller, wanted: u32) -> u32 {
    let attributes = node.attributes();
    let right = |right, bits: u32| if attributes.allows(caller, right) { bits } else { 0 };
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
    let wire = node.as_ref().map_err(|status| *status).and_then(|n| export.wire_attributes(n));
    match procedure {
        P::NFSPROC3_GETATTR => {
            let result: nfs3::GETATTR3res =
                or_failure(wire.map(|obj_attributes| nfs3::GETATTR3resok { obj_attributes }), Void);
            reply(xid, &result)
        }
        P::NFSPROC3_COMMIT => {
            let result: nfs3::COMMIT3res = match node.and_then(|n| export.commit(&n, caller).map(|m| export.wire(&n, &m))) {
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
        time_delta: nfs3::nfstime3 { seconds: 0, nseconds: 1 },
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
    let of_directory =
        |found: &Result<Arc<Node>, _>| match found {
            Ok(directory) => attributes(export, directory),
            Err(_) => Nfs3Option::None,
        };
    let on = |work: &dyn Fn(&Node) -> Result<Option<Arc<Node>>, nfsstat3>| match &found {
        Ok(directory) => work(directory),
        Err(status) => Err(*status),
    };
    match procedure {
        P::NFSPROC3_LOOKUP => {
            let result: nfs3::LOOKUP3res =
                match on(&|directory| export.lookup(directory, caller, name).map(Some)) {
                    Ok(Some(node)) => Nfs3Result::Ok(nfs3::LOOKUP3resok {
                        object: wire_handle(export, &node),
                        obj_attributes: attributes(export, &node),
                        dir_attributes: of_directory(&found),
                    }),
                    Ok(None) => return Err(Refusal::SystemError),
                    Err(status) => {
                        let dir_attributes = of_directory(&found);
                        Nfs3Result::Err((status, nfs3::LOOKUP3resfail { dir_attributes }))
                    }
                };
            reply(xid, &result)
        }
        P::NFSPROC3_MKDIR => {
            let made = match &found {
                Ok(directory) => export.make_directory(directory, caller, name, change),
                Err(status) => Err(*status),
            };
            reply(xid, &created(export, found.ok(), made))
        }
        _ => {
            let is_directory = procedure == P::NFSPROC3_RMDIR;
            let removed = on(&|directory| {
                export.remove(directory, caller, name, is_directory).map(|()| None)
            });
            let dir_wcc = after(of_directory(&found));
            let status = removed.err().unwrap_or(nfsstat3::NFS3_OK);
            reply(xid, &Pair(status, dir_wcc))
        }
    }
}
