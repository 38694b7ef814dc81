//! See `fuzz::targets::nfs_reply`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::targets::nfs_reply::TARGET.check(input));
