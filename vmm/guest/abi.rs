//! What the self-checking guest and its monitor agree on: ports, boot parameters, the report.
//!
//! This one file is compiled into both. It uses nothing but `core`, holds no `unsafe`, and every record is a run of
//! little-endian 64-bit words whose last word is a checksum of the words before it, so that neither side ever acts on
//! a half-written or stale record.

/// Write, 32 bits: a command, one of the `COMMAND_…` values.
pub const PORT_COMMAND: u16 = 0x510;
/// Write, 32 bits: microseconds for which the guest has nothing to do. The exit lasts at most that long.
pub const PORT_WAIT: u16 = 0x514;
/// Write, 32 bits: the machine should end; 0: all is well, else a code that says how it failed. For programs in other
/// guests; the self-checking guest runs for ever.
pub const PORT_EXIT: u16 = 0x518;
/// How many ports the device takes from [`PORT_COMMAND`] on.
pub const PORT_COUNT: u16 = 16;

/// The report record in memory is complete and should be taken now.
pub const COMMAND_REPORT: u32 = 1;
/// The guest cannot go on (it says why in its report); the monitor should take the machine as failed.
pub const COMMAND_GIVE_UP: u32 = 2;

/// The longest wait that a guest asks for, µs. Bounds how long a monitor blocks in one exit.
pub const WAIT_US_MAX: u32 = 100_000;

/// Where the guest's program is linked and loaded.
pub const LOAD_ADDRESS: u64 = 0x10_0000;
/// The working set begins here at the earliest: program, rings, buffers and page tables lie below.
pub const WORKING_SET_START: u64 = 0x40_0000;
/// Bytes in a page of the working set and in a block of the disk.
pub const PAGE_BYTES: u64 = 4096;
/// 64-bit words in a page or block.
pub const PAGE_WORDS: usize = 512;
/// Blocks of the disk that the guest uses at most: it scans them all when it boots.
pub const DISK_BLOCKS_MAX: u64 = 16_384;
/// Virtual processors that the guest runs on at most: it has this many stacks.
pub const VCPUS_MAX: u64 = 32;
/// Blocks that the guest writes between two flushes at most: it has this many buffers.
pub const BLOCKS_PER_FLUSH_MAX: u64 = 16;

/// The dirty rate that stands for "as fast as it can".
pub const DIRTY_UNLIMITED: u64 = u32::MAX as u64;

/// The report's flag: the disk was scanned and `found_at_boot` is valid.
pub const FLAG_SCANNED: u64 = 1;
/// The report's flag: every page of the working set has been written once.
pub const FLAG_FILLED: u64 = 2;
/// The report's flag: the machine has no disk for the guest.
pub const FLAG_NO_DISK: u64 = 4;

/// Declares a record of 64-bit words: its struct, `to_words` and a checked `from_words`.
macro_rules! record {
    ($(#[$meta:meta])* $name:ident, $words:ident, $magic:expr, { $($(#[$field_meta:meta])* $field:ident,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name { $($(#[$field_meta])* pub $field: u64,)* }

        /// Words of the record: magic, fields, checksum.
        pub const $words: usize = 2 $(+ { let _ = stringify!($field); 1 })*;

        impl $name {
            /// The record as words, sealed with its magic and checksum.
            pub fn to_words(&self) -> [u64; $words] {
                let mut words = [0; $words];
                words[0] = $magic;
                let mut at = 1;
                $(words[at] = self.$field; at += 1;)*
                words[at] = checksum(&words[..at]);
                words
            }

            /// The record in `words`, or nothing where magic or checksum is wrong.
            pub fn from_words(words: &[u64; $words]) -> Option<Self> {
                let last = $words - 1;
                if words[0] != $magic || words[last] != checksum(&words[..last]) {
                    return None;
                }
                let mut at = 0;
                Some(Self { $($field: { at += 1; words[at] },)* })
            }
        }
    };
}

record! {
    /// What the monitor tells the guest: one record at the address that RDI holds when the guest starts.
    BootParams, BOOT_PARAMS_WORDS, 0x3150_4e4f_5441_4231, {
        /// The machine; part of every pattern, so that another machine's page or block is recognised.
        vm_id,
        /// First range of the working set: physical address, a whole page.
        range0_start,
        /// First range of the working set: pages.
        range0_pages,
        /// Second range (memory above the hole for devices): physical address.
        range1_start,
        /// Second range: pages; 0 where there is none.
        range1_pages,
        /// MiB/s of the working set to dirty; 0: it only checks; [`DIRTY_UNLIMITED`]: as fast as it can.
        dirty_mib_s,
        /// Physical address of the virtio-mmio block device's registers; 0: no disk.
        disk_mmio,
        /// Blocks of [`PAGE_BYTES`] on the disk that the guest may use.
        disk_blocks,
        /// µs from one flush to the next.
        flush_interval_us,
        /// Blocks written before each flush; 1 to [`BLOCKS_PER_FLUSH_MAX`].
        blocks_per_flush,
        /// Frequency of the time stamp counter, kHz.
        tsc_khz,
        /// µs from one step to the next.
        step_us,
        /// Physical address at which the guest keeps its report record.
        report_address,
        /// Virtual processors, 1 to [`VCPUS_MAX`]. Each begins at the guest's entry, its number in RSI.
        vcpus,
    }
}

record! {
    /// What the guest tells the monitor, each time it writes [`COMMAND_REPORT`]: of all its processors together.
    Report, REPORT_WORDS, 0x3152_4e4f_5441_4231, {
        /// Counts the reports of this boot, from 1.
        number,
        /// `FLAG_…` bits.
        flags,
        /// Paced steps since the working set was full: of the processor that has made the fewest.
        steps,
        /// Pages written since boot; with the page count it gives the generation of every page.
        pages_written,
        /// Whole pages compared with what they should hold.
        memory_checks,
        /// Whole blocks read back and compared.
        disk_checks,
        /// Highest block number whose write the guest knows to be flushed.
        flushed,
        /// The highest number such that it and every number before it were found on the disk at boot.
        found_at_boot,
        /// The highest valid number found on the disk at boot, with or without a hole before it.
        highest_at_boot,
        /// How many times a guest has booted from this disk, this boot included.
        life,
        /// Failed checks since boot.
        errors,
        /// The first failed check for ever: an [`ErrorCode`] as number; 0: none.
        error_code,
        /// Where it failed: a page of the working set, a block of the disk, or as the code says.
        error_where,
        /// What should have been there.
        error_expected,
        /// What was there.
        error_found,
        /// The guest's monotonic clock, ns since boot.
        clock_ns,
        /// The longest time between two looks of a processor at the clock since the report before, ns.
        gap_ns,
        /// The same since boot, ns.
        gap_ever_ns,
    }
}

/// What can be wrong; the number stands in [`Report::error_code`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum ErrorCode {
    /// A page's contents match no generation. Where: the page; expected and found: its first differing word.
    PageDamaged = 1,
    /// A page holds a whole but wrong generation. Expected and found: generations.
    PageStale = 2,
    /// The two records of how much a processor has written differ. Where: the processor; expected and found: the two
    /// counts.
    CounterStale = 3,
    /// The clock went back, or is behind what another processor has read before. Where: the processor; expected: no
    /// less than this; found: this (ns).
    ClockWentBack = 4,
    /// The disk answered a request with an error. Where: the block; found: the virtio status.
    DiskRequestFailed = 5,
    /// A block does not match its checksum, or is another machine's. Expected: its number; found: its number field.
    BlockDamaged = 6,
    /// A block holds another number than the one last written there. Expected and found: block numbers.
    BlockStale = 7,
    /// At boot: a block that later blocks say was flushed is not there. Expected and found: block numbers.
    BlockLost = 8,
    /// The device is not what the parameters promise. Found: the offending register or value.
    DiskUnusable = 9,
    /// The parameter record is damaged.
    BadParams = 10,
    /// The guest's own program failed.
    Panic = 11,
    /// The count that all processors keep together is not the sum of their own. Expected: the sum; found: the count.
    SharedCountStale = 12,
}

impl ErrorCode {
    /// Every code.
    pub const ALL: [Self; 12] = [
        Self::PageDamaged,
        Self::PageStale,
        Self::CounterStale,
        Self::ClockWentBack,
        Self::DiskRequestFailed,
        Self::BlockDamaged,
        Self::BlockStale,
        Self::BlockLost,
        Self::DiskUnusable,
        Self::BadParams,
        Self::Panic,
        Self::SharedCountStale,
    ];

    /// The code with this number.
    pub fn from_number(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|code| *code as u64 == number)
    }
}

/// The step between two words of a pattern: odd, and without short runs of equal bits, so that patterns do not compress.
pub const PATTERN_STEP: u64 = 0x9e37_79b9_7f4a_7c15;

const MIX_A: u64 = 0xff51_afd7_ed55_8ccd;
const MIX_B: u64 = 0xc4ce_b9fe_1a85_ec53;

/// A one-to-one scramble of 64 bits (the finaliser of MurmurHash3).
pub const fn mix(value: u64) -> u64 {
    let mut mixed = value;
    mixed ^= mixed >> 33;
    mixed = mixed.wrapping_mul(MIX_A);
    mixed ^= mixed >> 33;
    mixed = mixed.wrapping_mul(MIX_B);
    mixed ^ (mixed >> 33)
}

/// The inverse of [`mix`].
pub const fn unmix(mixed: u64) -> u64 {
    let mut value = mixed;
    value ^= value >> 33;
    value = value.wrapping_mul(odd_inverse(MIX_B));
    value ^= value >> 33;
    value = value.wrapping_mul(odd_inverse(MIX_A));
    value ^ (value >> 33)
}

/// The number that times `odd` gives 1 modulo 2^64, by Newton's iteration (each round doubles the good bits).
const fn odd_inverse(odd: u64) -> u64 {
    let mut inverse = odd;
    let mut round = 0;
    while round < 6 {
        inverse = inverse.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(inverse)));
        round += 1;
    }
    inverse
}

/// A checksum of words that sees every bit and the order.
pub fn checksum(words: &[u64]) -> u64 {
    let mut sum = 0x6a09_e667_f3bc_c908u64;
    for word in words {
        sum = (sum.rotate_left(23) ^ word).wrapping_mul(PATTERN_STEP);
    }
    mix(sum)
}

/// The first word of the pattern of `page` of machine `vm_id` in `generation` (1 and up; generation 0 is all zeroes).
/// Word `i` is the first word plus `i` times [`PATTERN_STEP`].
pub const fn page_base(vm_id: u64, page: u64, generation: u64) -> u64 {
    mix(page_seed(vm_id, page).wrapping_add(generation))
}

/// The generation that a first word belongs to; a nonsense number where it is no pattern of this page.
pub const fn page_generation(vm_id: u64, page: u64, base: u64) -> u64 {
    unmix(base).wrapping_sub(page_seed(vm_id, page))
}

const fn page_seed(vm_id: u64, page: u64) -> u64 {
    mix(mix(vm_id).wrapping_add(page))
}

/// The order in which the pages are written, the same in every round: scattered, yet computable both ways, so that
/// the one count of pages written gives the generation of every page, from outside that page.
#[derive(Clone, Copy, Debug)]
pub struct PageOrder {
    pages: u64,
    stride: u64,
    inverse: u64,
}

impl PageOrder {
    /// The order for so many pages (1 to 2^31).
    pub fn new(pages: u64) -> Self {
        let pages = pages.clamp(1, 1 << 31);
        // Near the golden section of the page count, the order has no locality that a copier could profit from.
        let mut stride = (pages as u128 * 618_034 / 1_000_000) as u64 | 1;
        while greatest_common_divisor(stride, pages) != 1 {
            stride += 1;
        }
        let stride = stride % pages.max(2);
        Self {
            pages,
            stride,
            inverse: modular_inverse(stride, pages),
        }
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The page that write number `written` (from 0) goes to.
    pub fn page_of(&self, written: u64) -> u64 {
        (written % self.pages) * self.stride % self.pages
    }

    /// The generation of `page` after `written` writes: how often it has been written.
    pub fn generation(&self, page: u64, written: u64) -> u64 {
        let position = page % self.pages * self.inverse % self.pages;
        written / self.pages + u64::from(position < written % self.pages)
    }
}

/// The part of `whole` that processor `vcpu` of `vcpus` has: where it begins and how much it is. The parts differ by one
/// at most, and together they are the whole.
pub const fn part_of(whole: u64, vcpus: u64, vcpu: u64) -> (u64, u64) {
    let start = whole * vcpu / vcpus;
    (start, whole * (vcpu + 1) / vcpus - start)
}

fn greatest_common_divisor(mut left: u64, mut right: u64) -> u64 {
    while right != 0 {
        (left, right) = (right, left % right);
    }
    left
}

/// The inverse of `value` modulo `modulus` (both under 2^32, coprime), by the extended Euclidean algorithm.
fn modular_inverse(value: u64, modulus: u64) -> u64 {
    let (mut remainder, mut next_remainder) = (modulus as i64, value as i64 % modulus as i64);
    let (mut factor, mut next_factor) = (0i64, 1i64);
    while next_remainder != 0 {
        let quotient = remainder / next_remainder;
        (remainder, next_remainder) = (next_remainder, remainder - quotient * next_remainder);
        (factor, next_factor) = (next_factor, factor - quotient * next_factor);
    }
    factor.rem_euclid(modulus as i64) as u64
}

/// The words of a disk block, in order; the rest is a pattern and the last is the checksum.
pub const BLOCK_MAGIC: u64 = 0x3144_4e4f_5441_4231;
/// Index of the word that holds the machine.
pub const BLOCK_VM: usize = 1;
/// Index of the word that holds the block's number.
pub const BLOCK_NUMBER: usize = 2;
/// Index of the word that holds the life of the guest that wrote it.
pub const BLOCK_LIFE: usize = 3;
/// Index of the word that holds the highest flushed number that the writer knew.
pub const BLOCK_FLUSHED: usize = 4;
const BLOCK_PATTERN: usize = 5;

/// Fills `words` with block `number`.
pub fn make_block(words: &mut [u64; PAGE_WORDS], vm_id: u64, number: u64, life: u64, flushed: u64) {
    words[0] = BLOCK_MAGIC;
    words[BLOCK_VM] = vm_id;
    words[BLOCK_NUMBER] = number;
    words[BLOCK_LIFE] = life;
    words[BLOCK_FLUSHED] = flushed;
    let mut value = mix(page_base(vm_id, number, life));
    for word in &mut words[BLOCK_PATTERN..PAGE_WORDS - 1] {
        *word = value;
        value = value.wrapping_add(PATTERN_STEP);
    }
    words[PAGE_WORDS - 1] = checksum(&words[..PAGE_WORDS - 1]);
}

/// What stands in a block of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockContents {
    /// Nothing but zeroes: never written.
    Empty,
    /// Neither empty nor whole; the number that its number field shows.
    Damaged(u64),
    /// A whole block of this machine.
    Whole {
        /// Its number.
        number: u64,
        /// The life of the guest that wrote it.
        life: u64,
        /// The highest flushed number that the writer knew.
        flushed: u64,
    },
}

/// Reads a block.
pub fn read_block(words: &[u64; PAGE_WORDS], vm_id: u64) -> BlockContents {
    if words.iter().all(|word| *word == 0) {
        return BlockContents::Empty;
    }
    let (number, life) = (words[BLOCK_NUMBER], words[BLOCK_LIFE]);
    let whole = words[0] == BLOCK_MAGIC
        && words[BLOCK_VM] == vm_id
        && number != 0
        && words[PAGE_WORDS - 1] == checksum(&words[..PAGE_WORDS - 1]);
    if !whole {
        return BlockContents::Damaged(number);
    }
    BlockContents::Whole {
        number,
        life,
        flushed: words[BLOCK_FLUSHED],
    }
}

/// The place of block `number` (1 and up) on a disk of `blocks` blocks: a ring.
pub const fn block_slot(number: u64, blocks: u64) -> u64 {
    (number - 1) % blocks
}

/// The number last written to `slot` when the numbers up to `written` are on the disk; 0: never written.
pub const fn number_in_slot(slot: u64, written: u64, blocks: u64) -> u64 {
    if written <= slot {
        return 0;
    }
    let laps = (written - slot - 1) / blocks;
    slot + 1 + laps * blocks
}
