//! The write log: order, commits, replays; and a random walk against a server that reorders.

use super::*;

const A: Verifier = [1; 8];
const B: Verifier = [2; 8];

fn data(value: u8, length: usize) -> Bytes {
    Bytes::from(vec![value; length])
}

fn send(log: &mut WriteLog) -> Option<(Sequence, u64, Bytes)> {
    let next = log.next_sendable()?;
    log.mark_sent(next.0);
    Some(next)
}

#[test]
fn overlapping_writes_wait_for_each_other_and_others_do_not() {
    let mut log = WriteLog::default();
    log.push(0, data(1, 8));
    log.push(100, data(2, 8));
    log.push(4, data(3, 8));
    assert_eq!(send(&mut log).unwrap().0, 0);
    assert_eq!(send(&mut log).unwrap().0, 1);
    assert_eq!(
        send(&mut log),
        None,
        "the third overlaps the first, which is unanswered"
    );
    assert!(log.answered(0, 8, false, A).complete);
    assert_eq!(send(&mut log).unwrap().0, 2);
}

#[test]
fn a_commit_lets_go_only_what_was_answered_before_it_was_sent() {
    let mut log = WriteLog::default();
    log.push(0, data(1, 8));
    send(&mut log);
    log.answered(0, 8, false, A);
    let stamp = log.commit_stamp();
    log.push(8, data(2, 8));
    send(&mut log);
    log.answered(1, 8, false, A);
    assert!(log.committed(stamp, A));
    assert!(log.committed_before(1) && !log.committed_before(2));
    assert_eq!((log.bytes(), log.unstable_bytes()), (8, 8));
}

#[test]
fn another_verifier_keeps_everything_and_says_so() {
    let mut log = WriteLog::default();
    log.push(0, data(1, 8));
    log.push(8, data(2, 8));
    send(&mut log);
    send(&mut log);
    assert!(!log.answered(0, 8, false, A).verifier_changed);
    assert!(log.answered(1, 8, false, B).verifier_changed);
    assert!(
        !log.committed(log.commit_stamp(), B),
        "half of it was taken in an earlier life"
    );
    assert!(!log.committed_before(1));
    log.replay();
    assert_eq!(send(&mut log).unwrap().0, 0);
    assert_eq!(send(&mut log).unwrap().0, 1);
}

#[test]
fn a_short_write_goes_on_where_the_server_stopped_and_a_replay_begins_anew() {
    let mut log = WriteLog::default();
    log.push(100, data(1, 10));
    send(&mut log);
    assert!(!log.answered(0, 4, false, A).complete);
    let (_, offset, rest) = send(&mut log).unwrap();
    assert_eq!((offset, rest.len()), (104, 6));
    log.replay();
    let (_, offset, rest) = send(&mut log).unwrap();
    assert_eq!((offset, rest.len()), (100, 10));
}

#[test]
fn a_stable_write_over_an_uncommitted_one_is_kept_to_be_sent_again_after_it() {
    let mut log = WriteLog::default();
    log.push(0, data(1, 8));
    send(&mut log);
    log.answered(0, 8, false, A);
    log.push(4, data(2, 8));
    send(&mut log);
    log.answered(1, 8, true, A);
    log.replay();
    assert_eq!(send(&mut log).unwrap().0, 0);
    log.answered(0, 8, false, B);
    assert_eq!(
        send(&mut log).unwrap().0,
        1,
        "else the older data would stand"
    );
    // Alone, a stable write is done at once.
    let mut log = WriteLog::default();
    log.push(0, data(1, 8));
    send(&mut log);
    log.answered(0, 8, true, A);
    assert!(log.is_empty());
}

/// A server in miniature: executes what is in flight in random order, restarts at random and
/// forgets what was not committed. Whatever happens, after a final replay and commit the file is
/// what the guest wrote, in the guest's order.
#[test]
fn the_file_ends_as_the_guest_wrote_it_however_server_and_links_behave() {
    const SIZE: usize = 64;
    for seed in 0..400u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut random = |bound: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % bound as u64) as usize
        };
        let mut log = WriteLog::default();
        let (mut guest, mut volatile, mut durable) = ([0u8; SIZE], [0u8; SIZE], [0u8; SIZE]);
        let mut verifier = 1u8;
        let mut in_flight: Vec<(Sequence, u64, Bytes)> = Vec::new();
        let mut value = 0u8;
        for step in 0..400 {
            let ending = step >= 340;
            match random(10) {
                0..4 if !ending => {
                    value = value.wrapping_add(1);
                    let offset = random(SIZE);
                    let length = 1 + random((SIZE - offset).min(16));
                    guest[offset..offset + length].fill(value);
                    log.push(offset as u64, data(value, length));
                }
                4 if !ending => {
                    // A re-key; after a restart, or because the connection was lost. What was in
                    // flight may have been executed or not, but is refused from now on.
                    if random(2) == 0 {
                        volatile = durable;
                        verifier = verifier.wrapping_add(1);
                    } else {
                        for (_, offset, data) in in_flight.drain(..) {
                            if random(2) == 0 {
                                let offset = offset as usize;
                                volatile[offset..offset + data.len()].copy_from_slice(&data);
                            }
                        }
                    }
                    in_flight.clear();
                    log.replay();
                }
                5 => {
                    let stamp = log.commit_stamp();
                    durable = volatile;
                    if !log.committed(stamp, [verifier; 8]) {
                        in_flight.clear();
                        log.replay();
                    }
                }
                6..8 if !in_flight.is_empty() => {
                    let (sequence, offset, data) = in_flight.swap_remove(random(in_flight.len()));
                    let offset = offset as usize;
                    let count = if random(4) == 0 {
                        1 + random(data.len())
                    } else {
                        data.len()
                    };
                    volatile[offset..offset + count].copy_from_slice(&data[..count]);
                    let stable = random(4) == 0;
                    if stable {
                        durable[offset..offset + count].copy_from_slice(&data[..count]);
                    }
                    log.answered(sequence, count, stable, [verifier; 8]);
                }
                _ => in_flight.extend(send(&mut log)),
            }
        }
        while !log.is_empty() {
            in_flight.extend(std::iter::from_fn(|| send(&mut log)));
            while !in_flight.is_empty() {
                let (sequence, offset, data) = in_flight.swap_remove(random(in_flight.len()));
                let offset = offset as usize;
                volatile[offset..offset + data.len()].copy_from_slice(&data);
                log.answered(sequence, data.len(), false, [verifier; 8]);
            }
            durable = volatile;
            let stamp = log.commit_stamp();
            if log.answered_before(log.end()) && !log.committed(stamp, [verifier; 8]) {
                log.replay();
            }
        }
        assert_eq!(durable, guest, "seed {seed}");
        assert_eq!((log.bytes(), log.unstable_bytes()), (0, 0), "seed {seed}");
    }
}
