//! Who may do what to a file: POSIX rules over the owner, group and mode that the server keeps.
//!
//! These rules are the fence. A disk's group is the token of its grant and its mode is 0060, so
//! [`Attributes::allows`] lets exactly the holder of the token read and write, and
//! [`change`] lets nobody but the file's owner (the broker) move it to another token. No right
//! comes from owning a file alone: an owner whose class has no `w` writes nothing.

use nfs3_types::nfs3::nfsstat3;

/// Who nobody is: what root becomes under root_squash, as on Linux servers.
pub(super) const NOBODY: u32 = 65534;

/// The most further groups that AUTH_SYS carries (RFC 5531, appendix A).
pub(super) const FURTHER_GROUPS_MAX: usize = 16;

/// Permission bits of one class: read.
pub(super) const READ: u32 = 4;
/// Permission bits of one class: write.
pub(super) const WRITE: u32 = 2;
/// Permission bits of one class: execute, or search a directory.
pub(super) const SEARCH: u32 = 1;

/// In a directory with this bit only the owner of an entry, or of the directory, removes the entry.
pub(super) const STICKY: u32 = 0o1000;

/// Who a call is from, after squashing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Caller {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) further_groups: Vec<u32>,
}

impl Caller {
    /// The caller that nothing is known about.
    pub(super) fn nobody() -> Caller {
        Caller {
            uid: NOBODY,
            gid: NOBODY,
            further_groups: Vec::new(),
        }
    }

    /// Takes root's rights from a caller, as the export option `root_squash` does on Linux: user 0
    /// becomes nobody altogether, and group 0 becomes nobody's group.
    pub(super) fn squash_root(self) -> Caller {
        if self.uid == 0 {
            return Caller::nobody();
        }
        let squash = |gid| if gid == 0 { NOBODY } else { gid };
        Caller {
            uid: self.uid,
            gid: squash(self.gid),
            further_groups: self.further_groups.into_iter().map(squash).collect(),
        }
    }

    /// Whether the server refuses this caller nothing (only without root_squash).
    fn is_root(&self) -> bool {
        self.uid == 0
    }

    fn is_in(&self, gid: u32) -> bool {
        self.gid == gid || self.further_groups.contains(&gid)
    }
}

/// What the server keeps of a file beside what the file system under it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Permission bits, with setuid, setgid and sticky.
    pub(super) mode: u32,
    /// When these were last changed, in nanoseconds since 1970.
    pub(super) changed_ns: u64,
}

impl Attributes {
    /// Which of read, write and search this caller's class grants. The first class that fits
    /// decides, even where a later one grants more.
    fn granted(&self, caller: &Caller) -> u32 {
        if caller.is_root() {
            READ | WRITE | SEARCH
        } else if caller.uid == self.uid {
            self.mode >> 6 & 7
        } else if caller.is_in(self.gid) {
            self.mode >> 3 & 7
        } else {
            self.mode & 7
        }
    }

    /// Whether the caller's class grants all that is `wanted`.
    pub(super) fn allows(&self, caller: &Caller, wanted: u32) -> bool {
        self.granted(caller) & wanted == wanted
    }

    /// [`Self::allows`], as the answer of an NFS procedure.
    pub(super) fn demand(&self, caller: &Caller, wanted: u32) -> Result<(), nfsstat3> {
        if self.allows(caller, wanted) {
            Ok(())
        } else {
            Err(nfsstat3::NFS3ERR_ACCES)
        }
    }

    /// Whether the caller may take an entry owned by `entry_uid` out of this directory.
    pub(super) fn demand_removal(&self, caller: &Caller, entry_uid: u32) -> Result<(), nfsstat3> {
        self.demand(caller, WRITE | SEARCH)?;
        let owner = caller.uid == entry_uid || caller.uid == self.uid || caller.is_root();
        if self.mode & STICKY != 0 && !owner {
            Err(nfsstat3::NFS3ERR_PERM)
        } else {
            Ok(())
        }
    }
}

/// How a caller wants a timestamp changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum TimeChange {
    /// Not at all.
    #[default]
    Keep,
    /// To the server's time: whoever may write may do this.
    Now,
    /// To a given time in nanoseconds since 1970: the owner's right.
    To(u64),
}

/// What a caller wants changed (RFC 1813, `sattr3`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) size: Option<u64>,
    pub(super) accessed: TimeChange,
    pub(super) modified: TimeChange,
}

impl Change {
    /// Whether it touches what the server keeps itself.
    pub(super) fn is_of_attributes(&self) -> bool {
        self.mode.is_some() || self.uid.is_some() || self.gid.is_some()
    }
}

/// The attributes after a change, or why the caller may not make it. All or nothing.
pub(super) fn change(
    before: &Attributes,
    caller: &Caller,
    wanted: &Change,
    now_ns: u64,
) -> Result<Attributes, nfsstat3> {
    let owner = caller.uid == before.uid || caller.is_root();
    if wanted.is_of_attributes() && !owner {
        return Err(nfsstat3::NFS3ERR_PERM);
    }
    if wanted.uid.is_some_and(|uid| uid != before.uid) && !caller.is_root() {
        return Err(nfsstat3::NFS3ERR_PERM);
    }
    let may_give = |gid| gid == before.gid || caller.is_in(gid) || caller.is_root();
    if wanted.gid.is_some_and(|gid| !may_give(gid)) {
        return Err(nfsstat3::NFS3ERR_PERM);
    }
    if wanted.size.is_some() {
        before.demand(caller, WRITE)?;
    }
    for time in [wanted.accessed, wanted.modified] {
        match time {
            TimeChange::Keep => {}
            TimeChange::Now if owner => {}
            TimeChange::Now => before.demand(caller, WRITE)?,
            TimeChange::To(_) if owner => {}
            TimeChange::To(_) => return Err(nfsstat3::NFS3ERR_PERM),
        }
    }
    Ok(Attributes {
        uid: wanted.uid.unwrap_or(before.uid),
        gid: wanted.gid.unwrap_or(before.gid),
        mode: wanted.mode.map_or(before.mode, |mode| mode & 0o7777),
        // Two changes never bear the same time, so that a guard tells them apart.
        changed_ns: now_ns.max(before.changed_ns + 1),
    })
}

/// The attributes of a new file or directory, or why the caller may not give it those.
pub(super) fn initial(
    directory: &Attributes,
    caller: &Caller,
    wanted: &Change,
    default_mode: u32,
    now_ns: u64,
) -> Result<Attributes, nfsstat3> {
    const SETGID: u32 = 0o2000;
    let inherited = directory.mode & SETGID != 0;
    let gid = if inherited { directory.gid } else { caller.gid };
    let bare = Attributes {
        uid: caller.uid,
        gid,
        mode: default_mode,
        changed_ns: now_ns,
    };
    // The size of a file that is being made is its maker's to choose, whatever its mode will be.
    let wanted = Change {
        size: None,
        ..*wanted
    };
    change(&bare, caller, &wanted, now_ns)
}

#[cfg(test)]
mod tests {
    use nfs3_types::nfs3::nfsstat3::{NFS3ERR_ACCES, NFS3ERR_PERM};

    use super::*;

    const BROKER: u32 = 50_000;
    const NODE: u32 = 50_001;
    const OLD: u32 = 0x4000_0001;
    const NEW: u32 = 0x4000_0002;

    fn caller(uid: u32, gid: u32) -> Caller {
        Caller {
            uid,
            gid,
            further_groups: Vec::new(),
        }
    }

    fn disk() -> Attributes {
        Attributes {
            uid: BROKER,
            gid: OLD,
            mode: 0o060,
            changed_ns: 10,
        }
    }

    fn to_group(gid: u32) -> Change {
        Change {
            gid: Some(gid),
            ..Change::default()
        }
    }

    #[test]
    fn a_disk_is_written_under_its_token_and_under_no_other() {
        assert_eq!(disk().demand(&caller(NODE, OLD), READ | WRITE), Ok(()));
        assert_eq!(disk().demand(&caller(NODE, NEW), WRITE), Err(NFS3ERR_ACCES));
        let in_further_groups = Caller {
            further_groups: vec![7, OLD],
            ..caller(NODE, NEW)
        };
        assert_eq!(disk().demand(&in_further_groups, WRITE), Ok(()));
    }

    #[test]
    fn the_owner_of_a_disk_has_no_right_to_its_data() {
        assert_eq!(
            disk().demand(&caller(BROKER, OLD), READ),
            Err(NFS3ERR_ACCES)
        );
        assert_eq!(
            disk().demand(&caller(BROKER, OLD), WRITE),
            Err(NFS3ERR_ACCES)
        );
        let size = Change {
            size: Some(0),
            ..Change::default()
        };
        assert_eq!(
            change(&disk(), &caller(BROKER, OLD), &size, 20),
            Err(NFS3ERR_ACCES)
        );
    }

    #[test]
    fn only_the_broker_moves_a_disk_and_only_to_a_token_that_it_asserts() {
        let moved = change(&disk(), &caller(BROKER, NEW), &to_group(NEW), 20).unwrap();
        assert_eq!(
            moved,
            Attributes {
                gid: NEW,
                changed_ns: 20,
                ..disk()
            }
        );
        for refused in [caller(BROKER, OLD), caller(NODE, NEW), caller(NODE, OLD)] {
            assert_eq!(
                change(&disk(), &refused, &to_group(NEW), 20),
                Err(NFS3ERR_PERM)
            );
        }
    }

    #[test]
    fn a_holder_can_change_neither_mode_nor_owner_nor_times_of_its_choice() {
        let holder = caller(NODE, OLD);
        for wanted in [
            Change {
                mode: Some(0o666),
                ..Change::default()
            },
            Change {
                uid: Some(NODE),
                ..Change::default()
            },
            Change {
                modified: TimeChange::To(0),
                ..Change::default()
            },
        ] {
            assert_eq!(
                change(&disk(), &holder, &wanted, 20),
                Err(NFS3ERR_PERM),
                "{wanted:?}"
            );
        }
        let now = Change {
            modified: TimeChange::Now,
            ..Change::default()
        };
        assert!(change(&disk(), &holder, &now, 20).is_ok());
    }

    #[test]
    fn nobody_but_root_gives_a_file_away() {
        let given = Change {
            uid: Some(NODE),
            ..Change::default()
        };
        assert_eq!(
            change(&disk(), &caller(BROKER, OLD), &given, 20),
            Err(NFS3ERR_PERM)
        );
        assert_eq!(
            change(&disk(), &caller(0, 0), &given, 20).unwrap().uid,
            NODE
        );
    }

    #[test]
    fn root_is_nobody_once_squashed() {
        let squashed = caller(0, OLD).squash_root();
        assert_eq!(squashed, Caller::nobody());
        assert_eq!(disk().demand(&squashed, WRITE), Err(NFS3ERR_ACCES));
        let group = Caller {
            further_groups: vec![0, 5],
            ..caller(NODE, 0)
        }
        .squash_root();
        assert_eq!(
            group,
            Caller {
                further_groups: vec![NOBODY, 5],
                ..caller(NODE, NOBODY)
            }
        );
    }

    #[test]
    fn a_refused_part_refuses_the_whole_change() {
        let both = Change {
            mode: Some(0),
            gid: Some(NEW),
            ..Change::default()
        };
        assert_eq!(
            change(&disk(), &caller(BROKER, OLD), &both, 20),
            Err(NFS3ERR_PERM)
        );
    }

    #[test]
    fn two_changes_never_bear_the_same_time() {
        let first = change(&disk(), &caller(BROKER, NEW), &to_group(NEW), 10).unwrap();
        assert!(first.changed_ns > disk().changed_ns);
    }

    #[test]
    fn a_new_file_is_its_makers_and_only_of_the_makers_groups() {
        let directory = Attributes {
            uid: 1,
            gid: 1,
            mode: 0o1777,
            changed_ns: 0,
        };
        let wanted = Change {
            mode: Some(0o060),
            size: Some(9),
            ..Change::default()
        };
        let made = initial(&directory, &caller(BROKER, OLD), &wanted, 0o600, 5).unwrap();
        assert_eq!((made.uid, made.gid, made.mode), (BROKER, OLD, 0o060));
        let foreign = initial(&directory, &caller(BROKER, OLD), &to_group(NEW), 0o600, 5);
        assert_eq!(foreign, Err(NFS3ERR_PERM));
    }

    #[test]
    fn in_a_sticky_directory_only_the_owner_removes_an_entry() {
        let directory = Attributes {
            uid: 1,
            gid: 1,
            mode: 0o1777,
            changed_ns: 0,
        };
        assert_eq!(directory.demand_removal(&caller(BROKER, 5), BROKER), Ok(()));
        assert_eq!(
            directory.demand_removal(&caller(NODE, 5), BROKER),
            Err(NFS3ERR_PERM)
        );
    }
}
