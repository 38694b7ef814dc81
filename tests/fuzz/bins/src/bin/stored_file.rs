//! See `fuzz::targets::stored_file`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::targets::stored_file::TARGET.check(input));
