//! A model of the replicated log: Raft's election and replication as a pure state machine for one node.
//!
//! What a node says here it has synced: an entry that is not acknowledged may be lost with its node, one
//! that is cannot. The store under the real log is tested on its own, and openraft is what runs in production.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster_model::Envelope;

/// An entry: its term, and a command or nothing (a new leader's first).
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The term it was written in.
    pub term: u64,
    /// What it asks.
    pub command: Option<Arc<Envelope>>,
}

/// What nodes say to each other about the log.
#[derive(Clone, Debug)]
pub enum RaftMessage {
    /// Asks for a vote.
    Vote { term: u64, last: (u64, usize) },
    /// Answers it.
    Voted { term: u64, yes: bool },
    /// Entries after `previous` (its term and the count of entries before), and what is committed.
    Append {
        term: u64,
        previous: (u64, usize),
        entries: Vec<Entry>,
        commit: usize,
        round: u64,
    },
    /// How far the log now agrees (or, refused, at most may), and the round it answers.
    Appended {
        term: u64,
        yes: bool,
        matched: usize,
        round: u64,
    },
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
pub struct Raft {
    /// This node.
    pub me: usize,
    peers: usize,
    /// Durable.
    pub term: u64,
    voted: Option<usize>,
    /// Durable.
    pub log: Vec<Entry>,
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

type Out = Vec<(usize, RaftMessage)>;

impl Raft {
    /// A node whose log begins with `log`, all committed.
    pub fn new(me: usize, peers: usize, log: Vec<Entry>) -> Raft {
        Raft {
            me,
            peers,
            term: 1,
            voted: None,
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

    fn last(&self) -> (u64, usize) {
        (
            self.log.last().map_or(0, |entry| entry.term),
            self.log.len(),
        )
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let me = self.me;
        (0..self.peers).filter(move |&peer| peer != me)
    }

    fn majority(&self, count: usize) -> bool {
        count * 2 > self.peers
    }

    fn follow(&mut self, term: u64, leader: Option<usize>) {
        if term > self.term {
            self.term = term;
            self.voted = None;
        }
        self.role = Role::Follower;
        self.leader = leader;
        self.confirms.clear();
    }

    /// No leader was heard for the election time.
    pub fn campaign(&mut self) -> Out {
        if self.role == Role::Leader {
            return Vec::new();
        }
        self.term += 1;
        self.voted = Some(self.me);
        self.leader = None;
        self.role = Role::Candidate(BTreeSet::from([self.me]));
        let (term, last) = (self.term, self.last());
        self.others()
            .map(|peer| (peer, RaftMessage::Vote { term, last }))
            .collect()
    }

    /// The leader's regular message to everybody.
    pub fn beat(&mut self) -> Out {
        if self.role != Role::Leader {
            return Vec::new();
        }
        self.round += 1;
        self.others()
            .map(|peer| (peer, self.append(peer)))
            .collect()
    }

    fn append(&self, peer: usize) -> RaftMessage {
        let next = self.next.get(&peer).copied().unwrap_or(self.log.len());
        let term_before = next
            .checked_sub(1)
            .map_or(0, |before| self.log[before].term);
        RaftMessage::Append {
            term: self.term,
            previous: (term_before, next),
            entries: self.log[next..].to_vec(),
            commit: self.commit,
            round: self.round,
        }
    }

    /// The leader writes an entry; gives its index.
    pub fn propose(&mut self, command: Option<Arc<Envelope>>) -> Option<usize> {
        if self.role != Role::Leader {
            return None;
        }
        let term = self.term;
        self.log.push(Entry { term, command });
        Some(self.log.len())
    }

    /// The leader asks the quorum whether it still leads, for whoever holds `number`.
    pub fn confirm(&mut self, number: u64) -> Option<Out> {
        // Before an entry of its own term is committed a leader does not know what is.
        let knows = self.role == Role::Leader
            && self.commit > 0
            && self.log[self.commit - 1].term == self.term;
        if !knows {
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
    pub fn take_in(&mut self, from: usize, message: RaftMessage) -> Out {
        match message {
            RaftMessage::Vote { term, last } => {
                if term > self.term {
                    self.follow(term, None);
                }
                let yes = term == self.term
                    && self.voted.is_none_or(|voted| voted == from)
                    && last >= self.last()
                    && self.role != Role::Leader;
                if yes {
                    self.voted = Some(from);
                }
                vec![(
                    from,
                    RaftMessage::Voted {
                        term: self.term,
                        yes,
                    },
                )]
            }
            RaftMessage::Voted { term, yes } => {
                if term > self.term {
                    self.follow(term, None);
                    return Vec::new();
                }
                if let Role::Candidate(votes) = &mut self.role
                    && term == self.term
                    && yes
                {
                    votes.insert(from);
                    let count = votes.len();
                    if self.majority(count) {
                        return self.lead();
                    }
                }
                Vec::new()
            }
            RaftMessage::Append {
                term,
                previous,
                entries,
                commit,
                round,
            } => {
                if term < self.term {
                    let refused = RaftMessage::Appended {
                        term: self.term,
                        yes: false,
                        matched: 0,
                        round,
                    };
                    return vec![(from, refused)];
                }
                self.follow(term, Some(from));
                let (term_before, next) = previous;
                let fits = next <= self.log.len()
                    && next
                        .checked_sub(1)
                        .is_none_or(|before| self.log[before].term == term_before);
                let matched = if fits {
                    // What lies behind may be an older leader's: only what came now is known to agree.
                    let agreed = next + entries.len();
                    for (at, entry) in entries.into_iter().enumerate() {
                        let at = next + at;
                        if self
                            .log
                            .get(at)
                            .is_some_and(|known| known.term != entry.term)
                        {
                            self.log.truncate(at);
                        }
                        if at == self.log.len() {
                            self.log.push(entry);
                        }
                    }
                    self.commit = self.commit.max(commit.min(agreed));
                    agreed
                } else {
                    next.saturating_sub(1).min(self.log.len())
                };
                let answer = RaftMessage::Appended {
                    term,
                    yes: fits,
                    matched,
                    round,
                };
                vec![(from, answer)]
            }
            RaftMessage::Appended {
                term,
                yes,
                matched,
                round,
            } => {
                if term > self.term {
                    self.follow(term, None);
                    return Vec::new();
                }
                if self.role != Role::Leader || term != self.term {
                    return Vec::new();
                }
                for (asked, who, ..) in &mut self.confirms {
                    if round >= *asked {
                        who.insert(from);
                    }
                }
                // A follower may have more than it was sent now; only what it was sent is known to agree.
                let matched = matched.min(self.log.len());
                if yes {
                    let known = self.matched.entry(from).or_insert(0);
                    *known = (*known).max(matched);
                    let known = *known;
                    self.next.insert(from, known);
                    self.advance();
                    return Vec::new();
                }
                self.next.insert(from, matched);
                vec![(from, self.append(from))]
            }
        }
    }

    fn lead(&mut self) -> Out {
        self.role = Role::Leader;
        self.leader = Some(self.me);
        self.matched.clear();
        self.next = self.others().map(|peer| (peer, self.log.len())).collect();
        self.propose(None);
        self.beat()
    }

    /// Commits what a majority has, if it is of this term.
    fn advance(&mut self) {
        let mut have: Vec<usize> = self
            .others()
            .map(|peer| self.matched.get(&peer).copied().unwrap_or(0))
            .chain([self.log.len()])
            .collect();
        have.sort_unstable();
        let agreed = have[(self.peers - 1) / 2];
        if agreed > self.commit && self.log[agreed - 1].term == self.term {
            self.commit = agreed;
        }
    }
}
