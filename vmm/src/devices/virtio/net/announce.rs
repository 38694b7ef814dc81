//! Frames that tell a network where a machine is now: RARP (RFC 903) and gratuitous ARP (RFC 5227), each padded to
//! the 60 bytes of the smallest Ethernet frame.
//!
//! Sent into the tap, they look as if the guest had sent them, so every bridge on the way learns the new place of its
//! MAC address at once. A RARP needs no IP address; the ARP also refreshes the caches of the guest's peers.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// Destination, source, type.
pub const ETHERNET_HEADER_BYTES: usize = 14;

/// The smallest Ethernet frame, without its checksum.
pub const FRAME_BYTES: usize = 60;

const TYPE_ARP: u16 = 0x0806;
const TYPE_RARP: u16 = 0x8035;
const ARP_REQUEST: u16 = 1;
const RARP_REQUEST: u16 = 3;
const BROADCAST: [u8; 6] = [0xff; 6];

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

/// Not a MAC address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no MAC address of one interface; write it as 52:54:00:12:34:56")]
pub struct BadMacAddress(pub String);

impl FromStr for MacAddress {
    type Err = BadMacAddress;

    fn from_str(text: &str) -> Result<Self, BadMacAddress> {
        let bad = || BadMacAddress(text.into());
        let mut address = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut address {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        // The lowest bit of the first byte marks a group, and no interface is all zeroes.
        if parts.next().is_some() || address[0] & 1 != 0 || address == [0; 6] {
            return Err(bad());
        }
        Ok(Self(address))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// "I am `mac`; who knows my address?" Nobody answers, every bridge learns.
pub fn rarp(mac: MacAddress) -> [u8; FRAME_BYTES] {
    frame(TYPE_RARP, RARP_REQUEST, mac, Ipv4Addr::UNSPECIFIED, mac.0)
}

/// "`address` is at `mac`."
pub fn gratuitous_arp(mac: MacAddress, address: Ipv4Addr) -> [u8; FRAME_BYTES] {
    frame(TYPE_ARP, ARP_REQUEST, mac, address, [0; 6])
}

fn frame(
    kind: u16,
    operation: u16,
    mac: MacAddress,
    address: Ipv4Addr,
    target: [u8; 6],
) -> [u8; FRAME_BYTES] {
    let mut bytes = Vec::with_capacity(FRAME_BYTES);
    bytes.extend(BROADCAST);
    bytes.extend(mac.0);
    bytes.extend(kind.to_be_bytes());
    // Ethernet and IPv4, addresses of 6 and 4 bytes.
    bytes.extend([0, 1, 8, 0, 6, 4]);
    bytes.extend(operation.to_be_bytes());
    bytes.extend(mac.0);
    bytes.extend(address.octets());
    bytes.extend(target);
    bytes.extend(address.octets());
    let mut frame = [0; FRAME_BYTES];
    frame[..bytes.len()].copy_from_slice(&bytes);
    frame
}

/// The address that a frame of the guest's claims for `mac`: the sender of an ARP packet.
pub fn claimed_address(frame: &[u8], mac: MacAddress) -> Option<Ipv4Addr> {
    let kind = frame.get(12..14)?;
    let sender = frame.get(22..28)?;
    let address = <[u8; 4]>::try_from(frame.get(28..32)?).ok()?;
    let address = Ipv4Addr::from(address);
    (kind == TYPE_ARP.to_be_bytes() && sender == mac.0 && !address.is_unspecified())
        .then_some(address)
}
