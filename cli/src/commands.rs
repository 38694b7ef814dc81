//! One noun, one file.

pub mod audit;
pub mod balance;
pub mod cluster;
pub mod context;
pub mod dev;
pub mod events;
pub mod lease;
pub mod migration;
pub mod node;
pub mod rule;
pub mod token;
pub mod vm;
pub mod volume;
pub mod why;
