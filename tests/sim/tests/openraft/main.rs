//! The simulation's model of Raft beside openraft, through the same histories.
//!
//! openraft runs, on a network whose every call waits for the history to deliver it, and with its timers off: elections,
//! heartbeats, writes, reads and restarts come from the seed too. Whatever a node hears, its model hears; after each step
//! their answers, votes and logs are compared, and who leads. What a leader sends must be in its model's log. What
//! openraft confirms for a read its model has confirmed, at the same index, and a read there misses nothing that anybody
//! had applied when it was asked for.

mod network;
mod store;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use network::{Answer, Call, Network, Request};
use openraft::raft::AppendEntriesResponse;
use openraft::{Config, EmptyNode, EntryPayload, LinearizerOption, Membership, ReadPolicy};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sim::raft::{Appended, Entry, LogEnd, Raft, RaftMessage, Role, Vote};
use store::{Disk, LogId, Machine, Types};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

/// Histories compared in a landing, and in the long tier (`BATON_TIER=long`).
const HISTORIES: [u64; 2] = [400, 2_000];
/// Steps of each before its end.
const STEPS: usize = 120;
/// Everything that can run has run after this, as time stands still meanwhile.
const MOMENT: Duration = Duration::from_millis(5);
/// Longer than any history.
const READ_PATIENCE: Duration = Duration::from_secs(1 << 20);
/// Longer than any lease.
const LEASE_OVER: Duration = Duration::from_secs(2);
/// Rounds in which a history without faults must agree.
const CALM_ROUNDS: usize = 200;

struct Node {
    disk: Disk,
    machine: Machine,
    raft: openraft::Raft<Types, Machine>,
    model: Raft<u64>,
    /// The model as it was when it last led: what was under way to others then is still sent.
    led: Option<Raft<u64>>,
    /// The model's round: what this node sends belongs to it, and so do the answers.
    round: u64,
    /// Reads that were asked of it and have no answer.
    reads: Vec<Read>,
    /// What its model has confirmed: the read's number, and how many entries it has to see.
    confirmed: BTreeMap<u64, usize>,
}

impl Node {
    /// Takes the round from what the model sends.
    fn sends(&mut self, out: &[(usize, RaftMessage<u64>)]) {
        for (_, message) in out {
            if let RaftMessage::Append { round, .. } = message {
                self.round = *round;
            }
        }
    }
}

/// A read that was asked of a node.
struct Read {
    number: u64,
    /// The model asks its quorum too. It refuses where openraft lets the reader wait for the leader's first entry.
    modelled: bool,
    /// How many commands the node that had applied most had applied.
    applied: usize,
    /// How many entries openraft says that the reader must see; nothing when it refuses.
    answer: oneshot::Receiver<Option<usize>>,
}

/// What happened in all histories.
#[derive(Debug, Default)]
struct Seen(BTreeMap<&'static str, u64>);

impl Seen {
    fn note(&mut self, what: &'static str) {
        *self.0.entry(what).or_default() += 1;
    }

    fn count(&self, what: &'static str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }
}

struct History<'a> {
    seed: u64,
    random: StdRng,
    network: Network,
    nodes: Vec<Node>,
    writes: u64,
    reads: u64,
    /// The longest log known to be committed.
    committed: Vec<Entry<u64>>,
    seen: &'a mut Seen,
}

fn model_vote(vote: &store::Vote) -> Vote {
    Vote {
        term: vote.leader_id.term,
        node: vote.leader_id.node_id as usize,
        committed: vote.committed,
    }
}

fn model_end(id: Option<LogId>) -> LogEnd {
    id.map_or(((0, 0), 0), |id| {
        let leader = *id.committed_leader_id();
        let leader = (leader.term, leader.node_id as usize);
        (leader, id.index as usize + 1)
    })
}

fn model_entry(entry: &store::Entry) -> Entry<u64> {
    Entry {
        leader: model_end(Some(entry.log_id)).0,
        command: match entry.payload {
            EntryPayload::Normal(command) => Some(command),
            EntryPayload::Blank | EntryPayload::Membership(_) => None,
        },
    }
}

async fn begin(
    node: usize,
    network: &Network,
    disk: &Disk,
    machine: &Machine,
) -> openraft::Raft<Types, Machine> {
    let config = Config {
        enable_tick: false,
        enable_leader_restore: Some(false),
        heartbeat_interval: 80,
        election_timeout_min: 200,
        election_timeout_max: 300,
        snapshot_policy: openraft::SnapshotPolicy::Never,
        backoff: "50ms 100ms 200ms ...1000ms".into(),
        ..Config::default()
    };
    let config = Arc::new(config.validate().expect("settings"));
    let factory = network.of(node);
    openraft::Raft::new(node as u64, config, factory, disk.clone(), machine.clone())
        .await
        .expect("a node")
}

impl<'a> History<'a> {
    async fn new(seed: u64, seen: &'a mut Seen) -> History<'a> {
        let mut random = StdRng::seed_from_u64(seed);
        let count = if random.random_bool(0.5) { 3 } else { 5 };
        let network = Network::default();
        let members: BTreeMap<u64, EmptyNode> =
            (0..count).map(|node| (node, EmptyNode {})).collect();
        let voters = vec![members.keys().copied().collect()];
        let mut nodes = Vec::new();
        for node in 0..count as usize {
            let disk = Disk::default();
            {
                let mut contents = disk.open();
                let leader = openraft::alias::LeaderIdOf::<Types> {
                    term: 1,
                    node_id: 0,
                };
                contents.vote = Some(store::Vote::new(1, 0));
                contents.log = vec![openraft::Entry {
                    log_id: LogId::new(leader, 0),
                    payload: EntryPayload::Membership(
                        Membership::new(voters.clone(), members.clone()).expect("members"),
                    ),
                }];
            }
            let log = disk.open().log.iter().map(model_entry).collect();
            let machine = Machine::default();
            let raft = begin(node, &network, &disk, &machine).await;
            nodes.push(Node {
                disk,
                machine,
                raft,
                model: Raft::new(node, count as usize, log),
                led: None,
                round: 0,
                reads: Vec::new(),
                confirmed: BTreeMap::new(),
            });
        }
        let committed = nodes[0].model.log.clone();
        History {
            seed,
            random,
            network,
            nodes,
            writes: 0,
            reads: 0,
            committed,
            seen,
        }
    }

    fn any_node(&mut self) -> usize {
        self.random.random_range(0..self.nodes.len())
    }

    async fn step(&mut self) {
        let waiting = self.network.with(|calls| calls.len());
        match self.random.random_range(0..100) {
            0..60 if waiting > 0 => {
                let at = self.random.random_range(0..waiting);
                let twice = self.random.random_bool(0.1);
                let answered = self.random.random_bool(0.9);
                self.deliver(at, twice, answered).await;
            }
            60..66 if waiting > 0 => {
                let at = self.random.random_range(0..waiting);
                self.network.with(|calls| calls.swap_remove(at));
                self.seen.note("calls lost");
            }
            66..69 => {
                let node = self.any_node();
                self.elect(node).await;
            }
            69..73 => self.heartbeat().await,
            73..74 => {
                let node = self.any_node();
                self.restart(node).await;
            }
            74..77 => {
                let ms = self.random.random_range(10..500);
                tokio::time::sleep(Duration::from_millis(ms)).await;
            }
            77..84 => {
                for node in 0..self.nodes.len() {
                    self.read(node);
                }
            }
            _ => self.write().await,
        }
        self.settle().await;
    }

    /// Asks a node, whatever it takes itself for, to confirm that it leads.
    fn read(&mut self, at: usize) {
        self.reads += 1;
        let number = self.reads;
        let applied = self.nodes.iter().map(|node| node.machine.applied().len());
        let applied = applied.max().unwrap_or(0);
        let node = &mut self.nodes[at];
        let asked = node.model.confirm(number);
        let modelled = asked.is_some();
        node.sends(&asked.unwrap_or_default());
        let (tell, answer) = oneshot::channel();
        let raft = node.raft.clone();
        tokio::spawn(async move {
            // Only an answer or the loss of the lead ends the wait.
            let option =
                LinearizerOption::from(ReadPolicy::ReadIndex).with_wait_timeout(READ_PATIENCE);
            let confirmed = raft.get_read_log_id(option).await.ok();
            // Nobody listens once the history has ended.
            let _ = tell.send(confirmed.map(|(read, _)| read.index() as usize + 1));
        });
        node.reads.push(Read {
            number,
            modelled,
            applied,
            answer,
        });
    }

    /// What became of the reads that a node was asked. openraft confirms nothing that its model has not confirmed; the
    /// model may be ahead, for it counts an answer by when its call left, openraft by when the call was made up.
    fn answer_reads(&mut self, at: usize) {
        let seed = self.seed;
        let node = &mut self.nodes[at];
        node.confirmed.extend(node.model.confirmed());
        for mut read in std::mem::take(&mut node.reads) {
            let number = read.number;
            let modelled = node.confirmed.get(&number).copied();
            let answer = match read.answer.try_recv() {
                Ok(answer) => answer,
                Err(TryRecvError::Closed) => None,
                Err(TryRecvError::Empty) => {
                    node.reads.push(read);
                    continue;
                }
            };
            match (answer, modelled) {
                (Some(entries), Some(model)) => {
                    assert_eq!(
                        model, entries,
                        "seed {seed}: read {number} of n{at}, the model and openraft"
                    );
                    self.seen.note("reads confirmed");
                }
                (Some(_), None) => {
                    assert!(
                        !read.modelled,
                        "seed {seed}: openraft confirms read {number} of n{at}, the model does not"
                    );
                    self.seen.note("reads that wait for a first entry");
                }
                (None, Some(_)) => self.seen.note("reads confirmed by the model alone"),
                (None, None) => self.seen.note("reads refused"),
            }
            for entries in [answer, modelled].into_iter().flatten() {
                let log = node.model.log.iter().take(entries);
                let commands = log.filter(|entry| entry.command.is_some()).count();
                assert!(
                    commands >= read.applied,
                    "seed {seed}: read {number} of n{at} sees {commands} commands, {} were applied when it was asked",
                    read.applied
                );
            }
        }
    }

    async fn elect(&mut self, node: usize) {
        self.nodes[node]
            .raft
            .trigger()
            .elect(false)
            .await
            .expect("a node");
        self.seen.note("elections");
    }

    async fn heartbeat(&mut self) {
        for node in &self.nodes {
            node.raft.trigger().heartbeat().await.expect("a node");
        }
    }

    /// Every node that takes itself for a leader writes; one that has not heard its quorum for long refuses.
    async fn write(&mut self) {
        for at in 0..self.nodes.len() {
            let node = &mut self.nodes[at];
            if node.model.role != Role::Leader {
                continue;
            }
            self.writes += 1;
            let write = node.raft.client_write_ff(self.writes, None);
            write.await.expect("a node");
            tokio::time::sleep(MOMENT).await;
            let written = node.disk.open().log.last().map(model_entry);
            if written.is_some_and(|entry| entry.command == Some(self.writes)) {
                node.model.propose(Some(self.writes));
                self.seen.note("writes");
            } else {
                self.seen.note("writes refused");
            }
        }
    }

    async fn restart(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        node.raft.shutdown().await.expect("it stops");
        node.machine = Machine::default();
        node.raft = begin(at, &self.network, &node.disk, &node.machine).await;
        node.model.restart();
        self.seen.note("restarts");
    }

    /// Gives a call to whom it is for, and to its model; perhaps the answer to who asked. `twice`: it arrives again later.
    async fn deliver(&mut self, at: usize, twice: bool, answered: bool) {
        let call = self.network.with(|calls| {
            let call = calls.swap_remove(at);
            if twice {
                calls.push(Call {
                    from: call.from,
                    to: call.to,
                    request: call.request.clone(),
                    answer: None,
                    seen: true,
                    round: call.round,
                });
            }
            call
        });
        let Call {
            from, to, round, ..
        } = call;
        let (answer, said) = match call.request {
            Request::Vote(request) => {
                let answer = self.nodes[to].raft.vote(request.clone()).await;
                let answer = answer.expect("a node");
                let said = self.voted(from, to, &request, &answer);
                (Answer::Vote(answer), said)
            }
            Request::Append(request) => {
                let answer = self.nodes[to].raft.append_entries(request.clone()).await;
                let answer = answer.expect("a node");
                let said = self.appended(from, to, round, &request, &answer);
                (Answer::Append(answer), said)
            }
        };
        // Who asked may have given up by now; then its model hears nothing either.
        if answered
            && let Some(asker) = call.answer
            && asker.send(answer).is_ok()
        {
            let out = self.nodes[from].model.take_in(to, said);
            self.nodes[from].sends(&out);
        }
    }

    fn voted(
        &mut self,
        from: usize,
        to: usize,
        request: &openraft::raft::VoteRequest<Types>,
        answer: &openraft::raft::VoteResponse<Types>,
    ) -> RaftMessage<u64> {
        let before = self.nodes[to].model.clone();
        let message = RaftMessage::Vote {
            vote: model_vote(&request.vote),
            last: model_end(request.last_log_id),
        };
        let model = &mut self.nodes[to].model;
        let [(_, said)] = &model.take_in(from, message)[..] else {
            panic!("one answer");
        };
        let RaftMessage::Voted { asked, vote, yes } = said.clone() else {
            panic!("an answer to a vote");
        };
        if yes && !answer.vote_granted {
            // The one thing that only openraft does: while it trusts a leader it elects no other.
            assert!(
                before.vote.committed || before.role == Role::Leader,
                "seed {}: n{to} refuses n{from} without a lease: {request} {answer}",
                self.seed
            );
            self.nodes[to].model = before;
            self.seen.note("votes refused for the lease");
            return RaftMessage::Voted {
                asked,
                vote: model_vote(&answer.vote),
                yes: false,
            };
        }
        assert_eq!(yes, answer.vote_granted, "seed {}: {answer}", self.seed);
        self.same_vote(to, vote, &answer.vote);
        self.seen.note(if yes {
            "votes granted"
        } else {
            "votes refused"
        });
        said.clone()
    }

    fn appended(
        &mut self,
        from: usize,
        to: usize,
        round: u64,
        request: &openraft::raft::AppendEntriesRequest<Types>,
        answer: &AppendEntriesResponse<Types>,
    ) -> RaftMessage<u64> {
        let message = RaftMessage::Append {
            vote: model_vote(&request.vote),
            previous: model_end(request.prev_log_id),
            entries: request.entries.iter().map(model_entry).collect(),
            commit: model_end(request.leader_commit).1,
            round,
        };
        let model = &mut self.nodes[to].model;
        let [(_, said)] = &model.take_in(from, message)[..] else {
            panic!("one answer");
        };
        let RaftMessage::Appended { vote, outcome, .. } = said else {
            panic!("an answer to entries");
        };
        match (outcome, answer) {
            (Appended::Agrees(_), AppendEntriesResponse::Success) => self.seen.note("appends"),
            (Appended::Conflicts(_), AppendEntriesResponse::Conflict) => {
                self.seen.note("conflicts");
            }
            (Appended::HigherVote, AppendEntriesResponse::HigherVote(real)) => {
                self.same_vote(to, *vote, real);
                self.seen.note("appends of old leaders");
            }
            _ => panic!(
                "seed {}: n{to} says {answer}, its model {outcome:?} to {request}",
                self.seed
            ),
        }
        said.clone()
    }

    /// A restarted leader's own vote is no longer committed in its memory; on its disk and in the model it is.
    fn same_vote(&self, at: usize, model: Vote, real: &store::Vote) {
        let mut real = model_vote(real);
        if real.leader() == model.leader() && real.node == at {
            real.committed = model.committed;
        }
        assert_eq!(model, real, "seed {}: the vote of n{at}", self.seed);
    }

    /// Lets everything run that can, tells the models what their nodes began, and compares.
    async fn settle(&mut self) {
        tokio::time::sleep(MOMENT).await;
        let rounds: Vec<u64> = self.nodes.iter().map(|node| node.round).collect();
        let sent: Vec<(usize, usize, Request)> = self.network.with(|calls| {
            calls
                .iter_mut()
                .filter(|call| !call.seen)
                .map(|call| {
                    call.seen = true;
                    call.round = rounds[call.from];
                    (call.from, call.to, call.request.clone())
                })
                .collect()
        });
        for (from, to, request) in sent {
            self.sent(from, to, &request);
        }
        for at in 0..self.nodes.len() {
            self.compare(at);
            self.answer_reads(at);
            let node = &mut self.nodes[at];
            if node.model.role == Role::Leader {
                node.led = Some(node.model.clone());
            }
        }
    }

    fn sent(&mut self, from: usize, to: usize, request: &Request) {
        let seed = self.seed;
        match request {
            Request::Vote(request) => {
                let model = &mut self.nodes[from].model;
                let vote = model_vote(&request.vote);
                if vote > model.vote {
                    let _ = model.campaign();
                }
                assert_eq!(
                    (vote, model_end(request.last_log_id)),
                    (model.vote, model.last()),
                    "seed {seed}: n{from} asks n{to} for its vote"
                );
            }
            Request::Append(request) => {
                let (_, next) = model_end(request.prev_log_id);
                let entries: Vec<_> = request.entries.iter().map(model_entry).collect();
                let vote = model_vote(&request.vote);
                let model = &self.nodes[from].model;
                if model.role != Role::Leader {
                    self.seen
                        .note("sends of leaders that were deposed meanwhile");
                }
                let led = [Some(model), self.nodes[from].led.as_ref()];
                let leader = led
                    .into_iter()
                    .flatten()
                    .find(|model| model.role == Role::Leader && model.vote == vote);
                let Some(leader) = leader else {
                    panic!("seed {seed}: n{from} sends n{to} entries and does not lead: {request}");
                };
                assert_eq!(
                    leader.log.get(next..next + entries.len()),
                    Some(&entries[..]),
                    "seed {seed}: n{from} sends {request}"
                );
                let commit = model_end(request.leader_commit).1;
                assert!(
                    commit <= leader.commit,
                    "seed {seed}: n{from} says that {commit} are committed; {} are",
                    leader.commit
                );
            }
        }
    }

    fn compare(&mut self, at: usize) {
        let seed = self.seed;
        let node = &self.nodes[at];
        let contents = node.disk.open();
        let log: Vec<_> = contents.log.iter().map(model_entry).collect();
        assert_eq!(node.model.log, log, "seed {seed}: the log of n{at}");
        let vote = contents.vote.expect("a vote");
        drop(contents);
        self.same_vote(at, node.model.vote, &vote);
        let leads = node.raft.is_leader();
        assert_eq!(
            node.model.role == Role::Leader,
            leads,
            "seed {seed}: whether n{at} leads"
        );
        let committed = &node.model.log[..node.model.commit];
        let known = committed.len().min(self.committed.len());
        assert_eq!(
            committed[..known],
            self.committed[..known],
            "seed {seed}: what n{at} takes for committed"
        );
        if committed.len() > known {
            self.committed = committed.to_vec();
        }
        // What openraft applies is what the models know to be committed.
        let applied = node.machine.applied();
        let commands: Vec<u64> = self
            .committed
            .iter()
            .filter_map(|entry| entry.command)
            .collect();
        assert!(
            commands.starts_with(&applied),
            "seed {seed}: n{at} applied {applied:?}, committed are {commands:?}"
        );
    }

    /// Faults are over: in the end all have the same log, committed and applied.
    async fn calm(&mut self) {
        for _ in 0..CALM_ROUNDS {
            while self.network.with(|calls| !calls.is_empty()) {
                self.deliver(0, false, true).await;
                self.settle().await;
            }
            let leader = self
                .nodes
                .iter()
                .filter(|node| node.model.role == Role::Leader)
                .max_by_key(|node| node.model.vote);
            match leader {
                Some(leader) if self.agreed(leader) => return,
                Some(_) => {
                    // Replication that gave up for a while tries again.
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    self.settle().await;
                    self.heartbeat().await;
                }
                None => {
                    tokio::time::sleep(LEASE_OVER).await;
                    self.settle().await;
                    let longest =
                        (0..self.nodes.len()).max_by_key(|&at| self.nodes[at].model.last());
                    self.elect(longest.unwrap_or(0)).await;
                }
            }
            self.settle().await;
        }
        let stand: Vec<String> = self
            .nodes
            .iter()
            .map(|node| {
                let Raft {
                    vote,
                    role,
                    commit,
                    log,
                    ..
                } = &node.model;
                let applied = node.machine.applied().len();
                format!(
                    "{vote:?} {role:?}: {commit} of {} committed, {applied} applied",
                    log.len()
                )
            })
            .collect();
        panic!("seed {}: no agreement:\n{}", self.seed, stand.join("\n"));
    }

    /// With everybody there and everything heard, a leader's read is confirmed.
    async fn last_read(&mut self) {
        let leads = |node: &Node| node.model.role == Role::Leader;
        let last = (0..self.nodes.len())
            .filter(|&at| leads(&self.nodes[at]))
            .max_by_key(|&at| self.nodes[at].model.vote);
        let at = last.expect("a leader");
        let before = self.seen.count("reads confirmed");
        self.read(at);
        self.settle().await;
        for _ in 0..CALM_ROUNDS {
            while self.network.with(|calls| !calls.is_empty()) {
                self.deliver(0, false, true).await;
                self.settle().await;
            }
            if self.nodes[at].reads.is_empty() {
                break;
            }
            self.heartbeat().await;
            self.settle().await;
        }
        assert!(
            self.seen.count("reads confirmed") > before,
            "seed {}: n{at} leads and cannot say so",
            self.seed
        );
    }

    fn agreed(&self, leader: &Node) -> bool {
        let commands: Vec<u64> = leader
            .model
            .log
            .iter()
            .filter_map(|entry| entry.command)
            .collect();
        leader.model.commit == leader.model.log.len()
            && self.nodes.iter().all(|node| {
                node.model.log == leader.model.log && node.machine.applied() == commands
            })
    }
}

#[test]
fn the_model_of_raft_does_as_openraft_does_in_many_histories() {
    let mut seen = Seen::default();
    let [landing, long] = HISTORIES;
    let long_tier = std::env::var_os("BATON_TIER").is_some_and(|tier| tier == "long");
    let histories = if long_tier { long } else { landing };
    for seed in 0..histories {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let mut history = History::new(seed, &mut seen).await;
            for _ in 0..STEPS {
                history.step().await;
            }
            history.calm().await;
            history.last_read().await;
            history.seen.note("histories");
            let entries = history.committed.len() as u64;
            *history.seen.0.entry("entries committed").or_default() += entries;
            for node in &history.nodes {
                node.raft.shutdown().await.expect("it stops");
            }
        });
    }
    println!("{seen:?}");
    // None of what may differ was left out: so many times at least in the landing's histories.
    for (what, least) in [
        ("appends of old leaders", 200),
        ("votes refused", 200),
        ("votes refused for the lease", 100),
        ("restarts", 100),
        ("entries committed", 1_000),
        ("conflicts", 4),
    ] {
        let least = least * histories / landing;
        let count = seen.count(what);
        assert!(count >= least, "{what}: {seen:?}");
    }
    // Each history ends with a read that is confirmed; leaders that do not know themselves deposed asked as well.
    let confirmed = seen.count("reads confirmed");
    assert!(confirmed > 2 * seen.count("histories"), "{seen:?}");
    assert!(seen.count("reads refused") > confirmed / 4, "{seen:?}");
    assert!(
        seen.count("reads confirmed by the model alone") < confirmed / 20,
        "{seen:?}"
    );
}
