//! The arguments of NFSv3 procedures, off the wire.

use bytes::Bytes;
use nfs3_types::nfs3::{self, NFS_PROGRAM, Nfs3Option};
use nfs3_types::xdr_codec::{Pack, Unpack};

use super::super::export::{Existing, NAME_BYTES_MAX};
use super::super::listing;
use super::super::permission::{Change, TimeChange};
use super::TRANSFER_BYTES_MAX;
use crate::nfs::xdr::{Decoder, XdrError};

/// A name may be sent longer than it may be, to be told so; longer than this it is garbage.
const NAME_FIELD_BYTES_MAX: u32 = 4 * NAME_BYTES_MAX as u32;

/// A call's arguments, understood.
pub(super) enum Request {
    Write {
        file: Bytes,
        offset: u64,
        stable: nfs3::stable_how,
        data: Bytes,
    },
    SetAttributes {
        file: Bytes,
        change: Change,
        guard: Option<nfs3::nfstime3>,
    },
    Create {
        directory: Bytes,
        name: Bytes,
        change: Change,
        existing: Existing,
    },
    Plain(Plain),
}

/// Those that need no gate.
pub(super) enum Plain {
    Null,
    /// GETATTR, FSSTAT, FSINFO, PATHCONF, COMMIT, READLINK.
    Of(Bytes),
    Access {
        object: Bytes,
        wanted: u32,
    },
    Read {
        file: Bytes,
        offset: u64,
        count: u32,
    },
    Name {
        directory: Bytes,
        name: Bytes,
        change: Change,
    },
    Rename {
        from: (Bytes, Bytes),
        to: (Bytes, Bytes),
    },
    List(listing::Request),
    /// SYMLINK, MKNOD, LINK.
    Unsupported,
}

/// The arguments of a call; what follows them is of no interest.
pub(super) fn decode(procedure: NFS_PROGRAM, arguments: &mut Decoder) -> Result<Request, XdrError> {
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

/// A file handle.
pub(in crate::nfs_server) fn handle(arguments: &mut Decoder) -> Result<Bytes, XdrError> {
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

fn option<T: Pack + Unpack>(wire: Nfs3Option<T>) -> Option<T> {
    match wire {
        Nfs3Option::Some(value) => Some(value),
        Nfs3Option::None => None,
    }
}
