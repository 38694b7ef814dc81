//! The storage server: checks the token when it processes a call, lands writes later, and forgets what was
//! not committed when it crashes. What was measured on real servers, and nothing kinder.

use std::collections::BTreeMap;

use cluster_model::{Token, VmId};

/// Blocks of a disk; a guest writes them round and round.
pub const BLOCKS: usize = 8;

/// A block's content: the guest's number for it and the token it was written under.
pub type Block = (u64, Token);

/// A call. `token` is the group in its credential, except for the broker's calls.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    /// A guest's write, UNSTABLE.
    Write {
        vm: VmId,
        token: Token,
        sequence: u64,
    },
    /// A guest's read of the whole disk.
    Read { vm: VmId, token: Token },
    /// A guest's COMMIT.
    Commit { vm: VmId, token: Token },
    /// The broker makes a disk file under a token; one that is there is kept.
    Make { vm: VmId, token: Token },
    /// The broker's claim: SETATTR of the group.
    Claim { vm: VmId, token: Token },
    /// The broker looks at the group and commits the whole file.
    VerifyAndCommit { vm: VmId, token: Token },
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Done; the server's write verifier.
    Done { verifier: u64 },
    /// The content.
    Content { blocks: [Block; BLOCKS] },
    /// The token is not the file's group.
    Refused,
    /// The server would say no whatever the token.
    Denied,
}

/// A machine's disk file.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    /// Its group.
    pub token: Token,
    /// What a read shows.
    pub blocks: [Block; BLOCKS],
    /// What survives a crash of the server.
    pub stable: [Block; BLOCKS],
    /// The newest token under which a write, read or commit was answered.
    pub answered: Token,
}

/// The server.
#[derive(Clone, Debug, Default)]
pub struct Server {
    /// By machine.
    pub disks: BTreeMap<VmId, Disk>,
    /// Whether it runs.
    pub up: bool,
    /// Changes with each start.
    pub verifier: u64,
    /// Whether it looks at tokens at all (a mutant does not).
    pub checks: bool,
}

/// What processing a call gives.
#[derive(Clone, Debug, PartialEq)]
pub enum Processed {
    /// Answer at once.
    Now(Answer),
    /// A write passed the check and lands later.
    Lands,
}

impl Server {
    fn allows(&self, vm: VmId, token: Token) -> bool {
        !self.checks || self.disks.get(&vm).is_some_and(|disk| disk.token == token)
    }

    /// Processes a call: the check happens now.
    pub fn process(&mut self, call: &Call) -> Processed {
        let done = Answer::Done {
            verifier: self.verifier,
        };
        match *call {
            Call::Write { vm, token, .. } => match self.allows(vm, token) {
                true => Processed::Lands,
                false => Processed::Now(Answer::Refused),
            },
            Call::Read { vm, token } => Processed::Now(match self.allows(vm, token) {
                true => {
                    let disk = self.disks.entry(vm).or_default();
                    disk.answered = disk.answered.max(token);
                    Answer::Content {
                        blocks: disk.blocks,
                    }
                }
                false => Answer::Refused,
            }),
            Call::Commit { vm, token } => Processed::Now(match self.allows(vm, token) {
                true => {
                    let disk = self.disks.entry(vm).or_default();
                    disk.answered = disk.answered.max(token);
                    disk.stable = disk.blocks;
                    done
                }
                false => Answer::Refused,
            }),
            Call::Make { vm, token } => {
                let made = Disk {
                    token,
                    ..Disk::default()
                };
                self.disks.entry(vm).or_insert(made);
                Processed::Now(done)
            }
            Call::Claim { vm, token } => {
                self.disks.entry(vm).or_default().token = token;
                Processed::Now(done)
            }
            Call::VerifyAndCommit { vm, token } => {
                let disk = self.disks.entry(vm).or_default();
                Processed::Now(if disk.token == token {
                    disk.stable = disk.blocks;
                    done
                } else {
                    Answer::Refused
                })
            }
        }
    }

    /// A checked write lands; says whether a newer owner had an answer before.
    pub fn land(&mut self, vm: VmId, token: Token, sequence: u64) -> Result<Answer, Token> {
        let verifier = self.verifier;
        let disk = self.disks.entry(vm).or_default();
        let newer = disk.answered;
        disk.blocks[sequence as usize % BLOCKS] = (sequence, token);
        if newer > token {
            return Err(newer);
        }
        disk.answered = token;
        Ok(Answer::Done { verifier })
    }

    /// Loses its memory; checked writes that have not landed die with it (the world forgets them).
    pub fn crash(&mut self) {
        self.up = false;
        for disk in self.disks.values_mut() {
            disk.blocks = disk.stable;
        }
    }

    /// Starts again.
    pub fn start(&mut self) {
        self.up = true;
        self.verifier += 1;
    }
}
