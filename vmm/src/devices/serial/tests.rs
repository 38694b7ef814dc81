//! The serial port between a guest's registers and the console.

use super::*;
use crate::devices::testing::{Bench, until};

const IRQ: u32 = 4;
const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const LINE_STATUS: u64 = 5;
const DATA_READY: u8 = 1;

#[tokio::test]
async fn what_the_guest_writes_is_on_the_console() {
    let bench = Bench::new();
    let console = Arc::new(Console::default());
    let serial = Serial::new(&bench.context, IRQ, console.clone());
    for byte in b"hello" {
        bench.write(serial.as_ref(), DATA, &[*byte]);
    }
    // Only byte accesses reach a UART.
    bench.write(serial.as_ref(), DATA, b"no");
    assert_eq!(console.output_from(0).0, b"hello");
}

#[tokio::test]
async fn what_is_typed_reaches_the_guest_with_an_interrupt_however_long_it_is() {
    let bench = Bench::new();
    let console = Arc::new(Console::default());
    let serial = Serial::new(&bench.context, IRQ, console.clone());
    bench.write(serial.as_ref(), INTERRUPT_ENABLE, &[1]);
    let typed: Vec<u8> = (0..200).collect();
    assert_eq!(console.type_input(&typed), typed.len());
    until("the guest is interrupted", || bench.lines.edges(IRQ) > 0).await;
    let mut read = Vec::new();
    while bench.read_byte(serial.as_ref(), LINE_STATUS) & DATA_READY != 0 {
        read.push(bench.read_byte(serial.as_ref(), DATA));
    }
    assert_eq!(read, typed);
}

#[tokio::test]
async fn registers_and_unread_input_travel() {
    let bench = Bench::new();
    let console = Arc::new(Console::default());
    let serial = Serial::new(&bench.context, IRQ, console.clone());
    console.type_input(b"abc");
    until("the input is received", || {
        bench.read_byte(serial.as_ref(), LINE_STATUS) & DATA_READY != 0
    })
    .await;
    bench.write(serial.as_ref(), 7, &[0x5a]);
    let saved = serial.save().unwrap();
    let there = Serial::new(&bench.context, IRQ, Arc::new(Console::default()));
    there.restore(1, &saved).unwrap();
    assert_eq!(there.save().unwrap(), saved);
    assert_eq!(bench.read_byte(there.as_ref(), 7), 0x5a);
    let read: Vec<u8> = (0..3)
        .map(|_| bench.read_byte(there.as_ref(), DATA))
        .collect();
    assert_eq!(read, b"abc");
}

#[tokio::test]
async fn a_state_that_no_port_saved_is_refused() {
    let bench = Bench::new();
    let serial = Serial::new(&bench.context, IRQ, Arc::new(Console::default()));
    let saved = serial.save().unwrap();
    let text = String::from_utf8(saved.clone()).unwrap();
    let too_long = text.replace(
        "\"received\":[]",
        &format!("\"received\":[{}1]", "1,".repeat(64)),
    );
    assert_ne!(too_long, text);
    for (version, state) in [
        (2, saved.as_slice()),
        (1, b"".as_slice()),
        (1, too_long.as_bytes()),
    ] {
        assert!(serial.restore(version, state).is_err());
    }
    assert_eq!(serial.save().unwrap(), saved);
}
