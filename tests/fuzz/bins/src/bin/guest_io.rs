//! See `fuzz::targets::guest_io`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::targets::guest_io::TARGET.check(input));
