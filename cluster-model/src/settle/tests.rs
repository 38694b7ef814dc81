use super::*;
use crate::command::{Command, Rejection};
use crate::testing::{World, name};

#[test]
fn the_largest_of_what_is_known_is_waited() {
    let mut world = World::new(1, 1024);
    let vm = world.create("a", 64);
    let settle = |world: &World, us| world.state.settle(world.vm(vm), us);
    assert_eq!(settle(&world, 0).ms, 1_000);

    world.settings(|settings| settings.settle_ms_min = 300_000);
    assert_eq!(
        settle(&world, 0).ms,
        300_000,
        "an operator's word is waited in full"
    );
    assert_eq!(settle(&world, 90_000_000).ms, 300_000);

    world.settings(|settings| settings.settle_ms_min = 1_000);
    for volume in world.state.volumes.values_mut() {
        volume.settle_ms = 450_000;
    }
    assert_eq!(
        settle(&world, 0).ms,
        450_000,
        "a certificate is waited in full"
    );

    for volume in world.state.volumes.values_mut() {
        volume.settle_ms = 0;
    }
    assert_eq!(settle(&world, 250_001).ms, 2_501, "ten times the p99.9");
}

#[test]
fn what_was_measured_counts_for_two_minutes_at_most_and_says_so() {
    let mut world = World::new(1, 1024);
    let vm = world.create("a", 64);
    let settle = world.state.settle(world.vm(vm), 12_000_000);
    assert_eq!((settle.ms, settle.is_bounded()), (120_000, false));
    for us in [12_000_001, 600_000_000, u64::MAX] {
        let settle = world.state.settle(world.vm(vm), us);
        assert_eq!((settle.ms, settle.is_bounded()), (120_000, true), "{us}");
    }
    world.settings(|settings| settings.settle_ms_min = 300_000);
    let settle = world.state.settle(world.vm(vm), 20_000_000);
    assert_eq!((settle.ms, settle.is_bounded()), (300_000, false));
}

#[test]
fn a_certificate_above_the_maximum_is_none() {
    assert_eq!(certified_ms(0), Ok(1_000));
    assert_eq!(certified_ms(108_000), Ok(1_080));
    assert_eq!(certified_ms(60_000_000), Ok(600_000));
    assert_eq!(certified_ms(60_000_001), Err(600_001));
    assert!(certified_ms(u64::MAX).is_err());
}

#[test]
fn setting_and_volume_are_bound_to_the_same_maximum() {
    let mut world = World::new(1, 1024);
    let add = |settle_ms| Command::AddVolume {
        name: name("slow"),
        url: "nfs://10.0.0.9/slow".into(),
        uuid: "uuid-slow".into(),
        fence: crate::state::FenceClass::GidToken,
        settle_ms,
        size_bytes: 1 << 30,
        nodes: std::collections::BTreeSet::new(),
        tls_ca: None,
    };
    let refused = world.refused(add(SETTLE_MS_MAX + 1));
    assert!(matches!(refused, Rejection::TooLarge { .. }), "{refused}");
    world.done(add(SETTLE_MS_MAX));

    let set = |settle_ms_min| Settings {
        settle_ms_min,
        ..Settings::default()
    };
    for ms in [SETTLE_MS_MIN, SETTLE_MS_MAX] {
        assert_eq!(set(ms).validate(), Ok(()));
    }
    for ms in [SETTLE_MS_MIN - 1, SETTLE_MS_MAX + 1] {
        let error = set(ms).validate().unwrap_err();
        assert_eq!(error.setting, "settle_ms_min");
    }
}
