//! The node's own socket: whoever may open it administers this node, and the kernel says who that is.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::{Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::server::Connected;

use super::caller::{Caller, Shown};

/// A connection of a process on this host.
#[derive(Debug)]
pub struct LocalGuest {
    stream: UnixStream,
    uid: u32,
}

/// The connections of root and of this daemon's own user; others are turned away. The socket's mode says the
/// same, this does not rest on it.
pub fn guests(listener: UnixListenerStream) -> impl Stream<Item = io::Result<LocalGuest>> {
    let own = nix::unistd::geteuid().as_raw();
    listener.filter_map(move |accepted| async move {
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => return Some(Err(error)),
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 || peer.uid() == own => Some(Ok(LocalGuest {
                uid: peer.uid(),
                stream,
            })),
            Ok(peer) => {
                tracing::warn!(uid = peer.uid(), "turned away at this node's socket");
                None
            }
            Err(error) => {
                tracing::debug!(%error, "it is not known who came to this node's socket");
                None
            }
        }
    })
}

impl Connected for LocalGuest {
    type ConnectInfo = Caller;
    fn connect_info(&self) -> Caller {
        Caller {
            shown: Shown::Local { uid: self.uid },
            from: "local".into(),
        }
    }
}

impl AsyncRead for LocalGuest {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for LocalGuest {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
