//! What a guest flushed is there for every later owner; and no write lands after a newer owner had an answer.

use cluster_model::{Token, VmId};

use crate::world::World;

/// A guest has looked at its disk, and found something wrong.
pub fn lost(world: &mut World, wrong: String) {
    world.violate("a flushed write is never lost", wrong);
}

/// A write has landed, though `newer` was answered before.
pub fn late(world: &mut World, vm: VmId, token: Token, newer: Token) {
    let what = format!("{vm}: a write of {token} landed after {newer} was answered");
    world.violate("late landing", what);
}
