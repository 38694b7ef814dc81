//! The two deadlines and everything that moves them.

mod absence;
mod losses;

use super::*;
use crate::command::Command;
use crate::ids::Incarnation;
use crate::settings::Settings;
use crate::testing::World;

const N1: NodeId = NodeId(1);
const N2: NodeId = NodeId(2);
const LIFE: Incarnation = Incarnation(1);
const MS: u64 = NS_IN_MS;

/// A heartbeat at that moment, which the quorum confirmed at once, of a node that has applied everything.
fn heartbeat(world: &World, node: NodeId, at_ms: u64) -> Heartbeat {
    Heartbeat {
        node,
        incarnation: LIFE,
        applied: world.state.applied,
        received_ns: at_ms * MS,
        confirmed_ns: at_ms * MS,
        needs: world.state.applied,
    }
}

/// The quorum confirms the leader: a heartbeat came, if only from a stranger.
fn confirm(term: &mut Term, world: &World, at_ms: u64) {
    let stranger = heartbeat(world, NodeId(999), at_ms);
    assert!(term.grant(&world.state, &stranger, at_ms * MS).is_err());
}

/// Whom a term's look finds lost, while the leader has looked all the time.
fn lost_nodes(term: &mut Term, world: &World, now_ms: u64) -> Vec<NodeId> {
    confirm(term, world, now_ms);
    lost_now(term, world, now_ms)
}

/// The same, with a quorum that may be silent; every loss is forgotten at once, so that the next look finds it again.
fn lost_now(term: &mut Term, world: &World, now_ms: u64) -> Vec<NodeId> {
    let table = &mut term.table;
    if table.quorum_is_away(&world.state, now_ms * MS) {
        return Vec::new();
    }
    let lost = table.lost(&world.state, now_ms * MS);
    lost.into_iter().map(|(node, _)| node).collect()
}

fn grant(term: &mut Term, world: &World, node: NodeId, at_ms: u64) {
    term.grant(&world.state, &heartbeat(world, node, at_ms), at_ms * MS)
        .expect("a grant");
}

fn absent(world: &mut World, node: NodeId, duration_ms: u32) -> LogIndex {
    world.done(Command::Absent {
        node,
        incarnation: LIFE,
        duration_ms,
    });
    world.state.applied
}

fn return_from(world: &mut World, node: NodeId, absence: LogIndex) {
    world.done(Command::Returned {
        node,
        incarnation: LIFE,
        absence,
    });
}

#[test]
fn a_new_leader_gives_everyone_the_full_time_itself_included() {
    let world = World::new(2, 64);
    let mut term = Term::new(1, 1_000 * MS);
    assert_eq!(lost_nodes(&mut term, &world, 7_499), vec![]);
    assert_eq!(lost_nodes(&mut term, &world, 7_500), vec![N1, N2]);
    assert_eq!(term.lost_at_ns(&world.state, N1), Some(7_500 * MS));
}

#[test]
fn the_lost_time_counts_from_the_last_reply() {
    let world = World::new(2, 64);
    let mut term = Term::new(1, 0);
    grant(&mut term, &world, N1, 6_000);
    grant(&mut term, &world, N2, 3_000);
    assert_eq!(lost_nodes(&mut term, &world, 9_499), vec![]);
    assert_eq!(lost_nodes(&mut term, &world, 9_500), vec![N2]);
    assert_eq!(lost_nodes(&mut term, &world, 12_500), vec![N1, N2]);
}

#[test]
fn no_lease_is_granted_on_an_older_confirm_or_to_the_wrong_life() {
    let mut world = World::new(2, 64);
    let mut term = Term::new(1, 0);
    let ask = |term: &mut Term, world: &World, node, incarnation, confirmed_ns| {
        let heartbeat = Heartbeat {
            incarnation,
            received_ns: 100,
            confirmed_ns,
            ..heartbeat(world, node, 0)
        };
        term.grant(&world.state, &heartbeat, 200)
    };
    assert_eq!(
        ask(&mut term, &world, N1, LIFE, 99),
        Err(LeaseRefusal::Unconfirmed { node: N1 })
    );
    assert!(ask(&mut term, &world, N1, LIFE, 100).is_ok());
    assert!(matches!(
        ask(&mut term, &world, N1, Incarnation(2), 100),
        Err(LeaseRefusal::OtherIncarnation { .. })
    ));
    assert!(matches!(
        ask(&mut term, &world, NodeId(9), LIFE, 100),
        Err(LeaseRefusal::Unknown { .. })
    ));
    world.lose(N2);
    assert!(matches!(
        ask(&mut term, &world, N2, LIFE, 100),
        Err(LeaseRefusal::NotUp { .. })
    ));
}

#[test]
fn a_shorter_setting_does_not_cut_a_lease_that_runs() {
    let mut world = World::new(2, 64);
    world.settings(|settings| {
        settings.freeze_ms = 60_000;
        settings.lost_ms = 90_000;
    });
    let mut term = Term::new(1, 0);
    grant(&mut term, &world, N1, 0);
    world.settings(|settings| *settings = Settings::fast());
    assert_eq!(lost_nodes(&mut term, &world, 89_999), vec![]);
    assert_eq!(lost_nodes(&mut term, &world, 90_000), vec![N1, N2]);
    // The next leader does not know which setting the lease was granted under.
    let mut next = Term::new(1, 0);
    assert_eq!(lost_nodes(&mut next, &world, 89_999), vec![]);
    grant(&mut term, &world, N1, 0);
    assert!(lost_nodes(&mut term, &world, 2_800).contains(&N1));
}

#[test]
fn a_node_counts_from_when_it_sent_however_late_the_reply() {
    let mut lease = HeldLease::default();
    assert!(!lease.valid(0));
    let first = lease.sending(1_000 * MS);
    let second = lease.sending(2_000 * MS);
    let given = Grant { lease_ms: 5_000 };
    assert_eq!(lease.granted(second, given), Some(7_000 * MS));
    // The first reply, overtaken: it neither shortens nor lengthens.
    assert_eq!(lease.granted(first, given), None);
    assert_eq!(lease.granted(second, given), None, "answered once");
    assert_eq!(lease.granted(99, given), None, "never sent");
    assert!(lease.valid(6_999 * MS) && !lease.valid(7_000 * MS));
    assert_eq!(
        lease.absence_committed(6_000 * MS, 20_000),
        Some(27_000 * MS)
    );
    assert_eq!(
        lease.absence_committed(27_000 * MS, 20_000),
        None,
        "too late"
    );
}

#[test]
fn heartbeats_without_replies_are_bounded() {
    let mut lease = HeldLease::default();
    let first = lease.sending(0);
    for at in 0..10_000 {
        lease.sending(at);
    }
    assert_eq!(lease.under_way(), UNDER_WAY_MAX);
    assert_eq!(lease.granted(first, Grant { lease_ms: 5_000 }), None);
}

#[test]
fn a_node_is_frozen_before_it_is_lost_whatever_the_delays() {
    // Every delay of request and reply, clocks that differ in rate by 10 %: the deadline on the node comes
    // before the loss on the leader.
    let world = World::new(2, 64);
    for sent in [0u64, 333] {
        for there in [0u64, 1, 400, 4_000] {
            for reply in [0u64, 7, 900] {
                for (node_rate, leader_rate) in [(100, 100), (95, 105), (105, 95)] {
                    let mut lease = HeldLease::default();
                    let sequence = lease.sending(sent * node_rate / 100 * MS);
                    let received = sent + there;
                    let replied = received + reply;
                    let mut term = Term::new(1, 0);
                    let at = |real: u64| real * leader_rate / 100 * MS;
                    let asked = Heartbeat {
                        received_ns: at(received),
                        confirmed_ns: at(received),
                        ..heartbeat(&world, N2, 0)
                    };
                    let given = term
                        .grant(&world.state, &asked, at(replied))
                        .expect("a grant");
                    let deadline = lease.granted(sequence, given).expect("a deadline");
                    let frozen_at = deadline / MS * 100 / node_rate;
                    let lost_at = term.lost_at_ns(&world.state, N2).expect("known");
                    let lost_at = lost_at / MS * 100 / leader_rate;
                    assert!(
                        frozen_at < lost_at,
                        "frozen at {frozen_at}, lost at {lost_at}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_node_that_comes_back_has_the_full_time_again() {
    let mut world = World::new(2, 64);
    let mut term = Term::new(1, 0);
    grant(&mut term, &world, N1, 1_000);
    grant(&mut term, &world, N2, 1_000);
    assert_eq!(lost_nodes(&mut term, &world, 7_500), vec![N1, N2]);
    grant(&mut term, &world, N1, 7_600);
    for (_, command) in term.table.lost(&world.state, 7_600 * MS) {
        world.done(command);
    }
    assert_eq!(lost_nodes(&mut term, &world, 9_000), vec![]);
    world.register(N2, LIFE, 64);
    grant(&mut term, &world, N1, 9_900);
    assert_eq!(lost_nodes(&mut term, &world, 10_000), vec![]);
    assert_eq!(lost_nodes(&mut term, &world, 16_399), vec![]);
    assert_eq!(lost_nodes(&mut term, &world, 16_500), vec![N1, N2]);
}

#[test]
fn without_a_quorum_no_time_counts_against_anybody() {
    let world = World::new(2, 64);
    let mut term = Term::new(1, 0);
    grant(&mut term, &world, N1, 1_000);
    grant(&mut term, &world, N2, 1_000);
    assert_eq!(lost_nodes(&mut term, &world, 1_100), vec![]);
    // The quorum is silent until 20 s: nobody is lost meanwhile, nor when it is back...
    for now_ms in (3_600..20_000).step_by(100) {
        assert_eq!(lost_now(&mut term, &world, now_ms), vec![]);
    }
    assert_eq!(lost_nodes(&mut term, &world, 20_000), vec![]);
    // ...but all who do not ask within the full time from then on.
    grant(&mut term, &world, N1, 20_500);
    assert_eq!(lost_nodes(&mut term, &world, 26_499), vec![]);
    assert_eq!(lost_nodes(&mut term, &world, 26_500), vec![N2]);
}
