//! Everything that is fuzzed, one module each.

use crate::target::Target;

pub mod migration_stream;

/// All of them.
pub const TARGETS: &[Target] = &[migration_stream::TARGET];
