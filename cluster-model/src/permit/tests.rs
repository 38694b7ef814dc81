//! Each missing proof is a refusal.

use std::sync::Arc;

use super::{ClaimAck, Confirm, PermitError, RunPermit};
use crate::agent::{MonitorMigration, MonitorPhase, MonitorView, PermitRefusal, Side};
use crate::safeguards::Safeguards;
use crate::{
    ClusterState, LogIndex, Migration, MigrationCause, MigrationId, MigrationOptions,
    MigrationState, NodeId, OwnershipCause, Token, VmId,
};

const ME: NodeId = NodeId(3);
const VM: VmId = VmId(12);
const TOKEN: Token = Token(34);
const DEADLINE_NS: u64 = 5_000;

/// A log in which this node owns the machine under `TOKEN` since entry 40.
fn state(cause: OwnershipCause) -> ClusterState {
    let mut state = ClusterState::default();
    let vm = serde_json::json!({
        "id": VM, "name": "db-1",
        "spec": {"vcpus": 1, "memory_mib": 64, "boot": {"self-check": {"working_set_mib": 16, "dirty_mib_s": 0}}},
        "desired": "running",
        "ownership": {"owner": ME, "token": TOKEN, "since": 40, "image": TOKEN, "cause": cause,
                      "settle": false, "activated": false},
        "disks_made": true, "images": {}, "crashes": [], "held": null, "moved_at_ms": 0, "home": null,
    });
    state.vms.insert(VM, serde_json::from_value(vm).unwrap());
    state
}

fn confirm(state: ClusterState, begun_ns: u64) -> Confirm {
    Confirm::read(Arc::new(state), begun_ns, DEADLINE_NS)
}

fn monitor() -> MonitorView {
    MonitorView {
        vm: VM,
        token: TOKEN,
        nonce: 7,
        phase: MonitorPhase::Ready,
        said_quiet: false,
        writes_unanswered: false,
        write_latency_p999_us: 0,
        stop_asked: false,
        undrained: false,
        migration: None,
        failure: None,
        lease_deadline_passed: false,
    }
}

fn permit(
    claim: ClaimAck,
    confirm: &Confirm,
    monitor: &MonitorView,
) -> Result<RunPermit, PermitError> {
    RunPermit::new(ME, claim, confirm, monitor, 1_000, Safeguards::ALL)
}

fn claim() -> ClaimAck {
    ClaimAck::acknowledged(VM, TOKEN, 500)
}

#[test]
fn three_proofs_that_agree_make_a_permit() {
    let confirm = confirm(state(OwnershipCause::Start), 600);
    let permit = permit(claim(), &confirm, &monitor()).unwrap();
    assert_eq!(
        permit,
        RunPermit {
            vm: VM,
            token: TOKEN,
            log_index: LogIndex(40),
            lease_deadline_ns: DEADLINE_NS,
            nonce: 7,
        }
    );
}

#[test]
fn a_confirm_from_before_the_claim_is_refused() {
    let confirm = confirm(state(OwnershipCause::Start), 499);
    assert_eq!(
        permit(claim(), &confirm, &monitor()),
        Err(PermitError::ConfirmTooEarly { vm: VM })
    );
}

#[test]
fn a_token_that_moved_is_refused() {
    let mut moved = state(OwnershipCause::Start);
    moved.vms.get_mut(&VM).unwrap().ownership.token = Token(35);
    assert_eq!(
        permit(claim(), &confirm(moved, 600), &monitor()),
        Err(PermitError::Log(PermitRefusal::TokenMoved {
            vm: VM,
            asked: TOKEN,
            token: Token(35)
        }))
    );
}

#[test]
fn another_owner_is_refused() {
    let mut moved = state(OwnershipCause::Start);
    moved.vms.get_mut(&VM).unwrap().ownership.owner = Some(NodeId(4));
    assert!(matches!(
        permit(claim(), &confirm(moved, 600), &monitor()),
        Err(PermitError::Log(PermitRefusal::NotOwner { .. }))
    ));
}

#[test]
fn a_claim_of_another_machine_or_token_is_refused() {
    let confirm = confirm(state(OwnershipCause::Start), 600);
    let other = ClaimAck::acknowledged(VmId(13), TOKEN, 500);
    assert!(matches!(
        permit(other, &confirm, &monitor()),
        Err(PermitError::OtherMachine { .. })
    ));
    let older = ClaimAck::acknowledged(VM, Token(33), 500);
    assert!(matches!(
        permit(older, &confirm, &monitor()),
        Err(PermitError::OtherToken { .. })
    ));
}

#[test]
fn a_lease_that_ran_out_is_refused() {
    let confirm = confirm(state(OwnershipCause::Start), 600);
    for now_ns in [DEADLINE_NS, DEADLINE_NS + 1] {
        let refused = RunPermit::new(ME, claim(), &confirm, &monitor(), now_ns, Safeguards::ALL);
        assert!(matches!(refused, Err(PermitError::LeasePassed { .. })));
    }
}

#[test]
fn a_monitor_that_never_ran_proves_no_claim() {
    let mut status = monitor();
    for phase in [
        MonitorPhase::Ready,
        MonitorPhase::Running,
        MonitorPhase::Refused,
        MonitorPhase::Incoming,
        MonitorPhase::Complete,
        MonitorPhase::Stopped,
        MonitorPhase::Failed,
    ] {
        status.phase = phase;
        assert!(
            ClaimAck::of_a_machine_that_ran(&status).is_none(),
            "{phase:?}"
        );
    }
    status.phase = MonitorPhase::Frozen;
    assert!(ClaimAck::of_a_machine_that_ran(&status).is_some());
}

#[test]
fn only_a_cutover_to_this_node_stands_for_claim_and_confirm() {
    let cut_over = Arc::new(state(OwnershipCause::Cutover));
    let (claim, confirm) = Confirm::by_cutover(&cut_over, VM, ME, DEADLINE_NS).unwrap();
    assert!(permit(claim, &confirm, &monitor()).is_ok());
    assert!(Confirm::by_cutover(&cut_over, VM, NodeId(4), DEADLINE_NS).is_none());
    let started = Arc::new(state(OwnershipCause::Start));
    assert!(Confirm::by_cutover(&started, VM, ME, DEADLINE_NS).is_none());
}

#[test]
fn a_source_that_said_quiet_runs_only_under_a_token_from_after_the_abort() {
    let mut status = monitor();
    status.said_quiet = true;
    status.phase = MonitorPhase::Quiet;
    status.migration = Some(MonitorMigration {
        id: MigrationId(20),
        side: Side::Source,
        quiet_received: false,
        failed: None,
    });
    let with = |cause, ended: MigrationState| {
        let mut state = state(cause);
        let migration = Migration {
            id: MigrationId(20),
            vm: VM,
            from: ME,
            to: NodeId(4),
            state: ended,
            options: MigrationOptions::default(),
            cause: MigrationCause::Asked,
            actor: "alice".into(),
            queued_at_ms: 0,
            started_at_ms: 0,
            ended_at_ms: 0,
            summary: None,
        };
        state.migrations.insert(MigrationId(20), migration);
        confirm(state, 600)
    };
    let aborted = |at| MigrationState::Aborted {
        at: LogIndex(at),
        reason: "cancelled".into(),
    };
    let refused = Err(PermitError::SaidQuiet { vm: VM });
    // The token is of entry 40.
    let after = with(OwnershipCause::Rekey, aborted(39));
    assert!(permit(claim(), &after, &status).is_ok());
    let before = with(OwnershipCause::Rekey, aborted(41));
    assert_eq!(permit(claim(), &before, &status), refused);
    let never_rekeyed = with(OwnershipCause::Start, aborted(39));
    assert_eq!(permit(claim(), &never_rekeyed, &status), refused);
    let open = with(OwnershipCause::Rekey, MigrationState::Queued);
    assert_eq!(permit(claim(), &open, &status), refused);
}
