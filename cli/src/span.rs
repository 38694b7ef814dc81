//! Spans of time as people write them: 30s, 10m, 2h, 7d.

/// Milliseconds of a span.
///
/// # Errors
/// Says what would be right.
pub fn millis(text: &str) -> Result<u64, String> {
    let hint = || format!("`{text}` is not a time span; write 30s, 10m, 2h or 7d");
    let unit = text.chars().last().ok_or_else(hint)?;
    let number: u64 = text[..text.len() - unit.len_utf8()]
        .parse()
        .map_err(|_| hint())?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(hint()),
    };
    number.checked_mul(seconds * 1_000).ok_or_else(hint)
}

/// Seconds of a span that something is good for, at least one.
///
/// # Errors
/// Says what would be right.
pub fn life_s(text: &str) -> Result<u64, String> {
    match millis(text)? {
        0 => Err(format!("`{text}` is over at once; write 30m, 1h or 7d")),
        ms => Ok(ms / 1_000),
    }
}

/// The wall clock, ms since the Unix epoch.
pub fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_spans_need_a_unit() {
        assert_eq!(millis("10m"), Ok(600_000));
        for bad in ["", "10", "m", "-1s", "1y", "1µ", "99999999999999999d"] {
            assert!(millis(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_life_has_a_length() {
        assert_eq!(life_s("30m"), Ok(1_800));
        assert_eq!(life_s("1h"), Ok(3_600));
        assert_eq!(life_s("7d"), Ok(604_800));
        assert!(life_s("0h").is_err());
    }
}
