//! See `fuzz::targets::boot_image`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::targets::boot_image::TARGET.check(input));
