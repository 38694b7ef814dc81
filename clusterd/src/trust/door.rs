//! The door of a node: connections from the network come in through TLS here, and each request is looked at
//! before it goes anywhere.
//!
//! Who does not shake hands in time, or of whom there are too many, is turned away without costing the others
//! anything: handshakes are run apart, and only so many of one source and in all.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use cluster_model::NodeId;
use futures::future::{Either, Ready, ready};
use proto::tls::{self, Member, Usage};
use rustls::pki_types::UnixTime;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tonic::Status;
use tonic::transport::server::Connected;

use super::Keeper;
use super::caller::{Caller, Shown};
use crate::net::Breakable;

/// Handshakes under way at a time with whoever is not at a node's address: each has a descriptor and some kilobytes.
const HANDSHAKES_MAX: usize = 256;
/// Of one source: a node opens some ten connections to another at once.
const HANDSHAKES_OF_ONE_MAX: usize = 64;
/// Connections without a certificate at a time: people and their programs.
const UNNAMED_MAX: usize = 256;
/// Of one source.
const UNNAMED_OF_ONE_MAX: usize = 128;
/// Connections that wait to be taken up.
const GUESTS_MAX: usize = 64;
/// The pause after `accept` failed (descriptors may be short for a moment).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Counts what each source has open, and all of them together.
#[derive(Debug, Default)]
struct Count {
    all: AtomicUsize,
    of: Mutex<HashMap<IpAddr, usize>>,
}

/// One counted; dropping it counts down.
#[derive(Debug)]
struct Counted {
    count: Arc<Count>,
    source: IpAddr,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The maps behind these locks are whole after any panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Count {
    /// Counts one more of `source`, unless there are too many.
    fn one(self: &Arc<Self>, source: IpAddr, of_one_max: usize, all_max: usize) -> Option<Counted> {
        let mut of = lock(&self.of);
        let here = of.get(&source).copied().unwrap_or(0);
        if here >= of_one_max || self.all.load(Ordering::Relaxed) >= all_max {
            return None;
        }
        of.insert(source, here + 1);
        self.all.fetch_add(1, Ordering::Relaxed);
        Some(Counted {
            count: self.clone(),
            source,
        })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut of = lock(&self.count.of);
        if let Some(here) = of.get_mut(&self.source) {
            *here -= 1;
            if *here == 0 {
                of.remove(&self.source);
            }
        }
        self.count.all.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The door. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Door {
    keeper: Keeper,
    /// Connections of each node, to be broken when it is removed.
    of_nodes: Arc<Mutex<HashMap<NodeId, Vec<Weak<AtomicBool>>>>>,
    /// Where the cluster's nodes are: strangers must not take their places in the queue.
    nodes_at: Arc<Mutex<HashSet<IpAddr>>>,
}

impl Door {
    /// The door that `keeper`'s papers open.
    pub fn new(keeper: Keeper) -> Door {
        Door {
            keeper,
            of_nodes: Arc::default(),
            nodes_at: Arc::default(),
        }
    }

    /// Nodes are at these addresses, and connect from there: however many strangers there are, each of these gets its share.
    pub fn expect(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        *lock(&self.nodes_at) = addresses.into_iter().collect();
    }

    /// Accepts on `listener`; gives connections that have shaken hands. It ends when the receiver is dropped.
    pub fn open(&self, listener: TcpListener) -> mpsc::Receiver<io::Result<Guest>> {
        let (guests, taken) = mpsc::channel(GUESTS_MAX);
        tokio::spawn(self.clone().keep(listener, guests));
        taken
    }

    async fn keep(self, listener: TcpListener, guests: mpsc::Sender<io::Result<Guest>>) {
        let (of_nodes, of_others) = (Arc::<Count>::default(), Arc::<Count>::default());
        let unnamed = Arc::<Count>::default();
        loop {
            let accepted = tokio::select! {
                () = guests.closed() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, from) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (count, all_max) = if lock(&self.nodes_at).contains(&from.ip()) {
                (&of_nodes, usize::MAX)
            } else {
                (&of_others, HANDSHAKES_MAX)
            };
            let Some(counted) = count.one(from.ip(), HANDSHAKES_OF_ONE_MAX, all_max) else {
                metrics::counter!("clusterd_connections_refused_total", "reason" => "handshakes")
                    .increment(1);
                continue;
            };
            let (door, guests, unnamed) = (self.clone(), guests.clone(), unnamed.clone());
            tokio::spawn(async move {
                let shaken = door.shake(stream, from, &unnamed).await;
                drop(counted);
                match shaken {
                    // The server may be stopping.
                    Ok(guest) => drop(guests.send(Ok(guest)).await),
                    Err(error) => {
                        metrics::counter!("clusterd_connections_refused_total", "reason" => "tls")
                            .increment(1);
                        tracing::debug!(%from, %error, "a connection was turned away");
                    }
                }
            });
        }
    }

    async fn shake(
        &self,
        stream: TcpStream,
        from: SocketAddr,
        unnamed: &Arc<Count>,
    ) -> io::Result<Guest> {
        let config = self
            .keeper
            .server_config()
            .ok_or_else(|| io::Error::other("this node belongs to no cluster yet"))?;
        stream.set_nodelay(true)?;
        socket2::SockRef::from(&stream).set_tcp_keepalive(&crate::net::keepalive())?;
        let stream = tls::accept(config, stream).await?;
        let shown = self.shown(&stream)?;
        let counted = match shown {
            Shown::Nothing => Some(
                unnamed
                    .one(from.ip(), UNNAMED_OF_ONE_MAX, UNNAMED_MAX)
                    .ok_or_else(|| {
                        io::Error::other("too many connections without a certificate")
                    })?,
            ),
            Shown::Local { .. } | Shown::Node(_) | Shown::Foreign(_) => None,
        };
        let broken = Arc::new(AtomicBool::new(false));
        if let Shown::Node(identity) = &shown {
            let mut of_nodes = lock(&self.of_nodes);
            let of_node = of_nodes.entry(identity.node).or_default();
            of_node.retain(|other| other.strong_count() > 0);
            of_node.push(Arc::downgrade(&broken));
        }
        let visitor = Visitor {
            caller: Caller {
                shown,
                from: from.to_string(),
            },
            _counted: counted,
        };
        let why = "its node was removed from the cluster";
        Ok(Breakable::of(visitor, stream, broken, why))
    }

    /// Whom the connection's certificate names; TLS has found it good, and this tells of whose cluster it is.
    fn shown(&self, stream: &tls::ServerStream<TcpStream>) -> io::Result<Shown> {
        let Some([leaf, above @ ..]) = stream.get_ref().1.peer_certificates() else {
            return Ok(Shown::Nothing);
        };
        let gone = || io::Error::other("the papers have gone meanwhile");
        let now = UnixTime::since_unix_epoch(Duration::from_nanos(proto::clock::realtime_ns()));
        let member = self
            .keeper
            .anchors()
            .ok_or_else(gone)?
            .member(leaf, above, Usage::Client, now)
            .map_err(io::Error::other)?;
        Ok(match member {
            Member::Ours(identity) => Shown::Node(identity),
            Member::Foreign(name, _) => Shown::Foreign(name),
        })
    }

    /// Breaks the connections of every node that `removed` says yes to.
    pub fn break_removed(&self, removed: impl Fn(NodeId) -> bool) {
        lock(&self.of_nodes).retain(|node, connections| {
            let removed = removed(*node);
            if removed {
                for connection in connections.iter().filter_map(Weak::upgrade) {
                    connection.store(true, Ordering::Relaxed);
                }
            }
            !removed
        });
    }
}

/// Who is at the other end of a connection.
#[derive(Debug)]
pub struct Visitor {
    caller: Caller,
    _counted: Option<Counted>,
}

/// A connection that has shaken hands.
pub type Guest = Breakable<tls::ServerStream<TcpStream>, Visitor>;

impl Connected for Guest {
    type ConnectInfo = Caller;
    fn connect_info(&self) -> Caller {
        self.whose().caller.clone()
    }
}

/// Says whether a caller may make a call at all: `/service/Method`.
pub type Judge = Arc<dyn Fn(&Caller, &str) -> Result<(), Status> + Send + Sync>;

/// Puts a [`Judge`] before every service.
#[derive(Clone)]
pub struct Guard {
    judge: Judge,
}

impl Guard {
    /// That judge.
    pub fn new(judge: Judge) -> Guard {
        Guard { judge }
    }
}

impl<S> tower::Layer<S> for Guard {
    type Service = Guarded<S>;
    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded {
            judge: self.judge.clone(),
            inner,
        }
    }
}

/// A service behind a [`Judge`].
#[derive(Clone)]
pub struct Guarded<S> {
    judge: Judge,
    inner: S,
}

type HttpRequest = tonic::codegen::http::Request<tonic::body::Body>;
type HttpResponse = tonic::codegen::http::Response<tonic::body::Body>;

impl<S> tower::Service<HttpRequest> for Guarded<S>
where
    S: tower::Service<HttpRequest, Response = HttpResponse>,
{
    type Response = HttpResponse;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<HttpResponse, S::Error>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: HttpRequest) -> Self::Future {
        let caller = request.extensions().get::<Caller>();
        let judged = match caller {
            Some(caller) => (self.judge)(caller, request.uri().path()),
            None => Err(Status::unauthenticated("it is not known who calls")),
        };
        match judged {
            Ok(()) => Either::Left(self.inner.call(request)),
            Err(status) => {
                metrics::counter!("clusterd_calls_refused_total").increment(1);
                Either::Right(ready(Ok(status.into_http())))
            }
        }
    }
}
