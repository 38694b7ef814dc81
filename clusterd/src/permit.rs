//! The way of a run permit to its monitor. It is made in `cluster_model::flow` alone, out of claim, confirm and the
//! applied entry (rule R7), and is used up here.

use cluster_model::permit::RunPermit;
use proto::monitor as wire;

use crate::monitors::{Monitor, MonitorError};

/// Uses the permit up: the monitor lets its guest run.
///
/// # Errors
/// What the monitor says; whether the guest runs is then known from its next status only.
pub async fn send(permit: RunPermit, monitor: &Monitor) -> Result<wire::RunReply, MonitorError> {
    tracing::info!(vm = %permit.vm(), token = %permit.token(), entry = %permit.log_index(), "run permit");
    monitor
        .run(wire::RunPermit {
            vm_id: permit.vm().0,
            token: permit.token().0,
            log_index: permit.log_index().0,
            lease_deadline_ns: permit.lease_deadline_ns(),
            nonce: permit.nonce(),
        })
        .await
}
