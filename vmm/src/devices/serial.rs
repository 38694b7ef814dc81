//! The serial port: a 16550 between the guest and the machine's console.

mod state;

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use async_trait::async_trait;
use tokio::sync::watch;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial as Uart, Trigger};

use super::virtio::Tasks;
use super::{BusDevice, DeviceContext, ExitContext, IrqLine, Migratable, StateError};
use crate::console::Console;

/// COM1, with its interrupt.
pub struct Serial {
    uart: Mutex<Uart<Line, NoEvents, Output>>,
    console: Arc<Console>,
    irq: IrqLine,
    _tasks: Tasks,
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial")
            .field("irq", &self.irq)
            .finish_non_exhaustive()
    }
}

/// The interrupt line as the UART wants it.
struct Line(IrqLine);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.trigger();
        Ok(())
    }
}

/// Where the guest's bytes go.
struct Output(Arc<Console>);

impl io::Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write_output(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Serial {
    /// The port, with `irq` as its interrupt. What is typed on the console reaches the guest as it reads.
    pub fn new(context: &DeviceContext, irq: u32, console: Arc<Console>) -> Arc<Self> {
        let irq = context.irq_line(irq);
        Arc::new_cyclic(|serial| {
            let mut tasks = Tasks::default();
            tasks.spawn(
                &context.runtime,
                feed(serial.clone(), console.watch_input()),
            );
            let uart = Uart::new(Line(irq.clone()), Output(console.clone()));
            Self {
                uart: Mutex::new(uart),
                console,
                irq,
                _tasks: tasks,
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, Uart<Line, NoEvents, Output>> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves typed bytes into the receive buffer as far as it has room.
    fn receive(&self, uart: &mut Uart<Line, NoEvents, Output>) {
        let room = uart.fifo_capacity();
        if room > 0 {
            let typed = self.console.take_input(room);
            // A loop-back test of the driver's refuses input: what is typed meanwhile is lost, as on a real line.
            if let Err(error) = uart.enqueue_raw_bytes(&typed) {
                tracing::debug!(%error, "typed input is lost");
            }
        }
    }
}

/// Hands typed input on until the port or the console is gone.
async fn feed(serial: Weak<Serial>, mut typed: watch::Receiver<u64>) {
    while typed.changed().await.is_ok() {
        let Some(serial) = serial.upgrade() else {
            return;
        };
        serial.receive(&mut serial.lock());
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8], _: &ExitContext<'_>) {
        let mut uart = self.lock();
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = uart.read(offset);
            self.receive(&mut uart);
        }
    }

    fn write(&self, offset: u64, data: &[u8], _: &ExitContext<'_>) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset))
            && let Err(error) = self.lock().write(offset, *byte)
        {
            tracing::debug!(%error, "a byte on the serial line is lost");
        }
    }
}

#[async_trait]
impl Migratable for Serial {
    fn kind(&self) -> String {
        "serial".into()
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

    fn resume(&self) {
        self.receive(&mut self.lock());
    }
}

#[cfg(test)]
mod tests;
