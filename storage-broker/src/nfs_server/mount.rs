//! The MOUNT program, version 3 (RFC 1813, appendix I): the handle of the exported directory.

use nfs3_types::mount::{self, MOUNT_PROGRAM, mountstat3};
use nfs3_types::xdr_codec::{List, Opaque, Void};

use super::export::Export;
use super::procedures::reply;
use super::rpc::Refusal;
use crate::nfs::xdr::Decoder;

/// AUTH_SYS, the one manner of saying who a call is from that NFS calls need here.
const FLAVORS: [u32; 1] = [1];

/// Executes one call of the MOUNT program. Whoever asks is told: a handle gives no rights.
pub(super) fn execute(
    export: &Export,
    name: &str,
    xid: u32,
    procedure: u32,
    mut arguments: Decoder,
) -> Result<Vec<u8>, Refusal> {
    let procedure =
        MOUNT_PROGRAM::try_from(procedure).map_err(|_| Refusal::ProcedureUnavailable)?;
    match procedure {
        // Nothing is remembered of who has mounted, so there is nothing to list or to forget.
        MOUNT_PROGRAM::MOUNTPROC3_NULL
        | MOUNT_PROGRAM::MOUNTPROC3_UMNT
        | MOUNT_PROGRAM::MOUNTPROC3_UMNTALL => reply(xid, &Void),
        MOUNT_PROGRAM::MOUNTPROC3_DUMP => reply(xid, &mount::mountlist::default()),
        MOUNT_PROGRAM::MOUNTPROC3_EXPORT => {
            let ex_dir = mount::dirpath(Opaque::borrowed(name.as_bytes()));
            reply(
                xid,
                &List(vec![mount::export_node {
                    ex_dir,
                    ex_groups: List::default(),
                }]),
            )
        }
        MOUNT_PROGRAM::MOUNTPROC3_MNT => {
            let asked = arguments
                .opaque(mount::MNTPATHLEN as u32)
                .map_err(|_| Refusal::GarbageArguments)?;
            if normal(&asked) != normal(name.as_bytes()) {
                return reply(xid, &mount::mountres3::Err(mountstat3::MNT3ERR_NOENT));
            }
            let Ok(root) = export.root() else {
                return reply(xid, &mount::mountres3::Err(mountstat3::MNT3ERR_IO));
            };
            let handle = export.handle(&root);
            let fhandle = mount::fhandle3(Opaque::borrowed(&handle));
            let auth_flavors = FLAVORS.to_vec();
            reply(
                xid,
                &mount::mountres3::Ok(mount::mountres3_ok {
                    fhandle,
                    auth_flavors,
                }),
            )
        }
    }
}

/// A path without the slashes at its end.
fn normal(path: &[u8]) -> &[u8] {
    let end = path
        .iter()
        .rposition(|byte| *byte != b'/')
        .map_or(0, |last| last + 1);
    &path[..end]
}
