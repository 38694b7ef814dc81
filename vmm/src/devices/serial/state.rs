//! The serial port's saved state: its registers and what the guest has not read. Console output stays behind.

use std::sync::PoisonError;

use serde::{Deserialize, Serialize};
use vm_superio::Serial as Uart;
use vm_superio::serial::{NoEvents, SerialState};

use super::{Line, Output, Serial};
use crate::devices::{Migratable, StateError, decode_state, encode_state};

/// The version that is written.
pub const VERSION: u32 = 1;

/// The registers, as the 16550's data sheet names them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    received: Vec<u8>,
}

/// Saves the port.
pub fn save(serial: &Serial) -> Result<Vec<u8>, StateError> {
    let state = serial.lock().state();
    encode_state(
        &serial.kind(),
        &State {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        },
    )
}

/// Restores the port.
pub fn restore(serial: &Serial, version: u32, state: &[u8]) -> Result<(), StateError> {
    let kind = serial.kind();
    if version != VERSION {
        return Err(StateError::Version {
            kind,
            found: version,
            known: VERSION,
        });
    }
    let saved: State = decode_state(&kind, state)?;
    let state = SerialState {
        baud_divisor_low: saved.baud_divisor_low,
        baud_divisor_high: saved.baud_divisor_high,
        interrupt_enable: saved.interrupt_enable,
        interrupt_identification: saved.interrupt_identification,
        line_control: saved.line_control,
        line_status: saved.line_status,
        modem_control: saved.modem_control,
        modem_status: saved.modem_status,
        scratch: saved.scratch,
        in_buffer: saved.received,
    };
    let restored = Uart::from_state(
        &state,
        Line(serial.irq.clone()),
        NoEvents,
        Output(serial.console.clone()),
    )
    .map_err(|error| StateError::Invalid {
        kind,
        reason: error.to_string(),
    })?;
    *serial.uart.lock().unwrap_or_else(PoisonError::into_inner) = restored;
    Ok(())
}
