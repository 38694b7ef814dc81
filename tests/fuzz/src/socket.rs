//! A connection without a network: a pair of Unix sockets, one end in the place of a TCP one.
//!
//! A TCP connection for each input would use up the host's ports within seconds.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

/// The two ends, within a runtime: the code's, and the input's.
///
/// # Errors
/// When the process has no descriptors left.
pub fn pair() -> io::Result<(TcpStream, UnixStream)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    let ours = std::net::TcpStream::from(OwnedFd::from(ours));
    Ok((TcpStream::from_std(ours)?, UnixStream::from_std(theirs)?))
}

/// The next record of one fragment (RFC 5531, section 11), as our side writes them.
///
/// # Errors
/// At the stream's end.
pub async fn read_record(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let header = stream.read_u32().await?;
    assert!(header >> 31 == 1, "a record of ours in several fragments");
    let mut record = vec![0; (header & 0x7fff_ffff) as usize];
    stream.read_exact(&mut record).await?;
    Ok(record)
}

/// Writes a record in as many fragments.
///
/// # Errors
/// When nobody reads any more.
pub async fn write_record(
    stream: &mut UnixStream,
    record: &[u8],
    fragments: usize,
) -> io::Result<()> {
    let mut rest = record;
    for left in (1..=fragments.max(1)).rev() {
        let (fragment, more) = rest.split_at(rest.len() / left);
        let last = if left == 1 { 1 << 31 } else { 0 };
        stream.write_u32(fragment.len() as u32 | last).await?;
        stream.write_all(fragment).await?;
        rest = more;
    }
    Ok(())
}
