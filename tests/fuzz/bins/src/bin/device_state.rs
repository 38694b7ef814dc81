//! See `fuzz::targets::device_state`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::targets::device_state::TARGET.check(input));
