//! KVM's structures as bytes, for the state that travels: plain data, checked for its length.

use std::mem::size_of;

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

/// A structure of the kernel's ABI: integers and arrays of them, where any bytes are a value.
///
/// # Safety
/// The type is `repr(C)` without implicit padding, holds no pointer and no type with invalid bit patterns.
pub unsafe trait Pod: Sized {}

macro_rules! pods {
    ($($name:ty),* $(,)?) => {$(
        // SAFETY: bindgen's `repr(C)` structure of integers and (unions of) integer arrays.
        unsafe impl Pod for $name {}
    )*};
}

pods!(
    kvm_clock_data,
    kvm_debugregs,
    kvm_irqchip,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_pit_state2,
    kvm_regs,
    kvm_sregs,
    kvm_vcpu_events,
    kvm_xcrs,
    kvm_xsave,
);

/// The value's bytes, in the host's (little-endian) order.
pub fn to_bytes<T: Pod>(value: &T) -> Vec<u8> {
    // SAFETY: the range is the value itself; `Pod` types have no implicit padding (the kernel's ABI
    // names its padding), so that every byte is initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }
        .to_vec()
}

/// The value that [`to_bytes`] made these bytes of; `None` when the length is another.
pub fn from_bytes<T: Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() != size_of::<T>() {
        return None;
    }
    // SAFETY: `bytes` has exactly the type's size, and any bytes are a value of a `Pod` type;
    // `read_unaligned` asks for no alignment.
    Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast::<T>()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_make_the_round_trip_and_a_wrong_length_is_refused() {
        let regs = kvm_regs {
            rip: 0x1234,
            rflags: 2,
            ..Default::default()
        };
        let bytes = to_bytes(&regs);
        assert_eq!(from_bytes::<kvm_regs>(&bytes), Some(regs));
        assert_eq!(from_bytes::<kvm_regs>(&bytes[1..]), None);
    }
}
