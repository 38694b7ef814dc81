//! From refusals to gRPC status and stable codes.

use cluster_model::{ClusterState, NameError, Rejection, TrustRefusal};
use tonic::{Code, Status};

use super::backend::BackendError;

/// A status with a stable code that programs may compare and people may look up.
pub fn status(code: Code, stable: &'static str, message: impl Into<String>) -> Status {
    let mut status = Status::new(code, message.into());
    status.metadata_mut().insert(
        "baton-code",
        tonic::metadata::MetadataValue::from_static(stable),
    );
    status
}

/// Bad input.
pub fn invalid(message: impl Into<String>) -> Status {
    status(Code::InvalidArgument, "E-INVALID", message)
}

/// No such thing; names the one that was probably meant.
pub fn not_found(state: &ClusterState, kind: &str, name: &str) -> Status {
    status(
        Code::NotFound,
        "E-NOTFOUND",
        match meant(known(state, kind), name) {
            Some(meant) => format!("there is no {kind} {name}; did you mean {meant}?"),
            None => format!("there is no {kind} {name}; try: clusterctl {kind} list"),
        },
    )
}

fn known(state: &ClusterState, kind: &str) -> Vec<String> {
    match kind {
        "node" => state
            .nodes
            .values()
            .map(|node| node.name.to_string())
            .collect(),
        "vm" => state.vms.values().map(|vm| vm.name.to_string()).collect(),
        "volume" => state
            .volumes
            .values()
            .map(|volume| volume.name.to_string())
            .collect(),
        "rule" => state.rules.keys().map(ToString::to_string).collect(),
        _ => Vec::new(),
    }
}

/// The known name that a misspelt one is closest to, if it is close at all.
fn meant(known: Vec<String>, name: &str) -> Option<String> {
    let far = 1 + name.len() / 4;
    known
        .into_iter()
        .map(|candidate| (distance(&candidate, name), candidate))
        .filter(|&(distance, _)| distance <= far && distance < name.len())
        .min()
        .map(|(_, candidate)| candidate)
}

/// How many letters must be put in, left out, changed, or swapped with their neighbour.
fn distance(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in other.iter().enumerate() {
            let mut least = (last[j] + usize::from(a != b))
                .min(last[j + 1] + 1)
                .min(row[j] + 1);
            if i > 0 && j > 0 && *a == other[j - 1] && one[i - 1] == *b {
                least = least.min(before_last[j - 1] + 1);
            }
            row.push(least);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[other.len()]
}

/// What a person may write as a name.
pub fn bad_name(error: &NameError) -> Status {
    status(Code::InvalidArgument, "E-NAME", error.to_string())
}

/// A refused command, in people's names.
pub fn rejected(state: &ClusterState, rejection: &Rejection) -> Status {
    if let Rejection::Unknown { kind, what } = rejection {
        return not_found(state, kind, what);
    }
    let (code, stable) = match rejection {
        Rejection::AlreadyInitialised(_) => (Code::AlreadyExists, "E-INITIALISED"),
        Rejection::NotInitialised => (Code::FailedPrecondition, "E-NOCLUSTER"),
        Rejection::NameTaken { .. } => (Code::AlreadyExists, "E-EXISTS"),
        Rejection::Unknown { .. } => (Code::NotFound, "E-NOTFOUND"),
        Rejection::BadSpec { .. } => (Code::InvalidArgument, "E-SPEC"),
        Rejection::BadSettings(_) => (Code::InvalidArgument, "E-SETTING"),
        Rejection::Stale { .. } => (Code::Aborted, "E-STALE"),
        Rejection::Owned { .. } => (Code::FailedPrecondition, "E-RUNNING"),
        Rejection::NotRunning { .. } | Rejection::NotDesired { .. } => {
            (Code::FailedPrecondition, "E-STOPPED")
        }
        Rejection::Held { .. } => (Code::FailedPrecondition, "E-HELD"),
        Rejection::NodeUnfit { .. } => (Code::FailedPrecondition, "E-NODE"),
        Rejection::NoRoom { .. } => (Code::ResourceExhausted, "E-ROOM"),
        Rejection::VolumeUnreachable { .. } => (Code::FailedPrecondition, "E-VOLUME"),
        Rejection::CpuDiffers { .. } => (Code::FailedPrecondition, "E-CPU"),
        Rejection::VersionsDiffer { .. } => (Code::FailedPrecondition, "E-VERSION"),
        Rejection::SameNode { .. } => (Code::InvalidArgument, "E-SAMENODE"),
        Rejection::AlreadyMigrating { .. } => (Code::FailedPrecondition, "E-MIGRATING"),
        Rejection::TooManyMigrations { .. } => (Code::ResourceExhausted, "E-BUSY"),
        Rejection::MigrationState { .. } => (Code::FailedPrecondition, "E-MIGRATION"),
        Rejection::RenewalsUsedUp { .. } => (Code::FailedPrecondition, "E-CLAIM"),
        Rejection::OtherIncarnation { .. } => (Code::Aborted, "E-STALE"),
        Rejection::NodeInUse { .. } => (Code::FailedPrecondition, "E-NODE"),
        Rejection::VolumeInUse { .. } => (Code::FailedPrecondition, "E-VOLUME"),
        Rejection::DrainState { .. } => (Code::FailedPrecondition, "E-DRAIN"),
        Rejection::RuleForbids { .. } => (Code::FailedPrecondition, "E-RULE"),
        Rejection::NoFence { .. } => (Code::FailedPrecondition, "E-FENCE"),
        Rejection::TokensUsedUp => (Code::ResourceExhausted, "E-TOKENS"),
        Rejection::Trust(refusal) => trust(refusal),
        Rejection::TooLarge { .. } => (Code::InvalidArgument, "E-LARGE"),
    };
    let mut words = rejection.in_words(state);
    if matches!(rejection, Rejection::NoRoom { .. }) {
        words.push_str("; choose another node, or make room: clusterctl node list");
    }
    status(code, stable, words)
}

fn trust(refusal: &TrustRefusal) -> (Code, &'static str) {
    match refusal {
        TrustRefusal::JoinTokenWrong
        | TrustRefusal::JoinTokenExpired { .. }
        | TrustRefusal::JoinTokenUsed { .. }
        | TrustRefusal::JoinTokenForOther { .. } => (Code::PermissionDenied, "E-JOINTOKEN"),
        TrustRefusal::UnknownRoot { .. }
        | TrustRefusal::UnknownJoinToken { .. }
        | TrustRefusal::UnknownAccessToken { .. }
        | TrustRefusal::UnknownCluster { .. } => (Code::NotFound, "E-NOTFOUND"),
        TrustRefusal::AlreadyFounded
        | TrustRefusal::TokenIdTaken { .. }
        | TrustRefusal::JoinTokenStands { .. }
        | TrustRefusal::KeyTaken { .. }
        | TrustRefusal::ClusterNameTaken { .. }
        | TrustRefusal::RootTrustedAs { .. } => (Code::AlreadyExists, "E-EXISTS"),
        TrustRefusal::BadAuthority { .. }
        | TrustRefusal::BadTokenId { .. }
        | TrustRefusal::ExpiredAtOnce => (Code::InvalidArgument, "E-INVALID"),
        TrustRefusal::AuthorityMoved { .. } => (Code::Aborted, "E-STALE"),
        TrustRefusal::NotFounded | TrustRefusal::OnlyRoot => (Code::FailedPrecondition, "E-CA"),
    }
}

impl From<BackendError> for Status {
    fn from(error: BackendError) -> Status {
        let (code, stable) = match &error {
            BackendError::NoCluster => (Code::FailedPrecondition, "E-NOCLUSTER"),
            BackendError::InCluster(_) => (Code::AlreadyExists, "E-INITIALISED"),
            BackendError::NoQuorum(_) => (Code::Unavailable, "E-NOQUORUM"),
            BackendError::NoReports(_) => (Code::Unavailable, "E-NOREPORTS"),
            BackendError::Failed(_) => (Code::Internal, "E-FAILED"),
        };
        status(code, stable, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_name_is_recognised_and_a_wild_one_is_not() {
        let known = || vec!["web-1".to_owned(), "db-1".to_owned(), "n1".to_owned()];
        for (typed, expected) in [
            ("wbe-1", Some("web-1")),
            ("web1", Some("web-1")),
            ("bd-1", Some("db-1")),
            ("n9", Some("n1")),
            ("build-7", None),
            ("x", None),
        ] {
            assert_eq!(meant(known(), typed).as_deref(), expected, "{typed}");
        }
    }
}
