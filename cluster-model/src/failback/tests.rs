//! Who returns, in which order, how many at a time, what stays away, and a fail-back that another leader goes
//! on with.

use super::*;
use crate::event::Object;
use crate::fleet::NodeLoad;
use crate::ids::{MigrationId, VmId};
use crate::queue;
use crate::state::Duty;
use crate::testing::{World, name, spec};

const NODE: NodeId = NodeId(1);
const RATE: u64 = 1 << 30;

fn drained(world: &mut World) {
    world.done(Command::StartDrain {
        node: NODE,
        reason: String::new(),
    });
    run(world, &Observed::default(), |_, _| true);
    assert_eq!(world.state.nodes[&NODE].duty, Duty::Drained);
}

fn uncordon(world: &mut World, failback: bool) {
    world.done(Command::Uncordon {
        node: NODE,
        failback,
    });
}

/// What the controllers and the nodes would do until nothing is left to do: every migration under way ends as
/// `through` says. Nothing is carried from one turn to the next but the log.
fn run(
    world: &mut World,
    observed: &Observed,
    mut through: impl FnMut(&World, MigrationId) -> bool,
) {
    for _ in 0..200 {
        let mut commands = crate::drain::next(&world.state, observed);
        commands.extend(next(&world.state, observed));
        let mut moved = !commands.is_empty();
        for command in commands {
            world.done(command);
        }
        for step in queue::next(&world.state, observed) {
            moved = true;
            match step {
                queue::Next::Start { migration, .. } => {
                    let command = world.start_command(migration);
                    world.done(command);
                }
                queue::Next::Abort { migration, .. } => world.abort(migration),
            }
        }
        let active: Vec<MigrationId> = world
            .state
            .migrations
            .values()
            .filter(|migration| migration.is_active())
            .map(|migration| migration.id)
            .collect();
        for migration in active {
            moved = true;
            if through(world, migration) {
                world.cutover(migration);
                let vm = world.state.migrations[&migration].vm;
                world.activate(vm);
            } else {
                world.abort(migration);
            }
        }
        if !moved {
            return;
        }
    }
    panic!("it does not end");
}

fn said(world: &World, kind: &str) -> Vec<String> {
    world
        .state
        .events
        .iter()
        .filter(|event| event.kind == kind)
        .map(|event| event.detail.clone())
        .collect()
}

#[test]
fn fail_back_brings_the_drained_machines_home_and_no_others() {
    let mut world = World::new(3, 4_096);
    let (home, by_hand, stopped) = (
        world.running("home", 128, NODE),
        world.running("by-hand", 128, NODE),
        world.running("stopped", 128, NODE),
    );
    let stranger = world.running("stranger", 128, NodeId(2));
    drained(&mut world);
    let owner = world.vm(by_hand).ownership.owner.expect("an owner");
    let to = if owner == NodeId(2) {
        NodeId(3)
    } else {
        NodeId(2)
    };
    let (migration, _) = world.migrate(by_hand, to);
    world.cutover(migration);
    world.activate(by_hand);
    world.desire(stopped, Desired::Stopped);
    assert_eq!(next(&world.state, &Observed::default()), vec![]);

    uncordon(&mut world, true);
    let planned = plan(&world.state, NODE, &Observed::default(), RATE);
    assert!(
        matches!(&planned[..], [PlannedMachine { vm, step: Step::Move { to: NODE, .. }, .. }] if *vm == home),
        "{planned:?}"
    );
    assert_eq!(
        said(&world, "failback.started"),
        ["1 machine returns to n1"]
    );
    run(&mut world, &Observed::default(), |_, _| true);
    assert_eq!(world.vm(home).ownership.owner, Some(NODE));
    assert_eq!(world.vm(home).home, None);
    assert_eq!(world.vm(by_hand).ownership.owner, Some(to));
    assert_eq!(world.vm(stranger).ownership.owner, Some(NodeId(2)));
    assert_eq!(world.vm(stopped).home, Some(NODE));
    assert!(world.state.failbacks.is_empty());
    assert_eq!(
        said(&world, "failback.done"),
        ["what a drain took from n1 is back"]
    );
    assert_eq!(plan(&world.state, NODE, &Observed::default(), RATE), vec![]);
}

#[test]
fn an_uncordon_without_it_forgets_where_machines_were() {
    let mut world = World::new(2, 4_096);
    let vm = world.running("a", 128, NODE);
    drained(&mut world);
    uncordon(&mut world, false);
    assert_eq!(world.vm(vm).home, None);
    uncordon(&mut world, true);
    run(&mut world, &Observed::default(), |_, _| true);
    assert_eq!(world.vm(vm).ownership.owner, Some(NodeId(2)));
}

#[test]
fn a_few_at_a_time_return_and_the_important_ones_first() {
    let mut world = World::new(3, 8_192);
    let mut machines: Vec<VmId> = Vec::new();
    for (number, priority) in [100, 900, 500, 900, 300, 700].into_iter().enumerate() {
        let mut asked = spec(&format!("v{number}"), 64);
        asked.priority = priority;
        let vm = world.create_with(&format!("v{number}"), asked);
        world.start(vm, NODE);
        world.activate(vm);
        machines.push(vm);
    }
    drained(&mut world);
    uncordon(&mut world, true);
    let commands = next(&world.state, &Observed::default());
    let queued: Vec<VmId> = commands
        .iter()
        .map(|command| match command {
            Command::QueueMigration { vm, to: NODE, .. } => *vm,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(AHEAD_MAX, 4);
    assert_eq!(queued, [1, 3, 5, 2].map(|number: usize| machines[number]));
    for command in commands {
        world.done(command);
    }
    assert_eq!(
        next(&world.state, &Observed::default()),
        vec![],
        "those that are open are enough"
    );
    run(&mut world, &Observed::default(), |_, _| true);
    for vm in machines {
        assert_eq!(world.vm(vm).ownership.owner, Some(NODE));
    }
}

#[test]
fn a_return_that_fails_too_often_stays_away_and_the_rest_returns() {
    let mut world = World::new(2, 4_096);
    let stubborn = world.running("stubborn", 128, NODE);
    let easy = world.running("easy", 128, NODE);
    drained(&mut world);
    uncordon(&mut world, true);
    let mut tries = 0;
    run(&mut world, &Observed::default(), |world, migration| {
        let fails = world.state.migrations[&migration].vm == stubborn;
        tries += usize::from(fails);
        !fails
    });
    assert_eq!(tries, usize::from(world.state.settings.drain_tries_max));
    assert_eq!(world.vm(easy).ownership.owner, Some(NODE));
    assert_eq!(world.vm(stubborn).ownership.owner, Some(NodeId(2)));
    assert_eq!(said(&world, "failback.stays").len(), 1);
    assert!(said(&world, "failback.done")[0].contains("but for 1 machine"));
    // A person may ask once more: the tries begin anew.
    uncordon(&mut world, true);
    run(&mut world, &Observed::default(), |_, _| true);
    assert_eq!(world.vm(stubborn).ownership.owner, Some(NODE));
}

#[test]
fn what_does_not_fit_at_home_stays_away_with_the_reason() {
    let mut world = World::new(2, 1_024);
    let large = world.running("large", 700, NODE);
    let small = world.running("small", 64, NODE);
    drained(&mut world);
    // Meanwhile its node was given less memory.
    world.register(NODE, crate::ids::Incarnation(1), 512);
    uncordon(&mut world, true);
    run(&mut world, &Observed::default(), |_, _| true);
    assert_eq!(world.vm(small).ownership.owner, Some(NODE));
    assert_eq!(world.vm(large).ownership.owner, Some(NodeId(2)));
    let stays = said(&world, "failback.stays");
    assert!(
        stays[0].starts_with("large does not return to n1:") && stays[0].contains("no room"),
        "{stays:?}"
    );
}

#[test]
fn a_volume_that_is_down_at_home_is_waited_for() {
    let mut world = World::new(2, 1_024);
    let vm = world.running("a", 64, NODE);
    drained(&mut world);
    uncordon(&mut world, true);
    let down = NodeLoad {
        volumes_down: BTreeSet::from([name("shared")]),
        ..NodeLoad::default()
    };
    let observed = Observed {
        nodes: [(NODE, down)].into(),
        ..Observed::default()
    };
    run(&mut world, &observed, |_, _| true);
    assert!(world.state.failbacks.contains_key(&NODE));
    run(&mut world, &Observed::default(), |_, _| true);
    assert_eq!(world.vm(vm).ownership.owner, Some(NODE));
}

#[test]
fn a_node_that_is_lost_drained_or_removed_meanwhile_gets_nothing_back() {
    let mut world = World::new(3, 1_024);
    let vm = world.running("a", 64, NODE);
    drained(&mut world);
    uncordon(&mut world, true);
    world.lose(NODE);
    assert_eq!(next(&world.state, &Observed::default()), vec![]);
    let planned = plan(&world.state, NODE, &Observed::default(), RATE);
    assert!(matches!(planned[0].step, Step::Later { .. }), "{planned:?}");

    let mut drained_again = world.clone();
    drained_again.register(NODE, crate::ids::Incarnation(2), 1_024);
    drained_again.done(Command::StartDrain {
        node: NODE,
        reason: String::new(),
    });
    assert!(drained_again.state.failbacks.is_empty());
    run(&mut drained_again, &Observed::default(), |_, _| true);
    assert_ne!(drained_again.vm(vm).ownership.owner, Some(NODE));

    world.done(Command::RemoveNode { node: NODE });
    assert!(world.state.failbacks.is_empty());
    assert_eq!(world.vm(vm).home, None);
}

#[test]
fn a_late_step_of_another_leader_is_refused() {
    let mut world = World::new(2, 1_024);
    let vm = world.running("a", 64, NODE);
    drained(&mut world);
    let end = Command::EndFailback { node: NODE };
    let away = Command::StayAway {
        node: NODE,
        vm,
        reason: "no room".into(),
    };
    assert!(matches!(
        world.refused(end.clone()),
        Rejection::DrainState { .. }
    ));
    uncordon(&mut world, true);
    assert!(matches!(
        world.refused(end.clone()),
        Rejection::NodeInUse { .. }
    ));
    world.done(away.clone());
    assert!(matches!(world.refused(away), Rejection::DrainState { .. }));
    let note = world.state.events.back().expect("an event");
    assert!(note.objects.contains(&Object::Vm(vm)));
    world.done(end);
}

#[test]
fn a_record_of_an_earlier_version_has_no_fail_backs() {
    let world = World::new(1, 64);
    let json = serde_json::to_value(&world.state).expect("it is written");
    assert!(json.get("failbacks").is_none());
    let read: ClusterState = serde_json::from_value(json).expect("it is read");
    assert_eq!(read, world.state);
    let old: Command =
        serde_json::from_str(r#"{"uncordon":{"node":1}}"#).expect("an old entry is read");
    let failback = false;
    assert_eq!(
        old,
        Command::Uncordon {
            node: NODE,
            failback
        }
    );
}
