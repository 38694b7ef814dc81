//! A relay between loopback addresses: every connection of a test cluster goes through it, so that any
//! link can be cut, one way or both, and healed, as a switch would do it.
//!
//! A cut link loses nothing and resets nothing: bytes wait, as they would in TCP's retransmissions, and
//! new connections are accepted but carry nothing. Each party connects from its own loopback address; that
//! is how the relay knows who talks to whom.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How much is read at a time.
const CHUNK: usize = 256 * 1024;

/// One direction of a link: from a party's address to another's.
type Way = (IpAddr, IpAddr);

/// The relay; dropping it closes every connection.
pub struct Relay {
    ways: Arc<Ways>,
    tasks: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Ways {
    open: Mutex<HashMap<Way, watch::Sender<bool>>>,
}

impl Ways {
    /// Whether bytes may pass, now and from now on.
    fn watch(&self, way: Way) -> watch::Receiver<bool> {
        let mut open = self
            .open
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        open.entry(way)
            .or_insert_with(|| watch::channel(true).0)
            .subscribe()
    }

    fn set(&self, way: Way, passes: bool) {
        let mut open = self
            .open
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        open.entry(way)
            .or_insert_with(|| watch::channel(true).0)
            .send_replace(passes);
    }
}

impl Relay {
    /// Relays each `(front, back)`: what connects to `front` is carried to `back`.
    ///
    /// # Errors
    /// When a front address cannot be bound.
    pub async fn start(pairs: &[(SocketAddr, SocketAddr)]) -> io::Result<Relay> {
        let ways = Arc::new(Ways::default());
        let mut tasks = Vec::new();
        for &(front, back) in pairs {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind(front)?;
            let listener = socket.listen(1024)?;
            tasks.push(tokio::spawn(accept(listener, back, ways.clone())));
        }
        Ok(Relay { ways, tasks })
    }

    /// Cuts both ways between two parties.
    pub fn cut(&self, a: IpAddr, b: IpAddr) {
        self.cut_one_way(a, b);
        self.cut_one_way(b, a);
    }

    /// Cuts what `from` sends to `to`.
    pub fn cut_one_way(&self, from: IpAddr, to: IpAddr) {
        self.ways.set((from, to), false);
    }

    /// Heals both ways.
    pub fn heal(&self, a: IpAddr, b: IpAddr) {
        self.ways.set((a, b), true);
        self.ways.set((b, a), true);
    }

    /// Heals everything.
    pub fn heal_all(&self) {
        let open = self
            .ways
            .open
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        for way in open.values() {
            way.send_replace(true);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn accept(listener: TcpListener, back: SocketAddr, ways: Arc<Ways>) {
    // Connections end with the listener's task: they are its children.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, from)) = accepted else { continue };
                let there = ways.watch((from.ip(), back.ip()));
                let home = ways.watch((back.ip(), from.ip()));
                connections.spawn(carry(client, from, back, there, home));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn carry(
    client: TcpStream,
    from: SocketAddr,
    back: SocketAddr,
    mut there: watch::Receiver<bool>,
    home: watch::Receiver<bool>,
) {
    // A connect through a cut link hangs until the link is whole.
    if there.wait_for(|passes| *passes).await.is_err() {
        return;
    }
    let connect = async {
        let socket = TcpSocket::new_v4()?;
        // The other side sees the party's own address, as it would without the relay.
        socket.bind(SocketAddr::new(from.ip(), 0))?;
        socket.connect(back).await
    };
    let Ok(server) = connect.await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    tokio::select! {
        () = pump(client_read, server_write, there) => {}
        () = pump(server_read, client_write, home) => {}
    }
}

/// Carries one direction until it ends; the end of one ends the connection.
async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut passes: watch::Receiver<bool>,
) {
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = match from.read(&mut chunk).await {
            Ok(0) | Err(_) => {
                // The news of an end does not pass a cut link either.
                let _ = passes.wait_for(|passes| *passes).await;
                return;
            }
            Ok(count) => count,
        };
        if passes.wait_for(|passes| *passes).await.is_err()
            || to.write_all(&chunk[..count]).await.is_err()
        {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_cut_link_holds_bytes_and_a_healed_one_delivers_them() {
        let server = TcpListener::bind("127.0.0.1:0").await.expect("a server");
        let back = server.local_addr().expect("an address");
        let probe = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let front = probe.local_addr().expect("an address");
        drop(probe);
        let relay = Relay::start(&[(front, back)]).await.expect("a relay");
        let mut client = TcpStream::connect(front).await.expect("a connection");
        let (mut served, _) = server.accept().await.expect("accepted");
        let mut byte = [0u8; 1];
        client.write_all(b"a").await.expect("sent");
        served.read_exact(&mut byte).await.expect("received");
        let me = client.local_addr().expect("an address").ip();
        relay.cut(me, back.ip());
        client.write_all(b"b").await.expect("sent");
        let nothing =
            tokio::time::timeout(Duration::from_millis(100), served.read_exact(&mut byte)).await;
        assert!(nothing.is_err(), "a byte passed a cut link");
        relay.heal(me, back.ip());
        served
            .read_exact(&mut byte)
            .await
            .expect("received after healing");
        assert_eq!(&byte, b"b");
    }
}
