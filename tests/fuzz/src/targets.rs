//! Everything that is fuzzed, one module each.

use crate::target::Target;

pub mod boot_image;
pub mod device_state;
pub mod disk_image;
pub mod guest_io;
pub mod migration_receive;
pub mod migration_stream;
pub mod nfs_call;
pub mod nfs_reply;
pub mod rpc;
pub mod snapshot;
pub mod stored_file;
pub mod vm_spec;

/// All of them.
pub const TARGETS: &[Target] = &[
    boot_image::TARGET,
    device_state::TARGET,
    disk_image::TARGET,
    guest_io::TARGET,
    migration_receive::TARGET,
    migration_stream::TARGET,
    nfs_call::TARGET,
    nfs_reply::TARGET,
    rpc::TARGET,
    snapshot::TARGET,
    stored_file::TARGET,
    vm_spec::TARGET,
];
