//! The self-checking guest's port: its reports, its waits, and the witness of what it was promised.
//!
//! ```text
//!  out COMMAND ─► report record in guest memory ─► GuestReport ─► status, clusterctl
//!                                              └─► flushed number grew ─► witness file (appended)
//!  out WAIT    ─► the vCPU blocks here until time, an interrupt or a pause
//!  out EXIT    ─► 0: the guest is done; else it failed
//! ```

mod report;
mod state;
pub mod witness;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use vm_memory::{Bytes, GuestAddress};

use super::{
    BusDevice, DeviceContext, ExitContext, GuestMemory, MachineEvent, MachineEvents, Migratable,
    StateError,
};
use crate::guest::abi::{
    COMMAND_GIVE_UP, COMMAND_REPORT, PORT_COMMAND, PORT_EXIT, PORT_WAIT, REPORT_WORDS, Report,
    WAIT_US_MAX,
};
pub use report::GuestReport;
use witness::Witness;

/// The device.
#[derive(Debug)]
pub struct SelfCheck {
    memory: GuestMemory,
    report_address: u64,
    events: MachineEvents,
    report: watch::Sender<GuestReport>,
    witness: Option<Mutex<Witness>>,
}

impl SelfCheck {
    /// The device; the guest keeps its report record at `report_address`. Flushed numbers are appended to `witness`.
    pub fn new(
        context: &DeviceContext,
        report_address: u64,
        witness: Option<Witness>,
    ) -> Arc<Self> {
        Arc::new(Self {
            memory: context.memory.clone(),
            report_address,
            events: context.events.clone(),
            report: watch::Sender::new(GuestReport::default()),
            witness: witness.map(Mutex::new),
        })
    }

    /// What the guest reported last.
    pub fn report(&self) -> GuestReport {
        self.report.borrow().clone()
    }

    /// Tells of every report.
    pub fn watch(&self) -> watch::Receiver<GuestReport> {
        self.report.subscribe()
    }

    /// The longest gap since this was asked last.
    pub fn take_longest_gap(&self) -> Duration {
        let mut longest = 0;
        self.report.send_if_modified(|report| {
            longest = std::mem::take(&mut report.longest_gap_ns);
            false
        });
        Duration::from_nanos(longest)
    }

    fn take_report(&self) {
        let Some(report) = self.read_record() else {
            tracing::warn!("the guest's report record does not match its checksum");
            self.report
                .send_modify(|report| report.damaged_records += 1);
            return;
        };
        let before = self.report();
        // The witness comes first: a number that it does not have was never promised to anyone.
        if let Some(witness) = &self.witness {
            let noted = lock(witness).note(before.last.as_ref(), &report);
            if let Err(error) = noted {
                tracing::error!(%error, "the witness cannot be kept");
                self.report
                    .send_modify(|report| report.witness_failure = Some(error.to_string()));
            }
        }
        if report.errors > 0 && before.last.is_none_or(|last| last.errors == 0) {
            tracing::error!(
                error = report::describe(&report),
                "a check of the guest failed"
            );
        }
        self.report.send_modify(|known| known.take(report));
    }

    fn read_record(&self) -> Option<Report> {
        let mut bytes = [0; REPORT_WORDS * 8];
        self.memory
            .read_slice(&mut bytes, GuestAddress(self.report_address))
            .ok()?;
        let mut words = [0; REPORT_WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Report::from_words(&words)
    }

    fn tell(&self, event: MachineEvent) {
        self.events.tell(event);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BusDevice for SelfCheck {
    fn read(&self, _: u64, data: &mut [u8], _: &ExitContext<'_>) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8], context: &ExitContext<'_>) {
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(data);
        match (offset + u64::from(PORT_COMMAND)) as u16 {
            PORT_COMMAND if value == COMMAND_REPORT => self.take_report(),
            PORT_COMMAND if value == COMMAND_GIVE_UP => {
                let report = self.report();
                let why = report
                    .error()
                    .unwrap_or_else(|| "its parameters are not valid".into());
                self.tell(MachineEvent::Failed(format!(
                    "the self-checking guest gave up: {why}"
                )));
            }
            PORT_WAIT => {
                context.wait(Duration::from_micros(u64::from(value.min(WAIT_US_MAX))));
            }
            PORT_EXIT if value == 0 => self.tell(MachineEvent::ShutDown),
            PORT_EXIT => self.tell(MachineEvent::Failed(format!(
                "the guest ended with code {value}"
            ))),
            _ => {}
        }
    }
}

#[async_trait]
impl Migratable for SelfCheck {
    fn kind(&self) -> String {
        "selfcheck".into()
    }

    fn version(&self) -> u32 {
        state::VERSION
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        state::save(self)
    }

    fn restore(&self, version: u32, state: &[u8]) -> Result<(), StateError> {
        state::restore(self, version, state)
    }
}

#[cfg(test)]
mod tests;
