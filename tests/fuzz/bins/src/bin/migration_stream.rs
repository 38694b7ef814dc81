//! See `fuzz::targets::migration_stream`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::targets::migration_stream::TARGET.check(input));
