//! Small files that are read at a start: the NFS server's journal, a volume's identity, a disk's record.
//!
//! ```text
//!  first byte   0    the journal's file as it is
//!               1    a journal's records, each sealed as it should be, or not
//!               2    an identity
//!               else a disk's record
//! ```

use storage_broker::fuzzing::{is_disk_record, read_journal};
use storage_broker::volume::Identity;

use crate::input::Input;
use crate::target::{MemoryBound, Target};

/// The target.
pub const TARGET: Target = Target {
    name: "stored_file",
    run,
    seeds,
    input_bytes_max: 16 << 10,
    // The file, and a table that grows by doubling: a record in it takes little more than its 64 bytes.
    memory: MemoryBound {
        base: 256 << 10,
        each: 16,
    },
};

const RECORD_BYTES: usize = 64;
/// A record without its checksum.
const SEALED_BYTES: usize = RECORD_BYTES - 8;

fn run(data: &[u8]) {
    let Some((kind, content)) = data.split_first() else {
        return;
    };
    match kind {
        0 => journal(content),
        1 => journal(&records(Input(content))),
        2 => {
            if let Ok(Some(identity)) = Identity::from_json(content) {
                let again = Identity::from_json(&identity.to_json());
                assert_eq!(again.ok().flatten(), Some(identity), "another volume");
            }
        }
        _ => {
            is_disk_record(content);
        }
    }
}

fn journal(content: &[u8]) {
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let Ok(directory) = directory else { return };
    if std::fs::write(directory.path().join("attributes"), content).is_err() {
        return;
    }
    if let Ok(records) = read_journal(directory.path()) {
        let room = content.len() / RECORD_BYTES;
        assert!(
            records.is_some_and(|count| count < room),
            "records that are not there"
        );
    }
}

/// The head, then for each record a byte that says whether it is sealed, and its contents.
fn records(mut input: Input<'_>) -> Vec<u8> {
    let mut file = seal([b"BATONNFS\x01\0\0\0".as_slice(), &[7; 44]].concat());
    while !input.is_empty() {
        let broken = input.u8() == 0xff;
        let mut record = input.bytes(SEALED_BYTES).to_vec();
        record.resize(SEALED_BYTES, 0);
        let mut record = seal(record);
        if broken {
            record[RECORD_BYTES - 1] ^= 1;
        }
        file.extend(record);
    }
    file
}

/// FNV-1a, 64 bits, behind what it covers.
fn seal(mut content: Vec<u8>) -> Vec<u8> {
    let sum = content
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum: u64, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
    content.extend(sum.to_le_bytes());
    content
}

fn seeds() -> Vec<Vec<u8>> {
    let record = |state: u8, kind: u32, inode: u64| {
        let mut record = vec![state];
        record.extend(kind.to_le_bytes());
        record.extend(0o060u32.to_le_bytes());
        record.extend(inode.to_le_bytes());
        record.extend([1; 40]);
        record
    };
    let whole = [
        record(0, 0x101, 5),
        record(0, 1, 6),
        record(0, 0x102, 5),
        record(0, 0x101, 7),
    ];
    let torn = [
        record(0, 0x101, 5),
        record(0xff, 0x101, 6),
        record(0xff, 1, 7),
    ];
    let damaged = [record(0xff, 0x101, 5), record(0, 0x101, 6)];
    let identity = Identity {
        cluster_id: "c".into(),
        volume_uuid: "v".into(),
    };
    let file = records(Input(&whole.concat()));
    vec![
        [vec![1], whole.concat()].concat(),
        [vec![1], torn.concat()].concat(),
        [vec![1], damaged.concat()].concat(),
        [vec![0], file].concat(),
        [vec![2], identity.to_json()].concat(),
        [&[3], &br#"{"token":7,"finished":true}"#[..]].concat(),
    ]
}
