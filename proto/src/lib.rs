//! Baton's wire contracts: code generated from `proto/*.proto`, and how parties connect.

#![forbid(unsafe_code)]

/// What `clusterd` says to a monitor.
#[allow(missing_docs, clippy::all)]
pub mod monitor {
    tonic::include_proto!("baton.monitor.v1");
}

/// What `clusterd` asks of the storage broker.
#[allow(missing_docs, clippy::all)]
pub mod broker {
    tonic::include_proto!("baton.broker.v1");
}

/// What nodes say to each other.
#[allow(missing_docs, clippy::all)]
pub mod peer {
    tonic::include_proto!("baton.peer.v1");
}

/// What `clusterctl` says to a node.
#[allow(missing_docs, clippy::all)]
pub mod admin {
    tonic::include_proto!("baton.admin.v1");
}

pub mod clock;
pub mod core_dump;
pub mod failpoint;
pub mod testing;
pub mod tls;
pub mod token;
pub mod unix;
