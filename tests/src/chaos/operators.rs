//! Administrators who go on with their work whatever happens: migrations, drains, stops and starts, balance runs.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clusterctl::client::{Connection, Endpoint, change};
use proto::admin::{
    BalanceRunRequest, MigrationCancelRequest, MigrationListRequest, NodeDrainRequest,
    NodeUncordonRequest, VmMigrateRequest, VmStartRequest, VmStopRequest,
};
use proto::token::AccessToken;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tokio::sync::RwLock;
use tokio::task::JoinSet;

use super::timeline::Timeline;

/// How long an administrator waits for an answer.
const PATIENCE: Duration = Duration::from_secs(8);

/// Where they work.
pub struct Workplace {
    /// Every node's name and address.
    pub nodes: Vec<(String, SocketAddr)>,
    /// An administrator's.
    pub token: AccessToken,
    /// Machines that are moved.
    pub machines: Vec<String>,
    /// The machine that is stopped and started.
    pub restless: String,
    /// Held for reading by whoever works: whoever writes has them at rest.
    pub gate: RwLock<()>,
    /// Where their doings are noted.
    pub timeline: Arc<Timeline>,
}

/// What an administrator does over and over.
#[derive(Clone, Copy, Debug)]
enum Job {
    Migrate,
    Cancel,
    StopAndStart,
    Drain,
    Balance,
}

/// Starts all of them; dropping the set ends them.
pub fn start(workplace: &Arc<Workplace>, seed: u64) -> JoinSet<()> {
    let mut set = JoinSet::new();
    let jobs = [
        (Job::Migrate, 400..1_200),
        (Job::Migrate, 400..1_500),
        (Job::Cancel, 2_000..6_000),
        (Job::StopAndStart, 4_000..9_000),
        (Job::Drain, 8_000..20_000),
        (Job::Balance, 5_000..15_000),
    ];
    for (nth, (job, pause_ms)) in jobs.into_iter().enumerate() {
        let workplace = Arc::clone(workplace);
        let mut rng = StdRng::seed_from_u64(seed ^ (nth as u64 + 1) << 40);
        set.spawn(async move {
            loop {
                // An administrator's pace.
                tokio::time::sleep(Duration::from_millis(rng.random_range(pause_ms.clone()))).await;
                let _working = workplace.gate.read().await;
                let work = workplace.work(job, &mut rng);
                let outcome = tokio::time::timeout(PATIENCE * 2, work).await;
                let (kind, said) = match outcome {
                    Ok(Ok(done)) => ("asked", done),
                    Ok(Err(error)) => ("refused", format!("{job:?}: {error:#}")),
                    Err(_) => ("refused", format!("{job:?}: no answer")),
                };
                workplace.timeline.note(kind, said);
            }
        });
    }
    set
}

impl Workplace {
    async fn connect(&self, rng: &mut StdRng) -> anyhow::Result<Connection> {
        let (name, address) = &self.nodes[rng.random_range(0..self.nodes.len())];
        let endpoint = Endpoint {
            servers: address.to_string(),
            token: Some(self.token.clone()),
        };
        let opened = tokio::time::timeout(PATIENCE, Connection::open(&endpoint)).await;
        opened
            .map_err(|_| anyhow::anyhow!("{name} does not answer"))?
            .map_err(anyhow::Error::from)
    }

    fn node(&self, rng: &mut StdRng) -> String {
        self.nodes[rng.random_range(0..self.nodes.len())].0.clone()
    }

    async fn work(&self, job: Job, rng: &mut StdRng) -> anyhow::Result<String> {
        let mut api = self.connect(rng).await?.api;
        let change = || Some(change(None, "chaos"));
        match job {
            Job::Migrate => {
                let name = self.machines.choose(rng).cloned().unwrap_or_default();
                let to = self.node(rng);
                let said = format!("migrate {name} to {to}");
                let request = VmMigrateRequest {
                    change: change(),
                    name,
                    to,
                    ..VmMigrateRequest::default()
                };
                let reply = api.vm_migrate(request).await?.into_inner();
                let id = reply.migration.map(|migration| migration.id);
                Ok(format!("{said}: {}", id.unwrap_or_default()))
            }
            Job::Cancel => {
                let list = api
                    .migration_list(MigrationListRequest {
                        all: false,
                        vm: String::new(),
                    })
                    .await?
                    .into_inner()
                    .migrations;
                let Some(some) = list.choose(rng) else {
                    return Ok("nothing to cancel".into());
                };
                let request = MigrationCancelRequest {
                    change: change(),
                    migration: some.id.clone(),
                };
                api.migration_cancel(request).await?;
                Ok(format!("cancel {}", some.id))
            }
            Job::StopAndStart => {
                let name = self.restless.clone();
                if rng.random_bool(0.5) {
                    let request = VmStopRequest {
                        change: change(),
                        name: name.clone(),
                        force: rng.random_bool(0.3),
                    };
                    api.vm_stop(request).await?;
                    Ok(format!("stop {name}"))
                } else {
                    let request = VmStartRequest {
                        change: change(),
                        name: name.clone(),
                    };
                    api.vm_start(request).await?;
                    Ok(format!("start {name}"))
                }
            }
            Job::Drain => {
                let node = self.node(rng);
                let request = NodeDrainRequest {
                    change: change(),
                    node: node.clone(),
                    dry_run: false,
                };
                api.node_drain(request).await?;
                self.timeline.note("asked", format!("drain {node}"));
                // As long as somebody works on the host.
                tokio::time::sleep(Duration::from_millis(rng.random_range(500..6_000))).await;
                let request = NodeUncordonRequest {
                    change: change(),
                    node: node.clone(),
                    failback: rng.random_bool(0.3),
                };
                let mut api = self.connect(rng).await?.api;
                api.node_uncordon(request).await?;
                Ok(format!("uncordon {node}"))
            }
            Job::Balance => {
                let request = BalanceRunRequest {
                    change: change(),
                    dry_run: false,
                };
                let plan = api.balance_run(request).await?.into_inner();
                Ok(format!("balance: {} moves", plan.moves.len()))
            }
        }
    }
}
