//! Printing: tables for people, JSON for programs, sizes and times in words.

use std::io::{IsTerminal, Write};

use clap::ValueEnum;
use serde::Serialize;

use crate::client::CliError;

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table for people.
    Table,
    /// One JSON value.
    Json,
}

/// Prints a value as JSON on stdout.
///
/// # Errors
/// When stdout is closed.
pub fn json(value: &impl Serialize) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}

/// Prints one JSON value on one line, for streams.
///
/// # Errors
/// When stdout is closed.
pub fn json_line(value: &impl Serialize) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    writeln!(out)?;
    out.flush()?;
    Ok(())
}

/// Text on stdout.
///
/// # Errors
/// When stdout is closed.
pub fn text(line: impl std::fmt::Display) -> Result<(), CliError> {
    writeln!(std::io::stdout().lock(), "{line}")?;
    Ok(())
}

/// A table without lines: columns as wide as they need, for reading and for `awk`. On a terminal the last
/// column is folded into the room that the others leave.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> Result<(), CliError> {
    text(table_string(header, rows))
}

/// The same as text.
pub fn table_string(header: &[&str], rows: Vec<Vec<String>>) -> String {
    table_in(terminal_width(), header, rows)
}

/// What lies between columns.
const GAP: usize = 2;
/// A column narrower than that is not folded: it would read worse.
const FOLD_MIN: usize = 24;

fn table_in(width: Option<usize>, header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut cells: Vec<Vec<String>> = vec![header.iter().map(|&cell| cell.to_owned()).collect()];
    cells.extend(rows.into_iter().map(|row| {
        row.into_iter()
            .map(|cell| {
                if cell.is_empty() {
                    "-".to_owned()
                } else {
                    cell
                }
            })
            .collect()
    }));
    let columns = header.len();
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let lengths = cells.iter().filter_map(|row| row.get(column));
            lengths.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let before: usize = widths.iter().rev().skip(1).map(|width| width + GAP).sum();
    let last = width
        .map(|width| width.saturating_sub(before))
        .filter(|&room| room >= FOLD_MIN);
    let mut lines = Vec::new();
    for row in cells {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            if column + 1 < columns {
                let pad = widths[column] + GAP - cell.chars().count();
                line.push_str(cell);
                line.push_str(&" ".repeat(pad));
                continue;
            }
            let folded = last.map_or_else(|| vec![cell.clone()], |room| fold(cell, room));
            for (number, part) in folded.iter().enumerate() {
                if number > 0 {
                    lines.push(std::mem::take(&mut line));
                    line.push_str(&" ".repeat(before));
                }
                line.push_str(part);
            }
        }
        lines.push(line);
    }
    let trimmed: Vec<&str> = lines.iter().map(|line| line.trim_end()).collect();
    trimmed.join("\n")
}

/// A text in lines of `width` characters at most, broken between words; a longer word stays whole.
fn fold(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut length = 0;
    for word in text.split(' ') {
        let long = word.chars().count();
        if length > 0 && length + 1 + long > width {
            lines.push(String::new());
            length = 0;
        }
        if let Some(line) = lines.last_mut() {
            if length > 0 {
                line.push(' ');
                length += 1;
            }
            line.push_str(word);
            length += long;
        }
    }
    lines
}

/// A text that begins after `indent` characters of its line, folded on a terminal so that every further
/// line begins there too.
pub fn hanging(text: &str, indent: usize) -> String {
    match terminal_width() {
        Some(width) if width >= indent + FOLD_MIN => {
            fold(text, width - indent).join(&format!("\n{}", " ".repeat(indent)))
        }
        _ => text.to_owned(),
    }
}

/// Whether a person reads stdout.
pub fn on_a_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// How wide the terminal is that stdout goes to; `None` where it goes elsewhere.
fn terminal_width() -> Option<usize> {
    let (width, _) = terminal_size::terminal_size_of(std::io::stdout())?;
    Some(usize::from(width.0))
}

/// `1 machine`, `3 machines`.
pub fn counted(count: impl Into<u64>, noun: &str) -> String {
    let count = count.into();
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{plural}")
}

/// Waits for something that Ctrl-C may end; `goes_on` says what it is that goes on without us.
///
/// # Errors
/// Those of what is waited for; [`CliError::Interrupted`].
pub async fn unless_interrupted<T>(
    waiting: impl Future<Output = Result<T, CliError>>,
    goes_on: impl FnOnce() -> String,
) -> Result<T, CliError> {
    tokio::select! {
        biased;
        outcome = waiting => outcome,
        _ = tokio::signal::ctrl_c() => Err(CliError::Interrupted(goes_on())),
    }
}

/// Until somebody wants this program to end: Ctrl-C, SIGTERM, a closed terminal.
///
/// # Errors
/// When signals cannot be received.
pub async fn told_to_end() -> Result<(), CliError> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
        _ = hang_up.recv() => {}
    }
    Ok(())
}

/// Whether a person watches stderr.
pub fn interactive() -> bool {
    std::io::stderr().is_terminal()
}

/// A size with a binary unit.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 100.0 || value.fract() < 0.05 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A duration given in microseconds.
pub fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..100_000 => format!("{:.1} ms", us as f64 / 1e3),
        100_000..1_000_000 => format!("{:.0} ms", us as f64 / 1e3),
        _ => millis(us / 1_000),
    }
}

/// A duration given in milliseconds.
pub fn millis(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", ms as f64 / 1e3),
        _ => format!("{} min {:02} s", ms / 60_000, ms / 1_000 % 60),
    }
}

/// A wall-clock time (ms since the Unix epoch) as UTC, `2026-11-22T14:03:52Z`.
pub fn utc(at_ms: u64) -> String {
    let seconds = at_ms / 1_000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant's civil-from-days, for days after 1970-01-01.
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z - era * 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 {
        month_index + 3
    } else {
        month_index - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        rest / 3_600,
        rest / 60 % 60,
        rest % 60
    )
}

/// Asks on the terminal; no terminal and no `--yes` is a no.
///
/// # Errors
/// When there is nobody to ask.
pub fn confirm(yes: bool, question: &str) -> Result<bool, CliError> {
    if yes {
        return Ok(true);
    }
    if !std::io::stdin().is_terminal() {
        return Err(CliError::Local(format!(
            "{question} There is nobody to ask here; say --yes to do it."
        )));
    }
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(1 << 30), "1 GiB");
        assert_eq!(micros(12_345), "12.3 ms");
        assert_eq!(millis(61_500), "1 min 01 s");
    }

    #[test]
    fn the_last_column_is_folded_where_the_terminal_ends() {
        let rows = || {
            let why = "n1 has no room: it needs 900 of memory, 4 is free".to_owned();
            vec![vec!["web-1".to_owned(), String::new(), why]]
        };
        let header = ["VM", "TO", "WHY"];
        assert_eq!(
            table_in(Some(40), &header, rows()),
            "VM     TO  WHY\n\
             web-1  -   n1 has no room: it needs 900\n\
             \x20          of memory, 4 is free"
        );
        // Too narrow to fold, and no terminal at all: one line a row, for awk.
        for width in [None, Some(20)] {
            assert_eq!(table_in(width, &header, rows()).lines().count(), 2);
        }
    }

    #[test]
    fn one_is_not_plural() {
        assert_eq!(counted(1u32, "machine"), "1 machine");
        assert_eq!(counted(0u32, "machine"), "0 machines");
    }

    #[test]
    fn dates_are_right_over_leap_years() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_400_000), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_767_225_599_000), "2025-12-31T23:59:59Z");
    }
}
