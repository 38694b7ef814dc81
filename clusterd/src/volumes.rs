//! Watches from this node which volumes it reaches, for the planners.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use cluster_model::Name;
use proto::broker::ProbeVolumeRequest;

use crate::member::Member;

/// How often every volume is looked at.
const LOOK: Duration = Duration::from_secs(5);
/// A volume that did not answer this often in a row is down: one lost packet is no news.
const FAILURES: u8 = 2;
/// Volumes that are looked at at once.
const TOGETHER: usize = 8;

/// Looks at every volume, again and again.
pub async fn watch(member: Arc<Member>) {
    let mut failures: BTreeMap<Name, u8> = BTreeMap::new();
    loop {
        tokio::time::sleep(LOOK).await;
        let state = member.state();
        let here: Vec<&cluster_model::Volume> = state
            .volumes
            .values()
            .filter(|volume| volume.reaches(member.node))
            .collect();
        failures.retain(|name, _| here.iter().any(|volume| volume.name == *name));
        for volumes in here.chunks(TOGETHER) {
            let looks = volumes.iter().map(|volume| {
                let request = ProbeVolumeRequest {
                    url: volume.url.clone(),
                    cluster_id: member.cluster_id().to_owned(),
                    broker_uid: state
                        .cluster
                        .as_ref()
                        .map_or(0, |cluster| cluster.broker_uid),
                    tls_ca: volume.tls_ca.clone().unwrap_or_default(),
                    ..Default::default()
                };
                let member = &member;
                async move {
                    let probe = member.broker.probe_volume(request).await;
                    (volume.name.clone(), probe)
                }
            });
            for (name, probe) in futures::future::join_all(looks).await {
                match probe {
                    Ok(probe) if probe.reachable => {
                        failures.remove(&name);
                    }
                    // What the broker cannot say is no news of the volume.
                    Err(error) => tracing::debug!(volume = %name, %error, "not looked at"),
                    Ok(_) => {
                        let count = failures.entry(name).or_default();
                        *count = count.saturating_add(1);
                    }
                }
            }
        }
        publish(&member, &failures);
    }
}

fn publish(member: &Member, failures: &BTreeMap<Name, u8>) {
    let down: BTreeSet<Name> = failures
        .iter()
        .filter(|(_, count)| **count >= FAILURES)
        .map(|(name, _)| name.clone())
        .collect();
    member.volumes_down.send_if_modified(|known| {
        for name in down.difference(known) {
            tracing::warn!(volume = %name, "this node does not reach a volume");
        }
        for name in known.difference(&down) {
            tracing::info!(volume = %name, "this node reaches a volume again");
        }
        let differs = *known != down;
        *known = down;
        differs
    });
}
