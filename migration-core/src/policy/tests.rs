//! The policy against tables, and against a simulated guest whose whole future the oracle knows.

use super::*;
use proptest::prelude::*;

const PAGE: u64 = PAGE_SIZE as u64;
const MIB: u64 = 1 << 20;

fn round(number: u32, mib: u64, duration_us: u64, dirty_mib: u64) -> RoundStats {
    RoundStats {
        number,
        pages: mib * MIB / PAGE,
        zero_pages: 0,
        bytes: mib * MIB,
        duration_us,
        dirty_pages_after: dirty_mib * MIB / PAGE,
    }
}

fn progress(rounds: &[RoundStats]) -> Progress<'_> {
    Progress {
        rounds,
        elapsed_us: rounds.iter().map(|r| r.duration_us).sum(),
        harvest_us: 100,
        costs: FixedCosts::default(),
        bandwidth_max_bytes_s: 0,
    }
}

/// A guest that writes `hot_pages` at random, `writes_s` pages a second, over a link of
/// `bytes_s` with a latency: the expected number of distinct pages is the classic urn formula.
#[derive(Clone, Copy, Debug)]
struct Guest {
    memory_pages: u64,
    hot_pages: u64,
    writes_s: f64,
    bytes_s: f64,
    latency_us: u64,
}

impl Guest {
    fn duration_us(&self, pages: u64) -> u64 {
        ((pages * PAGE) as f64 / self.bytes_s * 1e6) as u64 + self.latency_us
    }
    fn dirtied_in(&self, duration_us: u64) -> u64 {
        let hot = self.hot_pages as f64;
        let writes = self.writes_s * duration_us as f64 / 1e6;
        (hot * (1.0 - (-writes / hot).exp())).round() as u64
    }
    /// Every round that could ever be run, however many.
    fn trajectory(&self, rounds: u32) -> Vec<RoundStats> {
        let mut pages = self.memory_pages;
        (1..=rounds)
            .map(|number| {
                let duration_us = self.duration_us(pages);
                let dirty_pages_after = self.dirtied_in(duration_us);
                let done = RoundStats {
                    number,
                    pages,
                    zero_pages: 0,
                    bytes: pages * PAGE,
                    duration_us,
                    dirty_pages_after,
                };
                pages = dirty_pages_after;
                done
            })
            .collect()
    }
    /// What stopping after `last` really costs.
    fn blackout_us(&self, last: &RoundStats) -> u64 {
        FixedCosts::default().total_us() + 100 + self.duration_us(last.dirty_pages_after)
    }
}

/// Runs the policy over a trajectory: (rounds done, verdict).
fn drive(policy: &Policy, trajectory: &[RoundStats]) -> (usize, Verdict) {
    for done in 0..=trajectory.len() {
        match judge(policy, &progress(&trajectory[..done])) {
            Verdict::AnotherRound => {}
            verdict => return (done, verdict),
        }
    }
    panic!("the policy wanted more than {} rounds", trajectory.len());
}

#[test]
fn the_first_round_is_never_judged() {
    assert_eq!(
        judge(&Policy::default(), &progress(&[])),
        Verdict::AnotherRound
    );
}

#[test]
fn verdicts_follow_the_table() {
    type Is = fn(&Verdict) -> bool;
    let another: Is = |v| matches!(v, Verdict::AnotherRound);
    let nothing: Is = |v| matches!(v, Verdict::Stop(StopReason::NothingToGain { .. }));
    let no_longer: Is = |v| matches!(v, Verdict::Stop(StopReason::NoLongerPays { .. }));
    let table: &[(&str, Vec<RoundStats>, Is)] = &[
        (
            // 200 MiB at 1 GiB/s is under the ceiling of 300 ms, and a naive rule would stop here.
            "fits but the next round takes most of it away",
            vec![round(1, 1024, 1_000_000, 200)],
            another,
        ),
        ("nothing dirty", vec![round(1, 1024, 1_000_000, 0)], nothing),
        (
            "a steady writer at nine tenths of the link, within the ceiling",
            vec![
                round(1, 100, 100_000, 92),
                round(2, 92, 92_000, 84),
                round(3, 84, 84_000, 80),
            ],
            no_longer,
        ),
        (
            "the same just after a burst: wait for calm",
            vec![
                round(1, 100, 100_000, 92),
                round(2, 92, 92_000, 40),
                round(3, 40, 40_000, 80),
            ],
            another,
        ),
        (
            "does not fit, rounds are left",
            vec![round(1, 4096, 4_000_000, 4000)],
            another,
        ),
    ];
    for (name, rounds, is) in table {
        let verdict = judge(&Policy::default(), &progress(rounds));
        assert!(is(&verdict), "{name}: {verdict:?}");
    }
}

#[test]
fn a_guest_faster_than_the_link_is_given_up_with_its_figures() {
    let policy = Policy::default();
    let guest = Guest {
        memory_pages: 1 << 18,
        hot_pages: 1 << 17,
        writes_s: 100_000.0,
        bytes_s: 50.0 * MIB as f64,
        latency_us: 200,
    };
    let (rounds, verdict) = drive(&policy, &guest.trajectory(40));
    assert_eq!(rounds, 30);
    let Verdict::GiveUp(why) = verdict else {
        panic!("{verdict:?}")
    };
    assert!(why.predicted_blackout_us > 300_000);
    // Distinct pages are fewer than writes; the figure is of distinct pages over the real round.
    assert!(why.dirty_bytes_s > why.copy_bytes_s / 2, "{why}");
    assert!((why.copy_bytes_s as f64) > 49.0 * MIB as f64, "{why}");
    assert!(why.to_string().contains("stop-and-copy"));
}

#[test]
fn stop_and_copy_moves_what_does_not_converge() {
    let policy = Policy {
        stop_and_copy: true,
        rounds_max: 3,
        ..Policy::default()
    };
    let rounds = [
        round(1, 1024, 10_000_000, 900),
        round(2, 900, 9_000_000, 900),
        round(3, 900, 9_000_000, 900),
    ];
    let verdict = judge(&policy, &progress(&rounds));
    assert!(
        matches!(verdict, Verdict::Stop(StopReason::StopAndCopy { predicted_blackout_us })
        if predicted_blackout_us > 8_000_000)
    );
}

#[test]
fn the_time_bound_ends_copying_too() {
    let policy = Policy {
        copy_max_ms: 10_000,
        ..Policy::default()
    };
    let verdict = judge(&policy, &progress(&[round(1, 1024, 11_000_000, 900)]));
    assert!(matches!(verdict, Verdict::GiveUp(_)));
}

#[test]
fn an_idle_guest_is_stopped_with_next_to_nothing_left() {
    let guest = Guest {
        memory_pages: 1 << 18,
        hot_pages: 500,
        writes_s: 200.0,
        bytes_s: 1e9,
        latency_us: 300,
    };
    let trajectory = guest.trajectory(40);
    let (rounds, _) = drive(&Policy::default(), &trajectory);
    let remaining = trajectory[rounds - 1].dirty_pages_after * PAGE;
    assert!(remaining < MIB, "{remaining} bytes after {rounds} rounds");
    assert!(rounds <= 4);
}

#[test]
fn the_cap_bounds_the_throughput_believed_in() {
    let rounds = [round(1, 100, 100_000, 10)];
    let capped = Progress {
        bandwidth_max_bytes_s: 10 * MIB,
        ..progress(&rounds)
    };
    assert_eq!(predict(&capped).copy_bytes_s, 10 * MIB);
    assert!(predict(&capped).blackout_us > 1_000_000);
}

proptest! {
    /// Whatever the figures, even absurd ones: no panic, and an end after the rounds allowed.
    #[test]
    fn any_figures_get_a_verdict(
        figures in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()), 0..35),
        harvest_us in any::<u64>(), cap in any::<u64>(), stop_and_copy in any::<bool>(),
    ) {
        let rounds = figures.iter().map(|&(pages, zero_pages, duration_us, dirty_pages_after)| RoundStats {
            number: 1, pages, zero_pages, bytes: 0, duration_us, dirty_pages_after,
        }).collect::<Vec<_>>();
        let progress = Progress { rounds: &rounds, elapsed_us: 0, harvest_us,
            costs: FixedCosts { pause_us: u64::MAX, ..FixedCosts::default() }, bandwidth_max_bytes_s: cap };
        let verdict = judge(&Policy { stop_and_copy, ..Policy::default() }, &progress);
        if rounds.len() >= 30 {
            prop_assert!(verdict != Verdict::AnotherRound);
        }
    }

    /// Against the oracle: a stop within the ceiling keeps the ceiling in truth; giving up happens
    /// only where no round would have kept it; and where the guest is steady the stop is near the
    /// best that any number of rounds could have reached.
    #[test]
    fn a_steady_guest_is_stopped_near_the_best_possible_moment(
        memory_pages in 1_000u64..500_000,
        hot_share in 0.001f64..1.0,
        load in 0.0f64..1.5,
        link_mib_s in 20.0f64..3_000.0,
        latency_us in 50u64..2_000,
    ) {
        let bytes_s = link_mib_s * MIB as f64;
        let guest = Guest {
            memory_pages,
            hot_pages: ((memory_pages as f64 * hot_share) as u64).max(1),
            writes_s: bytes_s / PAGE as f64 * load,
            bytes_s, latency_us,
        };
        let policy = Policy::default();
        let trajectory = guest.trajectory(policy.rounds_max);
        let (rounds, verdict) = drive(&policy, &trajectory);
        let ceiling_us = u64::from(policy.downtime_max_ms) * 1000;
        let real_us = guest.blackout_us(&trajectory[rounds - 1]);
        let best_us = trajectory.iter().map(|r| guest.blackout_us(r)).min().unwrap();
        // What a prediction cannot know: one latency, and 1 % of rounding.
        let slack_us = 2 * latency_us + ceiling_us / 100;
        match verdict {
            Verdict::Stop(_) => {
                prop_assert!(real_us <= ceiling_us + slack_us, "{real_us} us after {rounds}");
                // Where each round takes a quarter at least, only the last few are left on the table.
                if load <= 0.7 {
                    prop_assert!(real_us <= best_us * 2 + slack_us + 2_000,
                        "stopped at {real_us} us where {best_us} us could be had");
                }
            }
            Verdict::GiveUp(_) => prop_assert!(best_us + slack_us >= ceiling_us,
                "gave up though {best_us} us was possible"),
            Verdict::AnotherRound => unreachable!(),
        }
    }
}
