//! What clients send to the embedded NFS server: it answers, refuses or closes, whatever they send.
//!
//! ```text
//!  first byte   0       a connection's stream as it is
//!               else    calls with right heads: any procedure, any caller, handles that the server gave;
//!                       a WRITE or READ that is answered well is one that the file's group and mode allow
//! ```

use nfs3_types::nfs3::NFS_PROGRAM as P;
use storage_broker::fuzzing::serve;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::input::{Input, field};
use crate::runtime::block_on_alone;
use crate::socket::{pair, read_record, write_record};
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "nfs_call",
    run,
    seeds,
    input_bytes_max: 4096,
    // A READ of 1 MiB: its data, the reply that is encoded from them, the replies gathered, and what we read of it.
    memory: MemoryBound {
        base: 12 << 20,
        each: 64,
    },
};

const CALLS_MAX: usize = 24;
/// Handles of one input that later calls can name.
const HANDLES_MAX: usize = 8;
const MOUNT: u32 = 100_005;
const NFS: u32 = 100_003;

fn run(data: &[u8]) {
    let Ok(root) = directory() else {
        return;
    };
    let mut input = Input(data);
    let mode = input.u8();
    block_on_alone(async {
        let Ok((stream, client)) = pair() else {
            return;
        };
        let talk = async {
            match mode {
                0 => pour(client, input.0).await,
                _ => converse(client, input).await.unwrap_or_default(),
            }
        };
        let (served, ()) = tokio::join!(serve(stream, root.path()), talk);
        assert!(served.is_ok(), "an empty directory is served");
    });
}

/// A directory in memory where there is one: syncing is not what is tested.
fn directory() -> std::io::Result<tempfile::TempDir> {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())
}

/// Sends a stream and reads what comes until the server closes.
async fn pour(client: UnixStream, stream: &[u8]) {
    let (mut reader, mut writer) = client.into_split();
    let write = async move {
        let _ = writer.write_all(stream).await;
        let _ = writer.shutdown().await;
    };
    let read = async {
        let mut waste = vec![0; 64 << 10];
        while matches!(reader.read(&mut waste).await, Ok(count) if count > 0) {}
    };
    tokio::join!(write, read);
}

/// Makes the input's calls one by one; `None` when the server closes.
async fn converse(mut client: UnixStream, mut input: Input<'_>) -> Option<()> {
    let path = [&1u32.to_be_bytes()[..], b"/\0\0\0"].concat();
    let mounted = exchange(&mut client, (MOUNT, 1), 1, &path).await?;
    let root = opaque(mounted.get(28..)?)?;
    let mut handles = vec![root];
    for _ in 0..CALLS_MAX {
        if input.is_empty() {
            return None;
        }
        let (procedure, choice) = (u32::from(input.u8() % 24), input.u8());
        let handle = &handles[usize::from(choice & 7) % handles.len()];
        let mut arguments = Vec::new();
        if choice & 0x80 == 0 {
            arguments.extend((handle.len() as u32).to_be_bytes());
            arguments.extend(handle);
        }
        arguments.extend(input.field());
        let caller = choice >> 3 & 3;
        let allowed = if choice & 0x80 == 0 {
            let file = &arguments[..4 + handle.len()];
            allowed(&mut client, file, caller, procedure).await?
        } else {
            true
        };
        let reply = exchange(&mut client, (NFS, procedure), caller, &arguments).await?;
        let results = reply.get(24..).unwrap_or_default();
        let made = match procedure {
            number if number == P::NFSPROC3_LOOKUP as u32 => results.get(4..),
            number if number == P::NFSPROC3_CREATE as u32 => results.get(8..),
            number if number == P::NFSPROC3_MKDIR as u32 => results.get(8..),
            _ => None,
        };
        let done = results.starts_with(&[0; 4]);
        assert!(
            allowed || !done,
            "caller {caller} did what the fence forbids: {procedure}"
        );
        if let Some(handle) = made.filter(|_| done).and_then(opaque)
            && handles.len() < HANDLES_MAX
        {
            handles.push(handle);
        }
    }
    None
}

/// Whether a READ or WRITE would be right, by what the server says of the file; anything else is none of the fence's.
async fn allowed(
    client: &mut UnixStream,
    handle: &[u8],
    caller: u8,
    procedure: u32,
) -> Option<bool> {
    let wanted = match procedure {
        number if number == P::NFSPROC3_READ as u32 => 4,
        number if number == P::NFSPROC3_WRITE as u32 => 2,
        _ => return Some(true),
    };
    let shown = exchange(client, (NFS, P::NFSPROC3_GETATTR as u32), 0, handle).await?;
    // Status, then type, mode, links, owner, group.
    let word = |at: usize| {
        let word = shown.get(24 + 4 * at..)?.first_chunk()?;
        Some(u32::from_be_bytes(*word))
    };
    if word(0) != Some(0) {
        return Some(true);
    }
    let (mode, owner, group) = (word(2)?, word(4)?, word(5)?);
    let (uid, gid) = match identity(caller) {
        // Root is nobody, and so is its group.
        (0, 0) => (65_534, 65_534),
        other => other,
    };
    let class = if uid == owner {
        6
    } else if gid == group {
        3
    } else {
        0
    };
    Some(mode >> class & wanted != 0)
}

/// Who makes a call: root, the broker, the holder of a token, the holder of another.
fn identity(caller: u8) -> (u32, u32) {
    match caller {
        0 => (0, 0),
        1 => (60_000, 0x4000_0007),
        2 => (60_001, 0x4000_0007),
        _ => (60_002, 0x4000_0008),
    }
}

/// A field of up to 64 bytes behind its length.
fn opaque(bytes: &[u8]) -> Option<Vec<u8>> {
    let (length, rest) = bytes.split_first_chunk()?;
    let length = u32::from_be_bytes(*length) as usize;
    rest.get(..length)
        .filter(|_| length <= 64)
        .map(<[u8]>::to_vec)
}

/// Makes one call and takes its reply, which must be one of ours.
async fn exchange(
    client: &mut UnixStream,
    (program, procedure): (u32, u32),
    caller: u8,
    arguments: &[u8],
) -> Option<Vec<u8>> {
    const XID: u32 = 0x5a5a_0001;
    let (uid, gid) = identity(caller);
    let head = [
        XID, 0, 2, program, 3, procedure, 1, 20, 0, 0, uid, gid, 0, 0, 0,
    ];
    let mut call: Vec<u8> = head.iter().flat_map(|word| word.to_be_bytes()).collect();
    call.extend(arguments);
    write_record(client, &call, 1).await.ok()?;
    let reply = read_record(client).await.ok()?;
    assert!(
        reply.starts_with(&XID.to_be_bytes()),
        "another call's reply"
    );
    assert!(reply.len() <= (1 << 20) + 4096, "a reply without bound");
    Some(reply)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// The broker's, or the holder's.
const BROKER: u8 = 1 << 3;
const HOLDER: u8 = 2 << 3;

fn seeds() -> Vec<Vec<u8>> {
    let call = |procedure: P, choice: u8, arguments: Vec<u8>| {
        [vec![procedure as u8, choice], field(&arguments)].concat()
    };
    let name = |name: &[u8]| {
        let mut bytes = words(&[name.len() as u32]);
        bytes.extend(name);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    // Mode 0060, no owner, no group, no size, no times.
    let attributes = words(&[1, 0o060, 0, 0, 0, 0, 0]);
    let create = |how: u32| [name(b"disk"), words(&[how]), attributes.clone()].concat();
    let write = [words(&[0, 4096, 8, 2, 8]), b"contents".to_vec()].concat();
    let sized = words(&[0, 0, 0, 1, 0, 1 << 20, 0, 0, 0]);
    let whole = [
        vec![1],
        call(P::NFSPROC3_NULL, 0, Vec::new()),
        call(P::NFSPROC3_FSINFO, 0, Vec::new()),
        call(P::NFSPROC3_CREATE, BROKER, create(1)),
        call(P::NFSPROC3_SETATTR, BROKER | 1, sized),
        call(P::NFSPROC3_WRITE, HOLDER | 1, write),
        call(P::NFSPROC3_READ, HOLDER | 1, words(&[0, 4096, 64])),
        call(P::NFSPROC3_COMMIT, HOLDER | 1, words(&[0, 0, 0])),
        call(P::NFSPROC3_GETATTR, HOLDER | 1, Vec::new()),
        call(P::NFSPROC3_ACCESS, HOLDER | 1, words(&[0x3f])),
    ]
    .concat();
    let names = [
        vec![1],
        call(
            P::NFSPROC3_MKDIR,
            BROKER,
            [name(b"vms"), attributes.clone()].concat(),
        ),
        call(P::NFSPROC3_LOOKUP, BROKER, name(b"vms")),
        call(
            P::NFSPROC3_CREATE,
            BROKER,
            [name(b"x"), words(&[2, 3, 4])].concat(),
        ),
        call(P::NFSPROC3_READDIR, BROKER, words(&[0, 0, 0, 0, 4096])),
        call(
            P::NFSPROC3_READDIRPLUS,
            BROKER,
            words(&[0, 0, 0, 0, 512, 4096]),
        ),
        call(P::NFSPROC3_REMOVE, BROKER, name(b"x")),
        call(P::NFSPROC3_RMDIR, BROKER, name(b"vms")),
        call(P::NFSPROC3_FSSTAT, BROKER, Vec::new()),
        call(P::NFSPROC3_PATHCONF, BROKER, Vec::new()),
        call(P::NFSPROC3_SYMLINK, BROKER, name(b"l")),
    ]
    .concat();
    let claim = [
        vec![1],
        call(P::NFSPROC3_CREATE, BROKER, create(0)),
        call(
            P::NFSPROC3_SETATTR,
            (3 << 3) | 1,
            words(&[0, 0, 1, 0x4000_0008, 0, 0, 0, 0]),
        ),
        call(P::NFSPROC3_READ, (3 << 3) | 1, words(&[0, 0, 1 << 20])),
    ]
    .concat();
    let record = words(&[0x8000_0028, 7, 0, 2, NFS, 3, 1, 0, 0, 0, 0]);
    vec![whole, names, claim, [vec![0], record].concat()]
}
