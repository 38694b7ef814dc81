//! A small cluster to test decisions on: it is built by commands alone, as a real one is.

use std::collections::{BTreeMap, BTreeSet};

use crate::command::{Command, Envelope, Outcome, Rejection, Reply};
use crate::event::Why;
use crate::ids::{Incarnation, LogIndex, MigrationId, Name, NodeId, RequestId, Token, VmId};
use crate::settings::Settings;
use crate::state::{
    Boot, ClusterState, Desired, DiskSpec, FenceClass, MigrationCause, MigrationOptions, NodeFacts,
    NodeRole, OnIsolation, Vm, VmSpec,
};
use crate::trust::Sha256;

/// The minimum time between two entries of a test's log, ms.
const STEP_MS: u64 = 10;

/// A state and its log.
#[derive(Clone, Debug, Default)]
pub(crate) struct World {
    pub(crate) state: ClusterState,
    pub(crate) log: Vec<(LogIndex, Envelope)>,
    pub(crate) now_ms: u64,
}

/// A name that is known to be one.
pub(crate) fn name(text: &str) -> Name {
    Name::new(text).expect("a name")
}

/// A machine of that size with one disk on volume `shared`.
pub(crate) fn spec(disk: &str, memory_mib: u64) -> VmSpec {
    VmSpec {
        vcpus: 1,
        memory_mib,
        boot: Boot::SelfCheck {
            working_set_mib: 4,
            dirty_mib_s: 0,
        },
        disks: vec![DiskSpec {
            volume: name("shared"),
            path: format!("{disk}.raw"),
            size_bytes: 1 << 20,
        }],
        nics: Vec::new(),
        priority: 500,
        failover: true,
        on_isolation: OnIsolation::Freeze,
        downtime_max_ms: None,
        witness: None,
        tags: BTreeSet::new(),
    }
}

/// The hash of a text's bytes, as far as tests tell texts apart.
pub(crate) fn hash(text: &str) -> Sha256 {
    let mut hash = [0x5a_u8; 32];
    for (at, byte) in text.bytes().enumerate() {
        hash[at % 32] = hash[at % 32].wrapping_mul(31).wrapping_add(byte);
    }
    Sha256(hash)
}

/// Makes the join token `join-<name>` with the secret `secret-<name>`, which never expires.
pub(crate) fn join_token(label: &str, role: NodeRole) -> Command {
    Command::CreateJoinToken {
        id: format!("join-{label}"),
        node: name(label),
        role,
        secret_hash: hash(&format!("secret-{label}")),
        expires_at_ms: u64::MAX,
    }
}

/// Joins by that token with the key `key-<name>`.
pub(crate) fn join(label: &str) -> Command {
    Command::JoinNode {
        token: format!("join-{label}"),
        secret_hash: hash(&format!("secret-{label}")),
        name: name(label),
        address: format!("{label}:1"),
        key: hash(&format!("key-{label}")),
    }
}

/// What a node of that memory says of itself.
pub(crate) fn facts(memory_mib: u64) -> NodeFacts {
    NodeFacts {
        cpus: 8,
        memory_mib,
        cpu_vendor: "AuthenticAMD".into(),
        cpu_model: "test".into(),
        version: "0.1.0".into(),
        stream_versions: (1, 1),
        watchdog: false,
        kvm: true,
    }
}

impl World {
    /// A cluster of `nodes` nodes (1, 2, 3, …) with `memory_mib` each and a volume `shared`.
    pub(crate) fn new(nodes: u64, memory_mib: u64) -> World {
        World::with_fence(nodes, memory_mib, FenceClass::GidToken)
    }

    /// The same with a volume of that fence class.
    pub(crate) fn with_fence(nodes: u64, memory_mib: u64, fence: FenceClass) -> World {
        let mut world = World {
            now_ms: 1_000_000,
            ..World::default()
        };
        world.done(Command::InitCluster {
            id: "c".into(),
            name: name("test"),
            broker_uid: 5_000,
            node_name: name("n1"),
            address: "127.0.0.1:1".into(),
        });
        for number in 2..=nodes {
            world.let_in(&format!("n{number}"), NodeRole::Voter);
        }
        for number in 1..=nodes {
            world.register(NodeId(number), Incarnation(1), memory_mib);
        }
        world.done(Command::AddVolume {
            name: name("shared"),
            url: "nfs://127.0.0.1/shared".into(),
            uuid: "v".into(),
            fence,
            settle_ms: 0,
            size_bytes: 1 << 40,
            nodes: BTreeSet::new(),
            tls_ca: None,
        });
        world
    }

    /// Applies a command as the next entry.
    pub(crate) fn ask(&mut self, command: Command) -> Reply {
        let index = LogIndex(self.state.applied.0 + 1);
        self.ask_at(index, format!("r{}", index.0), command)
    }

    fn ask_at(&mut self, index: LogIndex, request: String, command: Command) -> Reply {
        self.now_ms += STEP_MS;
        let envelope = Envelope {
            request: RequestId(request),
            ..self.envelope(command)
        };
        self.apply_at(index, envelope)
    }

    /// A command as the next entry would carry it.
    pub(crate) fn envelope(&self, command: Command) -> Envelope {
        Envelope {
            request: RequestId(format!("r{}", self.state.applied.0 + 1)),
            actor: "test".into(),
            at_ms: self.now_ms,
            asked: None,
            command,
        }
    }

    /// Applies an entry at that index.
    pub(crate) fn apply_at(&mut self, index: LogIndex, envelope: Envelope) -> Reply {
        let reply = self.state.apply(index, &envelope);
        self.log.push((index, envelope));
        reply
    }

    /// Lets a node in: its join token, then itself by it.
    ///
    /// The token's entry stands at the number of the one before it, so that the nodes of a new world are
    /// numbered 1, 2, 3, …: nothing but the order of entries matters to what is made of them.
    pub(crate) fn let_in(&mut self, label: &str, role: NodeRole) -> NodeId {
        let (index, number) = (self.state.applied, self.state.applied.0 + 1);
        let made = self.ask_at(index, format!("r{number}/token"), join_token(label, role));
        assert!(matches!(made, Reply::Done { .. }), "{label}: {made:?}");
        match self.done(join(label)) {
            Outcome::Node(node) => node,
            other => panic!("{other:?}"),
        }
    }

    /// Applies a command that must be done.
    pub(crate) fn done(&mut self, command: Command) -> Outcome {
        let text = format!("{command:?}");
        match self.ask(command) {
            Reply::Done { outcome, .. } => outcome,
            Reply::Rejected(rejection) => panic!("{text}: {rejection}"),
        }
    }

    /// Applies a command that must be refused.
    pub(crate) fn refused(&mut self, command: Command) -> Rejection {
        let text = format!("{command:?}");
        match self.ask(command) {
            Reply::Done { outcome, .. } => panic!("{text} was done: {outcome:?}"),
            Reply::Rejected(rejection) => rejection,
        }
    }

    pub(crate) fn register(&mut self, node: NodeId, incarnation: Incarnation, memory_mib: u64) {
        let replaces = self.state.nodes[&node].incarnation;
        self.done(Command::RegisterNode {
            node,
            incarnation,
            replaces,
            address: "127.0.0.1:1".into(),
            facts: facts(memory_mib),
        });
    }

    /// Creates a machine that should run.
    pub(crate) fn create(&mut self, label: &str, memory_mib: u64) -> VmId {
        self.create_with(label, spec(label, memory_mib))
    }

    pub(crate) fn create_with(&mut self, label: &str, spec: VmSpec) -> VmId {
        match self.done(Command::CreateVm {
            name: name(label),
            spec,
            images: BTreeMap::new(),
            desired: Desired::Running,
        }) {
            Outcome::Vm(vm) => vm,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn vm(&self, vm: VmId) -> &Vm {
        &self.state.vms[&vm]
    }

    pub(crate) fn token(&self, vm: VmId) -> Token {
        self.vm(vm).ownership.token
    }

    /// Gives a machine to a node.
    pub(crate) fn start(&mut self, vm: VmId, node: NodeId) -> Token {
        let expects = self.token(vm);
        match self.done(Command::StartVm {
            vm,
            node,
            expects,
            why: Why::default(),
        }) {
            Outcome::Token(token) => token,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn activate(&mut self, vm: VmId) {
        let record = &self.vm(vm).ownership;
        let (token, node) = (record.token, record.owner.expect("an owner"));
        self.done(Command::Activated { vm, node, token });
    }

    /// A machine that runs on a node.
    pub(crate) fn running(&mut self, label: &str, memory_mib: u64, node: NodeId) -> VmId {
        let vm = self.create(label, memory_mib);
        self.start(vm, node);
        self.activate(vm);
        vm
    }

    pub(crate) fn rekey(&mut self, vm: VmId, settle: bool) -> Token {
        let record = &self.vm(vm).ownership;
        let (expects, node) = (record.token, record.owner.expect("an owner"));
        match self.done(Command::Rekey {
            vm,
            node,
            expects,
            settle,
            reason: "test".into(),
        }) {
            Outcome::Token(token) => token,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn queue_command(vm: VmId, to: NodeId, cause: MigrationCause) -> Command {
        Command::QueueMigration {
            vm,
            to,
            options: MigrationOptions::default(),
            cause,
            why: Why::default(),
        }
    }

    pub(crate) fn queue(&mut self, vm: VmId, to: NodeId, cause: MigrationCause) -> MigrationId {
        match self.done(World::queue_command(vm, to, cause)) {
            Outcome::Migration(migration) => migration,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn start_command(&self, migration: MigrationId) -> Command {
        Command::StartMigration {
            migration,
            expects: self.token(self.state.migrations[&migration].vm),
            ticket: "ab".repeat(32),
        }
    }

    /// A migration under way, and the token it reserved.
    pub(crate) fn migrate(&mut self, vm: VmId, to: NodeId) -> (MigrationId, Token) {
        let migration = self.queue(vm, to, MigrationCause::Asked);
        match self.done(self.start_command(migration)) {
            Outcome::Token(token) => (migration, token),
            other => panic!("{other:?}"),
        }
    }

    /// The cutover of a migration under way.
    pub(crate) fn cutover(&mut self, migration: MigrationId) {
        let command = self.cutover_command(migration).expect("under way");
        self.done(command);
    }

    pub(crate) fn cutover_command(&self, migration: MigrationId) -> Option<Command> {
        match self.state.migrations.get(&migration)?.state {
            crate::state::MigrationState::Active {
                expects, reserved, ..
            } => Some(Command::Cutover {
                migration,
                expects,
                claimed: reserved,
            }),
            _ => None,
        }
    }

    pub(crate) fn abort(&mut self, migration: MigrationId) {
        self.done(Command::AbortMigration {
            migration,
            reason: "test".into(),
        });
    }

    pub(crate) fn lose(&mut self, node: NodeId) {
        let incarnation = self.state.nodes[&node].incarnation;
        self.done(Command::NodeLost {
            node,
            incarnation,
            why: Why::rule("test"),
        });
    }

    pub(crate) fn desire(&mut self, vm: VmId, desired: Desired) {
        self.done(Command::SetDesired {
            vm,
            desired,
            forced: false,
        });
    }

    pub(crate) fn settings(&mut self, change: impl FnOnce(&mut Settings)) {
        let mut settings = self.state.settings.clone();
        change(&mut settings);
        self.done(Command::SetSettings { settings });
    }
}
