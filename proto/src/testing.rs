//! What tests of all crates share: how they say that they cannot run here, and how much of themselves they run.

/// How much is tried: unset what a landing tries, `long` everything.
pub const TIER: &str = "BATON_TIER";

/// Says that a test needs what is not there. `cargo xtask test` counts these lines, and with `--all` each is a
/// failure: a test that is left out must not look like one that passed.
#[macro_export]
macro_rules! skip {
    ($test:expr, $($why:tt)+) => {
        println!("SKIPPED {}: {}", $test, format_args!($($why)+))
    };
}

/// So much in a landing, so much in the long tier (`.ci/long`, `BATON_TIER=long`).
pub fn by_tier<T>(landing: T, long: T) -> T {
    chosen(std::env::var(TIER).ok().as_deref(), landing, long)
}

fn chosen<T>(tier: Option<&str>, landing: T, long: T) -> T {
    match tier {
        Some("long") => long,
        None | Some("" | "landing") => landing,
        // Less than somebody asked for must not pass for what they asked for.
        Some(other) => panic!("{TIER}={other}: there are `landing` and `long`"),
    }
}

#[cfg(test)]
mod tests {
    use super::chosen;

    #[test]
    fn the_long_tier_has_to_be_asked_for_by_its_name() {
        assert_eq!(chosen(None, 400, 2_000), 400);
        assert_eq!(chosen(Some("landing"), 400, 2_000), 400);
        assert_eq!(chosen(Some("long"), 400, 2_000), 2_000);
        let wrong = std::panic::catch_unwind(|| chosen(Some("lnog"), 400, 2_000));
        assert!(wrong.is_err());
    }
}
