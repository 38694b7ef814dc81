//! The network interface on one end of a datagram pair in the tap's place: a frame a read, a frame a write.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::testing::Bench;
use crate::devices::virtio::driver::{BUFFERS, Driver};

const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);

fn device(bench: &Bench) -> (Arc<Net>, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let tap = Tap::from_file(File::from(OwnedFd::from(near))).unwrap();
    let config = NetConfig {
        index: 0,
        address: 0xd000_1000,
        irq: 6,
        mac: MAC,
    };
    (Net::new(&bench.context, &config, tap).unwrap(), far)
}

/// Both queues: receive, send.
fn drivers(net: &Net) -> (Driver<'_>, Driver<'_>) {
    let receive = Driver::start(net.transport(), FEATURE_MAC | FEATURE_STATUS);
    (receive, Driver::queue(net.transport(), 1))
}

/// An ARP request by the guest: who has 10.0.0.1, tell 10.0.0.7.
fn arp() -> Vec<u8> {
    announce::gratuitous_arp(MAC, Ipv4Addr::new(10, 0, 0, 7)).to_vec()
}

async fn receive_frame(far: UnixDatagram) -> Vec<u8> {
    tokio::task::spawn_blocking(move || {
        let mut frame = vec![0; FRAME_BYTES_MAX];
        let length = far.recv(&mut frame).unwrap();
        frame[..length].to_vec()
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn a_frame_reaches_the_guest_behind_a_header() {
    let bench = Bench::new();
    let (net, far) = device(&bench);
    net.resume();
    let (mut receive, _) = drivers(&net);
    receive.chain(0, &[(BUFFERS, 12, true), (BUFFERS + 0x1000, 1514, true)]);
    receive.offer(0);
    receive.notify();
    far.send(b"fourteen bytes and more").unwrap();
    assert_eq!(receive.wait_used().await, (0, 12 + 23));
    let memory = net.transport().memory();
    assert_eq!(
        memory.read_obj::<[u8; 12]>(GuestAddress(BUFFERS)).unwrap(),
        HEADER
    );
    assert_eq!(
        &memory
            .read_obj::<[u8; 23]>(GuestAddress(BUFFERS + 0x1000))
            .unwrap(),
        b"fourteen bytes and more"
    );
}

#[tokio::test]
async fn a_frame_waits_for_a_buffer_and_one_that_is_too_large_is_dropped() {
    let bench = Bench::new();
    let (net, far) = device(&bench);
    net.resume();
    let (mut receive, _) = drivers(&net);
    far.send(&[7; 100]).unwrap();
    far.send(&[8; 50]).unwrap();
    receive.chain(0, &[(BUFFERS, 64, true)]);
    receive.offer(0);
    receive.notify();
    assert_eq!(receive.wait_used().await, (0, 0));
    receive.offer(0);
    receive.notify();
    // The second frame has 50 bytes and finds 52.
    assert_eq!(receive.wait_used().await, (0, 62));
}

#[tokio::test]
async fn the_guests_frames_go_out_without_their_header_and_malformed_ones_do_not() {
    let bench = Bench::new();
    let (net, far) = device(&bench);
    net.resume();
    let (_receive, mut send) = drivers(&net);
    let memory = net.transport().memory();
    memory
        .write_slice(&arp(), GuestAddress(BUFFERS + 12))
        .unwrap();
    for (pieces, what) in [
        (vec![(BUFFERS, 11, false)], "no whole header"),
        (vec![(BUFFERS, 12 + 13, false)], "no whole Ethernet header"),
        (
            vec![(BUFFERS, 12 + FRAME_BYTES_MAX as u32 + 1, false)],
            "too long",
        ),
        (vec![(BUFFERS, 100, true)], "nothing to read"),
        (
            vec![(BUFFERS, 20, false), (BUFFERS + 20, 52, false)],
            "right",
        ),
    ] {
        send.chain(0, &pieces);
        send.offer(0);
        send.notify();
        assert_eq!(send.wait_used().await, (0, 0), "{what}");
    }
    assert_eq!(receive_frame(far).await, arp());
}

#[tokio::test]
async fn after_a_migration_the_interface_announces_what_its_guest_claimed() {
    let bench = Bench::new();
    let (net, _far) = device(&bench);
    net.resume();
    let (_receive, mut send) = drivers(&net);
    net.transport()
        .memory()
        .write_slice(&arp(), GuestAddress(BUFFERS + 12))
        .unwrap();
    send.chain(0, &[(BUFFERS, 72, false)]);
    send.offer(0);
    send.notify();
    send.wait_used().await;
    net.quiesce().await;
    let saved = net.save().unwrap();

    let other = Bench::new();
    let (there, far) = device(&other);
    there.restore(1, &saved).unwrap();
    assert_eq!(there.save().unwrap(), saved);
    there.announce().await.unwrap();
    let again = far.try_clone().unwrap();
    assert_eq!(receive_frame(far).await, announce::rarp(MAC));
    assert_eq!(receive_frame(again).await, arp());
}

#[tokio::test]
async fn a_state_of_another_interface_is_refused() {
    let bench = Bench::new();
    let (net, _far) = device(&bench);
    let saved = String::from_utf8(net.save().unwrap()).unwrap();
    let other = saved.replace("52:54:00:01:02:03", "52:54:00:01:02:04");
    assert_ne!(saved, other);
    for (version, state) in [(1, other.as_str()), (2, saved.as_str()), (1, "")] {
        assert!(net.restore(version, state.as_bytes()).is_err());
    }
    net.restore(1, saved.as_bytes()).unwrap();
}

#[test]
fn the_announcements_are_the_frames_of_the_standards() {
    let rarp = announce::rarp(MAC);
    let mac = MAC.0;
    assert_eq!(rarp[..6], [0xff; 6]);
    assert_eq!(rarp[6..12], mac);
    assert_eq!(rarp[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    assert_eq!((&rarp[22..28], &rarp[32..38]), (&mac[..], &mac[..]));
    assert_eq!(rarp[38..], [0; 22]);
    let arp = announce::gratuitous_arp(MAC, Ipv4Addr::new(10, 1, 2, 3));
    assert_eq!(arp[12..22], [0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
    assert_eq!(
        (&arp[28..32], &arp[38..42]),
        (&[10, 1, 2, 3][..], &[10, 1, 2, 3][..])
    );
    assert_eq!(
        announce::claimed_address(&arp, MAC),
        Some(Ipv4Addr::new(10, 1, 2, 3))
    );
    assert_eq!(announce::claimed_address(&arp, MacAddress([2; 6])), None);
    assert_eq!(announce::claimed_address(&rarp, MAC), None);
    for length in 0..32 {
        assert_eq!(announce::claimed_address(&arp[..length], MAC), None);
    }
}

#[test]
fn only_addresses_of_one_interface_are_mac_addresses() {
    assert_eq!("52:54:00:01:02:03".parse(), Ok(MAC));
    assert_eq!(MAC.to_string(), "52:54:00:01:02:03");
    for text in [
        "",
        "52:54:00:01:02",
        "52:54:00:01:02:03:04",
        "53:54:00:01:02:03",
        "5:4:0:1:2:3",
        "00:00:00:00:00:00",
        "5g:54:00:01:02:03",
        "+2:54:00:01:02:03x",
    ] {
        assert!(text.parse::<MacAddress>().is_err(), "{text}");
    }
}
