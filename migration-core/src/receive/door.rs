//! The destination's door: who may come in. One task owns what it knows.
//!
//! A connection must show the migration's ticket in its first frame, within the bound of a handshake.
//! The ticket opens each channel once, channel 0 first; anyone else is told why and closed, and
//! whoever is inside already does not notice.

use crate::error::{FrameError, ReceiveError};
use crate::frame::{Hello, Kind, accepted, encode_error};
use crate::net::{Acceptor, BoxStream};
use crate::options::{Credentials, ReceiveOptions};
use crate::wire::{FrameReader, FrameWriter, split};
use futures::future::BoxFuture;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

/// Handshakes at a time. One more ends the oldest: a source is through within milliseconds, who still has not
/// said who he is after 64 others came hardly will. Refusing the newest instead would let 64 silent
/// connections shut the door for as long as a handshake may take. A migration opens at most 16 channels.
const HANDSHAKES_MAX: usize = 64;

/// Failures of `accept` in a row before the port counts as broken (it may be short of descriptors for a moment).
const ACCEPT_FAILURES_MAX: u32 = 20;

/// The pause after one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long someone who is turned away may take to read why.
const REFUSAL_MAX: Duration = Duration::from_millis(500);

/// A connection that showed the ticket.
pub struct Admitted {
    pub channel: u16,
    pub channels: u16,
    pub reader: FrameReader,
    pub writer: FrameWriter,
}

type Introduced = (Result<Hello, FrameError>, FrameReader, FrameWriter);

/// Keeps the door until the engine has gone; sends it whoever is admitted.
pub async fn keep(
    acceptor: Arc<dyn Acceptor>,
    credentials: Credentials,
    options: ReceiveOptions,
    admitted: mpsc::Sender<Result<Admitted, ReceiveError>>,
) {
    let mut handshakes: JoinSet<Option<Introduced>> = JoinSet::new();
    // Oldest first; those that are over are let go of when the next one comes.
    let mut under_way: VecDeque<AbortHandle> = VecDeque::new();
    let mut refusals: JoinSet<()> = JoinSet::new();
    let mut taken: Vec<bool> = Vec::new();
    let mut failures = 0;
    loop {
        tokio::select! {
            () = admitted.closed() => return,
            accepted = acceptor.accept() => match accepted {
                Ok(securing) => {
                    failures = 0;
                    under_way.retain(|handshake| !handshake.is_finished());
                    if under_way.len() == HANDSHAKES_MAX && let Some(oldest) = under_way.pop_front() {
                        oldest.abort();
                    }
                    under_way.push_back(handshakes.spawn(introduce(securing, options.handshake_timeout)));
                }
                Err(error) => {
                    failures += 1;
                    tracing::warn!(%error, "could not accept a migration connection");
                    if failures == ACCEPT_FAILURES_MAX {
                        let _ = admitted.send(Err(ReceiveError::Accept(error))).await;
                        return;
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(done) = handshakes.join_next() => {
                let Ok(Some((hello, reader, writer))) = done else { continue };
                match hello.map_err(|error| error.to_string())
                    .and_then(|hello| admit(&hello, &credentials, &mut taken).map(|version| (hello, version)))
                {
                    Ok((hello, version)) => {
                        let Some(pair) = welcome(version, reader, writer, &options).await else { continue };
                        let (reader, writer) = pair;
                        let Hello { channel, channels, .. } = hello;
                        let guest = Admitted { channel, channels, reader, writer };
                        if admitted.send(Ok(guest)).await.is_err() {
                            return;
                        }
                    }
                    Err(reason) => {
                        tracing::warn!(%reason, "a migration connection was turned away");
                        if refusals.len() < HANDSHAKES_MAX {
                            refusals.spawn(refuse(reason, reader, writer));
                        }
                    }
                }
            }
            Some(_) = refusals.join_next() => {}
        }
    }
}

async fn introduce(
    securing: BoxFuture<'static, io::Result<BoxStream>>,
    bound: Duration,
) -> Option<Introduced> {
    let shaken = timeout(bound, async {
        let (mut reader, writer) = split(securing.await.ok()?, bound);
        let hello = match reader.expect(Kind::Hello).await {
            Ok(payload) => Hello::decode(&payload),
            Err(Err(crate::wire::WireError::Frame(error))) => Err(error),
            // Gone, or silent, or came to say that it gives up: no one to answer.
            Err(_) => return None,
        };
        Some((hello, reader, writer))
    });
    shaken.await.ok().flatten()
}

/// Whether this introduction opens a channel; the version to speak, or why not.
fn admit(hello: &Hello, due: &Credentials, taken: &mut Vec<bool>) -> Result<u16, String> {
    let shown = &hello.credentials;
    // One answer for both, so that a guesser learns nothing.
    if !shown.ticket.matches(&due.ticket) || shown.migration_id != due.migration_id {
        return Err("the ticket is not one for a migration that is expected here".into());
    }
    let version = hello.pick_version().map_err(|error| error.to_string())?;
    if taken.is_empty() {
        if hello.channel != 0 {
            return Err("channel 0 comes first".into());
        }
        *taken = vec![false; usize::from(hello.channels)];
    }
    if taken.len() != usize::from(hello.channels) {
        return Err("another number of channels was announced".into());
    }
    match taken.get_mut(usize::from(hello.channel)) {
        Some(slot) if !*slot => {
            *slot = true;
            Ok(version)
        }
        _ => Err("the ticket was used already".into()),
    }
}

/// Answers; `None` when the source is gone, which the engine notices by its own bound.
async fn welcome(
    version: u16,
    mut reader: FrameReader,
    mut writer: FrameWriter,
    options: &ReceiveOptions,
) -> Option<(FrameReader, FrameWriter)> {
    let answer = timeout(REFUSAL_MAX, writer.write(&mut accepted(version))).await;
    answer.ok()?.ok()?;
    reader.set_dead_after(options.dead_after);
    Some((reader, writer))
}

async fn refuse(reason: String, mut reader: FrameReader, mut writer: FrameWriter) {
    let told = async {
        if writer.write(&mut encode_error(&reason)).await.is_ok() {
            writer.close().await;
            // Closing with bytes unread would take the reason away from under the peer.
            reader.drain().await;
        }
    };
    let _ = timeout(REFUSAL_MAX, told).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Ticket;

    #[test]
    fn a_ticket_opens_each_channel_once_and_channel_0_first() {
        let due = Credentials {
            migration_id: 7,
            ticket: Ticket([5; 32]),
        };
        let hello = |channel, channels, credentials| Hello::new(channel, channels, credentials);
        let mut taken = Vec::new();
        let mut admit = |hello: Hello| admit(&hello, &due, &mut taken).map_err(|_| ());
        let mut wrong = due;
        wrong.ticket.0[31] ^= 1;
        assert_eq!(admit(hello(0, 2, wrong)), Err(()), "wrong ticket");
        let other = Credentials {
            migration_id: 8,
            ..due
        };
        assert_eq!(admit(hello(0, 2, other)), Err(()), "another migration");
        assert_eq!(admit(hello(1, 2, due)), Err(()), "data before control");
        assert_eq!(admit(hello(0, 2, due)), Ok(1));
        assert_eq!(
            admit(hello(0, 2, due)),
            Err(()),
            "the control channel again"
        );
        assert_eq!(
            admit(hello(1, 3, due)),
            Err(()),
            "another number of channels"
        );
        assert_eq!(admit(hello(1, 2, due)), Ok(1));
        assert_eq!(admit(hello(1, 2, due)), Err(()), "a data channel again");
    }

    #[test]
    fn a_version_that_is_not_spoken_here_is_refused_and_named() {
        let due = Credentials {
            migration_id: 7,
            ticket: Ticket([5; 32]),
        };
        let hello = Hello {
            version_min: 8,
            version_max: 9,
            ..Hello::new(0, 1, due)
        };
        let reason = admit(&hello, &due, &mut Vec::new()).unwrap_err();
        assert!(reason.contains("8 to 9"), "{reason}");
    }
}
