//! What is on the wire: catches what TCP carries on this machine, and tells TLS 1.3 from everything else.
//!
//! Every flow is put together from its SYN on, up to a bound, and walked record by record (RFC 8446 section
//! 5.1): one byte that is in no record is found.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sched::{CloneFlags, unshare};
use socket2::{Domain, Protocol, Socket, Type};

/// Of each flow so much is looked at, bytes: handshakes, and a good deal of what follows.
const FLOW_BYTES_MAX: usize = 256 * 1024;
/// A NULL call with its credentials, and its reply, are shorter.
const RPC_QUESTION_BYTES_MAX: usize = 128;
/// How long what passed before a tap's end is still read.
const REST: Duration = Duration::from_secs(1);
/// Flows that are followed at most.
const FLOWS_MAX: usize = 20_000;
/// ETH_P_IP, in network order, as a socket's protocol.
const IPV4: i32 = 0x0800u16.to_be() as i32;

/// Moves this thread, and what it starts from now on, into a network that has a loopback and nobody else on it. Needs
/// root.
///
/// # Errors
/// What the system refuses.
pub fn enter_network_of_its_own() -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("no network namespace; this needs root")?;
    let output = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .output()
        .context("cannot run ip; install iproute2")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip link set lo up: {said}");
    Ok(())
}

/// From whom to whom.
pub type Flow = (SocketAddrV4, SocketAddrV4);

/// One direction of a connection, from its SYN on.
#[derive(Debug, Default)]
struct Bytes {
    /// The sequence number of the first byte.
    first: u32,
    /// What came in order.
    content: Vec<u8>,
    /// Segments that came early.
    early: BTreeMap<u32, Vec<u8>>,
}

impl Bytes {
    fn take(&mut self, sequence: u32, payload: &[u8]) {
        if self.content.len() < FLOW_BYTES_MAX && self.early.len() < 1_024 {
            let offset = sequence.wrapping_sub(self.first);
            // A retransmission of what is there already has a huge offset or a small one; both are looked at.
            if offset as usize <= FLOW_BYTES_MAX {
                self.early.entry(offset).or_insert_with(|| payload.to_vec());
            }
        }
        while let Some((&offset, _)) = self.early.first_key_value() {
            let have = self.content.len();
            if offset as usize > have {
                return;
            }
            let Some((_, payload)) = self.early.pop_first() else {
                return;
            };
            if let Some(new) = payload.get(have - offset as usize..) {
                self.content.extend_from_slice(new);
            }
        }
    }
}

/// Catches what passes, until it is stopped.
pub struct Tap {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<BTreeMap<Flow, Bytes>>,
}

impl Tap {
    /// Catches TCP between addresses of which one has a port that `wanted` says yes to. Needs CAP_NET_RAW.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn open(wanted: fn(u16) -> bool) -> io::Result<Tap> {
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(IPV4)))?;
        // Memory streams come in bursts.
        let _ = socket.set_recv_buffer_size(64 << 20);
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut flows = BTreeMap::new();
            let mut frame = vec![0; 70_000];
            let mut socket = &socket;
            let mut end = None;
            loop {
                let stopped = stopped.load(Ordering::Relaxed);
                match socket.read(&mut frame) {
                    Ok(length) => {
                        segment(&mut flows, &frame[..length], wanted);
                    }
                    // What passed before the stop has been read.
                    Err(_) if stopped => break,
                    Err(_) => {}
                }
                // Others may go on talking.
                if stopped && Instant::now() >= *end.get_or_insert_with(|| Instant::now() + REST) {
                    break;
                }
            }
            flows
        });
        Ok(Tap { stop, thread })
    }

    /// Stops; gives every flow's bytes as far as they came in one piece.
    ///
    /// # Errors
    /// When the catching thread panicked.
    pub fn close(self) -> io::Result<BTreeMap<Flow, Vec<u8>>> {
        self.stop.store(true, Ordering::Relaxed);
        let flows = self
            .thread
            .join()
            .map_err(|_| io::Error::other("the tap panicked"))?;
        Ok(flows
            .into_iter()
            .map(|(flow, bytes)| (flow, bytes.content))
            .filter(|(_, content)| !content.is_empty())
            .collect())
    }
}

/// Takes one Ethernet frame (RFC 791, RFC 9293 section 3.1).
fn segment(flows: &mut BTreeMap<Flow, Bytes>, frame: &[u8], wanted: fn(u16) -> bool) -> Option<()> {
    let ip = frame.get(14..)?;
    let header = usize::from(ip.first()? & 0x0f) * 4;
    let total = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
    if *ip.get(9)? != 6 {
        return None;
    }
    let address = |at: usize| -> Option<Ipv4Addr> {
        let octets: [u8; 4] = ip.get(at..at + 4)?.try_into().ok()?;
        Some(octets.into())
    };
    // With segmentation offload the length field may be 0.
    let tcp = ip.get(
        header..if total == 0 {
            ip.len()
        } else {
            total.min(ip.len())
        },
    )?;
    let port =
        |at: usize| -> Option<u16> { Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?])) };
    let (from, to) = (port(0)?, port(2)?);
    if !wanted(from) && !wanted(to) {
        return None;
    }
    let flow = (
        SocketAddrV4::new(address(12)?, from),
        SocketAddrV4::new(address(16)?, to),
    );
    let sequence = u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?);
    let payload = tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?;
    let syn = tcp.get(13)? & 0x02 != 0;
    if syn && flows.len() < FLOWS_MAX {
        let first = sequence.wrapping_add(1);
        let known = flows.entry(flow).or_default();
        if known.first != first {
            // A port that is used again is another connection.
            *known = Bytes {
                first,
                ..Bytes::default()
            };
        }
    } else if let Some(bytes) = flows.get_mut(&flow).filter(|_| !payload.is_empty()) {
        bytes.take(sequence, payload);
    }
    Some(())
}

/// Says what of a flow is not TLS 1.3.
///
/// # Errors
/// Where, and what stands there.
pub fn is_tls13(content: &[u8]) -> Result<(), String> {
    let mut at = 0;
    let mut first = true;
    while at + 5 <= content.len() {
        let record = &content[at..];
        let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
        let known = (20..=23).contains(&record[0]) && record[1] == 3 && record[2] <= 3;
        if !known || length > 16_384 + 256 {
            return Err(format!("byte {at} begins no record: {:?}", &record[..5]));
        }
        if first {
            first = false;
            hello(record)?;
        }
        at += 5 + length;
    }
    if first {
        return Err(format!("{} bytes and no record", content.len()));
    }
    Ok(())
}

/// The same of a connection that begins with RPC's question for TLS (RFC 9289 section 4.1): one record of RPC in clear, then
/// TLS.
///
/// # Errors
/// Where, and what stands there.
pub fn is_rpc_with_tls(content: &[u8]) -> Result<(), String> {
    let mark = content.first_chunk::<4>().ok_or("no record of RPC")?;
    let length = (u32::from_be_bytes(*mark) & 0x7fff_ffff) as usize;
    if length > RPC_QUESTION_BYTES_MAX {
        return Err(format!("a record of RPC with {length} bytes in clear"));
    }
    match content.get(4 + length..) {
        // Somebody who only tried whether the server listens, or asks.
        None | Some([]) => Ok(()),
        Some(rest) => is_tls13(rest),
    }
}

/// The first record of either side must be a hello, and the server's must choose TLS 1.3 by its extension (RFC 8446
/// section 4.2.1).
fn hello(record: &[u8]) -> Result<(), String> {
    let (kind, message) = (record[0], record.get(5).copied());
    match (kind, message) {
        // An alert: the other side was turned away.
        (21, _) | (22, Some(1)) => Ok(()),
        (22, Some(2)) => {
            let chosen = record.windows(6).any(|bytes| bytes == [0, 43, 0, 2, 3, 4]);
            chosen
                .then_some(())
                .ok_or_else(|| "a server's hello that does not choose TLS 1.3".into())
        }
        _ => Err(format!("the first record is of type {kind}, {message:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_clear_are_told_from_records() {
        let hello = [22, 3, 1, 0, 4, 1, 0, 0, 0];
        let data = [23, 3, 3, 0, 2, 9, 9];
        let good = [hello.as_slice(), &data].concat();
        assert_eq!(is_tls13(&good), Ok(()));
        assert!(is_tls13(b"PRI * HTTP/2.0\r\n").is_err());
        assert!(is_tls13(&data).is_err(), "data before a hello");
        assert!(is_tls13(&[good.as_slice(), b"GET / HTTP/1.1"].concat()).is_err());
        let older = [22, 3, 3, 0, 4, 2, 0, 0, 0];
        assert!(is_tls13(&older).is_err(), "a server that speaks TLS 1.2");
    }

    #[test]
    fn a_tap_in_a_network_of_its_own_does_not_hear_what_others_say() {
        if !crate::all_or_skip("a tap in a network of its own") {
            return;
        }
        let conversation = || {
            let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let address = listener.local_addr().unwrap();
            let mut client = std::net::TcpStream::connect(address).unwrap();
            std::io::Write::write_all(&mut client, b"in clear").unwrap();
            let (mut server, _) = listener.accept().unwrap();
            let mut heard = [0; 8];
            server.read_exact(&mut heard).unwrap();
            address.port()
        };
        // Both taps are open while both talk; a thread alone moves, this one stays where the others are.
        let (moved, is_moved) = std::sync::mpsc::channel();
        let (talked, has_talked) = std::sync::mpsc::channel::<u16>();
        let inside = std::thread::spawn(move || {
            enter_network_of_its_own().unwrap();
            let tap = Tap::open(|_| true).unwrap();
            moved.send(()).unwrap();
            let elsewhere = has_talked.recv().unwrap();
            let own = conversation();
            let ports = ports(&tap.close().unwrap());
            assert!(ports.contains(&own), "{own} of {ports:?}");
            (elsewhere, ports)
        });
        is_moved.recv().unwrap();
        let tap = Tap::open(|_| true).unwrap();
        let own = conversation();
        talked.send(own).unwrap();
        let (elsewhere, heard_inside) = inside.join().unwrap();
        assert!(ports(&tap.close().unwrap()).contains(&own));
        assert!(!heard_inside.contains(&elsewhere), "{heard_inside:?}");
    }

    fn ports(flows: &BTreeMap<Flow, Vec<u8>>) -> Vec<u16> {
        flows.keys().map(|(_, to)| to.port()).collect()
    }

    #[test]
    fn segments_out_of_order_and_twice_are_put_together() {
        let mut bytes = Bytes {
            first: u32::MAX - 1,
            ..Bytes::default()
        };
        bytes.take(1, b"def");
        bytes.take(u32::MAX - 1, b"abc");
        bytes.take(u32::MAX - 1, b"abc");
        bytes.take(4, b"g");
        assert_eq!(bytes.content, b"abcdefg");
    }
}
