//! The fence's suite against an embedded server that refuses everything without TLS: the same assertions.

mod common;
#[path = "fence/suite.rs"]
mod suite;

const TLS: bool = true;
