//! What the demo asks of its guests, and what they promised before they died.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proto::admin::{GuestView, NodeListRequest, VmListRequest, VmView};

use super::{LOOK, STEP_TIMEOUT};
use crate::client::{CliError, Connection};
use crate::commands::vm;

/// The file to which a monitor appends every number that its guest has flushed.
pub struct Witness {
    path: PathBuf,
}

impl Witness {
    pub fn new(path: PathBuf) -> Witness {
        Witness { path }
    }

    pub fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// The highest number in it; 0 when the guest flushed nothing yet.
    pub fn last(&self) -> Result<u64, CliError> {
        let text = match std::fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        Ok(text
            .lines()
            .filter_map(|line| {
                line.strip_prefix("flushed ")?
                    .split(' ')
                    .next()?
                    .parse()
                    .ok()
            })
            .max()
            .unwrap_or(0))
    }
}

/// Waits until a guest has checked and flushed more than it had, and reports no error.
pub async fn wait_for_progress(
    connection: &mut Connection,
    name: &str,
    at_least_steps: Option<u64>,
) -> Result<GuestView, String> {
    let deadline = Instant::now() + STEP_TIMEOUT;
    let mut first: Option<GuestView> = None;
    loop {
        let view = vm::find(connection, name)
            .await
            .map_err(|error| error.to_string())?;
        if let Some(guest) = view.guest {
            if guest.errors > 0 {
                return Err(format!(
                    "the guest reports {} errors: {}",
                    guest.errors, guest.error
                ));
            }
            let base = first.get_or_insert_with(|| guest.clone());
            let went_on = guest.steps > base.steps
                && guest.memory_checks > base.memory_checks
                && guest.disk_checks > base.disk_checks
                && guest.flushed > base.flushed;
            if went_on && guest.steps >= at_least_steps.unwrap_or(0) {
                return Ok(guest);
            }
        }
        if Instant::now() > deadline {
            return Err(format!(
                "the guest made no progress in {} s (state {})",
                STEP_TIMEOUT.as_secs(),
                view.state
            ));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The node that runs the most machines, and their names.
pub async fn busiest_node(connection: &mut Connection) -> Result<(String, Vec<String>), CliError> {
    let vms = connection
        .api
        .vm_list(VmListRequest {
            name: String::new(),
        })
        .await?
        .into_inner()
        .vms;
    let mut by_node: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for vm in vms.into_iter().filter(|vm| vm.state == "running") {
        by_node.entry(vm.node).or_default().push(vm.name);
    }
    by_node
        .into_iter()
        .max_by_key(|(_, names)| names.len())
        .ok_or_else(|| CliError::Local("no machine runs".into()))
}

/// When the log counted a node as lost.
pub async fn wait_for_loss(
    connection: &mut Connection,
    node: &str,
    timeout: Duration,
) -> Result<Instant, CliError> {
    let deadline = Instant::now() + timeout;
    loop {
        // While a new leader is elected there is nobody to ask.
        if let Ok(reply) = connection.api.node_list(NodeListRequest {}).await {
            let lost = reply.into_inner().nodes.iter().any(|known| {
                known.name == node && matches!(known.state.as_str(), "lost" | "quarantined")
            });
            if lost {
                return Ok(Instant::now());
            }
        }
        if Instant::now() > deadline {
            return Err(CliError::Local(format!(
                "{node} was not counted as lost within {} s",
                timeout.as_secs()
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until a machine runs on another node than `node`.
pub async fn wait_elsewhere(
    connection: &mut Connection,
    name: &str,
    node: &str,
    timeout: Duration,
) -> Result<VmView, CliError> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Ok(view) = vm::find(connection, name).await
            && view.state == "running"
            && view.node != node
        {
            return Ok(view);
        }
        if Instant::now() > deadline {
            return Err(CliError::Local(format!(
                "{name} does not run elsewhere after {} s; see: clusterctl why vm/{name}",
                timeout.as_secs()
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}
