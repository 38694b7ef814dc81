//! Which calls Ganesha accepts from whom: what the fence rests on, one by one.

use cluster_model::ids::Token;
use nfs3_types::mount;
use nfs3_types::nfs3::{self, NFS_PROGRAM, Nfs3Option};
use nfs3_types::xdr_codec::{Opaque, Pack, Unpack};
use storage_broker::certify::{FLOOD_ROUNDS, FLOOD_ROUNDS_THOROUGH, FenceClass, certify};
use storage_broker::dialer::{Dialer, Service};
use storage_broker::fence::{DISK_MODE, claimant};
use storage_broker::nfs::client::SetAttributes;
use storage_broker::nfs::connection::{Connection, Procedure};
use storage_broker::nfs::{Credential, FileHandle, NfsClient, NfsError, Stable, Status};

use super::common::{BROKER_UID, Daemon};
use super::server::{Ganesha, MOUNT_PORT, with_ganesha};
use super::{CALL_TIMEOUT, NODE, block, connect};

const OLD: Token = Token(1);
const NEW: Token = Token(2);

fn status<T>(result: Result<T, NfsError>) -> Status {
    match result {
        Ok(_) => Status::NFS3_OK,
        Err(error) => error.status().expect("an answer"),
    }
}

async fn disk(client: &NfsClient, name: &str) -> FileHandle {
    let attributes = SetAttributes {
        mode: Some(DISK_MODE),
        gid: Some(OLD.gid()),
        size_bytes: None,
    };
    client
        .create(claimant(BROKER_UID, OLD), client.root(), name, attributes)
        .await
        .unwrap()
}

fn group(token: Token) -> SetAttributes {
    SetAttributes {
        gid: Some(token.gid()),
        ..SetAttributes::default()
    }
}

fn mode(mode: u32) -> SetAttributes {
    SetAttributes {
        mode: Some(mode),
        ..SetAttributes::default()
    }
}

fn holder(token: Token) -> Credential {
    Credential {
        uid: NODE,
        gid: token.gid(),
    }
}

#[test]
fn a_disk_obeys_its_token() {
    with_ganesha("a_disk_obeys_its_token", async |ganesha| {
        use Status::{NFS3_OK, NFS3ERR_ACCES, NFS3ERR_PERM};
        let client = connect(ganesha).await;
        let file = disk(&client, "disk").await;
        let write = async |whom| {
            let data = block(1, 512);
            status(client.write(whom, &file, 0, &data, Stable::UNSTABLE).await)
        };
        let set = async |whom, change| status(client.setattr(whom, &file, change).await);

        assert_eq!(write(holder(OLD)).await, NFS3_OK);
        assert_eq!(write(holder(NEW)).await, NFS3ERR_ACCES);
        let unasserted = claimant(BROKER_UID, OLD);
        assert_eq!(set(unasserted, group(NEW)).await, NFS3ERR_PERM);
        assert_eq!(set(claimant(BROKER_UID, NEW), group(NEW)).await, NFS3_OK);
        assert_eq!(write(holder(OLD)).await, NFS3ERR_ACCES);
        assert_eq!(write(holder(NEW)).await, NFS3_OK);
        let attributes = client.getattr(holder(OLD), &file).await.unwrap();
        let facts = (attributes.uid, attributes.gid, attributes.mode);
        assert_eq!(facts, (BROKER_UID, NEW.gid(), DISK_MODE));

        let root = Credential { uid: 0, gid: 0 };
        for whom in [holder(OLD), holder(NEW), root] {
            assert_eq!(set(whom, group(OLD)).await, NFS3ERR_PERM, "{whom:?}");
            assert_eq!(set(whom, mode(0o666)).await, NFS3ERR_PERM, "{whom:?}");
        }
        assert_eq!(write(root).await, NFS3ERR_ACCES);
        // Here the servers differ: no sign of who owns a disk may be read from it.
        assert_eq!(status(client.commit(holder(OLD), &file).await), NFS3_OK);
        assert_eq!(status(client.commit(holder(NEW), &file).await), NFS3_OK);
        let read = client.read(holder(OLD), &file, 0, 512).await;
        assert_eq!(status(read), NFS3ERR_ACCES);
    });
}

/// A call that the client has no method for.
async fn call(
    client: &NfsClient,
    whom: Credential,
    procedure: NFS_PROGRAM,
    arguments: &impl Pack,
) -> bytes::Bytes {
    let procedure = Procedure {
        program: nfs3::PROGRAM,
        version: nfs3::VERSION,
        number: procedure as u32,
    };
    let connection = client.connection();
    connection.call(procedure, whom, arguments).await.unwrap()
}

fn unpack<T: Unpack>(reply: &[u8]) -> T {
    let mut rest = reply;
    T::unpack(&mut rest).unwrap().0
}

#[test]
fn a_guard_is_compared_to_the_nanosecond() {
    with_ganesha("a_guard_is_compared_to_the_nanosecond", async |ganesha| {
        let client = connect(ganesha).await;
        disk(&client, "disk").await;
        let owner = claimant(BROKER_UID, NEW);
        let what = nfs3::diropargs3 {
            dir: root_handle(ganesha).await,
            name: b"disk"[..].into(),
        };
        let lookup = nfs3::LOOKUP3args { what };
        let reply = call(&client, owner, NFS_PROGRAM::NFSPROC3_LOOKUP, &lookup).await;
        let found: nfs3::LOOKUP3res = unpack(&reply);
        let found = found.unwrap();
        let mut guard = found.obj_attributes.unwrap().ctime;
        let guarded = async |guard| {
            let arguments = nfs3::SETATTR3args {
                object: found.object.clone(),
                new_attributes: nfs3::sattr3 {
                    gid: Nfs3Option::Some(NEW.gid()),
                    ..nfs3::sattr3::default()
                },
                guard: Nfs3Option::Some(guard),
            };
            let reply = call(&client, owner, NFS_PROGRAM::NFSPROC3_SETATTR, &arguments).await;
            unpack::<Status>(&reply)
        };
        let right = guard.nseconds;
        guard.nseconds = (right + 1) % 1_000_000_000;
        assert_eq!(guarded(guard).await, Status::NFS3ERR_NOT_SYNC);
        guard.nseconds = right;
        assert_eq!(guarded(guard).await, Status::NFS3_OK);
        assert_eq!(guarded(guard).await, Status::NFS3ERR_NOT_SYNC);
    });
}

/// The export's root, asked for with calls of our own.
async fn root_handle(ganesha: &Ganesha) -> nfs3::nfs_fh3 {
    let dialer = Dialer::default();
    let connecting = dialer.connect("127.0.0.1", MOUNT_PORT, Service::Mount);
    let stream = connecting.await.unwrap();
    let connection = Connection::new(stream, CALL_TIMEOUT);
    let procedure = Procedure {
        program: mount::PROGRAM,
        version: mount::VERSION,
        number: mount::MOUNT_PROGRAM::MOUNTPROC3_MNT as u32,
    };
    let export = ganesha.export();
    let path = mount::dirpath(Opaque::borrowed(export.as_os_str().as_encoded_bytes()));
    let whom = holder(OLD);
    let reply = connection.call(procedure, whom, &path).await.unwrap();
    let mount::mountres3::Ok(mounted) = unpack(&reply) else {
        panic!("not mounted")
    };
    nfs3::nfs_fh3 {
        data: mounted.fhandle.0,
    }
}

#[test]
fn certification_gives_the_strongest_class_and_leaves_nothing_behind() {
    with_ganesha(
        "certification_gives_the_strongest_class_and_leaves_nothing_behind",
        async |ganesha| {
            let (owner, holder) = (connect(ganesha).await, connect(ganesha).await);
            let rounds = proto::testing::by_tier(FLOOD_ROUNDS, FLOOD_ROUNDS_THOROUGH);
            let certificate = certify(&owner, &holder, BROKER_UID, rounds).await.unwrap();
            let report = &certificate.report;
            assert_eq!(certificate.class, FenceClass::GidToken, "{report}");
            assert!(!report.contains("FAIL"), "{report}");
            let tried = format!("{rounds} swaps under load");
            assert!(report.contains(&tried), "{report}");
            assert_eq!(std::fs::read_dir(ganesha.export()).unwrap().count(), 0);

            let mut daemon = Daemon::start().await;
            let adopted = daemon.adopt(&ganesha.url()).await.unwrap();
            assert_eq!(adopted.fence_class, "gid-token", "{}", adopted.report);
        },
    );
}
