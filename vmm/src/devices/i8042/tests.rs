//! The reset line and nothing else.

use super::*;
use crate::devices::testing::Bench;

#[tokio::test]
async fn only_a_pulse_of_the_reset_line_resets() {
    let mut bench = Bench::new();
    let controller = I8042::new(&bench.context);
    for (offset, data) in [
        (0, vec![0xfe]),
        (4, vec![0xff]),
        (4, vec![0xfe, 0xfe]),
        (4, vec![]),
    ] {
        bench.write(controller.as_ref(), offset, &data);
    }
    assert!(bench.events.try_recv().is_err());
    assert_eq!(bench.read_byte(controller.as_ref(), 4), 0);
    bench.write(controller.as_ref(), 4, &[0xfe]);
    assert_eq!(bench.events.try_recv(), Ok(MachineEvent::Reset));
    // A guest that never stops asking does not block.
    for _ in 0..100 {
        bench.write(controller.as_ref(), 4, &[0xfe]);
    }
}

#[tokio::test]
async fn it_has_no_state_and_takes_none() {
    let bench = Bench::new();
    let controller = I8042::new(&bench.context);
    controller.restore(1, &controller.save().unwrap()).unwrap();
    assert!(matches!(
        controller.restore(1, b"x"),
        Err(StateError::Invalid { .. })
    ));
    assert!(matches!(
        controller.restore(2, b""),
        Err(StateError::Version { .. })
    ));
}
