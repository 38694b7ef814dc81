//! One thing that is fuzzed: what it does with an input, what it begins with, what it may cost.

use crate::memory::peak_of;

/// A function that takes any bytes, and what is known of it.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name: of its module, its program and its corpus.
    pub name: &'static str,
    /// Takes an input. It returns, whatever the input is; a panic is a find.
    pub run: fn(&[u8]),
    /// Real values in the form that the target takes, to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// The longest input tried, bytes.
    pub input_bytes_max: usize,
    /// What it may hold in memory at once.
    pub memory: MemoryBound,
}

/// How much memory an input may make the code hold at once: so much for any, and so much for each of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryBound {
    /// Bytes for any input.
    pub base: usize,
    /// Bytes for each byte of the input.
    pub each: usize,
}

impl MemoryBound {
    /// Bytes for an input of this length.
    pub fn of(self, input_bytes: usize) -> usize {
        self.base + self.each * input_bytes
    }
}

impl Target {
    /// Runs one input and compares what it cost with the bound.
    ///
    /// # Panics
    /// When the input is a find.
    pub fn check(&self, input: &[u8]) {
        let bound = self.memory.of(input.len());
        let peak = peak_of(|| (self.run)(input));
        assert!(
            peak <= bound,
            "{}: an input of {} bytes made it hold {peak} bytes at once, more than {bound}",
            self.name,
            input.len(),
        );
    }
}
