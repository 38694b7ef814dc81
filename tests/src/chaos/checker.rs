//! Decides whether anything was lost: from every node's journal of events, every guest's report, what the
//! guests' witnesses wrote down, the storage server's own view of the disks, when which monitor's guest executed, and
//! what no log may say.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use cluster_model::Token;
use cluster_model::settings::Settings;
use nfs3_client::Nfs3ConnectionBuilder;
use nfs3_client::tokio::TokioConnector;
use nfs3_types::nfs3::{GETATTR3args, LOOKUP3args, Nfs3Result, diropargs3, filename3};
use nfs3_types::rpc::{auth_unix, opaque_auth};
use nfs3_types::xdr_codec::Opaque;
use proto::admin::{EventView, EventsRequest, VmView};
use vmm::devices::selfcheck::witness::{self, WitnessEvent};
use vmm::guest::abi::{BlockContents, PAGE_WORDS, block_slot, read_block};

use super::World;
use super::copies::Copies;
use super::logs::Logs;

/// Blocks of a disk that the guest writes, if the disk has as many.
const BLOCKS_MAX: u64 = vmm::guest::DISK_BLOCKS;
const BLOCK_BYTES: usize = PAGE_WORDS * 8;

/// What is known so far.
#[derive(Default)]
pub struct Checker {
    /// Every event, by log index and sequence.
    events: BTreeMap<(u64, u32), EventView>,
    /// Migrations that have begun, and those that ended, with how.
    begun: BTreeSet<String>,
    ended: BTreeMap<String, String>,
    /// The newest token seen of each machine.
    tokens: BTreeMap<String, u32>,
    /// Disks read from the server's side.
    pub disks_read: u64,
    /// When guests executed.
    pub copies: Copies,
    logs: Logs,
}

impl Checker {
    /// How often each kind of event was seen.
    pub fn kinds(&self) -> BTreeMap<String, u64> {
        let mut kinds = BTreeMap::new();
        for event in self.events.values() {
            *kinds.entry(event.kind.clone()).or_default() += 1;
        }
        kinds
    }

    /// Checks a cluster that is calm: every node is up, every machine runs or is stopped, nothing is moving.
    ///
    /// # Errors
    /// With the violation.
    pub async fn check(&mut self, world: &World, vms: &[VmView]) -> anyhow::Result<()> {
        self.copies.look(
            &world.cluster.local.nodes,
            &world.ledger,
            Settings::fast().margin_ms(),
        )?;
        self.logs.look(&world.cluster.local.plan.folder)?;
        for vm in vms {
            if let Some(guest) = &vm.guest {
                ensure!(
                    guest.errors == 0,
                    "{}'s guest reports: {}",
                    vm.name,
                    guest.error
                );
            }
            let known = self.tokens.entry(vm.name.clone()).or_default();
            ensure!(
                vm.token >= *known,
                "{}'s token went from {known} back to {}",
                vm.name,
                vm.token
            );
            *known = vm.token;
            self.check_witness(&world.cluster.witness_path(&vm.name))?;
            for disk in &vm.disks {
                let (group, told) = (group_of(world, &disk.path).await?, Token(disk.token).gid());
                ensure!(
                    group == told,
                    "{} belongs to group {group}, by the log to {told} (token {})",
                    disk.path,
                    disk.token
                );
            }
        }
        self.check_journals(world).await
    }

    /// No boot found less than had been flushed before it, whoever told of it late.
    fn check_witness(&self, path: &Path) -> anyhow::Result<()> {
        if !path.exists() {
            return Ok(());
        }
        let events = witness::read(path)?;
        if let Some(loss) = witness::losses(&events).first() {
            bail!("{}: {loss}", path.display());
        }
        let mut boots: Vec<(u64, u64)> = Vec::new();
        for event in events {
            match event {
                WitnessEvent::Found { number, life } => boots.push((number, life)),
                // A monitor that stood still tells late of a flush that was whole before its successor booted.
                WitnessEvent::Flushed { number, life } => {
                    let later = boots.iter().find(|boot| boot.1 > life && boot.0 < number);
                    if let Some((found, successor)) = later {
                        bail!(
                            "{}: life {life} flushed {number}, and life {successor} had found {found} only",
                            path.display()
                        );
                    }
                }
            }
        }
        Ok(())
    }

    /// Every node tells the same events, and each migration ends once.
    async fn check_journals(&mut self, world: &World) -> anyhow::Result<()> {
        let after = self.events.keys().next_back().copied().unwrap_or_default();
        let first = events_after(world, 0, after).await?;
        let last = first
            .last()
            .map_or(after, |event| (event.index, event.sequence));
        for at in 1..world.cluster.local.nodes.len() {
            let name = &world.cluster.local.nodes[at].name;
            let events = world
                .cluster
                .wait(&format!("{name} to know the newest event"), async || {
                    let events = events_after(world, at, after).await?;
                    let newest = events
                        .last()
                        .map_or(after, |event| (event.index, event.sequence));
                    Ok((newest >= last).then_some(events))
                })
                .await?;
            for (ours, theirs) in first.iter().zip(&events) {
                ensure!(ours == theirs, "n1 tells {ours:?}, {name} tells {theirs:?}");
            }
        }
        for event in first {
            self.take(&event)?;
            self.events.insert((event.index, event.sequence), event);
        }
        let open: Vec<_> = self
            .begun
            .iter()
            .filter(|id| !self.ended.contains_key(*id))
            .collect();
        ensure!(open.is_empty(), "migrations that never ended: {open:?}");
        Ok(())
    }

    fn take(&mut self, event: &EventView) -> anyhow::Result<()> {
        let migration = event
            .objects
            .iter()
            .find(|object| object.starts_with("migration/"));
        match (event.kind.as_str(), migration) {
            ("migration.queued" | "migration.started", Some(id)) => {
                ensure!(!self.ended.contains_key(id), "{id} begins again: {event:?}");
                self.begun.insert(id.clone());
            }
            ("migration.cut-over" | "migration.aborted", Some(id)) => {
                let before = self.ended.insert(id.clone(), event.kind.clone());
                ensure!(before.is_none(), "{id} ended twice: {before:?}, {event:?}");
            }
            (kind, None) if kind.starts_with("migration.") => bail!("which migration: {event:?}"),
            _ => {}
        }
        Ok(())
    }

    /// Reads the disks of stopped machines as the storage server has them: what was flushed is there.
    ///
    /// # Errors
    /// With the violation.
    pub async fn check_disks(&mut self, world: &World, vms: &[VmView]) -> anyhow::Result<()> {
        for vm in vms {
            for disk in &vm.disks {
                let path = world.cluster.local.nfs_root().join(&disk.path);
                let flushed = world.cluster.witness(&vm.name)?;
                let content = std::fs::read(&path).with_context(|| path.display().to_string())?;
                check_blocks(&content, vm.id, flushed)
                    .with_context(|| format!("{}, flushed {flushed}", path.display()))?;
                self.disks_read += 1;
            }
        }
        Ok(())
    }
}

/// Every slot holds the number that was last flushed to it, or a later one.
fn check_blocks(content: &[u8], vm: u64, flushed: u64) -> anyhow::Result<()> {
    let blocks = (content.len() / BLOCK_BYTES) as u64;
    let blocks = blocks.min(BLOCKS_MAX);
    let first = flushed.saturating_sub(blocks - 1).max(1);
    for number in first..=flushed {
        let slot = block_slot(number, blocks) as usize;
        let mut words = [0; PAGE_WORDS];
        let bytes = content[slot * BLOCK_BYTES..].chunks_exact(8);
        for (word, bytes) in words.iter_mut().zip(bytes) {
            *word = u64::from_le_bytes(bytes.try_into()?);
        }
        match read_block(&words, vm) {
            BlockContents::Whole { number: found, .. } if found >= number => {}
            // Written over when its machine was stopped by force or its host died: nothing was promised of
            // the number that was being written, and the one before is gone with it.
            BlockContents::Damaged(found) if found > flushed => {}
            other => bail!("slot {slot} holds {other:?} where block {number} was flushed"),
        }
    }
    Ok(())
}

async fn events_after(
    world: &World,
    at: usize,
    after: (u64, u32),
) -> anyhow::Result<Vec<EventView>> {
    let mut api = world.cluster.local.connect(at).await?;
    let request = EventsRequest {
        after_index: after.0,
        after_sequence: after.1,
        ..EventsRequest::default()
    };
    let mut stream = api.api.events(request).await?.into_inner();
    let mut events = Vec::new();
    while let Some(event) = stream.message().await? {
        events.push(event);
    }
    Ok(events)
}

/// A file's group, as the storage server tells it to a stranger who asks.
async fn group_of(world: &World, path: &str) -> anyhow::Result<u32> {
    let (export, port, mount_port) = world.server.mount_point(&world.cluster.local);
    let host = world.cluster.local.nfs.address.ip().to_string();
    let stranger = auth_unix {
        stamp: 0,
        machinename: Opaque::borrowed(b"chaos"),
        uid: 1_000,
        gid: 1_000,
        gids: Vec::new(),
    };
    let mut client = Nfs3ConnectionBuilder::new(TokioConnector, &host, &export)
        .connect_from_privileged_port(true)
        .nfs3_port(port)
        .mount_port(mount_port)
        .credential(opaque_auth::auth_unix(&stranger))
        .mount()
        .await
        .map_err(|error| anyhow::anyhow!("cannot mount {export}: {error}"))?;
    let mut object = client.root_nfs_fh3();
    for part in path.split('/') {
        let what = LOOKUP3args {
            what: diropargs3 {
                dir: object,
                name: filename3(Opaque::borrowed(part.as_bytes())),
            },
        };
        object = match client.lookup(&what).await? {
            Nfs3Result::Ok(found) => found.object,
            Nfs3Result::Err((status, _)) => bail!("the server refuses to look up {part}: {status}"),
        };
    }
    match client.getattr(&GETATTR3args { object }).await? {
        Nfs3Result::Ok(found) => Ok(found.obj_attributes.gid),
        Nfs3Result::Err((status, _)) => bail!("the server refuses GETATTR of {path}: {status}"),
    }
}
