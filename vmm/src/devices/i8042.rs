//! The keyboard controller, of which only the reset line is there: how a PC kernel reboots.

use std::sync::Arc;

use super::{
    BusDevice, DeviceContext, ExitContext, MachineEvent, MachineEvents, Migratable, StateError,
};
use async_trait::async_trait;

/// The command port, from the first port of the controller on.
const COMMAND: u64 = 4;
/// Pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;

/// The controller.
#[derive(Debug)]
pub struct I8042 {
    events: MachineEvents,
}

impl I8042 {
    /// The controller; a reset is told to the machine.
    pub fn new(context: &DeviceContext) -> Arc<Self> {
        Arc::new(Self {
            events: context.events.clone(),
        })
    }
}

impl BusDevice for I8042 {
    fn read(&self, _: u64, data: &mut [u8], _: &ExitContext<'_>) {
        // No input, and room for a command: a kernel that waits before it resets does not wait for ever.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8], _: &ExitContext<'_>) {
        if offset == COMMAND && data == [PULSE_RESET] {
            self.events.tell(MachineEvent::Reset);
        }
    }
}

#[async_trait]
impl Migratable for I8042 {
    fn kind(&self) -> String {
        "i8042".into()
    }

    fn version(&self) -> u32 {
        1
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    fn restore(&self, version: u32, state: &[u8]) -> Result<(), StateError> {
        let kind = self.kind();
        match (version, state) {
            (1, []) => Ok(()),
            (1, _) => Err(StateError::Invalid {
                kind,
                reason: "it has no state".into(),
            }),
            (found, _) => Err(StateError::Version {
                kind,
                found,
                known: 1,
            }),
        }
    }
}

#[cfg(test)]
mod tests;
