//! The block device's saved state: its transport; the disk is opened anew where the machine goes.

use super::Block;
use crate::devices::virtio::mmio::TransportState;
use crate::devices::{Migratable, StateError, decode_state, encode_state};

/// The version that is written.
pub const VERSION: u32 = 1;

/// Saves a quiesced device.
pub fn save(block: &Block) -> Result<Vec<u8>, StateError> {
    encode_state(&block.kind(), &block.transport.save()?)
}

/// Restores a device.
pub fn restore(block: &Block, version: u32, state: &[u8]) -> Result<(), StateError> {
    if version != VERSION {
        return Err(StateError::Version {
            kind: block.kind(),
            found: version,
            known: VERSION,
        });
    }
    let state: TransportState = decode_state(&block.kind(), state)?;
    block.transport.restore(&state)
}
