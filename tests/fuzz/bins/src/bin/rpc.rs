//! See `fuzz::targets::rpc`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::targets::rpc::TARGET.check(input));
