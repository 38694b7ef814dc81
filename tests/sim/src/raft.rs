//! A model of the replicated log: Raft's election and replication as a pure state machine for one node.
//!
//! What a node says here it has synced: an entry that is not acknowledged may be lost with its node, one
//! that is cannot. The store under the real log is tested on its own, and openraft is what runs in production:
//! `tests/openraft.rs` has both go through the same histories and compares them. What openraft has beside this, the
//! pre-vote and the leader's lease, only holds elections back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster_model::Envelope;

/// Who leads, or led: openraft's leader id. A term can have several, of which a later one outdoes the earlier.
pub type LeaderId = (u64, usize);

/// What a node has promised: it follows nobody below. openraft's `Vote`, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Vote {
    /// The term.
    pub term: u64,
    /// Who asked for it.
    pub node: usize,
    /// Whether a quorum granted it.
    pub committed: bool,
}

impl Vote {
    /// Whose entries it stands for.
    pub fn leader(self) -> LeaderId {
        (self.term, self.node)
    }
}

/// Where a log ends: the leader of its last entry and the count of entries. `(0, 0)` leads nothing.
pub type LogEnd = (LeaderId, usize);

/// An entry: who wrote it, and a command or nothing (a new leader's first).
#[derive(Clone, Debug, PartialEq)]
pub struct Entry<C = Arc<Envelope>> {
    /// The leader that wrote it.
    pub leader: LeaderId,
    /// What it asks.
    pub command: Option<C>,
}

/// What nodes say to each other about the log.
#[expect(missing_docs, reason = "each variant's sentence names its fields")]
#[derive(Clone, Debug, PartialEq)]
pub enum RaftMessage<C = Arc<Envelope>> {
    /// Asks for a vote.
    Vote { vote: Vote, last: LogEnd },
    /// Answers it, with what was asked for and the vote that now holds.
    Voted { asked: Vote, vote: Vote, yes: bool },
    /// Entries after `previous`, and how many are committed.
    Append {
        vote: Vote,
        previous: LogEnd,
        entries: Vec<Entry<C>>,
        commit: usize,
        round: u64,
    },
    /// What came of it: whose entries, the vote that now holds, and the round it answers.
    Appended {
        asked: Vote,
        vote: Vote,
        outcome: Appended,
        round: u64,
    },
}

/// What a follower makes of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// The log agrees up to here.
    Agrees(usize),
    /// It has not the entry that these follow: at most this many agree.
    Conflicts(usize),
    /// It has promised more to somebody else.
    HigherVote,
}

/// How a node stands in its term.
#[derive(Clone, Debug, PartialEq)]
pub enum Role {
    /// Follows whoever leads, if it knows.
    Follower,
    /// Asks for votes.
    Candidate(BTreeSet<usize>),
    /// Leads.
    Leader,
}

/// One node's part. Indices of nodes begin at 0; `log[i]` is the entry of index `i + 1`.
#[derive(Clone, Debug)]
pub struct Raft<C = Arc<Envelope>> {
    /// This node.
    pub me: usize,
    peers: usize,
    /// Durable.
    pub vote: Vote,
    /// Durable.
    pub log: Vec<Entry<C>>,
    /// Entries known to be committed.
    pub commit: usize,
    /// How it stands.
    pub role: Role,
    /// Who leads, as far as it knows.
    pub leader: Option<usize>,
    matched: BTreeMap<usize, usize>,
    next: BTreeMap<usize, usize>,
    round: u64,
    /// Confirms that wait: the round that counts for them, who answered it, their number, the index to wait for.
    confirms: Vec<(u64, BTreeSet<usize>, u64, usize)>,
}

type Out<C> = Vec<(usize, RaftMessage<C>)>;

impl<C: Clone> Raft<C> {
    /// A node whose log begins with `log`, all committed.
    pub fn new(me: usize, peers: usize, log: Vec<Entry<C>>) -> Raft<C> {
        Raft {
            me,
            peers,
            vote: Vote {
                term: 1,
                node: 0,
                committed: false,
            },
            commit: log.len(),
            log,
            role: Role::Follower,
            leader: None,
            matched: BTreeMap::new(),
            next: BTreeMap::new(),
            round: 0,
            confirms: Vec::new(),
        }
    }

    /// After a crash: what was durable is there, the rest is forgotten.
    pub fn restart(&mut self) {
        self.role = Role::Follower;
        self.leader = None;
        self.matched.clear();
        self.next.clear();
        self.confirms.clear();
    }

    /// Loses its last entries, and the promises it made since: what no disk must do.
    pub fn forget(&mut self, entries: usize) {
        self.log
            .truncate(self.log.len().saturating_sub(entries).max(1));
        self.commit = self.commit.min(self.log.len());
        let (term, node) = self.last().0;
        self.vote = Vote {
            term,
            node,
            committed: true,
        };
    }

    /// Where its log ends.
    pub fn last(&self) -> LogEnd {
        self.end(self.log.len())
    }

    fn end(&self, count: usize) -> LogEnd {
        let leader = count
            .checked_sub(1)
            .map_or((0, 0), |at| self.log[at].leader);
        (leader, count)
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<C> {
        let me = self.me;
        (0..self.peers).filter(move |&peer| peer != me)
    }

    fn majority(&self, count: usize) -> bool {
        count * 2 > self.peers
    }

    /// Takes up a vote, unless it promised more; its own, which it has already, changes nothing.
    fn accept(&mut self, vote: Vote) -> bool {
        if vote < self.vote {
            return false;
        }
        if vote > self.vote || vote.node != self.me {
            self.vote = vote;
            self.role = Role::Follower;
            self.leader = vote.committed.then_some(vote.node);
            self.confirms.clear();
        }
        true
    }

    /// No leader was heard for the election time.
    pub fn campaign(&mut self) -> Out<C> {
        if self.role == Role::Leader {
            return Vec::new();
        }
        self.vote = Vote {
            term: self.vote.term + 1,
            node: self.me,
            committed: false,
        };
        self.leader = None;
        self.role = Role::Candidate(BTreeSet::from([self.me]));
        let (vote, last) = (self.vote, self.last());
        self.others()
            .map(|peer| (peer, RaftMessage::Vote { vote, last }))
            .collect()
    }

    /// The leader's regular message to everybody.
    pub fn beat(&mut self) -> Out<C> {
        if self.role != Role::Leader {
            return Vec::new();
        }
        self.round += 1;
        self.others()
            .map(|peer| (peer, self.append(peer)))
            .collect()
    }

    fn append(&self, peer: usize) -> RaftMessage<C> {
        let next = self.next.get(&peer).copied().unwrap_or(self.log.len());
        RaftMessage::Append {
            vote: self.vote,
            previous: self.end(next),
            entries: self.log[next..].to_vec(),
            commit: self.commit,
            round: self.round,
        }
    }

    /// The leader writes an entry; gives its index.
    pub fn propose(&mut self, command: Option<C>) -> Option<usize> {
        if self.role != Role::Leader {
            return None;
        }
        let leader = self.vote.leader();
        self.log.push(Entry { leader, command });
        Some(self.log.len())
    }

    /// Leads, and has committed an entry of its own: before that a leader does not know what is committed.
    pub fn knows(&self) -> bool {
        self.role == Role::Leader && self.end(self.commit).0 == self.vote.leader()
    }

    /// The leader asks the quorum whether it still leads, for whoever holds `number`.
    pub fn confirm(&mut self, number: u64) -> Option<Out<C>> {
        if !self.knows() {
            return None;
        }
        let out = self.beat();
        let asked = (self.round, BTreeSet::from([self.me]), number, self.commit);
        self.confirms.push(asked);
        Some(out)
    }

    /// Confirms that a quorum has answered: number and index.
    pub fn confirmed(&mut self) -> Vec<(u64, usize)> {
        let peers = self.peers;
        let mut done = Vec::new();
        self.confirms.retain(|(_, who, number, index)| {
            let yes = who.len() * 2 > peers;
            if yes {
                done.push((*number, *index));
            }
            !yes
        });
        done
    }

    /// Takes in a message; gives the answers.
    pub fn take_in(&mut self, from: usize, message: RaftMessage<C>) -> Out<C> {
        match message {
            RaftMessage::Vote { vote, last } => {
                // A candidate that lacks entries changes nothing here, whatever its term.
                let asked = vote;
                let yes = last >= self.last() && self.accept(vote);
                let vote = self.vote;
                vec![(from, RaftMessage::Voted { asked, vote, yes })]
            }
            RaftMessage::Voted { asked, vote, yes } => {
                let Role::Candidate(votes) = &mut self.role else {
                    return Vec::new();
                };
                // An answer to an earlier campaign says nothing any more.
                if asked != self.vote {
                    return Vec::new();
                }
                if yes && vote == self.vote {
                    votes.insert(from);
                    let count = votes.len();
                    if self.majority(count) {
                        return self.lead();
                    }
                    return Vec::new();
                }
                let seen = Vote {
                    committed: false,
                    ..vote
                };
                if seen > self.vote {
                    self.accept(seen);
                }
                Vec::new()
            }
            RaftMessage::Append {
                vote,
                previous,
                entries,
                commit,
                round,
            } => {
                let outcome = if self.accept(vote) {
                    self.take_entries(previous, entries, commit)
                } else {
                    Appended::HigherVote
                };
                let (asked, vote) = (vote, self.vote);
                let answer = RaftMessage::Appended {
                    asked,
                    vote,
                    outcome,
                    round,
                };
                vec![(from, answer)]
            }
            RaftMessage::Appended {
                asked,
                vote,
                outcome,
                round,
            } => {
                if self.role == Role::Leader && asked == self.vote {
                    return self.appended(from, vote, outcome, round);
                }
                Vec::new()
            }
        }
    }

    fn take_entries(
        &mut self,
        previous: LogEnd,
        entries: Vec<Entry<C>>,
        commit: usize,
    ) -> Appended {
        let (_, next) = previous;
        if next > self.log.len() {
            return Appended::Conflicts(self.log.len());
        }
        if self.end(next) != previous {
            // Another leader's, and so is what follows it.
            self.log.truncate(next - 1);
            return Appended::Conflicts(next - 1);
        }
        // What lies behind may be an older leader's: only what came now is known to agree.
        let agreed = next + entries.len();
        for (at, entry) in (next..).zip(entries) {
            if self
                .log
                .get(at)
                .is_some_and(|known| known.leader != entry.leader)
            {
                self.log.truncate(at);
            }
            if at == self.log.len() {
                self.log.push(entry);
            }
        }
        self.commit = self.commit.max(commit.min(agreed));
        Appended::Agrees(agreed)
    }

    fn appended(&mut self, from: usize, vote: Vote, outcome: Appended, round: u64) -> Out<C> {
        if outcome != Appended::HigherVote {
            for (asked, who, ..) in &mut self.confirms {
                if round >= *asked {
                    who.insert(from);
                }
            }
        }
        match outcome {
            Appended::HigherVote => {
                if vote > self.vote {
                    self.accept(vote);
                }
                Vec::new()
            }
            Appended::Agrees(matched) => {
                let known = self.matched.entry(from).or_insert(0);
                *known = (*known).max(matched);
                let known = *known;
                self.next.insert(from, known);
                self.advance();
                Vec::new()
            }
            Appended::Conflicts(at_most) => {
                self.next.insert(from, at_most.min(self.log.len()));
                vec![(from, self.append(from))]
            }
        }
    }

    fn lead(&mut self) -> Out<C> {
        self.vote.committed = true;
        self.role = Role::Leader;
        self.leader = Some(self.me);
        self.matched.clear();
        self.next = self.others().map(|peer| (peer, self.log.len())).collect();
        self.propose(None);
        self.beat()
    }

    /// Commits what a majority has, if this leader wrote it.
    fn advance(&mut self) {
        let mut have: Vec<usize> = self
            .others()
            .map(|peer| self.matched.get(&peer).copied().unwrap_or(0))
            .chain([self.log.len()])
            .collect();
        have.sort_unstable();
        let agreed = have[(self.peers - 1) / 2];
        if agreed > self.commit && self.end(agreed).0 == self.vote.leader() {
            self.commit = agreed;
        }
    }
}
