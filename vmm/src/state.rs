//! A saved machine: vCPUs, interrupt and timer chips, clocks and devices, in one versioned document.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::devices::MachineEvent;
use crate::kvm::cpu::CpuState;
use crate::kvm::pod::{self, Pod};
use crate::kvm::vm::VmState;

/// The version that is written. A reader accepts it and the one before.
pub const STATE_VERSION: u32 = 1;

/// The largest document that is read: a vCPU takes some 25 KiB, a device a few.
pub const STATE_BYTES_MAX: usize = 64 << 20;

/// Everything but the memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// See [`STATE_VERSION`].
    pub version: u32,
    /// Guest memory, MiB; the restoring machine must have as much.
    pub memory_mib: u64,
    /// One for each vCPU, in their order.
    pub cpus: Vec<CpuState>,
    /// Irqchip, PIT, clock.
    pub vm: VmState,
    /// One for each device, in the machine's order.
    pub devices: Vec<DeviceState>,
    /// CLOCK_REALTIME of the host when it was saved, nanoseconds: by it the guest's clocks advance.
    pub saved_at_realtime_ns: u64,
    /// What the guest had asked for and nobody acted on, since it was stopped for its cutover right after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<MachineEvent>,
}

/// One device's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// Which device.
    pub kind: String,
    /// The version of its state.
    pub version: u32,
    /// As the device wrote it.
    pub state: Hex,
}

/// Why a document is not a saved machine that can be restored here.
#[derive(Debug, thiserror::Error)]
pub enum ReadStateError {
    /// It is too large.
    #[error("a machine state of {bytes} bytes is over the limit of {STATE_BYTES_MAX}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// It does not read as one.
    #[error("the machine state is damaged or of another kind: {0}")]
    Malformed(#[from] serde_json::Error),
    /// Another version wrote it.
    #[error(
        "the machine state has version {found}; this monitor reads {STATE_VERSION}: upgrade this node first"
    )]
    Version {
        /// The version.
        found: u32,
    },
}

impl MachineState {
    /// The document.
    ///
    /// # Panics
    /// Never: every part has a JSON form.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("numbers and text have a JSON form")
    }

    /// Reads a document.
    ///
    /// # Errors
    /// See [`ReadStateError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<MachineState, ReadStateError> {
        /// The one field that every version has.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        if bytes.len() > STATE_BYTES_MAX {
            return Err(ReadStateError::TooLarge { bytes: bytes.len() });
        }
        let Versioned { version } = serde_json::from_slice(bytes)?;
        if version != STATE_VERSION {
            return Err(ReadStateError::Version { found: version });
        }
        Ok(serde_json::from_slice(bytes)?)
    }
}

/// Bytes, written as hexadecimal text.
#[derive(Clone, PartialEq, Eq)]
pub struct Hex(pub Vec<u8>);

/// A part of a machine's state has another size or order than this monitor's KVM knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved `{part}` is not one that this monitor can put back")]
pub struct StateFormatError {
    /// Which part.
    pub part: &'static str,
}

impl Hex {
    /// A kernel structure's bytes.
    pub fn of<T: Pod>(value: &T) -> Hex {
        Hex(pod::to_bytes(value))
    }

    /// The kernel structure.
    ///
    /// # Errors
    /// When the length is another.
    pub fn pod<T: Pod>(&self, part: &'static str) -> Result<T, StateFormatError> {
        pod::from_bytes(&self.0).ok_or(StateFormatError { part })
    }
}

impl fmt::Debug for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes>", self.0.len())
    }
}

const DIGITS: &[u8; 16] = b"0123456789abcdef";

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(self.0.len() * 2);
        for byte in &self.0 {
            text.push(char::from(DIGITS[usize::from(byte >> 4)]));
            text.push(char::from(DIGITS[usize::from(byte & 0xf)]));
        }
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Hex, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|value| value as u8);
        let pairs = text.as_bytes().chunks(2).map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        });
        pairs
            .collect::<Option<_>>()
            .map(Hex)
            .ok_or_else(|| de::Error::custom("not hexadecimal text"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> MachineState {
        MachineState {
            version: STATE_VERSION,
            memory_mib: 64,
            cpus: Vec::new(),
            vm: VmState::default(),
            devices: vec![DeviceState {
                kind: "serial".into(),
                version: 1,
                state: Hex(vec![0, 0x9f, 255]),
            }],
            saved_at_realtime_ns: 5,
            ended: None,
        }
    }

    #[test]
    fn a_state_makes_the_round_trip() {
        let bytes = sample().to_bytes();
        assert_eq!(MachineState::from_bytes(&bytes).unwrap(), sample());
        // An older monitor, which knows nothing of it, reads what has none.
        assert!(!String::from_utf8(bytes).unwrap().contains("ended"));
        let ended = MachineState {
            ended: Some(MachineEvent::Reset),
            ..sample()
        };
        let read = MachineState::from_bytes(&ended.to_bytes()).unwrap();
        assert_eq!(read, ended);
    }

    #[test]
    fn a_newer_unknown_or_damaged_state_is_refused() {
        let text = String::from_utf8(sample().to_bytes()).unwrap();
        let newer = text.replacen("\"version\":1", "\"version\":2", 1);
        assert!(matches!(
            MachineState::from_bytes(newer.as_bytes()),
            Err(ReadStateError::Version { found: 2 })
        ));
        for damaged in [
            text.replacen("memory_mib", "memory_gib", 1),
            text.replacen("\"009fff\"", "\"009ff\"", 1),
            text.replacen("{", "{\"extra\":1,", 1),
            text[1..].to_owned(),
        ] {
            assert!(matches!(
                MachineState::from_bytes(damaged.as_bytes()),
                Err(ReadStateError::Malformed(_))
            ));
        }
    }
}
