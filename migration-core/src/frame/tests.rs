//! Frames that come back as they were, and everything else that must not come in.

use super::payload::pick;
use super::*;
use crate::options::{Credentials, Ticket};
use crate::pages::Region;
use crate::stats::SendTimings;
use proptest::prelude::*;

const REGIONS: &[Region] = &[
    Region {
        guest_address: 0,
        pages: 1000,
    },
    Region {
        guest_address: 1 << 32,
        pages: 5000,
    },
];

fn credentials() -> Credentials {
    Credentials {
        migration_id: 42,
        ticket: Ticket([9; 32]),
    }
}

/// The payload of a frame, through its header.
fn payload(mut frame: Frame) -> Vec<u8> {
    let bytes = frame.seal(3).to_vec();
    let header = Header::decode(bytes.first_chunk().unwrap()).unwrap();
    assert_eq!((header.sequence, header.kind), (3, frame.kind()));
    let payload = bytes[HEADER_BYTES..].to_vec();
    header.verify(&payload).unwrap();
    payload
}

fn batch(runs: &[(u32, u64, usize)]) -> Frame {
    let mut builder = BatchBuilder::new(Vec::new(), BATCH_PAGES_MAX);
    for &(region, first_page, count) in runs {
        for at in 0..count as u64 {
            let page = first_page + at;
            builder.tail(1).fill(page as u8);
            builder.keep(0, region, page);
        }
    }
    builder.finish()
}

#[test]
fn every_payload_comes_back_as_it_was() {
    let hello = Hello::decode(&payload(Hello::new(2, 4, credentials()).encode())).unwrap();
    assert_eq!((hello.channel, hello.channels), (2, 4));
    assert!(hello.credentials.ticket.matches(&credentials().ticket));
    assert_eq!(hello.credentials.migration_id, 42);

    let setup = Setup {
        regions: REGIONS.to_vec(),
    };
    assert_eq!(Setup::decode(&payload(setup.encode())).unwrap(), setup);

    let mark = RoundMark {
        round: 7,
        last: true,
    };
    let coded = payload(mark.encode(Kind::RoundEnd));
    assert_eq!(RoundMark::decode(Kind::RoundEnd, &coded).unwrap(), mark);

    let chunk = DeviceStateChunk {
        total: 10,
        offset: 4,
        bytes: &[1, 2, 3],
    };
    assert_eq!(
        DeviceStateChunk::decode(&payload(chunk.encode()), 4).unwrap(),
        chunk
    );

    let mut totals = ChannelTotals::default();
    totals.add(5, 6, 77);
    let last = Final {
        round: 3,
        channels: vec![totals; 16],
        device_state_bytes: 11,
        device_state_sum: 12,
        timings: SendTimings {
            started_ns: 1,
            vcpus_stopped_ns: 2,
            quiet_ns: 3,
            final_sent_ns: 4,
            complete_ns: 0,
        },
    };
    assert_eq!(Final::decode(&payload(last.encode())).unwrap(), last);

    let coded = payload(batch(&[(0, 10, 3), (1, 512, 2)]));
    let (runs, data) = decode_pages(&coded, REGIONS, 0, 1).unwrap();
    assert_eq!(
        runs,
        vec![
            PageRun {
                region: 0,
                count: 3,
                first_page: 10
            },
            PageRun {
                region: 1,
                count: 2,
                first_page: 512
            },
        ]
    );
    assert_eq!(data[2 * PAGE_SIZE], 12);
    assert_eq!(data.len(), 5 * PAGE_SIZE);

    assert_eq!(
        decode_accepted(&payload(accepted(VERSION_MAX))).unwrap(),
        VERSION_MAX
    );
}

#[test]
fn the_largest_frame_of_each_kind_is_within_its_limit() {
    let singles = (0..BATCH_PAGES_MAX as u64)
        .map(|n| (1, n * 2, 1))
        .collect::<Vec<_>>();
    assert!(payload(batch(&singles)).len() <= Kind::Pages.limit());
    let runs = vec![
        PageRun {
            region: 0,
            count: 1,
            first_page: 0
        };
        RUNS_MAX
    ];
    assert!(payload(encode_zero(&runs)).len() <= Kind::Zero.limit());
    let regions = vec![REGIONS[0]; REGIONS_MAX];
    assert!(payload(Setup { regions }.encode()).len() <= Kind::Setup.limit());
    let bytes = vec![0; DEVICE_STATE_CHUNK_BYTES];
    let chunk = DeviceStateChunk {
        total: 1 << 20,
        offset: 0,
        bytes: &bytes,
    };
    assert!(payload(chunk.encode()).len() <= Kind::DeviceState.limit());
    assert!(
        Kind::ALL
            .iter()
            .all(|kind| kind.limit() <= PAYLOAD_BYTES_MAX)
    );
}

#[test]
fn a_long_reason_is_cut_at_a_character_and_printed_without_control_characters() {
    let reason = format!("{}é\u{1b}[2J", "x".repeat(REASON_BYTES_MAX - 1));
    let told = decode_error(&payload(encode_error(&reason)));
    assert_eq!(told, "x".repeat(REASON_BYTES_MAX - 1));
    assert_eq!(decode_error(b"a\x1b[2Jb\xff"), "a [2Jb\u{fffd}");
}

#[test]
fn runs_outside_the_machine_are_refused() {
    let cases = [
        (
            "no such region",
            PageRun {
                region: 2,
                count: 1,
                first_page: 0,
            },
        ),
        (
            "beyond the end",
            PageRun {
                region: 0,
                count: 1,
                first_page: 1000,
            },
        ),
        (
            "across the end",
            PageRun {
                region: 0,
                count: 2,
                first_page: 999,
            },
        ),
        (
            "empty",
            PageRun {
                region: 0,
                count: 0,
                first_page: 0,
            },
        ),
        (
            "overflowing",
            PageRun {
                region: 0,
                count: 2,
                first_page: u64::MAX,
            },
        ),
        (
            "across a chunk",
            PageRun {
                region: 1,
                count: 2,
                first_page: 511,
            },
        ),
    ];
    for (name, run) in cases {
        let coded = payload(encode_zero(&[run]));
        let refused = decode_zero(&coded, REGIONS, 0, 1);
        assert!(
            matches!(refused, Err(FrameError::Pages { .. })),
            "{name}: {refused:?}"
        );
    }
}

#[test]
fn a_page_on_another_page_s_channel_is_refused() {
    let coded = payload(batch(&[(0, 0, 1)]));
    assert!(decode_pages(&coded, REGIONS, 0, 2).is_ok());
    assert!(matches!(
        decode_pages(&coded, REGIONS, 1, 2),
        Err(FrameError::Pages { .. })
    ));
}

#[test]
fn the_newest_common_version_is_picked_and_none_is_refused() {
    assert_eq!(pick(1, 1, 1, 2), Ok(1), "an older source");
    assert_eq!(
        pick(2, 3, 1, 2),
        Ok(2),
        "a newer source that still speaks ours"
    );
    assert_eq!(pick(1, 2, 1, 2), Ok(2));
    assert!(matches!(
        pick(3, 4, 1, 2),
        Err(FrameError::Version { theirs_min: 3, .. })
    ));
    assert!(pick(1, 1, 2, 3).is_err());
}

#[test]
fn a_hello_with_impossible_numbers_is_refused() {
    for (channel, channels) in [(0, 0), (4, 4), (0, 17), (9, 2)] {
        let coded = payload(Hello::new(channel, channels, credentials()).encode());
        assert!(
            Hello::decode(&coded).is_err(),
            "channel {channel} of {channels}"
        );
    }
    let mut coded = payload(Hello::new(0, 1, credentials()).encode());
    coded[0] = 2;
    assert!(
        Hello::decode(&coded).is_err(),
        "the role of a data channel on channel 0"
    );
}

#[test]
fn device_state_out_of_order_or_too_large_is_refused() {
    let chunk = |total, offset| {
        let bytes = [0; 8];
        payload(
            DeviceStateChunk {
                total,
                offset,
                bytes: &bytes,
            }
            .encode(),
        )
    };
    assert!(DeviceStateChunk::decode(&chunk(16, 8), 8).is_ok());
    for (name, coded, arrived) in [
        ("a gap", chunk(16, 8), 0),
        ("twice", chunk(16, 0), 8),
        ("beyond its own total", chunk(7, 0), 0),
        (
            "larger than any",
            chunk(DEVICE_STATE_BYTES_MAX as u64 + 1, 0),
            0,
        ),
    ] {
        assert!(DeviceStateChunk::decode(&coded, arrived).is_err(), "{name}");
    }
}

#[test]
fn totals_differ_when_frames_are_swapped_or_lost() {
    let of = |sums: &[u64]| {
        let mut totals = ChannelTotals::default();
        sums.iter().for_each(|&sum| totals.add(1, 0, sum));
        totals
    };
    assert!(of(&[1, 2, 3]).compare(&of(&[1, 2, 3])).is_ok());
    assert!(of(&[1, 2, 3]).compare(&of(&[1, 3, 2])).is_err());
    assert!(of(&[1, 2, 3]).compare(&of(&[1, 2])).is_err());
}

/// Decodes whatever it is given as every kind; it must never panic.
fn decode_as_everything(bytes: &[u8]) {
    let _ = Hello::decode(bytes);
    let _ = Setup::decode(bytes);
    let _ = decode_pages(bytes, REGIONS, 0, 2);
    let _ = decode_zero(bytes, REGIONS, 1, 2);
    let _ = RoundMark::decode(Kind::RoundAck, bytes);
    let _ = DeviceStateChunk::decode(bytes, 5);
    let _ = Final::decode(bytes);
    let _ = decode_accepted(bytes);
    let _ = decode_error(bytes);
}

proptest! {
    #[test]
    fn garbage_is_no_header(bytes in any::<[u8; HEADER_BYTES]>()) {
        prop_assert!(Header::decode(&bytes).is_err());
    }

    #[test]
    fn a_changed_bit_is_noticed(bit in 0usize..(HEADER_BYTES + 3 * PAGE_SIZE + 20) * 8) {
        let mut frame = batch(&[(0, 10, 3)]);
        let mut bytes = frame.seal(1).to_vec();
        prop_assert_eq!(bytes.len(), HEADER_BYTES + 3 * PAGE_SIZE + 20);
        bytes[bit / 8] ^= 1 << (bit % 8);
        let noticed = match Header::decode(bytes.first_chunk().unwrap()) {
            Err(_) => true,
            Ok(header) => header.verify(&bytes[HEADER_BYTES..]).is_err(),
        };
        prop_assert!(noticed);
    }

    #[test]
    fn no_payload_makes_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        decode_as_everything(&bytes);
    }

    #[test]
    fn no_truncation_makes_a_decoder_panic(keep in 0usize..9000, kind in 0usize..4) {
        let whole = match kind {
            0 => payload(batch(&[(0, 10, 2)])),
            1 => payload(Setup { regions: REGIONS.to_vec() }.encode()),
            2 => payload(Hello::new(1, 2, credentials()).encode()),
            _ => payload(encode_zero(&[PageRun { region: 0, count: 3, first_page: 1 }])),
        };
        if keep < whole.len() {
            let cut = &whole[..keep];
            decode_as_everything(cut);
            let accepted = match kind {
                0 => decode_pages(cut, REGIONS, 0, 1).is_ok(),
                1 => Setup::decode(cut).is_ok(),
                2 => Hello::decode(cut).is_ok(),
                _ => decode_zero(cut, REGIONS, 0, 1).is_ok(),
            };
            prop_assert!(!accepted, "{} of {} bytes were accepted", keep, whole.len());
        }
    }
}
