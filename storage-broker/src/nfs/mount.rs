//! From an NFS volume's address to its export's root: portmapper, MOUNT and the connection itself.

use std::time::Duration;

use nfs3_types::mount::{self as mount3, mountstat3};
use nfs3_types::xdr_codec::Opaque;
use nfs3_types::{nfs3, portmap};

use super::client::{NfsClient, NfsError, file_handle};
use super::connection::{CallError, Connection, Credential, Procedure};
use super::xdr::{Decoder, XdrError};
use crate::dialer::{DialError, Dialer};
use crate::volume::NfsUrl;

/// Why an export could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Nobody answers there.
    #[error("{url}: the server is not reachable: {source}")]
    Unreachable {
        /// The volume.
        url: NfsUrl,
        /// What the network said, and what to try.
        source: DialError,
    },
    /// Something answers, but not as the service expected.
    #[error(
        "{url}: {service} did not answer as it should: {problem}; check the ports in the volume's address"
    )]
    BadService {
        /// The volume.
        url: NfsUrl,
        /// Which service.
        service: &'static str,
        /// What it did.
        problem: String,
    },
    /// The portmapper does not know a service.
    #[error(
        "{url}: the server's portmapper knows no {service}; start it, or give its port (`?mountport=`)"
    )]
    NotRegistered {
        /// The volume.
        url: NfsUrl,
        /// Which service.
        service: &'static str,
    },
    /// The server does not export that path to this node.
    #[error("{url}: the server refuses to mount `{}` ({status}); {}", .url.export, mount_advice(*.status))]
    Refused {
        /// The volume.
        url: NfsUrl,
        /// The server's answer.
        status: mountstat3,
    },
}

fn mount_advice(status: mountstat3) -> &'static str {
    match status {
        mountstat3::MNT3ERR_NOENT | mountstat3::MNT3ERR_NOTDIR => {
            "it has no such directory: check the export's path (`showmount -e` on the server lists them)"
        }
        mountstat3::MNT3ERR_ACCES | mountstat3::MNT3ERR_PERM => {
            "it does not export this path to this node: check the path, the export's client list, and `insecure`"
        }
        _ => "see the server's log",
    }
}

const PORTMAPPER_PORT: u16 = 111;

/// Nobody in particular: what asks for ports and mounts.
const ANYBODY: Credential = Credential {
    uid: 65534,
    gid: 65534,
};

/// Connects to the volume's server and mounts its export; an unanswered call closes the
/// connection after `call_timeout`.
///
/// # Errors
/// See [`MountError`].
pub async fn mount(
    url: &NfsUrl,
    dialer: &Dialer,
    call_timeout: Duration,
) -> Result<NfsClient, MountError> {
    let mount_port = match url.mount_port() {
        Some(port) => port,
        None => ask_portmapper(url, dialer, call_timeout).await?,
    };
    let connection = connect(url, dialer, mount_port, call_timeout).await?;
    let procedure = Procedure {
        program: mount3::PROGRAM,
        version: mount3::VERSION,
        number: mount3::MOUNT_PROGRAM::MOUNTPROC3_MNT as u32,
    };
    let path = mount3::dirpath(Opaque::borrowed(url.export.as_bytes()));
    let bad = |problem: String| MountError::BadService {
        url: url.clone(),
        service: "the MOUNT service",
        problem,
    };
    let reply = connection
        .call(procedure, ANYBODY, &path)
        .await
        .map_err(|error| bad(error.to_string()))?;
    let root = match decode_mount(&mut Decoder(reply)).map_err(|error| bad(error.to_string()))? {
        Ok(root) => root,
        Err(status) => {
            return Err(MountError::Refused {
                url: url.clone(),
                status,
            });
        }
    };
    let connection = if mount_port == url.nfs_port() {
        connection
    } else {
        connect(url, dialer, url.nfs_port(), call_timeout).await?
    };
    let client = NfsClient::new(connection, root);
    client
        .null()
        .await
        .map_err(|error: NfsError| MountError::BadService {
            url: url.clone(),
            service: "the NFS service",
            problem: error.to_string(),
        })?;
    Ok(client)
}

async fn connect(
    url: &NfsUrl,
    dialer: &Dialer,
    port: u16,
    call_timeout: Duration,
) -> Result<Connection, MountError> {
    match dialer.connect(&url.host, port).await {
        Ok(stream) => Ok(Connection::new(stream, call_timeout)),
        Err(source) => Err(MountError::Unreachable {
            url: url.clone(),
            source,
        }),
    }
}

async fn ask_portmapper(
    url: &NfsUrl,
    dialer: &Dialer,
    call_timeout: Duration,
) -> Result<u16, MountError> {
    let service = "MOUNT service";
    let connection = connect(url, dialer, PORTMAPPER_PORT, call_timeout).await?;
    let procedure = Procedure {
        program: portmap::PROGRAM,
        version: portmap::VERSION,
        number: portmap::PMAP_PROG::PMAPPROC_GETPORT as u32,
    };
    let wanted = portmap::mapping {
        prog: mount3::PROGRAM,
        vers: mount3::VERSION,
        prot: portmap::IPPROTO_TCP,
        port: 0,
    };
    let reply: Result<_, CallError> = connection.call(procedure, ANYBODY, &wanted).await;
    let bad = |problem: String| MountError::BadService {
        url: url.clone(),
        service: "the portmapper",
        problem,
    };
    let reply = reply.map_err(|error| bad(error.to_string()))?;
    match Decoder(reply).u32().map(u16::try_from) {
        Ok(Ok(0)) => Err(MountError::NotRegistered {
            url: url.clone(),
            service,
        }),
        Ok(Ok(port)) => Ok(port),
        Ok(Err(_)) => Err(bad("it named a port above 65535".into())),
        Err(error) => Err(bad(error.to_string())),
    }
}

/// The root's handle, or the server's refusal. The list of flavors after it is not read: our
/// calls use AUTH_SYS, and a server that does not take it says so to each of them.
fn decode_mount(reply: &mut Decoder) -> Result<Result<super::FileHandle, mountstat3>, XdrError> {
    let status: mountstat3 = reply.fixed()?;
    if matches!(status, mountstat3::MNT3_OK) {
        file_handle(reply).map(Ok)
    } else {
        Ok(Err(status))
    }
}

// The largest handle is the same in both protocols.
const _: () = assert!(mount3::FHSIZE3 == nfs3::NFS3_FHSIZE);
