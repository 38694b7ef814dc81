//! What a live migration asks of a node beside the ordinary steps: a port to listen on, a destination that is ready,
//! and a source that begins to send. Each monitor's fingerprint reaches the other on the way: theirs accept each
//! other by nothing else.

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant, SystemTime};

use cluster_model::flow::{Answer, Ready};
use cluster_model::{Migration, MigrationId, MigrationOptions, MigrationState, NodeId};
use proto::failpoint;
use proto::monitor as wire;
use proto::peer as peer_wire;
use proto::peer::peer_client::PeerClient;

use super::executor::{Executor, StepError};

/// How long one question to the destination may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(3);

impl Executor {
    pub(super) fn migration(&self, id: MigrationId) -> Option<&Migration> {
        self.state.migrations.get(&id)
    }

    /// The ticket of a migration under way.
    pub(super) fn ticket(&self, id: MigrationId) -> Option<&str> {
        match &self.migration(id)?.state {
            MigrationState::Active { ticket, .. } => Some(ticket),
            MigrationState::Queued
            | MigrationState::CutOver { .. }
            | MigrationState::Aborted { .. } => None,
        }
    }

    /// An address for a memory stream on a port that no monitor of this node was given.
    pub(super) fn free_address(&self) -> Result<SocketAddr, StepError> {
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
            .ok_or(StepError::NoPort {
                first: ports.first,
                last: ports.last,
            })
    }

    /// Asks the destination once whether its monitor waits for this source.
    pub(super) async fn ask_ready(
        &mut self,
        to: NodeId,
        migration: MigrationId,
        nonce: u64,
    ) -> Result<Answer, StepError> {
        let monitor = self.member.monitors.get(nonce)?;
        let now = (Instant::now(), SystemTime::now());
        let (begun, begun_at) = *self.asked_ready.get_or_insert(now);
        let not_yet = |why: String| Answer::NotReady {
            why,
            for_good: false,
        };
        let node = self.state.nodes.get(&to);
        let address = node.map(|node| node.address.clone()).unwrap_or_default();
        let channel = match self.member.dialer.channel(&address) {
            Ok(channel) => channel,
            Err(error) => {
                return Ok(Answer::NotReady {
                    why: error.to_string(),
                    for_good: true,
                });
            }
        };
        let request = peer_wire::PrepareIncomingRequest {
            migration_id: migration.0,
            from_node: self.member.node.0,
            source_fingerprint: monitor.status.channel_fingerprint.clone(),
        };
        let mut client = PeerClient::new(channel);
        let asked = tokio::time::timeout(ASK_TIMEOUT, client.prepare_incoming(request)).await;
        Ok(
            match asked.map(|answer| answer.map(tonic::Response::into_inner)) {
                Ok(Ok(reply)) if reply.ready => {
                    crate::telemetry::step(
                        self.member.cluster_id(),
                        migration,
                        "setup: the destination is ready",
                        self.member.config.name.as_str(),
                        begun_at,
                        begun.elapsed(),
                    );
                    Answer::Ready(Ready {
                        addresses: reply.addresses,
                        fingerprint: reply.destination_fingerprint,
                    })
                }
                Ok(Ok(reply)) if !reply.refused.is_empty() => Answer::NotReady {
                    why: reply.refused,
                    for_good: true,
                },
                Ok(Ok(_)) => not_yet("it is still being built".to_owned()),
                Ok(Err(status)) => not_yet(status.message().to_owned()),
                Err(_) => not_yet(format!("{address} does not answer")),
            },
        )
    }

    /// Has our monitor send to theirs.
    pub(super) async fn send(
        &self,
        nonce: u64,
        migration: MigrationId,
        ready: Ready,
        options: MigrationOptions,
    ) -> Result<(), StepError> {
        let ticket = self.ticket(migration).and_then(unhex);
        let ticket = ticket.ok_or(StepError::BadTicket)?;
        failpoint::reach("agent.before_send").await?;
        let request = wire::SendMigrationRequest {
            migration_id: migration.0,
            addresses: ready.addresses,
            ticket,
            destination_fingerprint: ready.fingerprint,
            options: Some(wire::MigrationOptions {
                channels: options.channels,
                bandwidth_max_bytes_s: options.bandwidth_max_bytes_s,
                downtime_max_ms: options.downtime_max_ms,
                rounds_max: 0,
            }),
            traceparent: crate::telemetry::traceparent(self.member.cluster_id(), migration),
        };
        let sent = self
            .member
            .monitors
            .get(nonce)?
            .send_migration(request)
            .await;
        self.member.monitors.refresh(nonce).await;
        Ok(sent?)
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
