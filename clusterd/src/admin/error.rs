//! From refusals to gRPC status and stable codes.

use cluster_model::{NameError, Rejection};
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

/// No such thing.
pub fn not_found(kind: &str, name: &str) -> Status {
    status(
        Code::NotFound,
        "E-NOTFOUND",
        format!("there is no {kind} {name}; try: clusterctl {kind} list"),
    )
}

/// What a person may write as a name.
pub fn bad_name(error: &NameError) -> Status {
    status(Code::InvalidArgument, "E-NAME", error.to_string())
}

/// A refused command.
pub fn rejected(rejection: &Rejection) -> Status {
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
        Rejection::TooLarge { .. } => (Code::InvalidArgument, "E-LARGE"),
    };
    status(code, stable, rejection.to_string())
}

impl From<BackendError> for Status {
    fn from(error: BackendError) -> Status {
        let (code, stable) = match &error {
            BackendError::NoCluster => (Code::FailedPrecondition, "E-NOCLUSTER"),
            BackendError::InCluster(_) => (Code::AlreadyExists, "E-INITIALISED"),
            BackendError::NoQuorum(_) => (Code::Unavailable, "E-NOQUORUM"),
            BackendError::Failed(_) => (Code::Internal, "E-FAILED"),
        };
        status(code, stable, error.to_string())
    }
}
