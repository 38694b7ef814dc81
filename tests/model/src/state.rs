//! One state of the whole: the log, the three nodes and the storage server.

use crate::host::{Guest, Host, Node};
use crate::log::{Log, Phase, Token};
use crate::storage::{Group, Storage};

/// Everything that a step may depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// What was applied.
    pub log: Log,
    /// The nodes, by [`Node`].
    pub hosts: [Host; 3],
    /// The server.
    pub storage: Storage,
    /// The newest token that a guest began to run under.
    pub newest_run: Token,
    /// A WRITE landed after a guest had begun to run under a newer token.
    pub landed_late: bool,
    /// Faults so far.
    pub faults: u8,
}

impl State {
    /// The machine runs on the source under token 1, which the file bears.
    pub fn new(group: Group) -> State {
        let mut hosts = [Host::IDLE; 3];
        hosts[Node::Source as usize] = Host {
            guest: Guest::Running,
            token: 1,
            image: 1,
            begun: 1,
            ..Host::IDLE
        };
        State {
            log: Log::new(),
            hosts,
            storage: Storage::new(group),
            newest_run: 1,
            landed_late: false,
            faults: 0,
        }
    }

    /// One node.
    pub fn host(&self, node: Node) -> &Host {
        &self.hosts[node as usize]
    }

    /// One node, to be changed.
    pub fn host_mut(&mut self, node: Node) -> &mut Host {
        &mut self.hosts[node as usize]
    }

    /// Whether the guest on `node` executes.
    pub fn runs(&self, node: Node) -> bool {
        self.host(node).guest == Guest::Running
    }

    /// How many copies execute.
    pub fn running(&self) -> usize {
        Node::ALL
            .into_iter()
            .filter(|&node| self.runs(node))
            .count()
    }

    /// Whether the machine is `node`'s, with the image that its monitor holds.
    pub fn is_live(&self, node: Node) -> bool {
        let host = self.host(node);
        let ours = self.log.owner == Some(node);
        match host.guest {
            Guest::None => false,
            Guest::Receiving => {
                ours && self.log.migration.phase == Phase::CutOver
                    && self.log.image == self.log.migration.reserved
            }
            Guest::Running | Guest::Frozen | Guest::Held | Guest::Quiet => {
                ours && self.log.image == host.image
            }
        }
    }

    /// Whether the monitor on `node` may never run again, as whoever has applied everything knows.
    pub fn is_void(&self, node: Node) -> bool {
        let receives = self.host(node).guest == Guest::Receiving && self.log.migrating();
        self.host(node).guest != Guest::None && !receives && !self.is_live(node)
    }

    /// Whether a WRITE of the guest on `node`, under its present token, has no answer.
    pub fn unanswered(&self, node: Node) -> bool {
        let token = self.host(node).token;
        self.storage
            .writes()
            .any(|write| write.node == node && write.token == token)
    }

    /// Whether `node` has a part in the machine: a fault of any other changes nothing.
    pub fn has_part(&self, node: Node) -> bool {
        let host = self.host(node);
        host.guest != Guest::None || host.claim != 0 || self.log.owner == Some(node)
    }
}
