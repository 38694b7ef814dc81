//! Levels, gain, hysteresis, cooldown, rules and rest.

use super::*;
use crate::fleet::NodeLoad;
use crate::state::Rule;
use crate::testing::{World, name};

const LATER_MS: u64 = 1 << 40;

fn moves(world: &World) -> Vec<(VmId, NodeId)> {
    plan(&world.state, &Observed::default(), LATER_MS)
        .moves
        .iter()
        .map(|found| (found.vm, found.to))
        .collect()
}

fn filled(level: BalanceLevel, used_mib: u64) -> (World, Vec<VmId>) {
    let mut world = World::new(2, 1_000);
    world.settings(|settings| settings.balance_level = level);
    let vms = (0..used_mib / 50)
        .map(|number| world.running(&format!("v{number}"), 50, NodeId(1)))
        .collect();
    (world, vms)
}

#[test]
fn each_level_moves_from_its_own_threshold_on() {
    for (level, at, over) in [
        (BalanceLevel::Low, 800, 850),
        (BalanceLevel::Medium, 700, 750),
        (BalanceLevel::High, 50, 150),
    ] {
        assert_eq!(moves(&filled(level, at).0), vec![], "{level:?} at {at}");
        assert!(
            !moves(&filled(level, over).0).is_empty(),
            "{level:?} at {over}"
        );
    }
}

#[test]
fn it_stops_as_soon_as_the_node_is_under_its_threshold() {
    let (world, _) = filled(BalanceLevel::Low, 900);
    let planned = plan(&world.state, &Observed::default(), LATER_MS);
    assert_eq!(planned.moves.len(), 2, "{planned:?}");
    let first = &planned.moves[0];
    assert_eq!((first.gain_permille, first.cost_mib), (50, 50));
    assert!(first.why.inputs.contains_key("source before, %"));
}

#[test]
fn processor_load_moves_the_machine_that_causes_it() {
    let mut world = World::new(2, 10_000);
    let quiet = world.running("quiet", 200, NodeId(1));
    let busy = world.running("busy", 100, NodeId(1));
    let observed = Observed {
        nodes: [(
            NodeId(1),
            NodeLoad {
                cpu_permille: 900,
                ..NodeLoad::default()
            },
        )]
        .into(),
        vm_cpu_milli: [(busy, 3_000), (quiet, 100)].into(),
    };
    let planned = plan(&world.state, &observed, LATER_MS);
    assert_eq!(planned.moves.len(), 1, "{planned:?}");
    assert_eq!(
        (planned.moves[0].vm, planned.moves[0].gain_permille),
        (busy, 375)
    );
}

#[test]
fn a_machine_that_moved_rests_and_rules_and_room_are_kept() {
    let (mut world, vms) = filled(BalanceLevel::Low, 850);
    let left_alone = |world: &World, now_ms, words: &str| {
        let planned = plan(&world.state, &Observed::default(), now_ms);
        assert_eq!(planned.moves, vec![]);
        assert!(
            planned
                .left_alone
                .iter()
                .all(|left| left.reason.contains(words)),
            "{planned:?}"
        );
        assert_eq!(planned.left_alone.len(), vms.len());
    };
    let mut pinned = world.clone();
    for (number, &vm) in vms.iter().enumerate() {
        pinned.done(Command::SetRule {
            name: name(&format!("r{number}")),
            rule: Some(Rule::PossibleOwners {
                vm,
                nodes: [NodeId(1)].into(),
            }),
        });
    }
    left_alone(&pinned, LATER_MS, "rule");
    let mut full = world.clone();
    full.running("filler", 780, NodeId(2));
    left_alone(&full, LATER_MS, "too full itself");
    for vm in world.state.vms.values_mut() {
        vm.moved_at_ms = world.now_ms;
    }
    left_alone(&world, world.now_ms + 1_000, "rests");
}

#[test]
fn a_balanced_cluster_stays_at_rest() {
    // Carried out again and again, without cooldown: it comes to rest, and nothing goes back and forth.
    for level in [BalanceLevel::Low, BalanceLevel::Medium, BalanceLevel::High] {
        let mut world = World::new(4, 1_000);
        world.settings(|settings| {
            settings.balance_level = level;
            settings.migrations_out_max = 64;
            settings.migrations_in_max = 64;
        });
        for number in 0..9 {
            world.running(&format!("v{number}"), 40 + number * 15, NodeId(1));
        }
        let mut moved: BTreeMap<VmId, u32> = BTreeMap::new();
        let mut rounds = 0;
        loop {
            let planned = plan(&world.state, &Observed::default(), LATER_MS);
            if planned.moves.is_empty() {
                break;
            }
            rounds += 1;
            assert!(rounds < 20, "{level:?} never rests");
            for found in planned.moves {
                *moved.entry(found.vm).or_default() += 1;
                let (migration, _) = world.migrate(found.vm, found.to);
                world.cutover(migration);
                world.activate(found.vm);
            }
        }
        assert!(
            moved.values().all(|&times| times == 1),
            "{level:?}: {moved:?}"
        );
        let threshold = plan(&world.state, &Observed::default(), LATER_MS).threshold_permille;
        assert!(
            plan(&world.state, &Observed::default(), LATER_MS)
                .nodes
                .values()
                .all(|fill| fill.worst() <= threshold),
            "{level:?}"
        );
    }
}
