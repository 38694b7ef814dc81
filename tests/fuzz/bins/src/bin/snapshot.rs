//! See `fuzz::targets::snapshot`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::targets::snapshot::TARGET.check(input));
