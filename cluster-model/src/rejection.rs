//! Why a command is refused: the facts, and the text that says what to try.

use serde::{Deserialize, Serialize};

use crate::ids::{MigrationId, Name, NodeId, Token, VmId};
use crate::settings::SettingsError;
use crate::state::ClusterState;
use crate::trust::TrustRefusal;

/// Why a command was refused. The text says what to try.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Rejection {
    /// There is a cluster already.
    #[error("this node already belongs to the cluster `{0}`")]
    AlreadyInitialised(Name),
    /// There is none yet.
    #[error("there is no cluster yet; try: clusterctl cluster init")]
    NotInitialised,
    /// Names are unique among their kind.
    #[error("there is a {kind} named `{name}` already; choose another name")]
    NameTaken {
        /// node, machine, volume.
        kind: String,
        /// Which.
        name: Name,
    },
    /// No such thing.
    #[error("there is no {kind} {what}; try: clusterctl {kind} list")]
    Unknown {
        /// node, vm, volume, migration, rule.
        kind: String,
        /// As it was asked for.
        what: String,
    },
    /// The spec cannot be.
    #[error("{field}: {problem}")]
    BadSpec {
        /// Which field.
        field: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A setting cannot be.
    #[error(transparent)]
    BadSettings(SettingsError),
    /// The caller believes in an older owner or token.
    #[error("{vm} is owned by {} under {token}, not as you believe ({expected}); look again: clusterctl vm show", owner.map_or("nobody".to_owned(), |node| node.to_string()))]
    Stale {
        /// Which machine.
        vm: VmId,
        /// Its owner.
        owner: Option<NodeId>,
        /// Its token.
        token: Token,
        /// What the caller believed, in words.
        expected: String,
    },
    /// The machine has an owner.
    #[error("{vm} is on {owner}; stop it first: clusterctl vm stop")]
    Owned {
        /// Which machine.
        vm: VmId,
        /// Its owner.
        owner: NodeId,
    },
    /// The machine has no owner.
    #[error("{vm} does not run; start it first: clusterctl vm start")]
    NotRunning {
        /// Which machine.
        vm: VmId,
    },
    /// The machine should not run.
    #[error("{vm} should be stopped; to run it: clusterctl vm start")]
    NotDesired {
        /// Which machine.
        vm: VmId,
    },
    /// The machine is held.
    #[error("{vm} is held: {reason}; to try again: clusterctl vm start")]
    Held {
        /// Which machine.
        vm: VmId,
        /// Why.
        reason: String,
    },
    /// A node cannot take machines.
    #[error("{node} takes no machines: {reason}")]
    NodeUnfit {
        /// Which node.
        node: NodeId,
        /// Lost, draining, witness, ….
        reason: String,
    },
    /// A node has no room.
    #[error("{node} has no room: it needs {needs} of {what}, {free} is free")]
    NoRoom {
        /// Which node.
        node: NodeId,
        /// Memory or vCPUs.
        what: String,
        /// Asked for.
        needs: u64,
        /// There.
        free: u64,
    },
    /// A node does not reach a volume.
    #[error(
        "{node} does not reach volume `{volume}`; choose a node that does: clusterctl volume list"
    )]
    VolumeUnreachable {
        /// Which node.
        node: NodeId,
        /// Which volume.
        volume: Name,
    },
    /// CPUs differ too much.
    #[error(
        "{to} has a CPU of {theirs}, {from} of {ours}: a running machine cannot move between makers; stop it and start it there"
    )]
    CpuDiffers {
        /// Source.
        from: NodeId,
        /// Destination.
        to: NodeId,
        /// Source's vendor.
        ours: String,
        /// Destination's vendor.
        theirs: String,
    },
    /// The destination speaks another stream version.
    #[error(
        "{to} runs an older Baton ({theirs}) that does not read what {from} ({ours}) sends; upgrade it first"
    )]
    VersionsDiffer {
        /// Source.
        from: NodeId,
        /// Destination.
        to: NodeId,
        /// Source's.
        ours: String,
        /// Destination's.
        theirs: String,
    },
    /// A migration to where it is.
    #[error("{vm} is on {node} already; choose another node with --to")]
    SameNode {
        /// Which machine.
        vm: VmId,
        /// Where.
        node: NodeId,
    },
    /// One migration of a machine at a time.
    #[error(
        "{vm} is already migrating ({migration}); wait for it, or: clusterctl migration cancel {migration}"
    )]
    AlreadyMigrating {
        /// Which machine.
        vm: VmId,
        /// Which migration.
        migration: MigrationId,
    },
    /// The simultaneous migrations of a node are used up.
    #[error(
        "{node} has {running} of {max} migrations {direction} under way; it waits in the queue"
    )]
    TooManyMigrations {
        /// Which node.
        node: NodeId,
        /// in or out.
        direction: String,
        /// Under way.
        running: u32,
        /// The setting.
        max: u32,
    },
    /// The migration is not in the state that the command needs.
    #[error("{migration} is {is}, so {cannot}")]
    MigrationState {
        /// Which migration.
        migration: MigrationId,
        /// How it stands.
        is: String,
        /// What cannot be done.
        cannot: String,
    },
    /// The destination burnt its token too often.
    #[error(
        "{migration}: the destination's storage did not acknowledge {tries} claims; the migration must be aborted"
    )]
    RenewalsUsedUp {
        /// Which migration.
        migration: MigrationId,
        /// How many.
        tries: u8,
    },
    /// The node lives another life than the caller believes.
    #[error("{node} registered anew since; look again: clusterctl node show")]
    OtherIncarnation {
        /// Which node.
        node: NodeId,
    },
    /// The node is in use.
    #[error("{node} {reason}")]
    NodeInUse {
        /// Which node.
        node: NodeId,
        /// What is left, and what to do.
        reason: String,
    },
    /// The volume is in use.
    #[error("volume `{volume}` carries disks of {vms}; delete them first: clusterctl vm delete")]
    VolumeInUse {
        /// Which volume.
        volume: Name,
        /// Whose disks.
        vms: String,
    },
    /// The drain is not as the command needs.
    #[error("{node} is {is}; {hint}")]
    DrainState {
        /// Which node.
        node: NodeId,
        /// How it stands.
        is: String,
        /// What to try.
        hint: String,
    },
    /// A placement rule forbids it.
    #[error("rule `{rule}` keeps {vm} off {node}; change the rule, or choose another node")]
    RuleForbids {
        /// Which rule.
        rule: Name,
        /// Which machine.
        vm: VmId,
        /// Which node.
        node: NodeId,
    },
    /// The storage cannot fence the lost owner.
    #[error(
        "{vm} lies on a volume of fence class none: its lost owner cannot be stopped from writing; make sure that it is off, then: clusterctl vm start"
    )]
    NoFence {
        /// Which machine.
        vm: VmId,
    },
    /// The counter's end.
    #[error("all 2^30 fencing tokens were granted; restore into a new cluster")]
    TokensUsedUp,
    /// Certificates and tokens.
    #[error(transparent)]
    Trust(TrustRefusal),
    /// A text or list is too long, or another bound was passed.
    #[error("{what} is over its bound of {max}")]
    TooLarge {
        /// What.
        what: String,
        /// The bound.
        max: u64,
    },
}

impl Rejection {
    /// The text with people's names where `Display`, which knows no state, has numbers.
    pub fn in_words(&self, state: &ClusterState) -> String {
        let (vm, nodes) = self.objects();
        let mut text = self.to_string();
        for node in nodes.into_iter().flatten() {
            text = renamed(&text, &node.to_string(), &state.node_label(node));
        }
        if let Some(vm) = vm {
            text = renamed(&text, &vm.to_string(), &state.vm_label(vm));
        }
        // A hint that ends in a bare command gets its object.
        let named = |command: &str| text.ends_with(&format!("clusterctl {command}"));
        if let Some(vm) = vm
            && ["vm stop", "vm start", "vm show"].into_iter().any(named)
        {
            return format!("{text} {}", state.vm_label(vm));
        }
        match nodes {
            [Some(node), _] if named("why node") => format!("{text}/{}", state.node_label(node)),
            [Some(node), _] if named("node uncordon") || named("node show") => {
                format!("{text} {}", state.node_label(node))
            }
            _ => text,
        }
    }

    /// The machine and the nodes that it is about.
    fn objects(&self) -> (Option<VmId>, [Option<NodeId>; 2]) {
        match self {
            Rejection::Stale { vm, owner, .. } => (Some(*vm), [*owner, None]),
            Rejection::Owned { vm, owner } => (Some(*vm), [Some(*owner), None]),
            Rejection::NotRunning { vm }
            | Rejection::NotDesired { vm }
            | Rejection::Held { vm, .. }
            | Rejection::AlreadyMigrating { vm, .. }
            | Rejection::NoFence { vm } => (Some(*vm), [None, None]),
            Rejection::SameNode { vm, node } | Rejection::RuleForbids { vm, node, .. } => {
                (Some(*vm), [Some(*node), None])
            }
            Rejection::NodeUnfit { node, .. }
            | Rejection::NoRoom { node, .. }
            | Rejection::VolumeUnreachable { node, .. }
            | Rejection::TooManyMigrations { node, .. }
            | Rejection::OtherIncarnation { node }
            | Rejection::NodeInUse { node, .. }
            | Rejection::DrainState { node, .. } => (None, [Some(*node), None]),
            Rejection::CpuDiffers { from, to, .. } | Rejection::VersionsDiffer { from, to, .. } => {
                (None, [Some(*from), Some(*to)])
            }
            Rejection::AlreadyInitialised(_)
            | Rejection::NotInitialised
            | Rejection::NameTaken { .. }
            | Rejection::Unknown { .. }
            | Rejection::BadSpec { .. }
            | Rejection::BadSettings(_)
            | Rejection::MigrationState { .. }
            | Rejection::RenewalsUsedUp { .. }
            | Rejection::VolumeInUse { .. }
            | Rejection::TokensUsedUp
            | Rejection::Trust(_)
            | Rejection::TooLarge { .. } => (None, [None, None]),
        }
    }
}

/// `text` with `number` (`vm-3`) as `name` wherever it stands as a word: not in `vm-31`, not in `my-vm-3`.
fn renamed(text: &str, number: &str, name: &str) -> String {
    let part_of_name = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let mut renamed = String::with_capacity(text.len());
    let mut from = 0;
    for (at, found) in text.match_indices(number) {
        let before = text[..at].chars().next_back();
        let after = text[at + found.len()..].chars().next();
        if !before.is_some_and(part_of_name) && !after.is_some_and(part_of_name) {
            renamed.push_str(&text[from..at]);
            renamed.push_str(name);
            from = at + found.len();
        }
    }
    renamed.push_str(&text[from..]);
    renamed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::World;

    #[test]
    fn a_refusal_speaks_of_names_and_its_hint_names_the_object() {
        let mut world = World::new(2, 1_024);
        let vm = world.running("a", 64, NodeId(1));
        let here = Rejection::SameNode {
            vm,
            node: NodeId(1),
        };
        assert_eq!(
            here.in_words(&world.state),
            "a is on n1 already; choose another node with --to"
        );
        let unknown = Rejection::NotRunning { vm: VmId(99) };
        assert!(unknown.in_words(&world.state).starts_with("vm-99 "));
        let owned = Rejection::Owned {
            vm,
            owner: NodeId(2),
        };
        assert_eq!(
            owned.in_words(&world.state),
            "a is on n2; stop it first: clusterctl vm stop a"
        );
    }

    #[test]
    fn a_number_is_renamed_only_where_it_is_a_word() {
        assert_eq!(
            renamed("vm-1 vm-12 my-vm-1 vm-1;", "vm-1", "a"),
            "a vm-12 my-vm-1 a;"
        );
    }
}
