//! See `fuzz::targets::disk_image`.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::targets::disk_image::TARGET.check(input));
