//! From an NFS volume's address to its export's root: portmapper, MOUNT and the connection itself.
//!
//! Portmapper and MOUNT are asked through `nfs3_client`, one call a connection. Dropping one of its
//! calls half-way leaves half a record in the socket, so each runs in a task of its own that owns the
//! socket: a timeout closes the connection, and a caller who goes away cancels nothing.

use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes};
use nfs3_client::{MountClient, MountError as MountCallError, PortmapError, PortmapperClient};
use nfs3_types::mount::{self as mount3, mountstat3};
use nfs3_types::rpc::{auth_unix, opaque_auth};
use nfs3_types::xdr_codec::Opaque;
use nfs3_types::{nfs3, portmap};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::FileHandle;
use super::client::{NfsClient, NfsError};
use super::connection::Connection;
use super::xdr::{Decoder, XdrError};
use crate::dialer::{DialError, Dialer, Service};
use crate::tls::{ClientTlsError, Stream};
use crate::volume::{NfsTls, NfsUrl};

/// Why an export could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Nobody answers there.
    #[error("{url}: the server is not reachable: {source}")]
    Unreachable {
        /// The volume.
        url: NfsUrl,
        /// What the network said, and what to try.
        source: Box<DialError>,
    },
    /// Somebody answers, and does not prove to be the server.
    #[error("{url}: {source}{}", mount_in_clear_advice(.service))]
    NotSecure {
        /// The volume.
        url: NfsUrl,
        /// To which service no connection came about.
        service: &'static str,
        /// What went wrong, and what to try.
        source: Box<DialError>,
    },
    /// TLS is required, and nobody vouches for the server.
    #[error("{url}: {source}")]
    NoAuthority {
        /// The volume.
        url: NfsUrl,
        /// Says so.
        source: ClientTlsError,
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

fn mount_in_clear_advice(service: &str) -> &'static str {
    if service == MOUNT {
        "; if the server's MOUNT service has no TLS and its NFS service does (Linux), add the volume with \
         `--mount-in-clear`"
    } else {
        ""
    }
}

const MOUNT: &str = "the MOUNT service";

const NFS: &str = "the NFS service";

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

/// Nobody in particular: who asks for a mount.
const NOBODY: u32 = 65534;

/// The largest reply that a portmapper or MOUNT service gives: some hundred bytes.
const REPLY_BYTES_MAX: usize = 16 << 10;

/// The largest verifier in a reply (RFC 5531: 400 bytes).
const VERIFIER_BYTES_MAX: u32 = 400;

/// Connects to the volume's server and mounts its export; an unanswered call closes the
/// connection after `call_timeout`. What the dialer's TLS demands holds for every connection but the
/// portmapper's; an address that requires TLS is not connected to without.
///
/// # Errors
/// See [`MountError`].
pub async fn mount(
    url: &NfsUrl,
    dialer: &Dialer,
    call_timeout: Duration,
) -> Result<NfsClient, MountError> {
    if url.tls == Some(NfsTls::Require) && dialer.tls.is_none() {
        return Err(MountError::NoAuthority {
            url: url.clone(),
            source: ClientTlsError::NoAuthority,
        });
    }
    let root = match &url.root {
        Some(root) => FileHandle(Bytes::copy_from_slice(root)),
        None => ask_root(url, dialer, call_timeout).await?,
    };
    let stream = connect(url, dialer, url.nfs_port(), Service::Nfs).await?;
    let client = NfsClient::new(Connection::new(stream, call_timeout), root);
    client
        .null()
        .await
        .map_err(|error: NfsError| MountError::BadService {
            url: url.clone(),
            service: NFS,
            problem: error.to_string(),
        })?;
    Ok(client)
}

/// The file handle of the export's root, as portmapper and MOUNT have it.
///
/// # Errors
/// See [`MountError`].
pub async fn ask_root(
    url: &NfsUrl,
    dialer: &Dialer,
    call_timeout: Duration,
) -> Result<FileHandle, MountError> {
    let port = match url.mount_port() {
        Some(port) => port,
        None => ask_portmapper(url, dialer, call_timeout).await?,
    };
    ask_mount(url, dialer, port, call_timeout).await
}

async fn connect(
    url: &NfsUrl,
    dialer: &Dialer,
    port: u16,
    service: Service,
) -> Result<Stream, MountError> {
    let connected = dialer.connect(&url.host, port, service).await;
    connected.map_err(|source| {
        let url = url.clone();
        let source = Box::new(source);
        match *source {
            DialError::Connect { .. } => MountError::Unreachable { url, source },
            DialError::Tls { .. } => MountError::NotSecure {
                url,
                service: match service {
                    Service::Portmapper => "the portmapper",
                    Service::Mount => MOUNT,
                    Service::Nfs => NFS,
                },
                source,
            },
        }
    })
}

async fn ask_portmapper(
    url: &NfsUrl,
    dialer: &Dialer,
    call_timeout: Duration,
) -> Result<u16, MountError> {
    let stream = connect(url, dialer, portmap::PMAP_PORT, Service::Portmapper).await?;
    ask_portmapper_over(stream, url, call_timeout).await
}

/// The MOUNT service's port, asked over a connection to the portmapper.
pub(crate) async fn ask_portmapper_over(
    stream: impl Into<Stream>,
    url: &NfsUrl,
    call_timeout: Duration,
) -> Result<u16, MountError> {
    let mut client = PortmapperClient::new(CheckedReplies::new(stream.into(), check_portmapper));
    let asked = undisturbed(call_timeout, async move {
        client
            .getport(mount3::PROGRAM, mount3::VERSION, portmap::IPPROTO_TCP)
            .await
    });
    let problem = match asked.await {
        Ok(Ok(port)) => return Ok(port),
        Ok(Err(PortmapError::ProgramUnavailable)) => {
            return Err(MountError::NotRegistered {
                url: url.clone(),
                service: "MOUNT service",
            });
        }
        Ok(Err(error)) => error.to_string(),
        Err(problem) => problem,
    };
    Err(MountError::BadService {
        url: url.clone(),
        service: "the portmapper",
        problem,
    })
}

async fn ask_mount(
    url: &NfsUrl,
    dialer: &Dialer,
    port: u16,
    call_timeout: Duration,
) -> Result<FileHandle, MountError> {
    let stream = connect(url, dialer, port, Service::Mount).await?;
    ask_mount_over(stream, url, call_timeout).await
}

/// The export's root, asked over a connection to the MOUNT service.
pub(crate) async fn ask_mount_over(
    stream: impl Into<Stream>,
    url: &NfsUrl,
    call_timeout: Duration,
) -> Result<FileHandle, MountError> {
    let credential = opaque_auth::auth_unix(&auth_unix {
        uid: NOBODY,
        gid: NOBODY,
        ..Default::default()
    });
    let replies = CheckedReplies::new(stream.into(), check_mount);
    let mut client = MountClient::new_with_auth(replies, credential, opaque_auth::default());
    let path = mount3::dirpath(Opaque::owned(url.export.as_bytes().to_vec()));
    let asked = undisturbed(call_timeout, async move { client.mnt(path).await });
    let problem = match asked.await {
        // The flavors are not looked at: our calls use AUTH_SYS, and a server that does not take
        // it says so to each of them.
        Ok(Ok(mounted)) => {
            return Ok(FileHandle(Bytes::copy_from_slice(
                mounted.fhandle.0.as_ref(),
            )));
        }
        Ok(Err(MountCallError::Denied(status))) => {
            return Err(MountError::Refused {
                url: url.clone(),
                status,
            });
        }
        Ok(Err(MountCallError::Rpc(error))) => error.to_string(),
        Err(problem) => problem,
    };
    Err(MountError::BadService {
        url: url.clone(),
        service: MOUNT,
        problem,
    })
}

/// Makes a call in a task of its own, which owns the connection and drops it at the end or after `timeout`.
async fn undisturbed<T: Send + 'static>(
    timeout: Duration,
    call: impl Future<Output = T> + Send + 'static,
) -> Result<T, String> {
    let task = tokio::spawn(tokio::time::timeout(timeout, call));
    match task.await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(_)) => Err(format!("no answer within {timeout:?}")),
        Err(error) => Err(format!("the call did not end: {error}")),
    }
}

/// A socket that hands `nfs3_client` only replies whose lengths were checked: it reserves as much
/// memory as a length field says before it looks at the data.
struct CheckedReplies {
    stream: Stream,
    /// What of the present reply was not handed out yet.
    reply: Bytes,
    check: fn(&mut Decoder) -> Result<(), XdrError>,
}

impl CheckedReplies {
    fn new(stream: Stream, check: fn(&mut Decoder) -> Result<(), XdrError>) -> CheckedReplies {
        CheckedReplies {
            stream,
            reply: Bytes::new(),
            check,
        }
    }

    async fn next_reply(&mut self) -> io::Result<Bytes> {
        let header = self.stream.read_u32().await?;
        let length = (header & 0x7fff_ffff) as usize;
        if length > REPLY_BYTES_MAX {
            let text =
                format!("a reply of {length} bytes where at most {REPLY_BYTES_MAX} are allowed");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let mut record = vec![0; 4 + length];
        record[..4].copy_from_slice(&header.to_be_bytes());
        self.stream.read_exact(&mut record[4..]).await?;
        let record = Bytes::from(record);
        check_header(&mut Decoder(record.slice(4..)), self.check)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(record)
    }
}

impl nfs3_client::io::AsyncRead for CheckedReplies {
    async fn async_read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.reply.is_empty() {
            self.reply = self.next_reply().await?;
        }
        let count = buffer.len().min(self.reply.len());
        self.reply.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

impl nfs3_client::io::AsyncWrite for CheckedReplies {
    async fn async_write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.stream.write(buffer).await?;
        // Under TLS, written is not yet sent; the caller knows no flush.
        self.stream.flush().await?;
        Ok(written)
    }
}

/// The lengths in an RPC reply (RFC 5531 section 9): its verifier's, then, where the call was
/// executed, those in its result. Everything else has a fixed size, or is decoded as an error.
fn check_header(
    reply: &mut Decoder,
    check_result: fn(&mut Decoder) -> Result<(), XdrError>,
) -> Result<(), XdrError> {
    const REPLY: u32 = 1;
    const MSG_ACCEPTED: u32 = 0;
    const SUCCESS: u32 = 0;
    let _xid = reply.u32()?;
    if reply.u32()? != REPLY {
        return Err(XdrError::BadValue);
    }
    if reply.u32()? != MSG_ACCEPTED {
        return Ok(());
    }
    let _flavor = reply.u32()?;
    reply.opaque(VERIFIER_BYTES_MAX)?;
    if reply.u32()? == SUCCESS {
        check_result(reply)?;
    }
    Ok(())
}

/// A port number.
fn check_portmapper(result: &mut Decoder) -> Result<(), XdrError> {
    result.u32().map(|_| ())
}

/// A status; with it a file handle and a list of flavors.
fn check_mount(result: &mut Decoder) -> Result<(), XdrError> {
    if result.u32()? != mountstat3::MNT3_OK as u32 {
        return Ok(());
    }
    result.opaque(mount3::FHSIZE3 as u32)?;
    let (count, room) = (result.u32()?, result.0.remaining() as u32 / 4);
    if count > room {
        return Err(XdrError::TooLong {
            length: count,
            bound: room,
        });
    }
    Ok(())
}

// The largest handle is the same in both protocols.
const _: () = assert!(mount3::FHSIZE3 == nfs3::NFS3_FHSIZE);

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers one connection with `reply` behind the call's xid, and tells whether the peer then closed it.
    async fn answer_once(reply: Vec<u8>) -> (NfsUrl, tokio::task::JoinHandle<bool>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let url = format!("nfs://127.0.0.1:{port}/export?mountport={port}").parse();
        let crate::volume::VolumeUrl::Nfs(url) = url.unwrap() else {
            panic!("no NFS address")
        };
        let task = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut call = vec![0; (stream.read_u32().await.unwrap() & 0x7fff_ffff) as usize];
            stream.read_exact(&mut call).await.unwrap();
            if !reply.is_empty() {
                let length = 0x8000_0000 | (4 + reply.len() as u32);
                stream.write_u32(length).await.unwrap();
                stream.write_all(&call[..4]).await.unwrap();
                stream.write_all(&reply).await.unwrap();
            }
            // A socket closed with unread data in it ends with a reset.
            !matches!(stream.read(&mut [0]).await, Ok(1..))
        });
        (url, task)
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_be_bytes()).collect()
    }

    async fn problem_of(reply: Vec<u8>) -> String {
        let (url, server) = answer_once(reply).await;
        let error = mount(&url, &Dialer::default(), Duration::from_millis(300))
            .await
            .unwrap_err();
        let closed = tokio::time::timeout(Duration::from_secs(5), server).await;
        assert!(closed.unwrap().unwrap(), "the connection stays open");
        error.to_string()
    }

    #[tokio::test]
    async fn a_service_that_does_not_answer_is_named_and_left() {
        let problem = problem_of(Vec::new()).await;
        assert!(problem.contains("MOUNT service"), "{problem}");
        assert!(problem.contains("no answer within"), "{problem}");
    }

    #[tokio::test]
    async fn a_refusal_says_what_to_try() {
        let problem = problem_of(words(&[1, 0, 0, 0, 0, 13])).await;
        assert!(problem.contains("`insecure`"), "{problem}");
    }

    #[tokio::test]
    async fn absurd_lengths_are_refused_before_memory_is_reserved() {
        for reply in [
            words(&[1, 0, 0, u32::MAX]),
            words(&[1, 0, 0, 0, 0, 0, u32::MAX]),
            words(&[1, 0, 0, 0, 0, 0, 4, 7, u32::MAX]),
            words(&[1, 0, 0]),
            vec![0; REPLY_BYTES_MAX],
        ] {
            let problem = problem_of(reply).await;
            assert!(problem.contains("MOUNT service"), "{problem}");
        }
    }
}
