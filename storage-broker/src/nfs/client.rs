//! The NFSv3 procedures that disks and volumes need, typed, each with its own credential.

use std::future::Future;

use bytes::Bytes;
use nfs3_types::nfs3::{self, Nfs3Option, nfsstat3, stable_how, wcc_data};
use nfs3_types::xdr_codec::{Opaque, Pack};

pub use super::types::{
    Attributes, CommitReply, FileHandle, Limits, NfsError, ReadReply, Room, SetAttributes,
    TRANSFER_BYTES_MAX, WriteReply,
};

use super::connection::{CallError, Connection, Credential, Procedure, Slot, Started};
use super::xdr::{Decoder, XdrError};

/// An export's root and a connection to its server.
#[derive(Clone, Debug)]
pub struct NfsClient {
    connection: Connection,
    root: FileHandle,
}

type Result<T> = std::result::Result<T, NfsError>;

macro_rules! procedures {
    ($($name:ident = $number:expr;)*) => {
        $(const $name: (&str, Procedure) = (
            stringify!($name),
            Procedure { program: nfs3::PROGRAM, version: nfs3::VERSION, number: $number as u32 },
        );)*
    };
}

procedures! {
    NULL = nfs3::NFS_PROGRAM::NFSPROC3_NULL;
    GETATTR = nfs3::NFS_PROGRAM::NFSPROC3_GETATTR;
    SETATTR = nfs3::NFS_PROGRAM::NFSPROC3_SETATTR;
    LOOKUP = nfs3::NFS_PROGRAM::NFSPROC3_LOOKUP;
    ACCESS = nfs3::NFS_PROGRAM::NFSPROC3_ACCESS;
    READ = nfs3::NFS_PROGRAM::NFSPROC3_READ;
    WRITE = nfs3::NFS_PROGRAM::NFSPROC3_WRITE;
    CREATE = nfs3::NFS_PROGRAM::NFSPROC3_CREATE;
    MKDIR = nfs3::NFS_PROGRAM::NFSPROC3_MKDIR;
    REMOVE = nfs3::NFS_PROGRAM::NFSPROC3_REMOVE;
    FSSTAT = nfs3::NFS_PROGRAM::NFSPROC3_FSSTAT;
    FSINFO = nfs3::NFS_PROGRAM::NFSPROC3_FSINFO;
    COMMIT = nfs3::NFS_PROGRAM::NFSPROC3_COMMIT;
}

impl NfsClient {
    /// A client of the export whose root is `root`.
    pub fn new(connection: Connection, root: FileHandle) -> NfsClient {
        NfsClient { connection, root }
    }

    /// The connection, to take slots from or to close it.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The export's root directory.
    pub fn root(&self) -> &FileHandle {
        &self.root
    }

    async fn call<T>(
        &self,
        (name, procedure): (&'static str, Procedure),
        credential: Credential,
        arguments: &impl Pack,
        decode: impl FnOnce(&mut Decoder) -> std::result::Result<T, XdrError>,
    ) -> Result<T> {
        let reply = self.connection.call(procedure, credential, arguments).await;
        finish(name, reply, decode)
    }

    fn begin(
        &self,
        slot: Slot,
        procedure: Procedure,
        credential: Credential,
        arguments: &impl Pack,
    ) -> std::result::Result<Started, CallError> {
        self.connection
            .start(slot, procedure, credential, arguments)
    }

    /// NULL: whether the server answers at all.
    ///
    /// # Errors
    /// See [`NfsError`], as for all of these.
    pub async fn null(&self) -> Result<()> {
        let (name, procedure) = NULL;
        let nobody = Credential {
            uid: 65534,
            gid: 65534,
        };
        let void = nfs3_types::xdr_codec::Void;
        match self.connection.call(procedure, nobody, &void).await {
            Ok(_) => Ok(()),
            Err(source) => Err(NfsError::Call {
                procedure: name,
                source,
            }),
        }
    }

    /// GETATTR.
    pub async fn getattr(&self, credential: Credential, file: &FileHandle) -> Result<Attributes> {
        let arguments = nfs3::GETATTR3args {
            object: file.wire(),
        };
        let decode = |reply: &mut Decoder| reply.fixed::<nfs3::fattr3>().map(Attributes::from);
        self.call(GETATTR, credential, &arguments, decode).await
    }

    /// SETATTR, sent once.
    pub async fn setattr(
        &self,
        credential: Credential,
        file: &FileHandle,
        attributes: SetAttributes,
    ) -> Result<()> {
        let arguments = nfs3::SETATTR3args {
            object: file.wire(),
            new_attributes: attributes.wire(),
            guard: Nfs3Option::None,
        };
        self.call(SETATTR, credential, &arguments, weak_cache_data)
            .await
    }

    /// LOOKUP of one name in a directory.
    pub async fn lookup(
        &self,
        credential: Credential,
        directory: &FileHandle,
        name: &str,
    ) -> Result<FileHandle> {
        let arguments = nfs3::LOOKUP3args {
            what: entry(directory, name),
        };
        self.call(LOOKUP, credential, &arguments, |reply| {
            let handle = file_handle(reply)?;
            reply.optional::<nfs3::fattr3>()?;
            reply.optional::<nfs3::fattr3>()?;
            Ok(handle)
        })
        .await
    }

    /// ACCESS: which of the `wanted` rights (ACCESS3_… bits) the server would grant.
    pub async fn access(
        &self,
        credential: Credential,
        file: &FileHandle,
        wanted: u32,
    ) -> Result<u32> {
        let arguments = nfs3::ACCESS3args {
            object: file.wire(),
            access: wanted,
        };
        self.call(ACCESS, credential, &arguments, |reply| {
            reply.optional::<nfs3::fattr3>()?;
            reply.u32()
        })
        .await
    }

    /// CREATE of a file that must not exist; its handle is looked up where the server gives none.
    pub async fn create(
        &self,
        credential: Credential,
        directory: &FileHandle,
        name: &str,
        attributes: SetAttributes,
    ) -> Result<FileHandle> {
        let arguments = nfs3::CREATE3args {
            where_: entry(directory, name),
            how: nfs3::createhow3::GUARDED(attributes.wire()),
        };
        match self.call(CREATE, credential, &arguments, created).await? {
            Some(handle) => Ok(handle),
            None => self.lookup(credential, directory, name).await,
        }
    }

    /// MKDIR.
    pub async fn mkdir(
        &self,
        credential: Credential,
        directory: &FileHandle,
        name: &str,
        mode: u32,
    ) -> Result<FileHandle> {
        let attributes = SetAttributes {
            mode: Some(mode),
            ..SetAttributes::default()
        };
        let arguments = nfs3::MKDIR3args {
            where_: entry(directory, name),
            attributes: attributes.wire(),
        };
        match self.call(MKDIR, credential, &arguments, created).await? {
            Some(handle) => Ok(handle),
            None => self.lookup(credential, directory, name).await,
        }
    }

    /// REMOVE.
    pub async fn remove(
        &self,
        credential: Credential,
        directory: &FileHandle,
        name: &str,
    ) -> Result<()> {
        let arguments = nfs3::REMOVE3args {
            object: entry(directory, name),
        };
        self.call(REMOVE, credential, &arguments, weak_cache_data)
            .await
    }

    /// FSSTAT: room on the file system of the export.
    pub async fn fsstat(&self, credential: Credential) -> Result<Room> {
        let arguments = nfs3::FSSTAT3args {
            fsroot: self.root.wire(),
        };
        self.call(FSSTAT, credential, &arguments, |reply| {
            let room: nfs3::FSSTAT3resok = reply.fixed()?;
            Ok(Room {
                size_bytes: room.tbytes,
                free_bytes: room.abytes,
            })
        })
        .await
    }

    /// FSINFO: the transfer sizes, at most [`TRANSFER_BYTES_MAX`].
    pub async fn fsinfo(&self, credential: Credential) -> Result<Limits> {
        let arguments = nfs3::FSINFO3args {
            fsroot: self.root.wire(),
        };
        self.call(FSINFO, credential, &arguments, |reply| {
            let info: nfs3::FSINFO3resok = reply.fixed()?;
            Ok(Limits {
                read_bytes_max: info.rtmax.clamp(4096, TRANSFER_BYTES_MAX),
                write_bytes_max: info.wtmax.clamp(4096, TRANSFER_BYTES_MAX),
            })
        })
        .await
    }

    /// READ, begun at once.
    pub fn start_read(
        &self,
        slot: Slot,
        credential: Credential,
        file: &FileHandle,
        offset: u64,
        count: u32,
    ) -> impl Future<Output = Result<ReadReply>> + Send + use<> {
        let arguments = nfs3::READ3args {
            file: file.wire(),
            offset,
            count,
        };
        let begun = self.begin(slot, READ.1, credential, &arguments);
        complete(READ.0, begun, move |reply| {
            reply.optional::<nfs3::fattr3>()?;
            let read = reply.u32()?;
            let eof = reply.bool()?;
            let data = reply.opaque(count)?;
            if data.len() != read as usize {
                return Err(XdrError::BadValue);
            }
            Ok(ReadReply { data, eof })
        })
    }

    /// WRITE, begun at once.
    pub fn start_write(
        &self,
        slot: Slot,
        credential: Credential,
        file: &FileHandle,
        offset: u64,
        data: &Bytes,
        stable: stable_how,
    ) -> impl Future<Output = Result<WriteReply>> + Send + use<> {
        let sent = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let arguments = nfs3::WRITE3args {
            file: file.wire(),
            offset,
            count: sent,
            stable,
            data: Opaque::borrowed(data),
        };
        let begun = self.begin(slot, WRITE.1, credential, &arguments);
        complete(WRITE.0, begun, move |reply| {
            let done: nfs3::WRITE3resok = reply.fixed()?;
            if done.count > sent || (done.count == 0 && sent > 0) {
                return Err(XdrError::BadValue);
            }
            Ok(WriteReply {
                count: done.count,
                committed: done.committed != stable_how::UNSTABLE,
                verifier: done.verf.0,
            })
        })
    }

    /// COMMIT of the whole file, begun at once.
    pub fn start_commit(
        &self,
        slot: Slot,
        credential: Credential,
        file: &FileHandle,
    ) -> impl Future<Output = Result<CommitReply>> + Send + use<> {
        let arguments = nfs3::COMMIT3args {
            file: file.wire(),
            offset: 0,
            count: 0,
        };
        let begun = self.begin(slot, COMMIT.1, credential, &arguments);
        complete(COMMIT.0, begun, move |reply| {
            let done: nfs3::COMMIT3resok = reply.fixed()?;
            Ok(CommitReply {
                verifier: done.verf.0,
            })
        })
    }

    /// READ.
    pub async fn read(
        &self,
        credential: Credential,
        file: &FileHandle,
        offset: u64,
        count: u32,
    ) -> Result<ReadReply> {
        let slot = self.slot(READ.0).await?;
        self.start_read(slot, credential, file, offset, count).await
    }

    /// WRITE of one piece; the server may take fewer bytes than given.
    pub async fn write(
        &self,
        credential: Credential,
        file: &FileHandle,
        offset: u64,
        data: &Bytes,
        stable: stable_how,
    ) -> Result<WriteReply> {
        let slot = self.slot(WRITE.0).await?;
        self.start_write(slot, credential, file, offset, data, stable)
            .await
    }

    /// COMMIT of the whole file.
    pub async fn commit(&self, credential: Credential, file: &FileHandle) -> Result<CommitReply> {
        let slot = self.slot(COMMIT.0).await?;
        self.start_commit(slot, credential, file).await
    }

    async fn slot(&self, procedure: &'static str) -> Result<Slot> {
        self.connection
            .slot()
            .await
            .map_err(|source| NfsError::Call { procedure, source })
    }
}

fn entry<'a>(directory: &FileHandle, name: &'a str) -> nfs3::diropargs3<'a> {
    nfs3::diropargs3 {
        dir: directory.wire(),
        name: name.as_bytes().into(),
    }
}

/// Waits for a call that has begun and reads its results.
async fn complete<T>(
    name: &'static str,
    begun: std::result::Result<Started, CallError>,
    decode: impl FnOnce(&mut Decoder) -> std::result::Result<T, XdrError>,
) -> Result<T> {
    let reply = match begun {
        Ok(started) => started.await,
        Err(error) => Err(error),
    };
    finish(name, reply, decode)
}

/// The status, then the results or (whatever the server adds to) a refusal.
fn finish<T>(
    procedure: &'static str,
    reply: std::result::Result<Bytes, CallError>,
    decode: impl FnOnce(&mut Decoder) -> std::result::Result<T, XdrError>,
) -> Result<T> {
    let reply = reply.map_err(|source| NfsError::Call { procedure, source })?;
    let mut decoder = Decoder(reply);
    let bad = |source| NfsError::BadReply { procedure, source };
    let status: nfsstat3 = decoder.fixed().map_err(bad)?;
    if status != nfsstat3::NFS3_OK {
        return Err(NfsError::Status { procedure, status });
    }
    let result = decode(&mut decoder).map_err(bad)?;
    decoder.end().map_err(bad)?;
    Ok(result)
}

pub(crate) fn file_handle(reply: &mut Decoder) -> std::result::Result<FileHandle, XdrError> {
    let bound = nfs3::NFS3_FHSIZE as u32;
    // A copy, so that the handle does not keep the whole reply alive.
    reply
        .opaque(bound)
        .map(|handle| FileHandle(Bytes::copy_from_slice(&handle)))
}

fn weak_cache_data(reply: &mut Decoder) -> std::result::Result<(), XdrError> {
    reply.fixed::<wcc_data>().map(|_| ())
}

fn created(reply: &mut Decoder) -> std::result::Result<Option<FileHandle>, XdrError> {
    let handle = if reply.bool()? {
        Some(file_handle(reply)?)
    } else {
        None
    };
    reply.optional::<nfs3::fattr3>()?;
    weak_cache_data(reply)?;
    Ok(handle)
}
