//! The serial console's two ends: the last 64 KiB that the guest wrote, and what was typed for it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use tokio::sync::watch;

/// Output kept for those who look later, in bytes.
pub const CONSOLE_RING_BYTES: usize = 64 << 10;

/// Input typed and not yet read by the guest, in bytes; more is dropped, as on a real line.
pub const CONSOLE_INPUT_BYTES_MAX: usize = 4096;

/// The console of one machine. The serial device writes and reads one end, the control service the other.
#[derive(Debug)]
pub struct Console {
    ring: Mutex<Ring>,
    written: watch::Sender<u64>,
    input: Mutex<VecDeque<u8>>,
    typed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// How many bytes the guest has written in all.
    end: u64,
}

impl Default for Console {
    fn default() -> Self {
        Console {
            ring: Mutex::default(),
            written: watch::Sender::new(0),
            input: Mutex::default(),
            typed: watch::Sender::new(0),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Console {
    /// Appends what the guest wrote; the oldest bytes make room.
    pub fn write_output(&self, data: &[u8]) {
        let mut ring = lock(&self.ring);
        ring.bytes.extend(data);
        let excess = ring.bytes.len().saturating_sub(CONSOLE_RING_BYTES);
        ring.bytes.drain(..excess);
        ring.end += data.len() as u64;
        self.written.send_replace(ring.end);
    }

    /// What the guest wrote from position `from` on, as far as it is still kept, and the position after it.
    pub fn output_from(&self, from: u64) -> (Vec<u8>, u64) {
        let ring = lock(&self.ring);
        let start = ring.end - ring.bytes.len() as u64;
        let skip = from.max(start).min(ring.end) - start;
        (
            ring.bytes.iter().skip(skip as usize).copied().collect(),
            ring.end,
        )
    }

    /// Tells of output: the position after the last byte written.
    pub fn watch_output(&self) -> watch::Receiver<u64> {
        self.written.subscribe()
    }

    /// Types `data`; answers how many bytes found room.
    pub fn type_input(&self, data: &[u8]) -> usize {
        let mut input = lock(&self.input);
        let room = CONSOLE_INPUT_BYTES_MAX - input.len();
        let taken = data.len().min(room);
        input.extend(&data[..taken]);
        drop(input);
        self.typed.send_modify(|count| *count += taken as u64);
        taken
    }

    /// Takes up to `max` typed bytes, for the serial device's receive buffer.
    pub fn take_input(&self, max: usize) -> Vec<u8> {
        let mut input = lock(&self.input);
        let taken = max.min(input.len());
        input.drain(..taken).collect()
    }

    /// Tells of input: changes whenever something was typed.
    pub fn watch_input(&self) -> watch::Receiver<u64> {
        self.typed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last_bytes_and_counts_all() {
        let console = Console::default();
        console.write_output(&vec![b'a'; CONSOLE_RING_BYTES]);
        console.write_output(b"end");
        let (kept, end) = console.output_from(0);
        assert_eq!(kept.len(), CONSOLE_RING_BYTES);
        assert!(kept.ends_with(b"aend"));
        assert_eq!(end, CONSOLE_RING_BYTES as u64 + 3);
        assert_eq!(console.output_from(end - 2), (b"nd".to_vec(), end));
        assert_eq!(console.output_from(end + 9), (Vec::new(), end));
    }

    #[test]
    fn input_beyond_the_bound_is_dropped() {
        let console = Console::default();
        assert_eq!(
            console.type_input(&vec![b'x'; CONSOLE_INPUT_BYTES_MAX + 5]),
            CONSOLE_INPUT_BYTES_MAX
        );
        assert_eq!(
            console.take_input(usize::MAX).len(),
            CONSOLE_INPUT_BYTES_MAX
        );
        assert_eq!(console.type_input(b"y"), 1);
    }
}
