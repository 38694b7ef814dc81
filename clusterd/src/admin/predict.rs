//! How long a move will take: from what earlier moves took, or, before there were any, an estimate. Pure.

use cluster_model::{ClusterState, Migration, MigrationState, VmId};

/// Earlier moves looked at: the latest say more of today's network and load.
const MOVES_MAX: usize = 8;
/// What a move is expected to get through, bytes of memory a second, before any was measured.
const ESTIMATED_BYTES_S: u64 = 800 << 20;
/// What an estimated move costs besides its memory: setup, handover.
const ESTIMATED_OVERHEAD_MS: u64 = 300;

/// What predictions rest on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Basis {
    /// Memory moved a second, everything included.
    bytes_s: u64,
    /// Of how many earlier moves; 0: an estimate.
    moves: usize,
    /// The longest blackout among them, µs.
    blackout_us: u64,
    /// Whether they are the machine's own.
    own: bool,
}

impl Basis {
    /// The machine's own earlier moves; else everybody's; else an estimate.
    pub fn of(state: &ClusterState, vm: Option<VmId>) -> Basis {
        let of_all = || Basis::measured(state, |_| true);
        vm.and_then(|vm| Basis::measured(state, |migration| migration.vm == vm))
            .map(|basis| Basis { own: true, ..basis })
            .or_else(of_all)
            .unwrap_or(Basis {
                bytes_s: ESTIMATED_BYTES_S,
                moves: 0,
                blackout_us: 0,
                own: false,
            })
    }

    fn measured(state: &ClusterState, which: impl Fn(&Migration) -> bool) -> Option<Basis> {
        let number = |migration: &Migration, field: &str| {
            migration
                .summary
                .as_ref()
                .and_then(|summary| summary.get(field)?.as_u64())
                .filter(|&number| number > 0)
        };
        let (mut bytes, mut took_us, mut blackout_us, mut moves) = (0u128, 0u128, 0, 0);
        for migration in state.migrations.values().rev() {
            if moves == MOVES_MAX {
                break;
            }
            if !matches!(migration.state, MigrationState::CutOver { .. }) || !which(migration) {
                continue;
            }
            if let (Some(memory), Some(us)) = (
                number(migration, "memory_total_bytes"),
                number(migration, "total_us"),
            ) {
                bytes += u128::from(memory);
                took_us += u128::from(us);
                blackout_us = blackout_us.max(number(migration, "blackout_us").unwrap_or(0));
                moves += 1;
            }
        }
        (moves > 0).then(|| Basis {
            bytes_s: u64::try_from(bytes * 1_000_000 / took_us.max(1)).unwrap_or(u64::MAX),
            moves,
            blackout_us,
            own: false,
        })
    }

    /// The same, no faster than that; 0 is no limit.
    #[must_use]
    pub fn capped(mut self, bytes_s: u64) -> Basis {
        if bytes_s > 0 {
            self.bytes_s = self.bytes_s.min(bytes_s);
        }
        self
    }

    /// Bytes of memory a second.
    pub fn bytes_s(&self) -> u64 {
        self.bytes_s.max(1)
    }

    /// How long the move of a machine of that size will take, ms.
    pub fn predicted_ms(&self, memory_mib: u64) -> u64 {
        let overhead = if self.moves == 0 {
            ESTIMATED_OVERHEAD_MS
        } else {
            0
        };
        let copy = (u128::from(memory_mib) << 20) * 1_000 / u128::from(self.bytes_s());
        overhead.saturating_add(u64::try_from(copy).unwrap_or(u64::MAX))
    }

    /// For people: what a prediction rests on.
    pub fn words(&self) -> String {
        let whose = if self.own { "its" } else { "the" };
        match self.moves {
            0 => "an estimate: no move was measured yet".into(),
            1 => format!(
                "as {whose} last move went, with a blackout of {:.1} ms",
                self.blackout_us as f64 / 1e3
            ),
            moves => format!(
                "as {whose} last {moves} moves went, longest blackout {:.1} ms",
                self.blackout_us as f64 / 1e3
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use cluster_model::{LogIndex, MigrationCause, MigrationId, MigrationOptions, NodeId, Token};

    use super::*;

    fn ended(state: &mut ClusterState, id: u64, vm: u64, summary: serde_json::Value) {
        let migration = Migration {
            id: MigrationId(id),
            vm: VmId(vm),
            from: NodeId(1),
            to: NodeId(2),
            state: MigrationState::CutOver {
                at: LogIndex(id),
                expects: Token(1),
                token: Token(2),
            },
            options: MigrationOptions::default(),
            cause: MigrationCause::Asked,
            actor: "test".into(),
            queued_at_ms: 0,
            started_at_ms: 0,
            ended_at_ms: 0,
            summary: Some(summary),
        };
        state.migrations.insert(migration.id, migration);
    }

    fn took(memory_mib: u64, ms: u64, blackout_us: u64) -> serde_json::Value {
        serde_json::json!({
            "memory_total_bytes": memory_mib << 20,
            "total_us": ms * 1_000,
            "blackout_us": blackout_us,
        })
    }

    #[test]
    fn a_prediction_rests_on_what_was_measured() {
        let mut state = ClusterState::default();
        let estimate = Basis::of(&state, Some(VmId(1)));
        assert_eq!(estimate.predicted_ms(800), 1_300);
        assert!(estimate.words().contains("estimate"));

        ended(&mut state, 1, 1, took(512, 2_000, 9_000));
        ended(&mut state, 2, 1, serde_json::json!({ "total_us": 5 }));
        let own = Basis::of(&state, Some(VmId(1)));
        assert_eq!(own.predicted_ms(256), 1_000);
        assert_eq!(
            own.words(),
            "as its last move went, with a blackout of 9.0 ms"
        );
        let other = Basis::of(&state, Some(VmId(2)));
        assert_eq!(
            other.words(),
            "as the last move went, with a blackout of 9.0 ms"
        );
        assert_eq!(other.capped(64 << 20).predicted_ms(256), 4_000);
    }

    #[test]
    fn only_the_latest_moves_count() {
        let mut state = ClusterState::default();
        ended(&mut state, 1, 1, took(1, 1_000_000, 999_000));
        for id in 2..=9 {
            ended(&mut state, id, 1, took(100, 1_000, 1_000));
        }
        let basis = Basis::of(&state, None);
        assert_eq!(basis.predicted_ms(100), 1_000);
        assert_eq!(
            basis.words(),
            "as the last 8 moves went, longest blackout 1.0 ms"
        );
    }
}
