//! What travels, and what happens next.

use std::sync::Arc;

use cluster_model::{Envelope, Grant, MigrationId, MonitorView, Reply, Token, VmId};

use crate::monitor::{Guest, MonitorCall};
use crate::raft::RaftMessage;
use crate::storage::{Answer, Call};

/// Who can be spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A node's `clusterd`.
    Daemon(usize),
    /// A monitor on a node.
    Monitor(usize, u64),
    /// The storage server.
    Server,
}

/// What travels.
#[derive(Clone, Debug)]
pub enum Message {
    /// Between the logs of two nodes.
    Raft(RaftMessage),
    /// A command for the leader.
    Propose { rpc: u64, envelope: Arc<Envelope> },
    /// Its entry and answer, or nothing known.
    Proposed {
        rpc: u64,
        answer: Option<(usize, Reply)>,
    },
    /// Asks the leader for a confirmed index.
    Confirm { rpc: u64 },
    /// The index.
    Confirmed { rpc: u64, index: Option<usize> },
    /// Asks for the lease.
    Heartbeat {
        sequence: u64,
        incarnation: u64,
        applied: usize,
        volume_down: bool,
    },
    /// Grants it.
    Granted {
        sequence: u64,
        grant: Grant,
        index: usize,
        /// The node waits that long for its replica, real time.
        until: u64,
    },
    /// A daemon to its monitor: the deadline moves on.
    Extend { deadline: u64, session: u64 },
    /// The same: it moves back, and earlier lives are obeyed no more.
    Shorten {
        deadline: u64,
        session: u64,
        life: u64,
    },
    /// A monitor: it did that, for that life.
    Shortened { nonce: u64, life: u64 },
    /// Source to destination: is your monitor ready?
    AskReady { rpc: u64, migration: MigrationId },
    /// Its nonce.
    Ready { rpc: u64, nonce: Option<u64> },
    /// A daemon asks something of a monitor.
    Ask { rpc: u64, call: MonitorCall },
    /// What it says: whether it refused, how often it has described itself, and how it stands.
    Told {
        rpc: u64,
        refused: Option<String>,
        said: u64,
        view: Option<MonitorView>,
    },
    /// A monitor says how it stands.
    Status { said: u64, view: Box<MonitorView> },
    /// A monitor's process is gone.
    Gone { nonce: u64 },
    /// A storage call.
    Call { rpc: u64, call: Call },
    /// Its answer.
    Answer { rpc: u64, answer: Answer },
    /// Source monitor to destination monitor: the guest is stopped and everything is committed.
    Quiet { migration: MigrationId },
    /// The last of the memory and the device state.
    Final {
        migration: MigrationId,
        guest: Guest,
    },
    /// The memory stream broke.
    Broken { migration: MigrationId, why: String },
}

/// What happens next.
#[derive(Clone, Debug)]
pub enum Event {
    /// Something arrives.
    Arrive {
        from: Place,
        to: Place,
        message: Message,
    },
    /// A daemon's regular look, of that life.
    Tick { node: usize, life: u64 },
    /// A daemon sends its heartbeat.
    Beat { node: usize, life: u64 },
    /// A flow's wait has ended, if it is still the same one.
    Flow {
        node: usize,
        life: u64,
        flow: u64,
        wait: u64,
    },
    /// A monitor that a daemon found at its start has had its time to answer.
    NotFound { node: usize, life: u64, nonce: u64 },
    /// A guest's next step.
    Guest { node: usize, nonce: u64 },
    /// A monitor's deadline may have passed.
    Deadline { node: usize, nonce: u64 },
    /// A monitor's call has had no answer for long.
    CallLate { node: usize, nonce: u64, rpc: u64 },
    /// A source monitor has copied enough.
    Copied { node: usize, nonce: u64 },
    /// A checked write lands.
    Land {
        vm: VmId,
        token: Token,
        sequence: u64,
        verifier: u64,
        rpc: u64,
        to: Place,
    },
    /// Trouble.
    Fault,
    /// Somebody asks for something.
    Operate,
    /// A daemon starts.
    StartDaemon { node: usize },
    /// A daemon that is back from an absence is gone again.
    GoneAgain { node: usize },
    /// A host boots.
    Boot { node: usize },
    /// The storage server starts.
    StartServer,
    /// Links are whole again.
    Heal,
    /// All trouble ends.
    Calm,
}
