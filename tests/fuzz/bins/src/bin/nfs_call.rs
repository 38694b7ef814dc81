//! See `fuzz::targets::nfs_call`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::targets::nfs_call::TARGET.check(input));
