//! Both sides of a live migration as the agent carries them out.
//!
//! The destination's steps between *quiet* and *running* are the blackout's: each is begun by the event
//! that allows it, with no timer between, and notes when it happened.

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use cluster_model::agent::Learnt;
use cluster_model::{Command, Migration, MigrationId, MigrationState, NodeId, Token, Vm, VmId};
use proto::monitor as wire;
use proto::peer as peer_wire;
use proto::peer::peer_client::PeerClient;

use super::flows::{ActError, Flow};
use crate::broker::BrokerError;
use crate::machine_file::Incoming;
use crate::permit::Confirm;
use proto::failpoint;

/// How long the destination may take to have its monitor ready: it reserves the machine's memory.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long one question to the destination may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(3);
/// A destination that is not ready is asked again after this pause.
const ASK_PAUSE: Duration = Duration::from_millis(10);

/// A destination whose monitor waits for this source.
struct Ready {
    addresses: Vec<String>,
    fingerprint: Vec<u8>,
}

impl Flow {
    pub(super) fn migration(&self, id: MigrationId) -> Option<&Migration> {
        self.state.migrations.get(&id)
    }

    /// Destination: makes the monitor that receives.
    pub(super) async fn prepare_incoming(
        &mut self,
        id: VmId,
        migration: MigrationId,
    ) -> Result<(), ActError> {
        let vm = self.vm(id)?;
        let Some(MigrationState::Active {
            reserved, ticket, ..
        }) = self.migration(migration).map(|known| &known.state)
        else {
            return Ok(());
        };
        let incoming = Incoming {
            migration_id: migration,
            ticket: ticket.clone(),
            listen: vec![self.free_address()?],
        };
        self.build_monitor(vm, *reserved, Some(incoming)).await?;
        Ok(())
    }

    /// An address for a memory stream on a port that no monitor of this node was given.
    fn free_address(&self) -> Result<SocketAddr, ActError> {
        let config = &self.member.config;
        let table = self.member.monitors.table();
        let taken: Vec<u16> = table
            .borrow()
            .values()
            .flat_map(|monitor| monitor.status.incoming_addresses.clone())
            .filter_map(|address| address.rsplit_once(':')?.1.parse().ok())
            .collect();
        // Begun at another port each time: two migrations that start together rarely meet.
        let ports = config.migration_ports;
        let count = usize::from(ports.last - ports.first) + 1;
        let first = rand::random_range(0..count);
        ports
            .ports()
            .cycle()
            .skip(first)
            .take(count)
            .filter(|port| !taken.contains(port))
            .map(|port| SocketAddr::new(config.migration_listen, port))
            .find(|address| TcpListener::bind(address).is_ok())
            .ok_or(ActError::NoPort {
                first: ports.first,
                last: ports.last,
            })
    }

    /// Source: waits for the destination's monitor, then has ours send. On the way each monitor's fingerprint reaches
    /// the other: theirs accept each other by nothing else.
    pub(super) async fn send(&mut self, vm: VmId, id: MigrationId) -> Result<(), ActError> {
        let Some(migration) = self.migration(id) else {
            return Ok(());
        };
        let MigrationState::Active { ticket, .. } = &migration.state else {
            return Ok(());
        };
        let Some(monitor) = self
            .member
            .monitors
            .table()
            .borrow()
            .values()
            .find(|monitor| monitor.vm() == vm && monitor.status.phase() == wire::Phase::Running)
            .cloned()
        else {
            return Ok(());
        };
        let ticket = unhex(ticket).ok_or(ActError::BadTicket)?;
        let (begun, begun_at) = (std::time::Instant::now(), std::time::SystemTime::now());
        let fingerprint = &monitor.status.channel_fingerprint;
        let asked = self.ask_destination(migration.to, id, fingerprint).await;
        crate::telemetry::step(
            self.member.cluster_id(),
            id,
            "setup: the destination is ready",
            self.member.config.name.as_str(),
            begun_at,
            begun.elapsed(),
        );
        let ready = match asked {
            Ok(ready) => ready,
            Err(error) => {
                // Not tried for ever: whoever wants the move queues it again.
                self.abort(id, &error.to_string()).await?;
                return Err(error);
            }
        };
        failpoint::reach("agent.before_send").await?;
        let request = wire::SendMigrationRequest {
            migration_id: id.0,
            addresses: ready.addresses,
            ticket,
            destination_fingerprint: ready.fingerprint,
            options: Some(self.options(self.vm(vm)?, migration)),
            traceparent: crate::telemetry::traceparent(self.member.cluster_id(), id),
        };
        let nonce = monitor.nonce();
        let sent = monitor.send_migration(request).await;
        self.member.monitors.refresh(nonce).await;
        if let Err(error) = sent {
            self.abort(id, &error.to_string()).await?;
            return Err(error.into());
        }
        Ok(())
    }

    fn options(&self, vm: &Vm, migration: &Migration) -> wire::MigrationOptions {
        let options = migration.options.in_force(vm, &self.state.settings);
        wire::MigrationOptions {
            channels: options.channels,
            bandwidth_max_bytes_s: options.bandwidth_max_bytes_s,
            downtime_max_ms: options.downtime_max_ms,
            rounds_max: 0,
        }
    }

    async fn ask_destination(
        &self,
        to: NodeId,
        migration: MigrationId,
        source_fingerprint: &[u8],
    ) -> Result<Ready, ActError> {
        let address = self
            .state
            .nodes
            .get(&to)
            .map(|node| node.address.clone())
            .unwrap_or_default();
        let not_ready = |why: String| ActError::NotReady { why };
        let channel = self
            .member
            .dialer
            .channel(&address)
            .map_err(|error| not_ready(error.to_string()))?;
        let mut client = PeerClient::new(channel);
        let deadline = tokio::time::Instant::now() + READY_TIMEOUT;
        loop {
            let request = peer_wire::PrepareIncomingRequest {
                migration_id: migration.0,
                from_node: self.member.node.0,
                source_fingerprint: source_fingerprint.to_vec(),
            };
            let asked = tokio::time::timeout(ASK_TIMEOUT, client.prepare_incoming(request)).await;
            let why = match asked.map(|answer| answer.map(tonic::Response::into_inner)) {
                Ok(Ok(reply)) if reply.ready => {
                    return Ok(Ready {
                        addresses: reply.addresses,
                        fingerprint: reply.destination_fingerprint,
                    });
                }
                Ok(Ok(reply)) if !reply.refused.is_empty() => {
                    return Err(not_ready(reply.refused));
                }
                Ok(Ok(_)) => "it is still being built".to_owned(),
                Ok(Err(status)) => status.message().to_owned(),
                Err(_) => format!("{address} does not answer"),
            };
            let ended = !self
                .member
                .state()
                .migrations
                .get(&migration)
                .is_some_and(Migration::is_active);
            if ended || tokio::time::Instant::now() >= deadline {
                return Err(not_ready(why));
            }
            tokio::time::sleep(ASK_PAUSE).await;
        }
    }

    /// Source: the log says abort and the guest never stopped.
    pub(super) async fn cancel_send(&self, vm: VmId, id: MigrationId) -> Result<(), ActError> {
        let table = self.member.monitors.table().borrow().clone();
        let sending = table
            .values()
            .find(|monitor| monitor.vm() == vm && monitor.migration() == Some(id));
        if let Some(monitor) = sending {
            let cancelled = monitor
                .cancel_migration(id, "the migration was aborted")
                .await;
            self.member.monitors.refresh(monitor.nonce()).await;
            cancelled?;
        }
        Ok(())
    }

    /// Destination: the source is quiet.
    pub(super) async fn claim_for_cutover(
        &mut self,
        id: VmId,
        migration: MigrationId,
        reserved: Token,
    ) -> Result<(), ActError> {
        let vm = self.vm(id)?;
        failpoint::reach("agent.before_claim").await?;
        let begun_ns = self.member.clock.monotonic_ns();
        let claim = self.member.broker.claim(&self.state, vm, reserved).await;
        match claim {
            Ok(_) => {
                let claimed_ns = self.member.clock.monotonic_ns();
                failpoint::reach("agent.after_claim").await?;
                self.member.measure(migration, |measured| {
                    measured.handover.claim_begun_ns = begun_ns;
                    measured.handover.claimed_ns = claimed_ns;
                });
                self.learn(Learnt::Claimed(id, reserved));
                Ok(())
            }
            // No later token would help: the source runs on after the abort and a re-key.
            Err(BrokerError::ClaimRefused { why, .. }) => self.abort(migration, &why).await,
            // The next decision renews the token.
            Err(error @ BrokerError::Burnt { .. }) => {
                tracing::warn!(vm = %id, %error, "the reserved token is burnt");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Destination: everything arrived and every file acknowledged the claim.
    pub(super) async fn cutover(
        &self,
        migration: MigrationId,
        expects: Token,
        claimed: Token,
    ) -> Result<(), ActError> {
        failpoint::reach("agent.before_cutover").await?;
        let proposed_ns = self.member.clock.monotonic_ns();
        self.propose(Command::Cutover {
            migration,
            expects,
            claimed,
        })
        .await?;
        let applied_ns = self.member.clock.monotonic_ns();
        self.member.measure(migration, |measured| {
            measured.handover.proposed_ns = proposed_ns;
            measured.handover.applied_ns = applied_ns;
        });
        failpoint::reach("agent.after_cutover").await?;
        Ok(())
    }

    pub(super) async fn abort(&self, migration: MigrationId, reason: &str) -> Result<(), ActError> {
        failpoint::reach("agent.before_abort").await?;
        self.propose(Command::AbortMigration {
            migration,
            reason: reason.to_owned(),
        })
        .await?;
        metrics::counter!("clusterd_migration_failed_total", "phase" => "active").increment(1);
        failpoint::reach("agent.after_abort").await?;
        Ok(())
    }

    /// Destination: the cutover is applied here; it is the confirm of the claim that it names.
    pub(super) async fn run_after_cutover(
        &self,
        vm: VmId,
        token: Token,
        migration: MigrationId,
        nonce: u64,
    ) -> Result<(), ActError> {
        let mut monitor = self.member.monitors.get(nonce)?;
        let lease_deadline_ns = self.member.lease.borrow().deadline_ns;
        let state = self.member.state();
        let node = self.member.node;
        let (claim, confirm) = Confirm::by_cutover(&state, vm, node, lease_deadline_ns)
            .filter(|(claim, _)| claim.token() == token)
            .ok_or(ActError::NoCutover)?;
        if monitor.token() != token {
            // Its token was renewed since it was built.
            monitor = self.rekey(&monitor, token).await?;
        }
        let permit_ns = self.member.clock.monotonic_ns();
        self.permit(claim, &confirm, &monitor).await?;
        self.member.measure(migration, |measured| {
            measured.handover.permit_ns = permit_ns
        });
        self.activated(vm, token).await
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let bytes = text.as_bytes();
    if !bytes.len().is_multiple_of(2) {
        return None;
    }
    bytes
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_reads_back_and_nonsense_is_refused() {
        assert_eq!(unhex("00ffA1"), Some(vec![0, 255, 161]));
        assert_eq!(unhex("0"), None);
        assert_eq!(unhex("zz"), None);
        assert_eq!(unhex("é"), None);
    }
}
