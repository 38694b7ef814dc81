//! The status that the control service shows.

use std::fs::File;
use std::os::unix::fs::FileExt;

use cluster_model::MonitorPhase;
use cluster_model::phase::Phase;
use proto::monitor as wire;

use super::Monitor;
use crate::clock;
use crate::confine;
use crate::devices::selfcheck;

/// The wire's form of a phase.
pub fn wire_phase(phase: Phase) -> wire::Phase {
    match phase.seen() {
        MonitorPhase::Ready => wire::Phase::Ready,
        MonitorPhase::Running => wire::Phase::Running,
        MonitorPhase::Frozen => wire::Phase::Frozen,
        MonitorPhase::Refused => wire::Phase::Refused,
        MonitorPhase::Quiet => wire::Phase::Quiet,
        MonitorPhase::Incoming => wire::Phase::Incoming,
        MonitorPhase::Complete => wire::Phase::Complete,
        MonitorPhase::Stopped => wire::Phase::Stopped,
        MonitorPhase::Failed => wire::Phase::Failed,
    }
}

impl Monitor {
    /// How the monitor stands now.
    pub fn status(&self) -> wire::MonitorStatus {
        let file = self.spec.file();
        let machine = &self.platform.machine;
        let usage = self.usage();
        let state = self.lock();
        wire::MonitorStatus {
            vm_id: file.vm_id.0,
            vm_name: file.vm_name.clone(),
            token: state.disk_token.0,
            nonce: self.nonce,
            phase: wire_phase(state.phase).into(),
            failure: state.failure.clone(),
            pid: std::process::id(),
            lease_deadline_ns: machine.gate().deadline_ns(),
            migration: state
                .migration
                .as_ref()
                .map(super::migration::Migration::progress),
            guest: Some(
                self.platform
                    .selfcheck
                    .as_ref()
                    .map_or_else(Default::default, |port| guest(port)),
            ),
            usage: Some(usage),
            version: env!("CARGO_PKG_VERSION").into(),
            incoming_addresses: state.incoming_addresses.clone(),
            said_quiet: state.said_quiet,
            writes_unanswered: machine.disks().iter().any(|disk| disk.writes_unanswered()),
            stop_asked: state.stop_asked,
            undrained: state.undrained,
            channel_fingerprint: self.identity.fingerprint().0.to_vec(),
            measures: confine::as_they_hold(&self.measures),
        }
    }

    fn usage(&self) -> wire::Usage {
        let mut usage = wire::Usage {
            cpu_ns: clock::process_cpu_ns(),
            memory_resident_bytes: self
                .platform
                .memory_counts
                .as_ref()
                .and_then(resident_bytes)
                .unwrap_or(0),
            ..Default::default()
        };
        for disk in self.platform.machine.disks() {
            let disk = disk.statistics();
            usage.disk_read_bytes += disk.read_bytes;
            usage.disk_written_bytes += disk.written_bytes;
            let p999 = u64::try_from(disk.write_latency_p999.as_micros()).unwrap_or(u64::MAX);
            usage.write_latency_p999_us = usage.write_latency_p999_us.max(p999);
        }
        usage
    }
}

fn guest(port: &selfcheck::SelfCheck) -> wire::GuestReport {
    let report = port.report();
    let Some(last) = report.last else {
        return wire::GuestReport::default();
    };
    wire::GuestReport {
        present: true,
        steps: last.steps,
        flushed: last.flushed,
        memory_checks: last.memory_checks,
        disk_checks: last.disk_checks,
        errors: report.errors(),
        error: report.error().unwrap_or_default(),
        longest_gap_ns: last.gap_ever_ns,
        found_at_boot: report.found_at_boot().unwrap_or(0),
    }
}

/// Pages in memory, from the kernel's own count.
fn resident_bytes(counts: &File) -> Option<u64> {
    let mut bytes = [0; 128];
    let read = counts.read_at(&mut bytes, 0).ok()?;
    std::str::from_utf8(&bytes[..read])
        .ok()?
        .split_whitespace()
        .nth(1)?
        .parse::<u64>()
        .ok()?
        .checked_mul(crate::layout::PAGE_BYTES)
}
