//! A commit point travels with the next entries, if they come at once.
//!
//! openraft sends a new commit point as soon as there is one, in a request of its own when the log has
//! nothing new: on a busy log two more messages for each follower and commit, a moment before the next
//! entries would have carried it. So a replication stream with nothing to send but a commit point first
//! lets other tasks run: whoever was answered by this commit may propose again. Nobody waits for a clock, and
//! entries go at once.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use futures::Stream;

use super::wire::AppendRequest;

/// How often other tasks may run before a commit point goes alone.
const TURNS: u32 = 64;

/// The index that the log's next entry will have, for whoever does not hold the log. Only a hint.
#[derive(Clone, Debug, Default)]
pub(super) struct LogEnd(Arc<AtomicU64>);

impl LogEnd {
    pub(super) fn set(&self, end: u64) {
        self.0.store(end, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A stream of append requests whose commit points wait for the next entries, see the module.
pub(super) struct Carried<S> {
    input: S,
    log_end: LogEnd,
    /// Where the log ends at the receiver, when it has all that was sent.
    sent_end: u64,
    /// Whether the input had nothing when it was last asked: woken since, it may have a commit point alone.
    idle: bool,
    turns: u32,
}

impl<S> Carried<S> {
    pub(super) fn new(input: S, log_end: LogEnd) -> Carried<S> {
        Carried {
            input,
            log_end,
            sent_end: 0,
            idle: false,
            turns: 0,
        }
    }
}

impl<S: Stream<Item = AppendRequest> + Unpin> Stream for Carried<S> {
    type Item = AppendRequest;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<AppendRequest>> {
        let nothing_new = self.log_end.get() <= self.sent_end;
        if self.idle && nothing_new && self.turns < TURNS {
            self.turns += 1;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let polled = Pin::new(&mut self.input).poll_next(cx);
        self.turns = 0;
        self.idle = polled.is_pending();
        if let Poll::Ready(Some(request)) = &polled {
            let before = request.prev_log_id.map_or(0, |last| last.index + 1);
            self.sent_end = before + request.entries.len() as u64;
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use futures::channel::mpsc;
    use openraft::EntryPayload;

    use super::super::types::{Entry, LogId, Vote};
    use super::*;

    fn request(entries: std::ops::Range<u64>) -> AppendRequest {
        let at = |index| LogId {
            leader_id: Vote::new_committed(1, 1).leader_id,
            index,
        };
        AppendRequest {
            vote: Vote::new_committed(1, 1),
            prev_log_id: entries.start.checked_sub(1).map(at),
            leader_commit: None,
            entries: entries
                .map(|index| Entry {
                    log_id: at(index),
                    payload: EntryPayload::Blank,
                })
                .collect(),
        }
    }

    #[test]
    fn entries_go_at_once_and_a_commit_point_alone_after_others_had_their_turns() {
        let log_end = LogEnd::default();
        let (sender, input) = mpsc::unbounded();
        let mut carried = Carried::new(input, log_end.clone());
        let mut cx = Context::from_waker(std::task::Waker::noop());
        log_end.set(3);
        sender.unbounded_send(request(0..3)).unwrap();
        assert!(carried.poll_next_unpin(&mut cx).is_ready());
        assert!(carried.poll_next_unpin(&mut cx).is_pending());
        // The same end again: a commit point alone.
        sender.unbounded_send(request(3..3)).unwrap();
        for _ in 0..TURNS {
            assert!(carried.poll_next_unpin(&mut cx).is_pending());
        }
        assert!(carried.poll_next_unpin(&mut cx).is_ready());
        // New entries while a commit point waits end its waiting.
        for _ in 0..3 {
            assert!(carried.poll_next_unpin(&mut cx).is_pending());
        }
        log_end.set(5);
        sender.unbounded_send(request(3..5)).unwrap();
        assert!(carried.poll_next_unpin(&mut cx).is_ready());
    }
}
