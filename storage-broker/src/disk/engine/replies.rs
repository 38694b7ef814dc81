//! What each answer of the server, and each missing one, means for the disk.

use std::time::Instant as Clock;

use tokio::time::Instant;

use super::{CallError, Done, Engine, Kind, LATER_PAUSE, NfsError, STALL_PAUSE, Stall, Status};
use crate::disk::RekeyReason;
use crate::disk::engine::Link;

/// What an unsuccessful answer asks for.
enum Judgement {
    /// A fresh token (and handle).
    Rekey(RekeyReason),
    /// The same again after a pause, told to watchers.
    Stall(String),
    /// The same again after a short pause.
    Later,
    /// The same again on the next connection; the present one has ended.
    NextConnection,
}

fn judge(error: &NfsError, volume: &str) -> Judgement {
    match error {
        NfsError::Status { status, .. } => match status {
            Status::NFS3ERR_ACCES
            | Status::NFS3ERR_PERM
            | Status::NFS3ERR_STALE
            | Status::NFS3ERR_BADHANDLE => {
                Judgement::Rekey(RekeyReason::Refused { status: *status })
            }
            Status::NFS3ERR_JUKEBOX => Judgement::Later,
            Status::NFS3ERR_NOSPC => Judgement::Stall(format!(
                "volume {volume} is full: free space on it, I/O goes on by itself"
            )),
            Status::NFS3ERR_DQUOT => Judgement::Stall(format!(
                "a quota on volume {volume} is used up: raise it, I/O goes on by itself"
            )),
            Status::NFS3ERR_ROFS => Judgement::Stall(format!(
                "volume {volume} is exported read-only: export it read-write, I/O goes on by itself"
            )),
            _ => Judgement::Stall(format!(
                "volume {volume}: {error}; see the server's log, I/O goes on when it can"
            )),
        },
        NfsError::Call {
            source: CallError::Denied { .. },
            ..
        } => Judgement::Stall(format!("volume {volume}: {error}")),
        NfsError::Call { .. } | NfsError::BadReply { .. } => Judgement::NextConnection,
    }
}

impl Engine {
    pub(super) fn finished(&mut self, done: Done) {
        match done {
            Done::Read {
                piece,
                result: Ok(reply),
            } => {
                self.went_well(Kind::Read);
                self.reads.arrived(piece, reply.data, reply.eof);
            }
            Done::Read {
                piece,
                result: Err(error),
            } => {
                self.reads.again(piece);
                self.went_wrong(Kind::Read, &error);
            }
            Done::Write {
                sequence,
                sent,
                result: Ok(reply),
            } => {
                self.went_well(Kind::Write);
                self.shared.latency.record(Clock::now(), sent.elapsed());
                let answered = self.writes.answered(
                    sequence,
                    reply.count as usize,
                    reply.committed,
                    reply.verifier,
                );
                if answered.complete {
                    self.acknowledge(sequence);
                }
                if answered.verifier_changed {
                    self.want_rekey(RekeyReason::VerifierChanged);
                }
            }
            Done::Write {
                sequence,
                result: Err(error),
                ..
            } => {
                self.in_doubt |= error.is_unknown();
                self.writes.mark_waiting(sequence);
                self.went_wrong(Kind::Write, &error);
            }
            Done::Commit {
                stamp,
                result: Ok(reply),
            } => {
                self.went_well(Kind::Commit);
                self.commit_sent = false;
                self.verify = false;
                if !self.writes.committed(stamp, reply.verifier) {
                    self.want_rekey(RekeyReason::VerifierChanged);
                }
            }
            Done::Commit {
                result: Err(error), ..
            } => {
                self.commit_sent = false;
                self.went_wrong(Kind::Commit, &error);
            }
        }
    }

    /// Tells the guest, once all pieces of its request are on the server. A piece that is sent
    /// again after it was acknowledged has nobody to tell.
    fn acknowledge(&mut self, sequence: super::Sequence) {
        let Some(shared) = self.write_requests.remove(&sequence) else {
            return;
        };
        let mut slot = shared
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(request) = slot.as_mut() {
            request.pieces_left -= 1;
        }
        if let Some(request) = slot.take_if(|request| request.pieces_left == 0) {
            let _ = request.reply.send(());
        }
    }

    fn went_well(&mut self, kind: Kind) {
        self.stall.take_if(|stall| stall.of == kind);
    }

    fn went_wrong(&mut self, kind: Kind, error: &NfsError) {
        let (pause, reason) = match judge(error, &self.url.to_string()) {
            Judgement::Rekey(reason) => return self.want_rekey(reason),
            Judgement::NextConnection => {
                // A reply that makes no sense leaves a connection that cannot be trusted.
                if let Link::Up { client } = &self.link {
                    client.connection().close(&error.to_string());
                }
                return;
            }
            Judgement::Later => (LATER_PAUSE, None),
            Judgement::Stall(reason) => (STALL_PAUSE, Some(reason)),
        };
        if let Some(reason) = &reason
            && self
                .stall
                .as_ref()
                .is_none_or(|stall| stall.reason.as_ref() != Some(reason))
        {
            tracing::warn!(disk = %self.spec.path, reason, "stalled");
        }
        // A "later" between two tries does not make a told reason untrue.
        let told = self
            .stall
            .take()
            .filter(|stall| stall.of == kind)
            .and_then(|s| s.reason);
        self.stall = Some(Stall {
            until: Instant::now() + pause,
            reason: reason.or(told),
            of: kind,
        });
    }
}
