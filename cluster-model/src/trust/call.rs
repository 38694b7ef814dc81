//! Every call of the admin API, and what it takes to be let make it: one table.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::trust::Role;

/// How far a call reaches: what an access token that is narrowed to tags may do of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// It only looks at what every viewer may see; a narrowed token sees its own machines.
    Look,
    /// It does something to one machine.
    Machine,
    /// It concerns nodes, the cluster, or what only admins see: not for a narrowed token.
    Cluster,
}

/// Whether a call may put something into a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Reads,
    Changes,
}

macro_rules! calls {
    ($($call:ident: $role:ident, $reach:ident, $effect:ident;)*) => {
        /// A call of the admin API, by its name in `service Admin`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Call {
            $(#[doc = concat!("`", stringify!($call), "`.")] $call,)*
        }

        impl Call {
            /// Every call.
            pub const ALL: &[Call] = &[$(Call::$call),*];

            /// The call's name, as the API has it.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Call::$call => stringify!($call),)*
                }
            }

            /// The least role that may make it.
            pub fn role(self) -> Role {
                match self {
                    $(Call::$call => Role::$role,)*
                }
            }

            /// How far it reaches.
            pub(super) fn reach(self) -> Reach {
                match self {
                    $(Call::$call => Reach::$reach,)*
                }
            }

            /// Whether it may put something into the log: such a call is recorded in the audit. What
            /// goes through a machine's console is not in the log.
            pub fn changes(self) -> bool {
                match self {
                    $(Call::$call => matches!(Effect::$effect, Effect::Changes),)*
                }
            }
        }
    };
}

calls! {
    Version:         Viewer,   Look,    Reads;
    ClusterInit:     Admin,    Cluster, Changes;
    ClusterStatus:   Viewer,   Look,    Reads;
    SettingsGet:     Viewer,   Look,    Reads;
    SettingsSet:     Admin,    Cluster, Changes;

    NodeList:        Viewer,   Look,    Reads;
    NodeAdd:         Admin,    Cluster, Changes;
    NodeJoin:        Admin,    Cluster, Changes;
    NodeCheck:       Viewer,   Look,    Reads;
    NodeRemove:      Admin,    Cluster, Changes;
    NodeDrain:       Operator, Cluster, Changes;
    NodeDrainStatus: Viewer,   Look,    Reads;
    NodeUncordon:    Operator, Cluster, Changes;

    VmCreate:        Operator, Machine, Changes;
    VmList:          Viewer,   Look,    Reads;
    VmStart:         Operator, Machine, Changes;
    VmStop:          Operator, Machine, Changes;
    VmDelete:        Operator, Machine, Changes;
    VmMigrate:       Operator, Machine, Changes;
    VmConsole:       Operator, Machine, Reads;

    VolumeAdd:       Admin,    Cluster, Changes;
    VolumeList:      Viewer,   Look,    Reads;
    VolumeRemove:    Admin,    Cluster, Changes;
    LeaseList:       Viewer,   Look,    Reads;

    MigrationList:   Viewer,   Look,    Reads;
    MigrationWatch:  Viewer,   Look,    Reads;
    MigrationCancel: Operator, Machine, Changes;

    Events:          Viewer,   Look,    Reads;
    Why:             Viewer,   Look,    Reads;

    BalanceRun:      Operator, Cluster, Changes;
    BalanceStatus:   Viewer,   Look,    Reads;

    RuleSet:         Operator, Cluster, Changes;
    RuleList:        Viewer,   Look,    Reads;

    JoinTokenList:   Admin,    Cluster, Reads;
    JoinTokenRevoke: Admin,    Cluster, Changes;
    TokenCreate:     Admin,    Cluster, Changes;
    TokenList:       Admin,    Cluster, Reads;
    TokenRevoke:     Admin,    Cluster, Changes;
    AuditList:       Admin,    Cluster, Reads;
    CaShow:          Viewer,   Look,    Reads;
    CaRotate:        Admin,    Cluster, Changes;
    TrustAdd:        Admin,    Cluster, Changes;
    TrustList:       Viewer,   Look,    Reads;
    TrustRemove:     Admin,    Cluster, Changes;
}

impl Call {
    /// Whether it does something to one machine: what a narrowed token may do is looked at where the machine
    /// is known.
    pub fn concerns_machine(self) -> bool {
        self.reach() == Reach::Machine
    }

    /// The call of that name, alone (`VmCreate`) or at the end of a gRPC path (`/baton.admin.v1.Admin/VmCreate`).
    pub fn parse(text: &str) -> Option<Call> {
        let name = text.rsplit('/').next().unwrap_or(text);
        Call::ALL.iter().copied().find(|call| call.as_str() == name)
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
