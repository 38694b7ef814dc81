//! A stream that somebody else can break: its link is cut, its node was removed.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// `stream` until `broken` is set; from then on every read and write fails with `why`. It carries what is known of
/// whose it is.
#[derive(Debug)]
pub struct Breakable<S, W = ()> {
    pub(super) stream: S,
    broken: Arc<AtomicBool>,
    why: &'static str,
    whose: W,
}

impl<S> Breakable<S> {
    /// One that breaks when `broken` is set.
    pub fn new(stream: S, broken: Arc<AtomicBool>, why: &'static str) -> Breakable<S> {
        Breakable::of((), stream, broken, why)
    }
}

impl<S, W> Breakable<S, W> {
    /// One of whom `whose` tells.
    pub fn of(whose: W, stream: S, broken: Arc<AtomicBool>, why: &'static str) -> Breakable<S, W> {
        Breakable {
            stream,
            broken,
            why,
            whose,
        }
    }

    /// Whose it is.
    pub fn whose(&self) -> &W {
        &self.whose
    }

    fn check(&self) -> io::Result<()> {
        if self.broken.load(Ordering::Relaxed) {
            Err(io::Error::new(io::ErrorKind::ConnectionReset, self.why))
        } else {
            Ok(())
        }
    }
}

impl<S: AsyncRead + Unpin, W: Unpin> AsyncRead for Breakable<S, W> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin, W: Unpin> AsyncWrite for Breakable<S, W> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_broken_stream_neither_reads_nor_writes() {
        let (here, mut there) = tokio::io::duplex(64);
        let broken = Arc::new(AtomicBool::new(false));
        let mut stream = Breakable::new(here, broken.clone(), "broken by the test");
        there.write_all(b"ab").await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'a');
        stream.write_all(b"c").await.unwrap();
        broken.store(true, Ordering::Relaxed);
        let read = stream.read_u8().await.unwrap_err();
        let written = stream.write_all(b"d").await.unwrap_err();
        assert_eq!(read.to_string(), "broken by the test");
        assert_eq!(written.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(there.read_u8().await.unwrap(), b'c');
    }
}
