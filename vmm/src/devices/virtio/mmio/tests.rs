//! The transport against a driver that does everything right, and one that does everything wrong.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::testing::{Bench, MEMORY_MIB};
use crate::devices::virtio::FEATURE_INDIRECT;
use crate::devices::virtio::buffers::PIECES_MAX;
use crate::devices::virtio::driver::{
    BUFFERS, Driver, NEXT, Piece, QUEUE_SIZE, RINGS, WRITE, accept, get, reset, set,
};

const IRQ: u32 = 5;
const OFFERED: u64 = FEATURE_VERSION_1 | FEATURE_EVENT_INDEX | FEATURE_INDIRECT | 1 << 9;

fn transport(bench: &Bench) -> Arc<Transport> {
    let description = Description {
        name: "virtio-test:0".into(),
        device_id: 42,
        features: OFFERED,
        queue_sizes: vec![256],
        config: (0..10).collect(),
    };
    let transport = Transport::new(
        &bench.context,
        0xd000_0000,
        IRQ,
        description,
        &mut Tasks::default(),
    )
    .unwrap();
    transport.resume();
    transport
}

/// A request of one readable and one writable piece.
fn simple(driver: &mut Driver<'_>) {
    driver.chain(0, &[(BUFFERS, 16, false), (BUFFERS + 0x1000, 8, true)]);
    driver.offer(0);
}

#[tokio::test]
async fn the_registers_say_what_the_device_is() {
    let bench = Bench::new();
    let transport = transport(&bench);
    let read = |register| get(&transport, register);
    assert_eq!(
        [
            read(register::MAGIC),
            read(register::VERSION),
            read(register::DEVICE_ID)
        ],
        [MAGIC_VALUE, 2, 42]
    );
    for (select, half) in [
        (0, OFFERED as u32),
        (1, (OFFERED >> 32) as u32),
        (2, 0),
        (u32::MAX, 0),
    ] {
        set(&transport, register::DEVICE_FEATURES_SELECT, select);
        assert_eq!(read(register::DEVICE_FEATURES), half);
    }
    assert_eq!(read(register::QUEUE_SIZE_MAX), 256);
    set(&transport, register::QUEUE_SELECT, 1);
    assert_eq!(read(register::QUEUE_SIZE_MAX), 0);
    let mut config = [0xff; 8];
    transport.read(register::CONFIG + 6, &mut config);
    assert_eq!(config, [6, 7, 8, 9, 0, 0, 0, 0]);
    transport.read(u64::MAX, &mut config);
    assert_eq!(config, [0; 8]);
}

#[tokio::test]
async fn features_that_were_not_offered_and_legacy_drivers_are_refused() {
    let bench = Bench::new();
    let transport = transport(&bench);
    for features in [FEATURE_VERSION_1 | 1 << 3, 1 << 9, 0] {
        reset(&transport);
        set(
            &transport,
            register::STATUS,
            status::ACKNOWLEDGE | status::DRIVER,
        );
        accept(&transport, features);
        set(&transport, register::STATUS, status::FEATURES_OK);
        assert_eq!(
            get(&transport, register::STATUS),
            status::ACKNOWLEDGE | status::DRIVER
        );
        set(&transport, register::STATUS, status::DRIVER_OK);
        assert_eq!(get(&transport, register::STATUS) & status::DRIVER_OK, 0);
    }
}

#[tokio::test]
async fn a_request_is_taken_once_and_completed_with_an_interrupt() {
    let bench = Bench::new();
    let transport = transport(&bench);
    let mut driver = Driver::start(&transport, 0);
    transport
        .memory()
        .write_slice(b"what the guest wants", GuestAddress(BUFFERS))
        .unwrap();
    simple(&mut driver);
    let request = transport.take(0).unwrap();
    assert!(transport.take(0).is_none());
    let mut asked = [0; 32];
    assert_eq!(
        request
            .readable
            .read(transport.memory(), 5, &mut asked)
            .unwrap(),
        11
    );
    assert_eq!(&asked[..11], b"the guest w");
    transport.complete(&request, |memory| {
        request.writable.write(memory, 2, b"answer beyond").unwrap()
    });
    assert_eq!(driver.used(), Some((0, 6)));
    assert_eq!(
        transport
            .memory()
            .read_obj::<[u8; 10]>(GuestAddress(BUFFERS + 0x1000))
            .unwrap(),
        *b"\0\0answer\0\0"
    );
    assert_eq!(bench.lines.edges(IRQ), 1);
    assert_eq!(get(&transport, register::INTERRUPT_STATUS), 1);
    set(&transport, register::INTERRUPT_ACKNOWLEDGE, 1);
    assert_eq!(get(&transport, register::INTERRUPT_STATUS), 0);
}

#[tokio::test]
async fn a_driver_that_polls_is_not_interrupted() {
    let bench = Bench::new();
    let transport = transport(&bench);
    let mut driver = Driver::start(&transport, 0);
    driver.poll_only();
    simple(&mut driver);
    let request = transport.take(0).unwrap();
    transport.complete(&request, |_| 0);
    assert_eq!(driver.used(), Some((0, 0)));
    assert_eq!(bench.lines.edges(IRQ), 0);
}

#[tokio::test]
async fn what_the_device_writes_is_dirty() {
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
    let bench = Bench::new();
    let transport = transport(&bench);
    let mut driver = Driver::start(&transport, 0);
    simple(&mut driver);
    let region = transport.memory().iter().next().unwrap();
    <GuestRegionMmap<AtomicBitmap> as std::ops::Deref>::deref(region)
        .bitmap()
        .reset();
    let request = transport.take(0).unwrap();
    transport.complete(&request, |memory| {
        request.writable.write(memory, 0, b"x").unwrap()
    });
    let used_ring = (RINGS + 0x8000) as usize;
    assert!(region.bitmap().dirty_at(BUFFERS as usize + 0x1000));
    assert!(region.bitmap().dirty_at(used_ring));
    assert!(!region.bitmap().dirty_at(BUFFERS as usize));
}

#[tokio::test]
async fn a_malformed_chain_is_given_back_and_the_next_is_served() {
    let bench = Bench::new();
    let transport = transport(&bench);
    let end = MEMORY_MIB << 20;
    let piece = |address, length, flags, next| Piece {
        address,
        length,
        flags,
        next,
    };
    let chains: [(&str, Vec<Piece>); 8] = [
        ("a loop", vec![piece(BUFFERS, 16, NEXT, 0)]),
        (
            "a loop of two",
            vec![piece(BUFFERS, 16, NEXT, 1), piece(BUFFERS, 16, NEXT, 0)],
        ),
        (
            "a next beyond the table",
            vec![piece(BUFFERS, 16, NEXT, QUEUE_SIZE)],
        ),
        ("a piece beyond memory", vec![piece(end, 1, 0, 0)]),
        ("a piece across the end", vec![piece(end - 8, 16, WRITE, 0)]),
        ("an address that wraps", vec![piece(u64::MAX - 3, 16, 0, 0)]),
        (
            "reading after writing",
            vec![
                piece(BUFFERS, 16, WRITE | NEXT, 1),
                piece(BUFFERS, 16, 0, 0),
            ],
        ),
        ("too many bytes", vec![piece(0, 8 << 20, 0, 0)]),
    ];
    for (what, pieces) in chains {
        let mut driver = Driver::start(&transport, 0);
        for (index, piece) in pieces.iter().enumerate() {
            driver.describe(index as u16, *piece);
        }
        driver.offer(0);
        driver.chain(8, &[(BUFFERS, 4, false)]);
        driver.offer(8);
        let request = transport.take(0);
        assert_eq!(
            request.map(|request| (request.head, request.readable.len())),
            Some((8, 4)),
            "{what}"
        );
        assert_eq!(driver.used(), Some((0, 0)), "{what}");
    }
}

#[tokio::test]
async fn pieces_of_no_length_are_passed_over() {
    let bench = Bench::new();
    let transport = transport(&bench);
    let mut driver = Driver::start(&transport, 0);
    driver.chain(
        0,
        &[
            (BUFFERS, 0, false),
            (u64::MAX, 0, false),
            (BUFFERS, 7, false),
            (BUFFERS, 0, true),
        ],
    );
    driver.offer(0);
    let request = transport.take(0).unwrap();
    assert_eq!((request.readable.len(), request.writable.len()), (7, 0));
}

#[tokio::test]
async fn an_indirect_table_is_followed_once_and_a_bad_one_is_given_back() {
    const INDIRECT: u16 = 4;
    let bench = Bench::new();
    let transport = transport(&bench);
    let table = BUFFERS + 0x10_000;
    let entry = |index: u64, length: u64, flags: u16, next: u64| {
        let words = [BUFFERS, length | u64::from(flags) << 32 | next << 48];
        for (word, place) in words
            .iter()
            .zip([table + 16 * index, table + 16 * index + 8])
        {
            transport
                .memory()
                .write_obj(*word, GuestAddress(place))
                .unwrap();
        }
    };
    let mut driver = Driver::start(&transport, FEATURE_INDIRECT);
    entry(0, 3, NEXT, 1);
    entry(1, 4, WRITE, 0);
    driver.describe(
        0,
        Piece {
            address: table,
            length: 32,
            flags: INDIRECT,
            next: 0,
        },
    );
    driver.offer(0);
    let request = transport.take(0).unwrap();
    assert_eq!((request.readable.len(), request.writable.len()), (3, 4));
    // A table in a table, one of no length, one that is no whole number of descriptors, one outside memory.
    entry(0, 32, INDIRECT, 0);
    for (address, length) in [(table, 16), (table, 0), (table, 17), (u64::MAX - 15, 16)] {
        driver.describe(
            0,
            Piece {
                address,
                length,
                flags: INDIRECT,
                next: 0,
            },
        );
        driver.offer(0);
        assert!(transport.take(0).is_none());
        assert_eq!(driver.used(), Some((0, 0)));
    }
    // A long table that never ends.
    for index in 0..PIECES_MAX as u64 + 8 {
        entry(index, 1, NEXT, index + 1);
    }
    driver.describe(
        0,
        Piece {
            address: table,
            length: 16 * (PIECES_MAX as u32 + 8),
            flags: INDIRECT,
            next: 0,
        },
    );
    driver.offer(0);
    assert!(transport.take(0).is_none());
    assert_eq!(driver.used(), Some((0, 0)));
}

#[tokio::test]
async fn a_queue_that_makes_no_sense_stops_the_device_until_it_is_reset() {
    let bench = Bench::new();
    let transport = transport(&bench);
    let mut driver = Driver::start(&transport, 0);
    driver.set_available(QUEUE_SIZE + 1);
    assert!(transport.take(0).is_none());
    assert_ne!(get(&transport, register::STATUS) & status::NEEDS_RESET, 0);
    simple(&mut driver);
    assert!(transport.take(0).is_none());
    let mut driver = Driver::start(&transport, 0);
    simple(&mut driver);
    assert!(transport.take(0).is_some());
    // A head beyond the table cannot even be given back.
    let mut driver = Driver::start(&transport, 0);
    driver.offer(QUEUE_SIZE);
    assert!(transport.take(0).is_none());
    assert_ne!(get(&transport, register::STATUS) & status::NEEDS_RESET, 0);
}

#[tokio::test]
async fn rings_outside_memory_do_not_become_ready() {
    let bench = Bench::new();
    let transport = transport(&bench);
    for (descriptors, size) in [
        (MEMORY_MIB << 20, 16),
        ((MEMORY_MIB << 20) - 16, 16),
        (u64::MAX - 0xfff, 16),
    ] {
        Driver::start(&transport, 0);
        set(&transport, register::QUEUE_READY, 0);
        set(&transport, register::QUEUE_SIZE, size);
        set(
            &transport,
            register::QUEUE_DESCRIPTORS_LOW,
            descriptors as u32,
        );
        set(
            &transport,
            register::QUEUE_DESCRIPTORS_HIGH,
            (descriptors >> 32) as u32,
        );
        set(&transport, register::QUEUE_READY, 1);
        assert_eq!(
            get(&transport, register::QUEUE_READY),
            0,
            "{descriptors:#x}"
        );
        assert!(transport.take(0).is_none());
    }
}

#[tokio::test]
async fn nothing_is_written_for_a_request_that_a_reset_has_forgotten() {
    let bench = Bench::new();
    let transport = transport(&bench);
    let mut driver = Driver::start(&transport, 0);
    simple(&mut driver);
    let request = transport.take(0).unwrap();
    let mut driver = Driver::start(&transport, 0);
    transport.complete(&request, |_| {
        panic!("the driver has forgotten this request")
    });
    assert_eq!(driver.used(), None);
    transport.quiesce().await;
}

#[tokio::test]
async fn quiesce_waits_for_what_was_taken_and_leaves_the_rest() {
    let bench = Bench::new();
    let transport = transport(&bench);
    let mut driver = Driver::start(&transport, 0);
    simple(&mut driver);
    simple(&mut driver);
    let request = transport.take(0).unwrap();
    let quiet = tokio::spawn({
        let transport = transport.clone();
        async move { transport.quiesce().await }
    });
    crate::devices::testing::until("no more is taken", || !transport.lock().running).await;
    assert!(transport.take(0).is_none());
    assert!(matches!(
        transport.save(),
        Err(crate::devices::StateError::NotQuiesced { .. })
    ));
    assert!(!quiet.is_finished());
    transport.complete(&request, |_| 0);
    quiet.await.unwrap();
    transport.save().unwrap();
    transport.resume();
    assert!(transport.take(0).is_some());
}

#[tokio::test]
async fn a_restored_device_goes_on_with_the_next_request() {
    let (first, second) = (Bench::new(), Bench::new());
    let here = transport(&first);
    let mut driver = Driver::start(&here, FEATURE_EVENT_INDEX);
    for _ in 0..3 {
        simple(&mut driver);
    }
    let request = here.take(0).unwrap();
    here.complete(&request, |_| 0);
    assert_eq!(driver.used(), Some((0, 0)));
    here.quiesce().await;
    let saved = here.save().unwrap();
    let mut memory = vec![0; 4 << 20];
    here.memory()
        .read_slice(&mut memory, GuestAddress(0))
        .unwrap();

    let there = transport(&second);
    there
        .memory()
        .write_slice(&memory, GuestAddress(0))
        .unwrap();
    assert!(matches!(
        there.restore(&saved),
        Err(crate::devices::StateError::NotQuiesced { .. })
    ));
    there.quiesce().await;
    there.restore(&saved).unwrap();
    assert_eq!(there.save().unwrap(), saved);
    assert!(there.take(0).is_none());
    there.resume();
    // The interrupt that was not acknowledged is raised again.
    assert_eq!(second.lines.edges(IRQ), 1);
    let mut driver = driver.moved_to(&there);
    for _ in 0..2 {
        let request = there.take(0).unwrap();
        there.complete(&request, |_| 5);
        assert_eq!(driver.used(), Some((0, 5)));
    }
    assert!(there.take(0).is_none());
}

#[tokio::test]
async fn a_state_that_no_such_device_saved_is_refused() {
    let bench = Bench::new();
    let transport = transport(&bench);
    Driver::start(&transport, 0);
    transport.quiesce().await;
    let good = transport.save().unwrap();
    let broken: [fn(&mut TransportState); 8] = [
        |state| state.status |= 1 << 16,
        |state| state.driver_features |= 1 << 50,
        |state| state.queues.clear(),
        |state| state.queues[0].max_size = 128,
        |state| state.queues[0].size = 3,
        |state| state.queues[0].size = 512,
        |state| state.queues[0].descriptors = 1 << 40,
        |state| state.queues[0].used += 1,
    ];
    for (index, breaks) in broken.iter().enumerate() {
        let mut state = good.clone();
        breaks(&mut state);
        assert!(transport.restore(&state).is_err(), "{index}");
    }
    assert_eq!(transport.save().unwrap(), good);
}
