//! What may be sent now, and sending it.

use futures::FutureExt;
use tokio::time::Instant;

use super::{COMMIT_FROM_BYTES, Done, Drained, Engine, Link, Stable};
use crate::disk::DrainError;
use crate::nfs::NfsClient;
use crate::nfs::connection::Slot;

impl Engine {
    /// Sends whatever may be sent, and answers whoever waited for what has come about.
    pub(super) fn pump(&mut self) {
        self.send_all();
        self.finish_replay();
        // The end of a replay lets reads go that waited for it.
        self.send_all();
        self.finish_flushes();
        self.finish_drains();
    }

    fn send_all(&mut self) {
        self.waits_for_stall = self
            .stall
            .as_ref()
            .is_some_and(|s| s.until > Instant::now());
        if self.rekey_wanted.is_some() || self.waits_for_stall {
            return;
        }
        let Link::Up { client } = &self.link else {
            return;
        };
        if client.connection().is_closed() {
            return;
        }
        let client = client.clone();
        // The gate stays locked while requests are handed over: when `hold` has returned, none is.
        let shared = self.shared.clone();
        let held = shared.gate();
        if self.verify {
            if !*held {
                self.send_commit(&client);
            }
            return;
        }
        loop {
            // Turn and turn about, so that neither kind starves the other; COMMITs are rare.
            let commit = !*held && self.commit_due() && self.send_commit(&client);
            let write = self.send_write(&client, *held);
            let read = !*held && self.replay.is_none() && self.send_read(&client);
            if !(commit || write || read) {
                return;
            }
        }
    }

    fn send_write(&mut self, client: &NfsClient, held: bool) -> bool {
        let Some((sequence, offset, data)) = self.writes.next_sendable() else {
            return false;
        };
        // A replay goes on while the disk is held (its token was confirmed); nothing newer does.
        let replayed = self
            .replay
            .as_ref()
            .is_some_and(|replay| sequence < replay.end);
        if held && !replayed {
            return false;
        }
        let Some(slot) = client.connection().try_slot() else {
            return false;
        };
        let sent = Instant::now();
        let call = client.start_write(
            slot,
            self.credential(),
            &self.file,
            offset,
            &data,
            Stable::UNSTABLE,
        );
        self.writes.mark_sent(sequence);
        self.calls.push(
            call.map(move |result| Done::Write {
                sequence,
                sent,
                result,
            })
            .boxed(),
        );
        true
    }

    fn send_read(&mut self, client: &NfsClient) -> bool {
        if self.reads.waiting() == 0 {
            return false;
        }
        let Some(slot) = client.connection().try_slot() else {
            return false;
        };
        let Some(piece) = self.reads.next() else {
            return false;
        };
        let call = client.start_read(
            slot,
            self.credential(),
            &self.file,
            piece.offset,
            piece.length,
        );
        self.calls
            .push(call.map(move |result| Done::Read { piece, result }).boxed());
        true
    }

    /// Whether somebody waits for a COMMIT whose data is all on the server, or much is uncommitted.
    fn commit_due(&self) -> bool {
        if self.commit_sent || self.writes.unstable_bytes() == 0 {
            return false;
        }
        let flush = self
            .flushes
            .front()
            .is_some_and(|f| self.writes.answered_before(f.end));
        let drain = !self.drains.is_empty() && self.writes.answered_before(self.writes.end());
        flush || drain || self.writes.unstable_bytes() >= COMMIT_FROM_BYTES
    }

    fn send_commit(&mut self, client: &NfsClient) -> bool {
        if self.commit_sent {
            return false;
        }
        let Some(slot): Option<Slot> = client.connection().try_slot() else {
            return false;
        };
        let stamp = self.writes.commit_stamp();
        let call = client.start_commit(slot, self.credential(), &self.file);
        self.commit_sent = true;
        self.calls.push(
            call.map(move |result| Done::Commit { stamp, result })
                .boxed(),
        );
        true
    }

    fn finish_replay(&mut self) {
        if !matches!(self.link, Link::Up { .. }) || self.rekey_wanted.is_some() {
            return;
        }
        if let Some(replay) = self.replay.take_if(|r| self.writes.answered_before(r.end)) {
            for reply in replay.replies {
                let _ = reply.send(Ok(()));
            }
        }
    }

    fn finish_flushes(&mut self) {
        // In the order in which they were asked for: an earlier one's writes are a later one's too.
        while let Some(flush) = self.flushes.front()
            && self.writes.committed_before(flush.end)
        {
            if let Some(flush) = self.flushes.pop_front() {
                let _ = flush.reply.send(());
            }
        }
    }

    fn finish_drains(&mut self) {
        // Whoever gave up waiting must not make us commit for ever.
        self.drains.retain(|reply| !reply.is_closed());
        if self.drains.is_empty() {
            return;
        }
        let quiet = self.reads.is_empty() && self.flushes.is_empty() && self.writes.is_empty();
        let result = if let Some(reason) = &self.rekey_wanted {
            Err(DrainError::NeedsRekey(reason.clone()))
        } else if quiet && !self.commit_sent && self.calls.is_empty() {
            Ok(Drained)
        } else if *self.shared.gate() {
            Err(DrainError::Held)
        } else {
            return;
        };
        for reply in self.drains.drain(..) {
            let _ = reply.send(result.clone());
        }
    }
}
