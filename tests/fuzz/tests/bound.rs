//! The bound on memory is one: a target that believes a length fails. A test of its own, since memory is counted
//! for the whole process.

use fuzz::target::{MemoryBound, Target};

/// Reserves as much as its input's first byte says, in MiB, and then finds that there is nothing.
fn believes_a_length(input: &[u8]) {
    let mib = usize::from(input.first().copied().unwrap_or(0));
    let mut buffer: Vec<u8> = Vec::with_capacity(mib << 20);
    buffer.extend(input);
    assert_eq!(buffer, input);
}

#[test]
fn an_input_that_makes_a_target_reserve_more_than_its_bound_is_a_find() {
    let target = Target {
        name: "believer",
        run: believes_a_length,
        seeds: Vec::new,
        input_bytes_max: 16,
        memory: MemoryBound {
            base: 4 << 20,
            each: 16,
        },
    };
    target.check(&[3]);
    let found = std::panic::catch_unwind(|| target.check(&[5]));
    let said = found.expect_err("5 MiB are more than 4");
    let said = said.downcast_ref::<String>().unwrap();
    assert!(said.contains("believer: an input of 1 bytes"), "{said}");
}
