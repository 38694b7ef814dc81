//! How a connection begins: with the question for TLS and a handshake, or with ordinary calls.

use bytes::{Buf, BytesMut};
use nfs3_types::{mount as mount3, nfs3};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::Shared;
use super::connection::{End, GATHER_BYTES, STALL_TIMEOUT};
use super::rpc::{self, Call, Claim, Message};
use crate::tls::Stream;
use crate::tls::starttls::QUESTION_BYTES;

/// A connection that has begun.
pub(super) struct Greeted {
    pub(super) stream: Stream,
    /// What has been received of its calls already; nothing under TLS.
    pub(super) received: BytesMut,
}

/// Waits for the first bytes of a connection and secures it, if that is what they ask for. `None`: it was closed.
pub(super) async fn greet(mut stream: TcpStream, shared: &Shared) -> Result<Option<Greeted>, End> {
    let mut received = BytesMut::new();
    let Some(tls) = &shared.tls else {
        return Ok(Some(Greeted {
            stream: stream.into(),
            received,
        }));
    };
    // Only as many bytes as the question has: what is longer is another call, which its reader reads.
    while received.len() < QUESTION_BYTES {
        received.reserve(GATHER_BYTES);
        let read = if received.is_empty() {
            stream.read_buf(&mut received).await
        } else {
            timeout(STALL_TIMEOUT, stream.read_buf(&mut received))
                .await
                .map_err(|_| End::Stalled)?
        };
        if read? == 0 {
            return Ok(None);
        }
        if !may_be_question(&received) {
            break;
        }
    }
    let Some(xid) = question(&received) else {
        return Ok(Some(Greeted {
            stream: stream.into(),
            received,
        }));
    };
    // What follows the question in clear would otherwise be taken for something said under TLS, or
    // for a handshake that somebody else began.
    if received.len() > QUESTION_BYTES {
        return Err(End::InClear);
    }
    let secured = async {
        stream.write_all(&rpc::finish(rpc::start_tls(xid))).await?;
        tls.accept(stream).await
    };
    let stream = timeout(tls.handshake_timeout, secured)
        .await
        .map_err(|_| End::Stalled)?
        .map_err(End::Handshake)?;
    Ok(Some(Greeted {
        stream,
        received: BytesMut::new(),
    }))
}

/// Whether a record of the question's length begins here, as far as has been received.
fn may_be_question(received: &[u8]) -> bool {
    let mark = ((QUESTION_BYTES as u32 - 4) | 1 << 31).to_be_bytes();
    received.iter().zip(mark).all(|(byte, mark)| *byte == mark)
}

/// The xid of the question for TLS, if it is that, for a program served here.
fn question(received: &BytesMut) -> Option<u32> {
    if received.len() < QUESTION_BYTES || !may_be_question(received) {
        return None;
    }
    let mut record = received.clone().split_to(QUESTION_BYTES);
    record.advance(4);
    match rpc::decode(record.freeze()) {
        Ok(Message::Call(Call {
            xid,
            program: nfs3::PROGRAM | mount3::PROGRAM,
            version: nfs3::VERSION,
            procedure: 0,
            from: Claim::Tls,
            ..
        })) => Some(xid),
        _ => None,
    }
}

// One pattern serves for both programs.
const _: () = assert!(nfs3::VERSION == mount3::VERSION);
