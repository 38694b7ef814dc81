//! The NFS server with the machine's one file, and what is under way to it.
//!
//! ```text
//!  WRITE    sent ──► checked against the file's group ──► landed        (or refused at the check)
//!  SETATTR  sent ──► executed, and again, until it is answered; for ever if nobody waits for the answer
//! ```
//!
//! Between check and landing the server holds a WRITE that no later SETATTR stops: the residue that the
//! settle time bounds. A reply to a WRITE comes with its landing; a reply that is lost leaves its sender where
//! a WRITE that never lands leaves it, so it is not modelled apart.

use crate::bounds::WRITES_MAX;
use crate::host::Node;
use crate::log::Token;

/// A file's group: the token of a claim, as the wire carries it.
pub type Group = u8;

/// A set of groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Groups(u32);

impl Groups {
    /// Adds one.
    pub fn insert(&mut self, group: Group) {
        self.0 |= 1 << group;
    }

    /// Takes one out.
    pub fn remove(&mut self, group: Group) {
        self.0 &= !(1 << group);
    }

    /// Whether it is in the set.
    pub fn contains(self, group: Group) -> bool {
        self.0 & (1 << group) != 0
    }

    /// All of both.
    pub fn union(self, other: Groups) -> Groups {
        Groups(self.0 | other.0)
    }

    /// One after the other.
    pub fn iter(self) -> impl Iterator<Item = Group> {
        (0..32).filter(move |&group| self.contains(group))
    }
}

/// A WRITE that has not landed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Write {
    /// Whose.
    pub node: Node,
    /// The token that its guest ran under.
    pub token: Token,
    /// The group that the call carries.
    pub group: Group,
    /// Past the server's check.
    pub checked: bool,
}

/// The server and the network before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Storage {
    /// The file's group.
    pub group: Group,
    /// SETATTRs whose answer is awaited.
    pub awaited: Groups,
    /// Those of them that were executed at least once.
    pub executed: Groups,
    /// SETATTRs whose answer nobody awaits: they may be executed at any time, any number of times.
    pub stray: Groups,
    /// In order, the empty places last.
    writes: [Option<Write>; WRITES_MAX],
}

impl Storage {
    /// The file belongs to a group, and nothing is under way.
    pub fn new(group: Group) -> Storage {
        Storage {
            group,
            awaited: Groups::default(),
            executed: Groups::default(),
            stray: Groups::default(),
            writes: [None; WRITES_MAX],
        }
    }

    /// The WRITEs under way.
    pub fn writes(&self) -> impl Iterator<Item = Write> + '_ {
        self.writes.iter().flatten().copied()
    }

    /// A WRITE is sent. The caller has looked whether there is room.
    pub fn send(&mut self, write: Write) {
        debug_assert!(self.writes[WRITES_MAX - 1].is_none());
        self.writes[WRITES_MAX - 1] = Some(write);
        self.sort();
    }

    /// A WRITE is gone: landed or refused.
    pub fn take(&mut self, write: Write) {
        if let Some(place) = self.writes.iter_mut().find(|known| **known == Some(write)) {
            *place = None;
        }
        self.sort();
    }

    fn sort(&mut self) {
        self.writes.sort_by_key(|write| (write.is_none(), *write));
    }

    /// Whether the server holds a WRITE past its check that carries another group.
    pub fn holds_residue(&self, group: Group) -> bool {
        self.writes()
            .any(|write| write.checked && write.group != group)
    }

    /// Nobody waits for this SETATTR's answer any more.
    pub fn stop_waiting(&mut self, group: Group) {
        if self.awaited.contains(group) {
            self.awaited.remove(group);
            self.executed.remove(group);
            self.stray.insert(group);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(node: Node, checked: bool) -> Write {
        Write {
            node,
            token: 1,
            group: 1,
            checked,
        }
    }

    #[test]
    fn the_order_in_which_writes_are_sent_makes_no_other_state() {
        let (first, second) = (write(Node::Source, true), write(Node::Third, false));
        let (mut one, mut other) = (Storage::new(1), Storage::new(1));
        one.send(first);
        one.send(second);
        other.send(second);
        other.send(first);
        assert_eq!(one, other);
        one.take(first);
        assert_eq!(one.writes().collect::<Vec<_>>(), [second]);
    }

    #[test]
    fn a_setattr_that_nobody_waits_for_stays_under_way() {
        let mut storage = Storage::new(1);
        storage.awaited.insert(2);
        storage.executed.insert(2);
        storage.stop_waiting(2);
        storage.stop_waiting(3);
        assert!(!storage.awaited.contains(2) && !storage.executed.contains(2));
        assert_eq!(storage.stray.iter().collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn only_what_is_past_its_check_under_another_group_is_residue() {
        let mut storage = Storage::new(2);
        storage.send(write(Node::Source, false));
        assert!(!storage.holds_residue(2));
        storage.send(write(Node::Source, true));
        assert!(storage.holds_residue(2));
        assert!(!storage.holds_residue(1));
    }
}
