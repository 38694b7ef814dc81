//! The parts of the guest that both sides compute, and the parameters it is given.

use super::abi::{
    BlockContents, BootParams, PAGE_WORDS, PageOrder, block_slot, make_block, mix, number_in_slot,
    page_base, page_generation, part_of, read_block, unmix,
};
use super::*;

#[test]
fn every_page_is_written_once_a_round_and_its_generation_follows_from_the_count() {
    for pages in [1, 2, 3, 7, 64, 255, 256, 1000] {
        let order = PageOrder::new(pages);
        let mut generations = vec![0; pages as usize];
        for written in 0..3 * pages + 1 {
            for page in 0..pages {
                assert_eq!(
                    order.generation(page, written),
                    generations[page as usize],
                    "{pages} {written} {page}"
                );
            }
            generations[order.page_of(written) as usize] += 1;
        }
        assert!(
            generations
                .iter()
                .all(|generation| (3..=4).contains(generation))
        );
    }
}

#[test]
fn the_vcpus_parts_are_everything_once_and_alike() {
    for (whole, vcpus) in [(256, 1), (256, 3), (256, 32), (1000, 7), (7, 4), (2, 4)] {
        let mut next = 0;
        for vcpu in 0..vcpus {
            let (start, count) = part_of(whole, vcpus, vcpu);
            assert_eq!(start, next, "{whole} {vcpus} {vcpu}");
            assert!(count == whole / vcpus || count == whole.div_ceil(vcpus));
            next = start + count;
        }
        assert_eq!(next, whole);
    }
}

#[test]
fn a_pattern_tells_its_generation() {
    for value in [0, 1, 0x1234_5678_9abc_def0, u64::MAX] {
        assert_eq!(unmix(mix(value)), value);
    }
    assert_eq!(page_generation(7, 99, page_base(7, 99, 12)), 12);
    assert_ne!(page_base(7, 99, 12), page_base(7, 98, 12));
    assert_ne!(page_base(7, 99, 12), page_base(8, 99, 12));
}

#[test]
fn a_slot_holds_the_highest_number_that_belongs_there() {
    for blocks in [1, 5, 16] {
        let mut slots = vec![0; blocks as usize];
        for written in 1..4 * blocks {
            slots[block_slot(written, blocks) as usize] = written;
            for slot in 0..blocks {
                assert_eq!(number_in_slot(slot, written, blocks), slots[slot as usize]);
            }
        }
    }
}

#[test]
fn a_block_with_any_bit_changed_is_damaged() {
    let mut block = [0; PAGE_WORDS];
    assert_eq!(read_block(&block, 3), BlockContents::Empty);
    make_block(&mut block, 3, 40, 2, 36);
    assert_eq!(
        read_block(&block, 3),
        BlockContents::Whole {
            number: 40,
            life: 2,
            flushed: 36
        }
    );
    assert_eq!(read_block(&block, 4), BlockContents::Damaged(40));
    for word in 0..PAGE_WORDS {
        block[word] ^= 1 << (word % 64);
        assert!(
            matches!(read_block(&block, 3), BlockContents::Damaged(_)),
            "word {word}"
        );
        block[word] ^= 1 << (word % 64);
    }
}

#[test]
fn a_record_survives_the_way_and_a_damaged_one_does_not() {
    let params = boot_params(9, 64, 1, 32, 100, None, 2_000_000).unwrap();
    let mut words = params.to_words();
    assert_eq!(BootParams::from_words(&words), Some(params));
    for word in 0..words.len() {
        words[word] ^= 4;
        assert_eq!(BootParams::from_words(&words), None);
        words[word] ^= 4;
    }
}

#[test]
fn a_large_working_set_goes_on_above_the_devices() {
    let params = boot_params(1, 8192, 1, 8188, 0, None, 1).unwrap();
    assert_eq!(
        params.range0_start + params.range0_pages * PAGE_BYTES,
        LOW_RAM_END
    );
    assert_eq!(
        (params.range0_pages + params.range1_pages) * PAGE_BYTES,
        8188 << 20
    );
    assert_eq!(
        params.range1_start + params.range1_pages * PAGE_BYTES,
        working_set_end(8188)
    );
    let small = boot_params(1, 16, 1, 12, 0, None, 1).unwrap();
    assert_eq!((small.range0_pages, small.range1_pages), (12 << 8, 0));
    assert_eq!(working_set_end(12), 16 << 20);
}

#[test]
fn parameters_that_cannot_work_are_refused_with_what_would() {
    let disk = |bytes| {
        Some(GuestDisk {
            mmio_address: 0xd000_0000,
            bytes,
        })
    };
    assert_eq!(
        boot_params(1, 64, 1, 0, 0, None, 1),
        Err(GuestParamsError::NoWorkingSet)
    );
    assert_eq!(
        boot_params(1, 64, 1, 61, 0, None, 1),
        Err(GuestParamsError::WorkingSetTooLarge {
            working_set_mib: 61,
            memory_mib: 64,
            most_mib: 60
        })
    );
    assert_eq!(
        boot_params(1, 64, 1, 8, 0, disk(4096), 1),
        Err(GuestParamsError::DiskTooSmall { bytes: 4096 })
    );
    assert_eq!(
        boot_params(1, 64, 1, 8, 0, None, 0),
        Err(GuestParamsError::NoTscFrequency)
    );
    for vcpus in [0, VCPUS_MAX as u32 + 1] {
        assert_eq!(
            boot_params(1, 64, vcpus, 8, 0, None, 1),
            Err(GuestParamsError::TooManyVcpus { vcpus })
        );
    }
    assert!(boot_params(1, 64, 1, 8, 0, disk(DISK_BYTES_MIN), 1).is_ok());
}
