//! A processor: entry, ports, time stamp counter, raw memory. With `virtio` all of the guest's `unsafe`.

use core::arch::{asm, global_asm, x86_64::_rdtsc};
use core::sync::atomic::{AtomicU64, Ordering, fence};

use crate::abi::VCPUS_MAX;

/// Of each processor.
const STACK_BYTES: usize = 16 << 10;

#[repr(align(4096))]
#[allow(dead_code)] // Only its address is used, by the entry code.
struct Stacks([[u8; STACK_BYTES]; VCPUS_MAX as usize]);

#[unsafe(no_mangle)]
static mut GUEST_STACKS: Stacks = Stacks([[0; STACK_BYTES]; VCPUS_MAX as usize]);

// The monitor starts every processor here with RDI = address of the parameter record, RSI = the processor's number and
// everything else undefined.
global_asm!(
    ".section .text._start, \"ax\"",
    ".globl _start",
    "_start:",
    "    cld",
    "    imul rax, rsi, {stack_bytes}",
    "    lea rsp, [rip + GUEST_STACKS + {stack_bytes}]",
    "    add rsp, rax",
    "    xor ebp, ebp",
    "    call {enter}",
    "    ud2",
    ".text",
    stack_bytes = const STACK_BYTES,
    enter = sym enter,
);

extern "C" fn enter(params_address: u64, vcpu: u64) -> ! {
    crate::run(params_address, vcpu)
}

/// The number of the processor that asks: that of the stack it is on.
pub fn number() -> u64 {
    let here = 0u8;
    (&raw const here as u64).wrapping_sub(&raw const GUEST_STACKS as u64) / STACK_BYTES as u64
}

/// Writes 32 bits to a port: the guest stops here until the monitor has done its part.
pub fn out32(port: u16, value: u32) {
    // SAFETY: the I/O privilege level is 3. No `nomem`: the monitor reads and writes memory meanwhile.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) }
}

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: the counter may be read at every privilege level (CR4.TSD is clear).
    unsafe { _rdtsc() }
}

/// Everything written before is in memory before anything that follows, for other processors too.
pub fn barrier() {
    fence(Ordering::SeqCst);
}

/// Copies words out of memory that the monitor may have written.
pub fn read_words(address: u64, words: &mut [u64]) {
    for (index, word) in words.iter_mut().enumerate() {
        *word = read(address + 8 * index as u64);
    }
}

/// Copies words into memory that the monitor reads.
pub fn write_words(address: u64, words: &[u64]) {
    for (index, word) in words.iter().enumerate() {
        write(address + 8 * index as u64, *word);
    }
}

/// Reads a value that others may change.
pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: every address comes from the parameter record or a static of this program; all are identity-mapped.
    unsafe { core::ptr::read_volatile(address as *const T) }
}

/// Writes a value that others may read.
pub fn write<T: Copy>(address: u64, value: T) {
    // SAFETY: as for `read`; nothing of this program's own lies in those places but the buffers made for it.
    unsafe { core::ptr::write_volatile(address as *mut T, value) }
}

/// Adds to a value that other processors add to; no addition is lost.
pub fn add(address: u64, value: u64) {
    shared(address).fetch_add(value, Ordering::SeqCst);
}

/// Makes a value that other processors take at least so large.
pub fn raise(address: u64, value: u64) {
    shared(address).fetch_max(value, Ordering::SeqCst);
}

/// Takes a value away and leaves zero.
pub fn take(address: u64) -> u64 {
    shared(address).swap(0, Ordering::SeqCst)
}

fn shared<'a>(address: u64) -> &'a AtomicU64 {
    // SAFETY: a word of a static of this program, aligned and there for ever; whoever else reaches it does so through
    // this function or volatile reads.
    unsafe { AtomicU64::from_ptr(address as *mut u64) }
}

/// The page at `address` as words, for as long as the caller looks at it.
pub fn page<'a>(address: u64) -> &'a mut [u64; crate::abi::PAGE_WORDS] {
    // Whoever else writes here (a device, a test) did so during an exit; nothing read before it may be kept.
    // SAFETY: an empty instruction that the compiler takes to change memory.
    unsafe { asm!("", options(nostack, preserves_flags)) };
    // SAFETY: a page of the working set or a disk buffer: identity-mapped, aligned, and used by one caller at a time.
    unsafe { &mut *(address as *mut [u64; crate::abi::PAGE_WORDS]) }
}

// The compiler calls these by name; there is no C library here.

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
    // SAFETY: the caller promises both ranges; the direction flag is clear since the entry.
    unsafe {
        asm!("rep movsb", inout("rcx") length => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack))
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= length {
        // SAFETY: the destination does not begin inside the source, so a forward copy is right.
        return unsafe { memcpy(to, from, length) };
    }
    // SAFETY: the caller promises both ranges; copied from the end, and the direction flag is cleared again.
    unsafe {
        asm!(
            "std", "rep movsb", "cld",
            inout("rcx") length => _,
            inout("rdi") to.wrapping_add(length).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(length).wrapping_sub(1) => _,
            options(nostack)
        )
    };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, length: usize) -> *mut u8 {
    // SAFETY: the caller promises the range; the direction flag is clear since the entry.
    unsafe { asm!("rep stosb", inout("rcx") length => _, inout("rdi") to => _, in("al") value as u8, options(nostack)) };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, length: usize) -> i32 {
    for index in 0..length {
        // SAFETY: the caller promises both ranges. Volatile, so that this loop is not turned into a call of itself.
        let a = unsafe { core::ptr::read_volatile(left.add(index)) };
        // SAFETY: as above.
        let b = unsafe { core::ptr::read_volatile(right.add(index)) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, length: usize) -> i32 {
    // SAFETY: the same promises.
    unsafe { memcmp(left, right, length) }
}
