//! The two deadlines and everything that moves them.

use super::*;
use crate::settings::Settings;
use crate::testing::World;

const N1: NodeId = NodeId(1);
const N2: NodeId = NodeId(2);
const LIFE: Incarnation = Incarnation(1);
const MS: u64 = NS_IN_MS;

/// The quorum confirms the leader: a heartbeat came, if only from a stranger.
fn confirm(table: &mut LeaseTable, world: &World, at_ms: u64) {
    let at_ns = at_ms * MS;
    let stranger = table.grant(&world.state, NodeId(999), LIFE, at_ns, at_ns, at_ns);
    assert!(stranger.is_err());
}

fn lost_nodes(table: &mut LeaseTable, world: &World, now_ms: u64) -> Vec<NodeId> {
    confirm(table, world, now_ms);
    lost_now(table, world, now_ms)
}

fn lost_now(table: &mut LeaseTable, world: &World, now_ms: u64) -> Vec<NodeId> {
    table
        .lost(&world.state, now_ms * MS)
        .into_iter()
        .map(|command| match command {
            Command::NodeLost { node, .. } => node,
            other => panic!("{other:?}"),
        })
        .collect()
}

fn grant(table: &mut LeaseTable, world: &World, node: NodeId, at_ms: u64) {
    table
        .grant(&world.state, node, LIFE, at_ms * MS, at_ms * MS, at_ms * MS)
        .expect("a grant");
}

#[test]
fn a_new_leader_gives_everyone_the_full_time_itself_included() {
    let world = World::new(2, 64);
    let mut table = LeaseTable::new(1_000 * MS);
    assert_eq!(lost_nodes(&mut table, &world, 7_499), vec![]);
    assert_eq!(lost_nodes(&mut table, &world, 7_500), vec![N1, N2]);
    assert_eq!(table.next_ns(&world.state), Some(7_500 * MS));
}

#[test]
fn the_lost_time_counts_from_the_last_reply() {
    let world = World::new(2, 64);
    let mut table = LeaseTable::new(0);
    grant(&mut table, &world, N1, 6_000);
    grant(&mut table, &world, N2, 3_000);
    assert_eq!(lost_nodes(&mut table, &world, 9_499), vec![]);
    assert_eq!(lost_nodes(&mut table, &world, 9_500), vec![N2]);
    assert_eq!(lost_nodes(&mut table, &world, 12_500), vec![N1, N2]);
}

#[test]
fn no_lease_is_granted_on_an_older_confirm_or_to_the_wrong_life() {
    let mut world = World::new(2, 64);
    let mut table = LeaseTable::new(0);
    let ask = |table: &mut LeaseTable, world: &World, node, life, confirmed| {
        table.grant(&world.state, node, life, 100, confirmed, 200)
    };
    assert_eq!(
        ask(&mut table, &world, N1, LIFE, 99),
        Err(LeaseRefusal::Unconfirmed { node: N1 })
    );
    assert!(ask(&mut table, &world, N1, LIFE, 100).is_ok());
    assert!(matches!(
        ask(&mut table, &world, N1, Incarnation(2), 100),
        Err(LeaseRefusal::OtherIncarnation { .. })
    ));
    assert!(matches!(
        ask(&mut table, &world, NodeId(9), LIFE, 100),
        Err(LeaseRefusal::Unknown { .. })
    ));
    world.lose(N2);
    assert!(matches!(
        ask(&mut table, &world, N2, LIFE, 100),
        Err(LeaseRefusal::NotUp { .. })
    ));
}

#[test]
fn an_announced_absence_adds_its_time_until_the_node_registers() {
    let mut world = World::new(2, 64);
    let mut table = LeaseTable::new(0);
    grant(&mut table, &world, N1, 1_000);
    grant(&mut table, &world, N2, 1_000);
    world.done(Command::Absent {
        node: N2,
        incarnation: LIFE,
        duration_ms: 60_000,
    });
    assert_eq!(lost_nodes(&mut table, &world, 7_500), vec![N1]);
    assert_eq!(lost_nodes(&mut table, &world, 67_499), vec![N1]);
    assert_eq!(lost_nodes(&mut table, &world, 67_500), vec![N1, N2]);
    // A leader that takes over in the middle adds it, too.
    let mut next = LeaseTable::new(10_000 * MS);
    assert_eq!(lost_nodes(&mut next, &world, 76_499), vec![N1]);
    world.register(N2, LIFE, 64);
    assert_eq!(lost_nodes(&mut next, &world, 16_500), vec![N1, N2]);
}

#[test]
fn a_shorter_setting_does_not_cut_a_lease_that_runs() {
    let mut world = World::new(2, 64);
    world.settings(|settings| {
        settings.freeze_ms = 60_000;
        settings.lost_ms = 90_000;
    });
    let mut table = LeaseTable::new(0);
    grant(&mut table, &world, N1, 0);
    world.settings(|settings| *settings = Settings::fast());
    assert_eq!(lost_nodes(&mut table, &world, 89_999), vec![]);
    assert_eq!(lost_nodes(&mut table, &world, 90_000), vec![N1, N2]);
    // The next leader does not know which setting the lease was granted under.
    let mut next = LeaseTable::new(0);
    assert_eq!(lost_nodes(&mut next, &world, 89_999), vec![]);
    grant(&mut table, &world, N1, 0);
    assert!(lost_nodes(&mut table, &world, 2_800).contains(&N1));
}

#[test]
fn a_node_counts_from_when_it_sent_however_late_the_reply() {
    let mut lease = NodeLease::default();
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
    let mut lease = NodeLease::default();
    let first = lease.sending(0);
    for at in 0..10_000 {
        lease.sending(at);
    }
    assert_eq!(lease.under_way.len(), UNDER_WAY_MAX);
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
                    let mut lease = NodeLease::default();
                    let sequence = lease.sending(sent * node_rate / 100 * MS);
                    let received = sent + there;
                    let replied = received + reply;
                    let mut table = LeaseTable::new(0);
                    let at = |real: u64| real * leader_rate / 100 * MS;
                    let given = table
                        .grant(
                            &world.state,
                            N2,
                            LIFE,
                            at(received),
                            at(received),
                            at(replied),
                        )
                        .expect("a grant");
                    let deadline = lease.granted(sequence, given).expect("a deadline");
                    let frozen_at = deadline / MS * 100 / node_rate;
                    let node = &world.state.nodes[&N2];
                    let lost_at = table.lost_at_ns(&world.state, node) / MS * 100 / leader_rate;
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
    let mut table = LeaseTable::new(0);
    grant(&mut table, &world, N1, 1_000);
    grant(&mut table, &world, N2, 1_000);
    assert_eq!(lost_nodes(&mut table, &world, 7_500), vec![N1, N2]);
    grant(&mut table, &world, N1, 7_600);
    for command in table.lost(&world.state, 7_600 * MS) {
        world.done(command);
    }
    assert_eq!(lost_nodes(&mut table, &world, 9_000), vec![]);
    world.register(N2, LIFE, 64);
    grant(&mut table, &world, N1, 9_900);
    assert_eq!(lost_nodes(&mut table, &world, 10_000), vec![]);
    assert_eq!(lost_nodes(&mut table, &world, 16_399), vec![]);
    assert_eq!(lost_nodes(&mut table, &world, 16_500), vec![N1, N2]);
}

#[test]
fn without_a_quorum_no_time_counts_against_anybody() {
    let world = World::new(2, 64);
    let mut table = LeaseTable::new(0);
    grant(&mut table, &world, N1, 1_000);
    grant(&mut table, &world, N2, 1_000);
    assert_eq!(lost_nodes(&mut table, &world, 1_100), vec![]);
    // The quorum is silent until 20 s: nobody is lost meanwhile, nor when it is back...
    for now_ms in (3_600..20_000).step_by(100) {
        assert_eq!(lost_now(&mut table, &world, now_ms), vec![]);
    }
    assert_eq!(lost_nodes(&mut table, &world, 20_000), vec![]);
    // ...but all who do not ask within the full time from then on.
    grant(&mut table, &world, N1, 20_500);
    assert_eq!(lost_nodes(&mut table, &world, 26_499), vec![]);
    assert_eq!(lost_nodes(&mut table, &world, 26_500), vec![N2]);
}
