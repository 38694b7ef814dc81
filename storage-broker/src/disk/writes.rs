//! Which WRITEs are waiting, unanswered or not yet committed, and in which order they may be sent.
//!
//! Pure bookkeeping. The rule that keeps the guest's data right: a WRITE is sent only when no
//! earlier WRITE to any of the same bytes is unanswered. So overlapping WRITEs reach the file in
//! the guest's order, the first time and at every replay, however a server reorders its work.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

/// A WRITE's place in the guest's order.
pub(crate) type Sequence = u64;

/// The number a server gives to one of its lives.
pub(crate) type Verifier = [u8; 8];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// To be sent (again), beginning with byte `done`.
    Waiting,
    /// Sent and not answered.
    Sent,
    /// Answered, on the server, and not known to be on stable storage.
    Unstable {
        /// Counts answers: a COMMIT covers those before it was sent.
        stamp: u64,
    },
}

#[derive(Debug)]
struct Entry {
    offset: u64,
    data: Bytes,
    /// How many bytes the server has taken of it so far.
    done: usize,
    /// The verifier of the parts taken so far.
    verifier: Option<Verifier>,
    state: State,
}

impl Entry {
    fn overlaps(&self, offset: u64, length: usize) -> bool {
        self.offset < offset + length as u64 && offset < self.offset + self.data.len() as u64
    }
}

/// What an answer to a WRITE leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answered {
    /// The whole of it is on the server.
    pub(crate) complete: bool,
    /// The server is not in the same life as when it took earlier data that is not committed.
    pub(crate) verifier_changed: bool,
}

/// The WRITEs of one disk that are not known to be on stable storage.
#[derive(Debug, Default)]
pub(crate) struct WriteLog {
    entries: BTreeMap<Sequence, Entry>,
    waiting: BTreeSet<Sequence>,
    sent: BTreeSet<Sequence>,
    next: Sequence,
    answers: u64,
    bytes: usize,
    unstable_bytes: usize,
}

impl WriteLog {
    /// Takes a WRITE in; it waits.
    pub(crate) fn push(&mut self, offset: u64, data: Bytes) -> Sequence {
        let sequence = self.next;
        self.next += 1;
        self.bytes += data.len();
        let entry = Entry {
            offset,
            data,
            done: 0,
            verifier: None,
            state: State::Waiting,
        };
        self.entries.insert(sequence, entry);
        self.waiting.insert(sequence);
        sequence
    }

    /// One more than the last sequence given out.
    pub(crate) fn end(&self) -> Sequence {
        self.next
    }

    /// All bytes held here.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes that a COMMIT now would let go.
    pub(crate) fn unstable_bytes(&self) -> usize {
        self.unstable_bytes
    }

    /// Whether a WRITE has been sent and not answered.
    pub(crate) fn any_sent(&self) -> bool {
        !self.sent.is_empty()
    }

    /// Whether everything is on stable storage.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether everything before `end` is on stable storage.
    pub(crate) fn committed_before(&self, end: Sequence) -> bool {
        self.entries.range(..end).next().is_none()
    }

    /// Whether everything before `end` has been answered.
    pub(crate) fn answered_before(&self, end: Sequence) -> bool {
        self.waiting.range(..end).next().is_none() && self.sent.range(..end).next().is_none()
    }

    /// The next WRITE that may be sent: the first one waiting, unless it overlaps one unanswered.
    pub(crate) fn next_sendable(&self) -> Option<(Sequence, u64, Bytes)> {
        let sequence = *self.waiting.first()?;
        let entry = self.entries.get(&sequence)?;
        let blocked = self
            .sent
            .iter()
            .filter_map(|sent| self.entries.get(sent))
            .any(|sent| sent.overlaps(entry.offset, entry.data.len()));
        if blocked {
            return None;
        }
        Some((
            sequence,
            entry.offset + entry.done as u64,
            entry.data.slice(entry.done..),
        ))
    }

    /// Notes that a WRITE has been handed to the connection.
    pub(crate) fn mark_sent(&mut self, sequence: Sequence) {
        if let Some(entry) = self.entries.get_mut(&sequence) {
            entry.state = State::Sent;
            self.waiting.remove(&sequence);
            self.sent.insert(sequence);
        }
    }

    /// Puts a WRITE that was not executed (or is in doubt) back.
    pub(crate) fn mark_waiting(&mut self, sequence: Sequence) {
        if self.sent.remove(&sequence)
            && let Some(entry) = self.entries.get_mut(&sequence)
        {
            entry.state = State::Waiting;
            self.waiting.insert(sequence);
        }
    }

    /// Notes the server's answer: it took `count` bytes.
    pub(crate) fn answered(
        &mut self,
        sequence: Sequence,
        count: usize,
        stable: bool,
        verifier: Verifier,
    ) -> Answered {
        // Answers agree until one differs, so any entry's verifier stands for the last life seen.
        let last_life = self.entries.values().find_map(|entry| entry.verifier);
        let other_life = last_life.is_some_and(|last| last != verifier);
        if !self.sent.remove(&sequence) {
            return Answered {
                complete: false,
                verifier_changed: false,
            };
        }
        let Some(entry) = self.entries.get_mut(&sequence) else {
            return Answered {
                complete: false,
                verifier_changed: false,
            };
        };
        entry.done = (entry.done + count).min(entry.data.len());
        entry.verifier = Some(verifier);
        if entry.done < entry.data.len() {
            entry.state = State::Waiting;
            self.waiting.insert(sequence);
            return Answered {
                complete: false,
                verifier_changed: other_life,
            };
        }
        let (offset, length) = (entry.offset, entry.data.len());
        // A stable WRITE above an uncommitted one stays too: were only the older one sent again,
        // it would undo the newer.
        let above_older = || {
            self.entries
                .range(..sequence)
                .any(|(_, older)| older.overlaps(offset, length))
        };
        if stable && !above_older() {
            self.entries.remove(&sequence);
            self.bytes -= length;
        } else if let Some(entry) = self.entries.get_mut(&sequence) {
            self.answers += 1;
            entry.state = State::Unstable {
                stamp: self.answers,
            };
            self.unstable_bytes += length;
        }
        Answered {
            complete: true,
            verifier_changed: other_life,
        }
    }

    /// What a COMMIT sent now covers; give it to [`WriteLog::committed`].
    pub(crate) fn commit_stamp(&self) -> u64 {
        self.answers
    }

    /// Notes the answer to a COMMIT: lets go what it covered, all or nothing. False when the
    /// server has changed lives since it took some of it, so that it must all be sent again.
    pub(crate) fn committed(&mut self, stamp: u64, verifier: Verifier) -> bool {
        let covered: Vec<Sequence> = self
            .entries
            .iter()
            .filter(|(_, e)| matches!(e.state, State::Unstable { stamp: s } if s <= stamp))
            .map(|(sequence, _)| *sequence)
            .collect();
        let same = covered
            .iter()
            .filter_map(|sequence| self.entries.get(sequence))
            .all(|entry| entry.verifier == Some(verifier));
        if same {
            for sequence in covered {
                if let Some(entry) = self.entries.remove(&sequence) {
                    self.bytes -= entry.data.len();
                    self.unstable_bytes -= entry.data.len();
                }
            }
        }
        same
    }

    /// Everything waits again, from its first byte, in its old order.
    pub(crate) fn replay(&mut self) {
        for (sequence, entry) in &mut self.entries {
            entry.state = State::Waiting;
            entry.done = 0;
            entry.verifier = None;
            self.waiting.insert(*sequence);
        }
        self.sent.clear();
        self.unstable_bytes = 0;
    }
}

#[cfg(test)]
mod tests;
