//! One channel's rules, fed with frames instead of a socket.

use super::*;
use crate::frame::{BatchBuilder, Frame, HEADER_BYTES, Header, encode_zero};
use std::sync::Mutex;

/// Remembers what was asked of it.
#[derive(Default)]
struct Sink {
    log: Mutex<Vec<String>>,
}

const REGIONS: &[Region] = &[Region {
    guest_address: 0,
    pages: 2048,
}];

impl MemorySink for Sink {
    fn regions(&self) -> Vec<Region> {
        REGIONS.to_vec()
    }
    fn write_pages(&self, region: usize, page: u64, data: &[u8]) -> Result<(), HostError> {
        let count = data.len() / PAGE_SIZE;
        self.log
            .lock()
            .unwrap()
            .push(format!("write {region}:{page}+{count}"));
        Ok(())
    }
    fn zero_pages(&self, region: usize, page: u64, count: u64) -> Result<(), HostError> {
        self.log
            .lock()
            .unwrap()
            .push(format!("zero {region}:{page}+{count}"));
        Ok(())
    }
    fn round_arrived(&self, round: u32) -> Result<(), HostError> {
        self.log.lock().unwrap().push(format!("round {round}"));
        Ok(())
    }
}

struct Bench {
    sink: Arc<Sink>,
    intake: Intake<Sink>,
}

impl Bench {
    fn new(channel: u16, channels: u16) -> Bench {
        let sink = Arc::new(Sink::default());
        let shared = Arc::new(Shared::new(sink.regions()));
        Bench {
            intake: Intake::new(Arc::clone(&sink), shared, channel, channels),
            sink,
        }
    }

    fn set_up() -> Bench {
        let mut bench = Bench::new(0, 1);
        assert_eq!(bench.take(setup(REGIONS)).unwrap(), Some(Arrived::Setup));
        bench
    }

    fn take(&mut self, mut frame: Frame) -> Result<Option<Arrived>, ReceiveError> {
        let bytes = frame.seal(0).to_vec();
        let header = Header::decode(bytes.first_chunk().unwrap()).unwrap();
        self.intake.take(&header, &bytes[HEADER_BYTES..])
    }

    fn log(&self) -> Vec<String> {
        self.sink.log.lock().unwrap().clone()
    }
}

fn setup(regions: &[Region]) -> Frame {
    Setup {
        regions: regions.to_vec(),
    }
    .encode()
}

fn page(page: u64) -> Frame {
    let mut builder = BatchBuilder::new(Vec::new(), 1);
    builder.tail(1).fill(1);
    builder.keep(0, 0, page);
    builder.finish()
}

fn zero(first_page: u64, count: u32) -> Frame {
    encode_zero(&[PageRun {
        region: 0,
        count,
        first_page,
    }])
}

fn quiet() -> Frame {
    Frame::new(Kind::Quiet, &[])
}

fn end(round: u32, last: bool) -> Frame {
    RoundMark { round, last }.encode(Kind::RoundEnd)
}

fn state(bytes: &[u8]) -> Frame {
    DeviceStateChunk {
        total: bytes.len() as u64,
        offset: 0,
        bytes,
    }
    .encode()
}

fn last(round: u32, state: &[u8]) -> Frame {
    Final {
        round,
        channels: vec![ChannelTotals::default()],
        device_state_bytes: state.len() as u64,
        device_state_sum: xxhash_rust::xxh3::xxh3_64(state),
        timings: Default::default(),
    }
    .encode()
}

#[test]
fn zero_pages_of_fresh_memory_are_not_touched_and_later_ones_are() {
    let mut bench = Bench::set_up();
    bench.take(zero(0, 100)).unwrap();
    assert!(bench.log().is_empty());
    bench.take(page(5)).unwrap();
    bench.take(zero(3, 4)).unwrap();
    assert_eq!(bench.log(), ["write 0:5+1", "zero 0:5+1"]);
    assert_eq!(bench.intake.totals.zero_pages, 104);
}

#[test]
fn a_whole_migration_in_order_is_accepted() {
    let mut bench = Bench::set_up();
    bench.take(page(1)).unwrap();
    let reported = bench.take(end(1, false)).unwrap();
    assert!(
        matches!(reported, Some(Arrived::RoundEnd(RoundMark { round: 1, last: false }, totals))
        if totals.pages == 1 && totals.frames == 1)
    );
    assert!(matches!(bench.take(quiet()), Ok(Some(Arrived::Quiet { at_ns })) if at_ns > 0));
    bench.take(page(2)).unwrap();
    bench.take(state(b"abc")).unwrap();
    bench.take(end(2, true)).unwrap();
    assert!(!bench.intake.is_finished());
    let done = bench.take(last(2, b"abc")).unwrap();
    assert!(matches!(done, Some(Arrived::Final(_, state)) if state == b"abc"));
    assert!(bench.intake.is_finished());
}

#[test]
fn the_monitor_is_told_of_each_round_but_the_last() {
    let mut bench = Bench::set_up();
    for frame in [end(1, false), end(2, false), quiet(), end(3, true)] {
        bench.take(frame).unwrap();
    }
    assert_eq!(bench.log(), ["round 1", "round 2"]);
}

#[test]
fn frames_out_of_place_are_refused() {
    type Steps = Vec<fn() -> Frame>;
    let cases: Vec<(&str, Steps)> = vec![
        ("pages before Setup", vec![|| page(1)]),
        ("Quiet before Setup", vec![quiet]),
        ("Setup twice", vec![|| setup(REGIONS), || setup(REGIONS)]),
        ("a round skipped", vec![|| setup(REGIONS), || end(2, false)]),
        ("Quiet twice", vec![|| setup(REGIONS), quiet, quiet]),
        (
            "device state before Quiet",
            vec![|| setup(REGIONS), || state(b"x")],
        ),
        (
            "Final before Quiet",
            vec![|| setup(REGIONS), || last(0, b"")],
        ),
        (
            "Final before the last round's end",
            vec![|| setup(REGIONS), quiet, || last(0, b"")],
        ),
        (
            "pages after the last round",
            vec![|| setup(REGIONS), quiet, || end(1, true), || page(1)],
        ),
        (
            "Final with another state",
            vec![|| setup(REGIONS), quiet, || end(1, true), || last(1, b"x")],
        ),
        (
            "Final of another round",
            vec![|| setup(REGIONS), quiet, || end(1, true), || last(2, b"")],
        ),
        (
            "a destination's word",
            vec![|| Frame::new(Kind::Complete, &[])],
        ),
    ];
    for (name, steps) in cases {
        let mut bench = Bench::new(0, 1);
        let (wrong, right) = steps.split_last().unwrap();
        for step in right {
            bench
                .take(step())
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        let refused = bench.take(wrong());
        assert!(
            matches!(refused, Err(ReceiveError::Protocol { .. })),
            "{name}: {refused:?}"
        );
    }
}

#[test]
fn a_data_channel_takes_memory_and_nothing_else() {
    for wrong in [quiet(), setup(REGIONS), state(b"x"), last(1, b"")] {
        let mut bench = Bench::new(1, 2);
        bench.intake.shared.set_up.store(true, Ordering::Relaxed);
        bench.take(page(512)).unwrap();
        let label = wrong.kind().label();
        assert!(
            matches!(bench.take(wrong), Err(ReceiveError::Protocol { .. })),
            "{label}"
        );
    }
}

#[test]
fn regions_that_differ_are_refused_with_the_difference() {
    let theirs = [Region {
        guest_address: 0,
        pages: 4096,
    }];
    let refused = Bench::new(0, 1).take(setup(&theirs));
    let Err(ReceiveError::Regions(why)) = refused else {
        panic!("{refused:?}")
    };
    assert!(why.contains("4096") && why.contains("2048"), "{why}");
}

#[test]
fn what_the_source_says_on_giving_up_is_passed_on() {
    let refused = Bench::set_up().take(crate::frame::encode_error("cancelled"));
    assert!(matches!(refused, Err(ReceiveError::Source(why)) if why == "cancelled"));
}
