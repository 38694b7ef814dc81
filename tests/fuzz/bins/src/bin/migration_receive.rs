//! See `fuzz::targets::migration_receive`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::targets::migration_receive::TARGET.check(input));
