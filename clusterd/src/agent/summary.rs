//! What a migration took: both sides' measurements put together by the destination, once, for the log.

use std::time::{Duration, SystemTime};

use cluster_model::{Command, MigrationId, SUMMARY_BYTES_MAX, VmId};
use proto::monitor as wire;
use proto::peer::SourceProgressRequest;
use proto::peer::peer_client::PeerClient;
use serde::{Deserialize, Serialize};

use super::executor::{Executor, StepError};
use crate::member::{Handover, Member};

/// The source is asked this often for what it measured; it may be gone.
const ASK_TRIES: u32 = 5;
const ASK_TIMEOUT: Duration = Duration::from_secs(1);
const ASK_PAUSE: Duration = Duration::from_millis(100);
/// Rounds that go into the log; the last ones tell how the copying ended.
const ROUNDS_MAX: usize = 40;

/// A migration's figures, as `Migration::summary` carries them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationSummary {
    /// From the start of the source to the first guest instruction on the destination, µs; 0: unknown.
    pub total_us: u64,
    /// From the last guest instruction on the source to the first on the destination, µs; 0: unknown.
    pub blackout_us: u64,
    /// Whether both sides' clocks are one: on one host. Otherwise the way of *quiet* over the network is
    /// missing from the figures.
    pub same_host: bool,
    /// The blackout's parts in order; they add up to it.
    pub parts: Vec<Part>,
    /// The whole claim, part of which lies under the last copy, µs.
    pub claim_us: u64,
    /// The cutover's entry from its proposal to its being applied at the destination, µs.
    pub commit_us: u64,
    /// What the source predicted when it stopped copying, µs.
    pub predicted_blackout_us: u64,
    /// Why it stopped copying.
    pub why_stopped_copying: String,
    /// Guest memory, bytes.
    pub memory_total_bytes: u64,
    /// Sent, bytes.
    pub sent_bytes: u64,
    /// Pages sent or left out.
    pub pages: u64,
    /// Pages of zeroes, which were left out.
    pub zero_pages: u64,
    /// The rounds of copying.
    pub rounds: Vec<Round>,
}

/// A part of the blackout.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// How long, µs.
    pub us: u64,
}

/// A round of copying.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Its number, from 1.
    pub number: u32,
    /// Pages sent.
    pub pages: u64,
    /// Of them pages of zeroes.
    pub zero_pages: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// How long, µs.
    pub duration_us: u64,
    /// Pages that the guest had dirtied by its end.
    pub dirty_pages_after: u64,
}

impl MigrationSummary {
    /// Puts the two sides together; `same_host`: their monotonic clocks are one.
    pub fn new(
        source: Option<&wire::MigrationProgress>,
        destination: &wire::MigrationProgress,
        handover: &Handover,
        same_host: bool,
    ) -> MigrationSummary {
        let there = destination.timings.unwrap_or_default();
        let mut summary = MigrationSummary {
            same_host,
            claim_us: us_between(handover.claim_begun_ns, handover.claimed_ns),
            commit_us: us_between(handover.proposed_ns, handover.applied_ns),
            memory_total_bytes: destination.memory_total_bytes,
            ..MigrationSummary::default()
        };
        let Some(source) = source else {
            return summary;
        };
        let here = source.timings.unwrap_or_default();
        summary.predicted_blackout_us = source.predicted_blackout_us;
        summary
            .why_stopped_copying
            .clone_from(&source.why_stopped_copying);
        summary.memory_total_bytes = source.memory_total_bytes;
        summary.sent_bytes = source.sent_bytes;
        summary.pages = source.pages;
        summary.zero_pages = source.zero_pages;
        let skipped = source.rounds.len().saturating_sub(ROUNDS_MAX);
        summary.rounds = source.rounds.iter().skip(skipped).map(round).collect();
        let drain = us_between(here.vcpus_stopped_ns, here.quiet_ns);
        // The moment of quiet on the clock that the rest is counted on.
        let quiet_ns = if same_host {
            here.quiet_ns
        } else {
            there.quiet_received_ns
        };
        let mut last_ns = quiet_ns;
        let mut parts = vec![("drain", drain)];
        let steps = [
            ("last copy", there.complete_ns),
            ("claim", handover.claimed_ns),
            ("commit", handover.applied_ns),
            ("resume", there.running_ns),
        ];
        for (name, at_ns) in steps {
            // What was through before its predecessor took nothing on the critical path.
            parts.push((name, us_between(last_ns, at_ns)));
            last_ns = last_ns.max(at_ns);
        }
        let known = here.vcpus_stopped_ns != 0 && quiet_ns != 0 && there.running_ns != 0;
        if known {
            summary.blackout_us = drain + us_between(quiet_ns, there.running_ns);
            summary.total_us =
                us_between(here.started_ns, here.quiet_ns) + us_between(quiet_ns, there.running_ns);
            summary.parts = parts
                .into_iter()
                .map(|(name, us)| Part {
                    name: name.to_owned(),
                    us,
                })
                .collect();
        }
        summary
    }
}

/// Whether a source's figures are whole: its guest has stopped, and it has said *quiet*.
pub fn is_whole(source: &wire::MigrationProgress) -> bool {
    let timings = source.timings.as_ref();
    timings.is_some_and(|timings| timings.vcpus_stopped_ns != 0 && timings.quiet_ns != 0)
}

/// What the source of a migration measured here, as far as this node knows: of its monitor's life, or of its end.
pub async fn of_source(member: &Member, id: MigrationId) -> Option<wire::MigrationProgress> {
    let running = || {
        let table = member.monitors.table().borrow().clone();
        let monitors = table
            .values()
            .filter(|monitor| monitor.incoming != Some(id) && monitor.migration() == Some(id));
        let mut known = monitors
            .filter_map(|monitor| Some((monitor.nonce(), monitor.status.migration.clone()?)));
        known.next()
    };
    let kept = || member.measured(id).source;
    if let Some(kept) = kept().filter(is_whole) {
        return Some(kept);
    }
    let state = member.state();
    let known = state.migrations.get(&id);
    let over = known.is_some_and(|known| !known.is_open());
    match running() {
        // Its last word is on its way here: the migration has ended, and who asks wants the whole of it.
        Some((nonce, progress)) if over && !is_whole(&progress) => {
            member.monitors.refresh(nonce).await;
        }
        Some((_, progress)) => return Some(progress),
        None => {}
    }
    match running().map(|(_, progress)| progress) {
        Some(whole) if is_whole(&whole) => Some(whole),
        part => kept().or(part),
    }
}

/// From one moment to the next, µs; 0 when one is not known or they are in the other order.
fn us_between(from_ns: u64, to_ns: u64) -> u64 {
    if from_ns == 0 {
        0
    } else {
        to_ns.saturating_sub(from_ns) / 1_000
    }
}

fn round(round: &wire::Round) -> Round {
    Round {
        number: round.number,
        pages: round.pages,
        zero_pages: round.zero_pages,
        bytes: round.bytes,
        duration_us: round.duration_us,
        dirty_pages_after: round.dirty_pages_after,
    }
}

impl Executor {
    /// Destination: puts the measurements together and hands them to the log.
    pub(super) async fn report(&self, vm: VmId, id: MigrationId) -> Result<(), StepError> {
        let Some(migration) = self.migration(id) else {
            return Ok(());
        };
        let progress = self.own_progress(vm, id).await;
        let nodes = &self.state.nodes;
        let (from, to) = (nodes.get(&migration.from), nodes.get(&migration.to));
        let same_host = match (from, to) {
            (Some(from), Some(to)) => from.incarnation == to.incarnation,
            _ => false,
        };
        let source = match from {
            Some(from) => self.ask_source(&from.address, id).await,
            None => None,
        };
        let handover = self.member.measured(id).handover;
        let summary = MigrationSummary::new(source.as_ref(), &progress, &handover, same_host);
        // When the guest ran, on the wall's clock.
        let running_ns = progress.timings.map_or(0, |timings| timings.running_ns);
        let ago_ns = self
            .member
            .clock
            .monotonic_ns()
            .saturating_sub(running_ns.max(1));
        let running_at = SystemTime::now() - Duration::from_nanos(ago_ns);
        crate::telemetry::migration_ended(
            self.member.cluster_id(),
            self.member.config.name.as_str(),
            migration,
            &summary,
            running_at,
        );
        let mut json = serde_json::to_value(&summary).unwrap_or_default();
        if json.to_string().len() > SUMMARY_BYTES_MAX {
            json["rounds"] = serde_json::Value::Array(Vec::new());
        }
        let command = Command::ReportMigration {
            migration: id,
            summary: json,
        };
        self.propose(None, command).await
    }

    /// What this node's monitor measured: also when its last word has not come by itself yet.
    async fn own_progress(&self, vm: VmId, id: MigrationId) -> wire::MigrationProgress {
        let monitors = &self.member.monitors;
        let find = || {
            let table = monitors.table().borrow().clone();
            let mut of_vm = table.values().filter(|monitor| monitor.vm() == vm);
            let found = of_vm.find(|monitor| monitor.migration() == Some(id))?;
            Some((found.nonce(), found.status.migration.clone()?))
        };
        let runs = |progress: &wire::MigrationProgress| {
            let timings = progress.timings.as_ref();
            timings.is_some_and(|timings| timings.running_ns != 0)
        };
        match find() {
            Some((_, progress)) if runs(&progress) => return progress,
            Some((nonce, _)) => monitors.refresh(nonce).await,
            None => {}
        }
        find().map(|(_, progress)| progress).unwrap_or_default()
    }

    async fn ask_source(&self, address: &str, id: MigrationId) -> Option<wire::MigrationProgress> {
        let mut client = PeerClient::new(self.member.dialer.channel(address).ok()?);
        let mut last = None;
        for _ in 0..ASK_TRIES {
            let request = SourceProgressRequest { migration_id: id.0 };
            let asked = tokio::time::timeout(ASK_TIMEOUT, client.source_progress(request)).await;
            if let Ok(Ok(reply)) = asked
                && let Ok(progress) = serde_json::from_slice(&reply.into_inner().progress)
            {
                if is_whole(&progress) {
                    return Some(progress);
                }
                last = Some(progress);
            }
            tokio::time::sleep(ASK_PAUSE).await;
        }
        tracing::info!(migration = %id, "the source cannot say all that it measured");
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn both() -> (wire::MigrationProgress, wire::MigrationProgress, Handover) {
        let source = wire::MigrationProgress {
            timings: Some(wire::Timings {
                started_ns: 10 * MS,
                vcpus_stopped_ns: 1_000 * MS,
                quiet_ns: 1_002 * MS,
                final_sent_ns: 1_006 * MS,
                ..wire::Timings::default()
            }),
            ..wire::MigrationProgress::default()
        };
        let destination = wire::MigrationProgress {
            timings: Some(wire::Timings {
                quiet_received_ns: 1_003 * MS,
                complete_ns: 1_008 * MS,
                permit_ns: 1_015 * MS,
                running_ns: 1_017 * MS,
                ..wire::Timings::default()
            }),
            ..wire::MigrationProgress::default()
        };
        let handover = Handover {
            claim_begun_ns: 1_003 * MS,
            claimed_ns: 1_006 * MS,
            proposed_ns: 1_008 * MS,
            applied_ns: 1_014 * MS,
            permit_ns: 1_014 * MS,
        };
        (source, destination, handover)
    }

    #[test]
    fn on_one_host_the_parts_add_up_to_the_blackout() {
        let (source, destination, handover) = both();
        let summary = MigrationSummary::new(Some(&source), &destination, &handover, true);
        assert_eq!(summary.blackout_us, 17_000);
        assert_eq!(summary.total_us, 1_007_000);
        let sum: u64 = summary.parts.iter().map(|part| part.us).sum();
        assert_eq!(sum, summary.blackout_us);
        let part = |name: &str| {
            summary
                .parts
                .iter()
                .find(|part| part.name == name)
                .unwrap()
                .us
        };
        assert_eq!(part("claim"), 0, "it lies under the last copy");
        assert_eq!(summary.claim_us, 3_000);
        assert_eq!(part("commit"), 6_000);
    }

    #[test]
    fn on_two_hosts_each_side_counts_on_its_own_clock() {
        let (mut source, destination, handover) = both();
        let timings = source.timings.as_mut().unwrap();
        for at in [
            &mut timings.started_ns,
            &mut timings.vcpus_stopped_ns,
            &mut timings.quiet_ns,
            &mut timings.final_sent_ns,
        ] {
            *at += 5_000_000 * MS;
        }
        let summary = MigrationSummary::new(Some(&source), &destination, &handover, false);
        assert_eq!(summary.blackout_us, 2_000 + 14_000);
        let sum: u64 = summary.parts.iter().map(|part| part.us).sum();
        assert_eq!(sum, summary.blackout_us);
    }

    #[test]
    fn a_source_is_whole_when_it_has_said_quiet() {
        let (mut source, ..) = both();
        assert!(is_whole(&source));
        source.timings.as_mut().unwrap().quiet_ns = 0;
        assert!(!is_whole(&source));
        source.timings = None;
        assert!(!is_whole(&source));
    }

    #[test]
    fn a_dead_source_leaves_the_blackout_unknown() {
        let (_, destination, handover) = both();
        let summary = MigrationSummary::new(None, &destination, &handover, true);
        assert_eq!(summary.blackout_us, 0);
        assert!(summary.parts.is_empty());
        assert_eq!(summary.commit_us, 6_000);
    }
}
