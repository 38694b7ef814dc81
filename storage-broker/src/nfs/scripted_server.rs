//! A server for tests that does on command what real ones do rarely: stop answering, lose
//! connections, restart and forget uncommitted data, be full, work out of order.
//!
//! One export (any path), one directory, one file `disk.raw`; others cannot be created, and a
//! test chooses the reason. It checks the group of READ, WRITE
//! and COMMIT against the file's, as the fence needs.

use std::io::Cursor;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::BytesMut;
use nfs3_types::nfs3::*;
use nfs3_types::rpc;
use nfs3_types::xdr_codec::{Opaque, Pack, Unpack};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::record::RecordReader;
use crate::volume::NfsUrl;

/// The only file.
pub(crate) const DISK: &str = "disk.raw";

const ROOT: &[u8] = b"root";

/// A call that was executed, in the order of execution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) procedure: NFS_PROGRAM,
    pub(crate) gid: u32,
    pub(crate) offset: u64,
    pub(crate) length: usize,
}

/// What the server does with calls of the data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    /// Executes and answers.
    Normal,
    /// Keeps them, executes nothing, until the mood changes; then they are executed.
    Stuck,
    /// Executes, answers nothing.
    Mute,
    /// Answers every WRITE so.
    Refuse(nfsstat3),
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) gid: u32,
    pub(crate) seen: Vec<Seen>,
    pub(crate) connections: usize,
    /// WRITEs take at most so many bytes.
    pub(crate) write_bytes_max: u32,
    /// Whether each data call waits a little, each differently, before it is executed.
    pub(crate) scramble: bool,
    /// Whether WRITEs are answered as stable.
    pub(crate) stable: bool,
    /// What CREATE is answered with, and which rights ACCESS grants on the directory.
    pub(crate) create_status: nfsstat3,
    pub(crate) access: u32,
    /// SETATTRs executed, and whether they are answered.
    pub(crate) setattrs: usize,
    pub(crate) mute_setattr: bool,
    verifier: u64,
    /// What READs see, and what survives a restart.
    pub(crate) volatile: Vec<u8>,
    pub(crate) durable: Vec<u8>,
    arrivals: u64,
    /// WRITEs being executed, to see the most at once.
    pub(crate) open: usize,
    pub(crate) open_max: usize,
}

pub(crate) struct ScriptedServer {
    pub(crate) address: SocketAddr,
    world: Arc<Mutex<World>>,
    mood: Arc<watch::Sender<Mood>>,
    lives: watch::Sender<CancellationToken>,
    _stop: tokio_util::sync::DropGuard,
}

impl ScriptedServer {
    pub(crate) async fn start(size_bytes: usize, gid: u32) -> ScriptedServer {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let world = Arc::new(Mutex::new(World {
            gid,
            seen: Vec::new(),
            connections: 0,
            write_bytes_max: 64 << 10,
            scramble: false,
            stable: false,
            create_status: nfsstat3::NFS3ERR_ROFS,
            access: 0x3f,
            setattrs: 0,
            mute_setattr: false,
            verifier: 1,
            volatile: vec![0; size_bytes],
            durable: vec![0; size_bytes],
            arrivals: 0,
            open: 0,
            open_max: 0,
        }));
        let mood = Arc::new(watch::Sender::new(Mood::Normal));
        let stop = CancellationToken::new();
        let lives = watch::Sender::new(stop.child_token());
        let (world2, mood2, life, stopped) =
            (world.clone(), mood.clone(), lives.subscribe(), stop.clone());
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    () = stopped.cancelled() => return,
                    accepted = listener.accept() => accepted,
                };
                let Ok((stream, _)) = accepted else { return };
                world2.lock().unwrap().connections += 1;
                let life = life.borrow().clone();
                let (world, mood) = (world2.clone(), mood2.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        () = life.cancelled() => {}
                        () = serve(stream, world, mood) => {}
                    }
                });
            }
        });
        ScriptedServer {
            address,
            world,
            mood,
            lives,
            _stop: stop.drop_guard(),
        }
    }

    pub(crate) fn url(&self) -> NfsUrl {
        NfsUrl {
            host: self.address.ip().to_string(),
            port: Some(self.address.port()),
            mount_port: None,
            export: "/export".into(),
            tls: None,
            root: None,
        }
    }

    pub(crate) fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    pub(crate) fn mood(&self, mood: Mood) {
        self.mood.send_replace(mood);
    }

    /// Closes every connection; what is stuck inside stays there.
    pub(crate) fn cut(&self) {
        let old = self.lives.send_replace(CancellationToken::new());
        old.cancel();
    }

    /// Loses its connections and whatever was not committed.
    pub(crate) fn restart(&self) {
        {
            let mut world = self.world();
            world.verifier += 1;
            world.volatile = world.durable.clone();
        }
        self.cut();
    }

    pub(crate) fn seen(&self, procedure: NFS_PROGRAM) -> Vec<Seen> {
        self.world()
            .seen
            .iter()
            .filter(|seen| seen.procedure == procedure)
            .cloned()
            .collect()
    }

    /// Waits, with a bound, for the world to be as wanted.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&World) -> bool) {
        let wait = async {
            while !wanted(&self.world()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait)
            .await
            .unwrap_or_else(|_| panic!("never came about: {what}"));
    }
}

async fn serve(stream: TcpStream, world: Arc<Mutex<World>>, mood: Arc<watch::Sender<Mood>>) {
    let (mut read, mut write) = stream.into_split();
    let (replies, mut outgoing) = mpsc::unbounded_channel::<Vec<u8>>();
    let writer = async {
        while let Some(reply) = outgoing.recv().await {
            if write.write_all(&reply).await.is_err() {
                return;
            }
        }
    };
    let reader = async {
        let mut records = RecordReader::default();
        let mut received = BytesMut::new();
        loop {
            while let Some(record) = records.next(&mut received).unwrap() {
                let (world, mood, replies) = (world.clone(), mood.subscribe(), replies.clone());
                // A task of its own: it outlives the connection, as work inside a server does.
                tokio::spawn(async move {
                    if let Some(reply) = answer(&record, &world, mood).await {
                        let _ = replies.send(reply);
                    }
                });
            }
            match read.read_buf(&mut received).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    };
    tokio::select! { () = reader => {}, () = writer => {} }
}

struct OpenWrite<'a>(&'a Mutex<World>);

impl Drop for OpenWrite<'_> {
    fn drop(&mut self) {
        self.0.lock().unwrap().open -= 1;
    }
}

async fn answer(
    record: &[u8],
    world: &Mutex<World>,
    mut mood: watch::Receiver<Mood>,
) -> Option<Vec<u8>> {
    let mut cursor = Cursor::new(record);
    let (message, _) = rpc::rpc_msg::unpack(&mut cursor).unwrap();
    let rpc::msg_body::CALL(call) = message.body else {
        panic!("not a call")
    };
    let mut reply = vec![0; 4];
    message.xid.pack(&mut reply).unwrap();
    // REPLY, MSG_ACCEPTED, AUTH_NULL verifier, SUCCESS
    for word in [1u32, 0, 0, 0, 0] {
        word.pack(&mut reply).unwrap();
    }
    if call.prog == nfs3_types::mount::PROGRAM {
        0u32.pack(&mut reply).unwrap();
        Opaque::borrowed(ROOT).pack(&mut reply).unwrap();
        vec![1u32].pack(&mut reply).unwrap();
    } else {
        let credential = rpc::auth_unix::unpack(&mut Cursor::new(&call.cred.body.0))
            .unwrap()
            .0;
        let procedure = NFS_PROGRAM::try_from(call.proc).unwrap();
        use NFS_PROGRAM::*;
        let data_path = matches!(procedure, NFSPROC3_READ | NFSPROC3_WRITE | NFSPROC3_COMMIT);
        if data_path {
            let pause = {
                let mut world = world.lock().unwrap();
                world.arrivals += 1;
                world.open += 1;
                world.open_max = world.open_max.max(world.open);
                // Later arrivals wait less, so that they overtake.
                world
                    .scramble
                    .then(|| Duration::from_millis(8 - 2 * (world.arrivals % 4)))
            };
            let _open = OpenWrite(world);
            if let Some(pause) = pause {
                tokio::time::sleep(pause).await;
            }
            let _ = mood.wait_for(|mood| *mood != Mood::Stuck).await;
        }
        let now = *mood.borrow();
        execute(
            &mut world.lock().unwrap(),
            procedure,
            credential.gid,
            now,
            &mut cursor,
            &mut reply,
        );
        let mute_setattr = procedure == NFSPROC3_SETATTR && world.lock().unwrap().mute_setattr;
        if (data_path && now == Mood::Mute) || mute_setattr {
            return None;
        }
    }
    let length = (reply.len() - 4) as u32 | 1 << 31;
    reply[..4].copy_from_slice(&length.to_be_bytes());
    Some(reply)
}

fn refuse(reply: &mut Vec<u8>, status: nfsstat3, attributes: usize) {
    status.pack(reply).unwrap();
    for _ in 0..attributes {
        0u32.pack(reply).unwrap();
    }
}

fn execute(
    world: &mut World,
    procedure: NFS_PROGRAM,
    gid: u32,
    mood: Mood,
    arguments: &mut Cursor<&[u8]>,
    reply: &mut Vec<u8>,
) {
    use NFS_PROGRAM::*;
    let ok = nfsstat3::NFS3_OK;
    let mut saw = |offset, length| {
        world.seen.push(Seen {
            procedure,
            gid,
            offset,
            length,
        });
    };
    let verifier = writeverf3(world.verifier.to_be_bytes());
    match procedure {
        NFSPROC3_NULL => {}
        NFSPROC3_GETATTR => {
            ok.pack(reply).unwrap();
            attributes(world).pack(reply).unwrap();
        }
        NFSPROC3_LOOKUP => {
            let (arguments, _) = LOOKUP3args::unpack(arguments).unwrap();
            if arguments.what.name != *DISK.as_bytes() {
                return refuse(reply, nfsstat3::NFS3ERR_NOENT, 1);
            }
            ok.pack(reply).unwrap();
            Opaque::borrowed(b"disk").pack(reply).unwrap();
            [0u8; 8].pack(reply).unwrap();
        }
        NFSPROC3_ACCESS => {
            ok.pack(reply).unwrap();
            0u32.pack(reply).unwrap();
            world.access.pack(reply).unwrap();
        }
        NFSPROC3_CREATE => refuse(reply, world.create_status, 2),
        NFSPROC3_FSSTAT => {
            ok.pack(reply).unwrap();
            0u32.pack(reply).unwrap();
            [1000u64, 400, 300, 0, 0, 0]
                .iter()
                .for_each(|word| drop(word.pack(reply)));
            0u32.pack(reply).unwrap();
        }
        NFSPROC3_FSINFO => {
            ok.pack(reply).unwrap();
            0u32.pack(reply).unwrap();
            let max = world.write_bytes_max;
            for word in [max, max, 1, max, max, 1, max, 0, u32::MAX, 0, 1, 0] {
                word.pack(reply).unwrap();
            }
        }
        NFSPROC3_SETATTR => {
            let (arguments, _) = SETATTR3args::unpack(arguments).unwrap();
            world.setattrs += 1;
            if let Nfs3Option::Some(gid) = arguments.new_attributes.gid {
                world.gid = gid;
            }
            ok.pack(reply).unwrap();
            wcc_data::default().pack(reply).unwrap();
        }
        NFSPROC3_READ => {
            let (arguments, _) = READ3args::unpack(arguments).unwrap();
            saw(arguments.offset, arguments.count as usize);
            if gid != world.gid {
                return refuse(reply, nfsstat3::NFS3ERR_ACCES, 1);
            }
            let start = (arguments.offset as usize).min(world.volatile.len());
            let end = (start + arguments.count as usize).min(world.volatile.len());
            ok.pack(reply).unwrap();
            0u32.pack(reply).unwrap();
            ((end - start) as u32).pack(reply).unwrap();
            (end == world.volatile.len()).pack(reply).unwrap();
            Opaque::borrowed(&world.volatile[start..end])
                .pack(reply)
                .unwrap();
        }
        NFSPROC3_WRITE => {
            let (arguments, _) = WRITE3args::unpack(arguments).unwrap();
            if let Mood::Refuse(status) = mood {
                return refuse(reply, status, 2);
            }
            if gid != world.gid {
                return refuse(reply, nfsstat3::NFS3ERR_ACCES, 2);
            }
            saw(arguments.offset, arguments.data.len());
            let count = arguments.data.len().min(world.write_bytes_max as usize);
            let start = arguments.offset as usize;
            world.volatile[start..start + count].copy_from_slice(&arguments.data[..count]);
            let committed = if world.stable {
                world.durable[start..start + count].copy_from_slice(&arguments.data[..count]);
                stable_how::FILE_SYNC
            } else {
                stable_how::UNSTABLE
            };
            ok.pack(reply).unwrap();
            let file_wcc = wcc_data::default();
            WRITE3resok {
                file_wcc,
                count: count as u32,
                committed,
                verf: verifier,
            }
            .pack(reply)
            .unwrap();
        }
        NFSPROC3_COMMIT => {
            if gid != world.gid {
                return refuse(reply, nfsstat3::NFS3ERR_ACCES, 2);
            }
            saw(0, 0);
            world.durable = world.volatile.clone();
            ok.pack(reply).unwrap();
            COMMIT3resok {
                file_wcc: wcc_data::default(),
                verf: verifier,
            }
            .pack(reply)
            .unwrap();
        }
        other => panic!("the scripted server does not do {other}"),
    }
}

fn attributes(world: &World) -> fattr3 {
    fattr3 {
        type_: ftype3::NF3REG,
        mode: 0o060,
        nlink: 1,
        uid: 50_000,
        gid: world.gid,
        size: world.volatile.len() as u64,
        used: 0,
        rdev: specdata3::default(),
        fsid: 1,
        fileid: 2,
        atime: nfstime3::default(),
        mtime: nfstime3::default(),
        ctime: nfstime3::default(),
    }
}
