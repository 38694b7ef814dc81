//! A request takes effect once, however often it is sent.

use cluster_model::{Envelope, Reply};

use crate::world::World;

/// Checks the entry that was just committed.
pub fn check(world: &mut World, envelope: &Envelope, reply: Option<&Reply>) {
    let now = world.truth.log.len() as u64;
    let Some(Reply::Done { index, .. }) = reply else {
        return;
    };
    if index.0 != now {
        return;
    }
    if let Some(before) = world.truth.done.insert(envelope.request.clone(), now) {
        let what = format!(
            "{} took effect at {before} and again at {now}",
            envelope.request.0
        );
        world.violate("a request takes effect once", what);
    }
}
