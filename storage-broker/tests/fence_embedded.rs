//! The fence's suite against the embedded server, in clear.

mod common;
#[path = "fence/suite.rs"]
mod suite;

const TLS: bool = false;
