//! A planned absence: who waits for how long, and what ends it.

use super::*;

#[test]
fn an_announced_absence_adds_its_time() {
    let mut world = World::new(2, 64);
    let mut term = Term::new(1, 0);
    grant(&mut term, &world, N1, 1_000);
    grant(&mut term, &world, N2, 1_000);
    absent(&mut world, N2, 60_000);
    assert_eq!(lost_nodes(&mut term, &world, 7_500), vec![N1]);
    // The node counts 60 s and this clock 78: over so long a time the margin between two clocks is wider.
    assert_eq!(lost_nodes(&mut term, &world, 85_499), vec![N1]);
    assert_eq!(lost_nodes(&mut term, &world, 85_500), vec![N1, N2]);
    // A leader that takes over in the middle adds it, too.
    let mut next = Term::new(2, 10_000 * MS);
    assert_eq!(lost_nodes(&mut next, &world, 94_499), vec![N1]);
    assert_eq!(lost_nodes(&mut next, &world, 94_500), vec![N1, N2]);
}

#[test]
fn a_node_that_registers_again_is_not_lost_before_its_monitors_came_back_from_the_absence() {
    let mut world = World::new(2, 64);
    let mut term = Term::new(1, 0);
    grant(&mut term, &world, N2, 1_000);
    let absence = absent(&mut world, N2, 60_000);
    assert!(!lost_nodes(&mut term, &world, 1_100).contains(&N2));
    // It is back after longer than the lost-time, and has its lease.
    world.register(N2, LIFE, 64);
    assert!(!lost_nodes(&mut term, &world, 20_000).contains(&N2));
    grant(&mut term, &world, N2, 20_000);
    // It is gone again: what the monitors were given before counts, and not from that reply.
    assert!(!lost_nodes(&mut term, &world, 85_499).contains(&N2));
    assert!(lost_nodes(&mut term, &world, 85_500).contains(&N2));
    // Had it had its monitors come back, its lease alone would count.
    return_from(&mut world, N2, absence);
    assert!(!lost_nodes(&mut term, &world, 26_499).contains(&N2));
    assert!(lost_nodes(&mut term, &world, 26_500).contains(&N2));
}

#[test]
fn a_node_that_is_back_with_its_lease_is_not_kept_longer_than_the_absence() {
    let mut world = World::new(2, 64);
    let mut term = Term::new(1, 0);
    grant(&mut term, &world, N2, 1_000);
    absent(&mut world, N2, 60_000);
    lost_nodes(&mut term, &world, 1_100);
    for at_ms in (2_000..200_000).step_by(1_000) {
        grant(&mut term, &world, N2, at_ms);
    }
    assert!(!lost_nodes(&mut term, &world, 205_499).contains(&N2));
    assert!(lost_nodes(&mut term, &world, 205_500).contains(&N2));
}

#[test]
fn the_end_of_one_absence_leaves_a_newer_one() {
    let mut world = World::new(2, 64);
    let first = absent(&mut world, N2, 60_000);
    let second = absent(&mut world, N2, 1_000);
    return_from(&mut world, N2, first);
    // Monitors that did not hear of the second go by the first.
    let absence = world.state.nodes[&N2].absence.expect("announced");
    assert_eq!((absence.since, absence.duration_ms), (second, 60_000));
    return_from(&mut world, N2, second);
    assert_eq!(world.state.nodes[&N2].absence, None);
}

#[test]
fn a_reboot_and_a_loss_end_an_absence_and_a_restart_does_not() {
    let mut world = World::new(2, 64);
    absent(&mut world, N1, 60_000);
    absent(&mut world, N2, 60_000);
    world.register(N1, LIFE, 64);
    assert!(world.state.nodes[&N1].absence.is_some());
    world.register(N1, Incarnation(2), 64);
    assert!(world.state.nodes[&N1].absence.is_none());
    world.lose(N2);
    assert!(world.state.nodes[&N2].absence.is_none());
}

#[test]
fn an_absence_is_over_when_every_monitor_has_said_so_under_a_valid_lease() {
    let mut world = World::new(2, 64);
    let since = absent(&mut world, N2, 60_000);
    let me = world.state.nodes[&N2].clone();
    let mut lease = HeldLease::default();
    let monitors = [7u64, 8];
    let returned =
        |lease: &HeldLease, now_ms: u64| lease.returned(&me, monitors.iter().copied(), now_ms * MS);
    // Nothing to come back to before the first grant: a guest that may run on would freeze.
    assert_eq!(lease.shorten_to(&me, 1_000 * MS), None);
    let sequence = lease.sending(1_000 * MS);
    lease.granted(sequence, Grant { lease_ms: 5_000 });
    assert_eq!(lease.shorten_to(&me, 1_100 * MS), Some(6_000 * MS));
    lease.shortened(7);
    assert_eq!(returned(&lease, 1_200), None, "one does not answer");
    lease.shortened(8);
    let end = Command::Returned {
        node: N2,
        incarnation: LIFE,
        absence: since,
    };
    assert_eq!(returned(&lease, 1_300), Some(end));
    assert_eq!(returned(&lease, 6_000), None, "the lease has run out");
    // A second absence is come back from anew.
    lease.absence_committed(1_400 * MS, 60_000);
    assert_eq!(returned(&lease, 1_500), None);
    // Nothing is due once the log knows of no absence.
    return_from(&mut world, N2, since);
    let me = &world.state.nodes[&N2];
    assert_eq!(lease.shorten_to(me, 1_500 * MS), None);
    assert_eq!(lease.returned(me, [].into_iter(), 1_500 * MS), None);
}

#[test]
fn clocks_that_differ_by_a_tenth_do_not_end_an_absence_too_early() {
    for (node_rate, leader_rate) in [(100, 100), (95, 105), (105, 95)] {
        let mut world = World::new(2, 64);
        let mut lease = HeldLease::default();
        let sequence = lease.sending(1_000 * node_rate / 100 * MS);
        let mut term = Term::new(1, 0);
        grant(&mut term, &world, N2, 1_000 * leader_rate / 100);
        lease.granted(sequence, Grant { lease_ms: 5_000 });
        absent(&mut world, N2, 60_000);
        let now_ns = 1_100 * node_rate / 100 * MS;
        let deadline = lease.absence_committed(now_ns, 60_000).expect("a lease");
        let frozen_at = deadline / MS * 100 / node_rate;
        let lost_at = term.lost_at_ns(&world.state, N2).expect("known") / MS * 100 / leader_rate;
        assert!(frozen_at < lost_at, "frozen {frozen_at}, lost {lost_at}");
    }
}
