//! A host's clocks, read here by its daemon and its monitors alike.
//!
//! `BATON_CLOCK=/path/file` shifts them, so that a test can make one host's clocks step while others' do not:
//! the file holds two little-endian signed 64-bit numbers, nanoseconds to add to boot time and to wall time,
//! and is read at every reading. Without the variable there is no file and nothing is shifted.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;

use nix::time::{ClockId, clock_gettime};

/// The variable that names the file.
pub const VARIABLE: &str = "BATON_CLOCK";

/// CLOCK_BOOTTIME, nanoseconds: goes on while the host sleeps. Lease deadlines are counted on it.
pub fn boottime_ns() -> u64 {
    read(ClockId::CLOCK_BOOTTIME).saturating_add_signed(shifts().0)
}

/// What the kernel's own CLOCK_BOOTTIME reads when [`boottime_ns`] reads `at_ns`: what a timer is set to. A later step
/// moves the moment and not the timer; see [`may_step`].
pub fn kernel_boottime_ns(at_ns: u64) -> u64 {
    unshifted(at_ns, shifts().0)
}

fn unshifted(at_ns: u64, shift_ns: i64) -> u64 {
    at_ns.saturating_add_signed(shift_ns.saturating_neg())
}

/// Whether a test shifts this process's clocks, so that they may step under a timer.
pub fn may_step() -> bool {
    file().is_some()
}

/// CLOCK_MONOTONIC, nanoseconds: durations of a migration are counted on it.
pub fn monotonic_ns() -> u64 {
    read(ClockId::CLOCK_MONOTONIC)
}

/// CLOCK_REALTIME, nanoseconds since the Unix epoch: for people, and for the guest's clock over a migration.
pub fn realtime_ns() -> u64 {
    read(ClockId::CLOCK_REALTIME).saturating_add_signed(shifts().1)
}

/// Writes what [`VARIABLE`]'s file says: nanoseconds to add to boot time and to wall time.
///
/// # Errors
/// When the file cannot be written.
pub fn write_shifts(path: &Path, boottime_ns: i64, realtime_ns: i64) -> std::io::Result<()> {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&boottime_ns.to_le_bytes());
    bytes[8..].copy_from_slice(&realtime_ns.to_le_bytes());
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?;
    file.write_all_at(&bytes, 0)
}

/// Opens [`VARIABLE`]'s file now, for a process that may not later on.
pub fn prepare() {
    shifts();
}

fn file() -> Option<&'static File> {
    static FILE: OnceLock<Option<File>> = OnceLock::new();
    let file = FILE.get_or_init(|| File::open(std::env::var_os(VARIABLE)?).ok());
    file.as_ref()
}

fn shifts() -> (i64, i64) {
    file().map_or((0, 0), shifts_in)
}

fn shifts_in(file: &File) -> (i64, i64) {
    let mut bytes = [0; 16];
    if file.read_exact_at(&mut bytes, 0).is_err() {
        return (0, 0);
    }
    let [a, b, c, d, e, f, g, h, wall @ ..] = bytes;
    (
        i64::from_le_bytes([a, b, c, d, e, f, g, h]),
        i64::from_le_bytes(wall),
    )
}

fn read(clock: ClockId) -> u64 {
    // These clocks exist on every Linux; a zero makes a lease lapse, the safe side.
    clock_gettime(clock).map_or(0, |time| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        seconds * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shifts_are_read_as_they_were_written_and_change_while_the_file_is_open() {
        let path = std::env::temp_dir().join(format!("baton-clock-{}", std::process::id()));
        write_shifts(&path, 5, -7).unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(shifts_in(&file), (5, -7));
        write_shifts(&path, i64::MAX, i64::MIN).unwrap();
        assert_eq!(shifts_in(&file), (i64::MAX, i64::MIN));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_timer_is_set_to_when_the_shifted_clock_reads_that_time() {
        // The kernel's clock reads 100 and ours 130: at 150 of ours it is 120 of the kernel's.
        assert_eq!(unshifted(150, 30), 120);
        assert_eq!(unshifted(150, -30), 180);
        assert_eq!(unshifted(20, 30), 0, "it has passed");
    }

    #[test]
    fn nothing_is_shifted_where_nobody_asks() {
        assert_eq!(shifts(), (0, 0));
        assert!(!may_step());
        assert_eq!(kernel_boottime_ns(5), 5);
    }
}
