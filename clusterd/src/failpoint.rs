//! Failpoints: see [`proto::failpoint`].

pub use proto::failpoint::{Tripped, reach};
