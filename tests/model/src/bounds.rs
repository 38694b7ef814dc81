//! How much may happen in one history, so that the histories can be counted out.

/// The bounds of one check. Everything within them happens in every order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// What the check is about.
    pub name: &'static str,
    /// Migrations from the source to the destination, one after the other.
    pub migrations: u8,
    /// `Rekey` entries.
    pub rekeys: u8,
    /// `RenewMigrationToken` entries.
    pub renewals: u8,
    /// Crashes of a host or a monitor, restarts of a `clusterd`, leases that run out and losses declared in
    /// spite of a valid lease, together.
    pub faults: u8,
    /// WRITEs in the network or in the server at one time, of all nodes together.
    pub writes: u8,
    /// Whether a node is declared lost only when its lease has run out. Without it a host that stood still,
    /// or a guest that runs until it is fenced, goes on beside its successor: the disk must be safe all the same.
    pub leases_hold: bool,
}

/// WRITEs that a state has room for.
pub const WRITES_MAX: usize = 2;

const fn leases_hold(
    name: &'static str,
    migrations: u8,
    rekeys: u8,
    renewals: u8,
    faults: u8,
) -> Bounds {
    Bounds {
        name,
        migrations,
        rekeys,
        renewals,
        faults,
        writes: 2,
        leases_hold: true,
    }
}

const fn leases_fail(migrations: u8, rekeys: u8, renewals: u8, faults: u8) -> Bounds {
    Bounds {
        leases_hold: false,
        ..leases_hold(
            "leases that do not hold",
            migrations,
            rekeys,
            renewals,
            faults,
        )
    }
}

/// Small enough for every run of the tests.
pub const SMALL: [Bounds; 2] = [leases_hold("small", 1, 1, 1, 1), leases_fail(1, 1, 0, 1)];

/// What a run without flags counts out.
pub const USUAL: [Bounds; 6] = [
    leases_hold("migrations", 2, 2, 2, 0),
    leases_hold("takeovers", 0, 1, 0, 2),
    leases_hold("migration with one fault", 1, 2, 1, 1),
    leases_hold("two migrations with one fault", 2, 1, 1, 1),
    leases_hold("migration with two faults", 1, 1, 0, 2),
    leases_fail(1, 0, 0, 2),
];

/// What `--deep` counts out.
pub const DEEP: [Bounds; 5] = [
    leases_hold("migrations", 2, 3, 2, 0),
    leases_hold("takeovers", 0, 2, 0, 2),
    leases_hold("migration with one fault", 1, 2, 2, 1),
    leases_hold("migration with two faults", 1, 1, 1, 2),
    leases_fail(1, 1, 0, 2),
];
