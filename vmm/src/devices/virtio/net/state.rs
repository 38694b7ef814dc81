//! The network interface's saved state: its transport, its address, and the address that its guest claimed.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::Net;
use crate::devices::virtio::mmio::TransportState;
use crate::devices::{Migratable, StateError, decode_state, encode_state};

/// The version that is written.
pub const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    transport: TransportState,
    mac: String,
    ipv4: Option<Ipv4Addr>,
}

/// Saves a quiesced device.
pub fn save(net: &Net) -> Result<Vec<u8>, StateError> {
    let state = State {
        transport: net.transport.save()?,
        mac: net.port.mac.to_string(),
        ipv4: net.port.ipv4(),
    };
    encode_state(&net.kind(), &state)
}

/// Restores a device. Its own MAC address must be the one that the guest has read.
pub fn restore(net: &Net, version: u32, state: &[u8]) -> Result<(), StateError> {
    let kind = net.kind();
    if version != VERSION {
        return Err(StateError::Version {
            kind,
            found: version,
            known: VERSION,
        });
    }
    let state: State = decode_state(&kind, state)?;
    if state.mac != net.port.mac.to_string() {
        let reason = format!("its MAC address is {}, not {}", state.mac, net.port.mac);
        return Err(StateError::Invalid { kind, reason });
    }
    net.transport.restore(&state.transport)?;
    net.port.set_ipv4(state.ipv4);
    Ok(())
}
