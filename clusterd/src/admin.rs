//! The admin API: what `clusterctl` asks, answered by any node; changes are handed to the leader.
//!
//! Every request is parsed into the model's own types at this door. Whatever is refused says why and
//! what to try, and carries a stable code in the metadata key `baton-code`.

mod asker;
mod authority;
mod backend;
mod cluster;
mod error;
mod events;
mod migrations;
mod node_backend;
mod nodes;
mod plans;
mod predict;
mod service;
pub mod soft;
#[cfg(test)]
mod tests;
mod tokens;
pub mod views;
mod vms;
mod volume_security;
mod volumes;

pub use asker::Asker;
pub use backend::{Backend, BackendError, ConsoleChunks};
pub use node_backend::NodeBackend;
pub use service::AdminService;
