//! See `fuzz::targets::vm_spec`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::targets::vm_spec::TARGET.check(input));
