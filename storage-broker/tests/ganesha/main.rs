//! The client, the fence and the disks against NFS-Ganesha, a server that is not ours.

mod disks;
mod flood;
mod semantics;
mod server;

#[path = "../common/mod.rs"]
mod common;

use std::time::Duration;

use bytes::Bytes;
use storage_broker::dialer::Dialer;
use storage_broker::nfs::{NfsClient, mount};
use storage_broker::volume::VolumeUrl;

/// No call takes so long, on however loaded a machine.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// The node under whose uid monitors do I/O.
const NODE: u32 = 60_001;

async fn connect(ganesha: &server::Ganesha) -> NfsClient {
    let VolumeUrl::Nfs(url) = ganesha.url().parse().unwrap() else {
        panic!("not NFS")
    };
    mount(&url, &Dialer::default(), CALL_TIMEOUT).await.unwrap()
}

fn block(value: u8, bytes: usize) -> Bytes {
    Bytes::from(vec![value; bytes])
}
