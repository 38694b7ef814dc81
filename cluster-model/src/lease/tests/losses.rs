//! Losses on their way into the log: none holds up another, and a condemned node is granted nothing.

use super::*;

/// Two nodes that were granted a lease at 1 s, and the losses of both, found at 7.5 s.
fn two_lost() -> (World, Term, Vec<Loss>) {
    let world = World::new(2, 64);
    let mut term = Term::new(3, 0);
    look_until(&mut term, &world, 0, 1_000);
    grant(&mut term, &world, N1, 1_000);
    grant(&mut term, &world, N2, 1_000);
    look_until(&mut term, &world, 1_000, 7_400);
    confirm(&mut term, &world, 7_500);
    let losses = look(&mut term, &world, 7_500);
    assert_eq!(of(&losses), vec![N1, N2]);
    (world, term, losses)
}

fn look(term: &mut Term, world: &World, at_ms: u64) -> Vec<Loss> {
    let look = term.look(&world.state, at_ms * MS);
    assert!(!look.stood_still, "at {at_ms} ms");
    look.losses
}

/// Looks every 100 ms, with a quorum that confirms, and finds nothing.
fn look_until(term: &mut Term, world: &World, from_ms: u64, to_ms: u64) {
    for at_ms in (from_ms..to_ms).step_by(100) {
        confirm(term, world, at_ms);
        assert_eq!(look(term, world, at_ms), vec![], "at {at_ms} ms");
    }
}

fn of(losses: &[Loss]) -> Vec<NodeId> {
    losses.iter().map(|loss| loss.node).collect()
}

fn asks(term: &mut Term, world: &World, node: NodeId, at_ms: u64) -> Result<Grant, LeaseRefusal> {
    term.grant(&world.state, &heartbeat(world, node, at_ms), at_ms * MS)
}

#[test]
fn a_loss_without_an_answer_neither_blocks_the_next_nor_is_proposed_twice() {
    let world = World::new(2, 64);
    let mut term = Term::new(3, 0);
    look_until(&mut term, &world, 0, 1_000);
    grant(&mut term, &world, N1, 1_000);
    grant(&mut term, &world, N2, 2_000);
    look_until(&mut term, &world, 2_000, 7_500);
    confirm(&mut term, &world, 7_500);
    let first = look(&mut term, &world, 7_500);
    assert_eq!(of(&first), vec![N1]);
    // Nobody has answered, and the second node's time goes on.
    look_until(&mut term, &world, 7_600, 8_500);
    confirm(&mut term, &world, 8_500);
    assert_eq!(of(&look(&mut term, &world, 8_500)), vec![N2]);
}

#[test]
fn a_condemned_node_is_granted_nothing_until_the_log_has_decided() {
    let (mut world, mut term, losses) = two_lost();
    let refused = Err(LeaseRefusal::Condemned { node: N2 });
    assert_eq!(asks(&mut term, &world, N2, 7_550), refused);
    term.loss_answered(&losses[1], LossOutcome::Unknown, 7_560 * MS);
    assert_eq!(asks(&mut term, &world, N2, 7_600), refused);
    term.loss_answered(&losses[1], LossOutcome::Recorded, 7_610 * MS);
    assert_eq!(asks(&mut term, &world, N2, 7_620), refused);
    // The log shows it, and then that the node has come up again: what is left of the loss is forgotten.
    world.done(losses[1].command.clone());
    world.register(N2, LIFE, 64);
    assert!(asks(&mut term, &world, N2, 7_700).is_ok());
}

#[test]
fn a_loss_of_unknown_fate_is_asked_for_again_under_the_same_id_and_not_at_once() {
    let (world, mut term, losses) = two_lost();
    term.loss_answered(&losses[0], LossOutcome::Unknown, 7_500 * MS);
    look_until(&mut term, &world, 7_600, 8_500);
    confirm(&mut term, &world, 8_500);
    assert_eq!(look(&mut term, &world, 8_500), vec![losses[0].clone()]);
    // Under way again.
    look_until(&mut term, &world, 8_600, 10_000);
}

#[test]
fn a_loss_that_is_not_in_the_log_condemns_nobody_and_comes_again_under_a_new_id() {
    let (world, mut term, losses) = two_lost();
    for loss in &losses {
        term.loss_answered(loss, LossOutcome::Refused, 7_500 * MS);
    }
    // One node asks again; the other one stays silent.
    assert!(asks(&mut term, &world, N1, 7_550).is_ok());
    look_until(&mut term, &world, 7_600, 8_500);
    confirm(&mut term, &world, 8_500);
    let again = look(&mut term, &world, 8_500);
    assert_eq!(of(&again), vec![N2]);
    assert_ne!(again[0].request, losses[1].request);
    // An answer to the old one says nothing of the new one.
    term.loss_answered(&losses[1], LossOutcome::Refused, 8_550 * MS);
    assert!(asks(&mut term, &world, N2, 8_600).is_err());
}

#[test]
fn a_silent_quorum_is_noticed_while_a_loss_is_in_flight() {
    let (world, mut term, losses) = two_lost();
    term.loss_answered(&losses[0], LossOutcome::Unknown, 7_500 * MS);
    // Nobody confirms anything until 20 s. N2's loss was refused: it would be lost at the next look.
    term.loss_answered(&losses[1], LossOutcome::Refused, 7_500 * MS);
    assert!(asks(&mut term, &world, N2, 7_600).is_ok());
    for at_ms in (7_700..20_000).step_by(100) {
        // Up to the point where the silence counts, the unknown one may be asked for.
        let found = look(&mut term, &world, at_ms);
        assert!(!of(&found).contains(&N2), "at {at_ms} ms");
    }
    // The quorum is back: N2 has the full time again, and the unknown loss is settled.
    confirm(&mut term, &world, 20_000);
    assert!(!of(&look(&mut term, &world, 20_000)).contains(&N2));
    for at_ms in (20_100..26_400).step_by(100) {
        confirm(&mut term, &world, at_ms);
        assert!(!of(&look(&mut term, &world, at_ms)).contains(&N2));
    }
}

#[test]
fn a_leader_that_stood_still_gives_everybody_the_full_time_again() {
    let world = World::new(2, 64);
    let mut term = Term::new(3, 0);
    look_until(&mut term, &world, 0, 5_000);
    confirm(&mut term, &world, 9_000);
    let found = term.look(&world.state, 9_000 * MS);
    assert!(found.stood_still && found.losses.is_empty());
    look_until(&mut term, &world, 9_100, 15_500);
    confirm(&mut term, &world, 15_500);
    assert_eq!(of(&look(&mut term, &world, 15_500)), vec![N1, N2]);
}

#[test]
fn a_node_that_the_log_does_not_reach_is_granted_nothing_more_and_is_lost() {
    let mut world = World::new(2, 64);
    let mut term = Term::new(3, 0);
    let stuck = world.state.applied;
    let mut granted_ms = 0;
    for at_ms in (1_000..30_000u64).step_by(1_000) {
        // The log goes on, N1 with it.
        world.settings(|settings| settings.crashes_max = 1 + u8::try_from(at_ms / 1_000).unwrap());
        grant(&mut term, &world, N1, at_ms);
        let asked = Heartbeat {
            applied: stuck,
            ..heartbeat(&world, N2, at_ms)
        };
        match term.grant(&world.state, &asked, at_ms * MS) {
            Ok(_) => granted_ms = at_ms,
            Err(refusal) => assert!(matches!(refusal, LeaseRefusal::Behind { .. }), "{refusal}"),
        }
        let lost = lost_now(&mut term, &world, at_ms);
        let due = granted_ms + u64::from(world.state.settings.lost_ms);
        assert_eq!(lost.contains(&N2), at_ms >= due, "at {at_ms} ms");
    }
    // One lease's length after the first grant that it did not use.
    assert_eq!(granted_ms, 6_000);
}

#[test]
fn a_node_that_follows_a_busy_log_at_a_distance_keeps_its_lease() {
    let mut world = World::new(2, 64);
    let mut term = Term::new(3, 0);
    let mut behind = world.state.applied;
    for at_ms in (1_000..60_000u64).step_by(1_000) {
        world.settings(|settings| settings.crashes_max = 1 + u8::try_from(at_ms / 1_000).unwrap());
        let asked = Heartbeat {
            applied: behind,
            ..heartbeat(&world, N2, at_ms)
        };
        let granted = term.grant(&world.state, &asked, at_ms * MS);
        assert!(granted.is_ok(), "at {at_ms} ms: {granted:?}");
        // It has applied what was there three seconds ago.
        if at_ms > 3_000 {
            behind = LogIndex(behind.0 + 1);
        }
    }
}
