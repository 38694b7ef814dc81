//! From a machine file to a machine: disks opened, devices built and put where the guest looks for them.

use std::fs::File;
use std::sync::Arc;

use cluster_model::state::{Boot, OnIsolation};
use storage_broker::dialer::Dialer;
use storage_broker::disk::{DirDisk, Disk, OpenError, open_disk};
use tokio::sync::mpsc;

use crate::boot::linux::{self, LinuxImage};
use crate::boot::start::Start;
use crate::boot::{BootError, selfcheck};
use crate::console::Console;
use crate::devices::i8042::I8042;
use crate::devices::selfcheck::SelfCheck;
use crate::devices::selfcheck::witness::WitnessError;
use crate::devices::serial::Serial;
use crate::devices::virtio::block::{Block, BlockConfig};
use crate::devices::virtio::net::announce::MacAddress;
use crate::devices::virtio::net::tap::{Tap, TapError};
use crate::devices::virtio::net::{Net, NetConfig};
use crate::devices::{DeviceContext, GuestMemory, MachineEvent};
use crate::gate::{Lapsed, OnLapse};
use crate::guest::{GuestDisk, REPORT_ADDRESS, boot_params};
use crate::handles::{Handles, Images};
use crate::kvm::vm::KvmError;
use crate::layout::{
    I8042_PORT, I8042_PORTS, REPORT_PORT, REPORT_PORTS, SERIAL_IRQ, SERIAL_PORT, SERIAL_PORTS,
    VIRTIO_MMIO_SLOT_BYTES, virtio_irq, virtio_mmio_address,
};
use crate::machine::{AssembleError, Config, DeviceSet, Machine};
use crate::run_log::RunLogError;
use crate::spec::ValidatedSpec;

/// A machine and the handles on its devices that its monitor needs.
#[derive(Debug)]
pub struct Platform {
    /// The machine.
    pub machine: Machine,
    /// Its serial console.
    pub console: Arc<Console>,
    /// The self-checking guest's port, where that is what it boots.
    pub selfcheck: Option<Arc<SelfCheck>>,
    /// Its network interfaces.
    pub nics: Vec<Arc<Net>>,
    /// The kernel's count of this process's memory.
    pub memory_counts: Option<File>,
}

/// Why a machine could not be built from its file.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A disk cannot be opened.
    #[error(transparent)]
    Disk(#[from] OpenError),
    /// A disk is not the one that the log has.
    #[error(
        "disk {index} has {found} bytes and should have {expected}: another file lies in its place"
    )]
    DiskSize {
        /// Which.
        index: usize,
        /// What it has.
        found: u64,
        /// What the log says.
        expected: u64,
    },
    /// The hardware.
    #[error(transparent)]
    Assemble(#[from] AssembleError),
    /// A tap cannot be had.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// KVM cannot be opened.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// What it should boot cannot be opened.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The witness cannot be kept.
    #[error(transparent)]
    Witness(#[from] WitnessError),
    /// What a test wants to know cannot be written down.
    #[error(transparent)]
    RunLog(#[from] RunLogError),
    /// It would have nobody to be on its memory channels.
    #[error(transparent)]
    Identity(#[from] migration_core::tls::DrawError),
}

/// Builds the machine that `spec` describes, loaded with what it boots unless it is an incoming one.
///
/// # Errors
/// See [`BuildError`].
pub async fn build(
    spec: &ValidatedSpec,
    handles: Handles,
    events: mpsc::Sender<MachineEvent>,
    lapsed: impl Fn(Lapsed) + Send + 'static,
) -> Result<Platform, BuildError> {
    let Handles {
        kvm,
        taps,
        directory_disks,
        images,
        witness,
        memory_counts,
        run_log,
    } = handles;
    let disks = open_disks(spec, directory_disks).await?;
    let file = spec.file();
    let config = Config {
        kvm,
        memory_mib: file.memory_mib,
        vcpus: file.vcpus,
        disks: disks.clone(),
        on_lapse: match file.on_isolation {
            OnIsolation::Freeze => OnLapse::Freeze,
            OnIsolation::RunUntilFenced => OnLapse::RunUntilFenced,
        },
        run_log,
    };
    let console = Arc::new(Console::default());
    let (mut selfcheck, mut nics) = (None, Vec::new());
    let attach = |context: &DeviceContext| {
        let mut set = DeviceSet::default();
        let serial = Serial::new(context, SERIAL_IRQ, console.clone());
        set.buses
            .pio
            .insert(SERIAL_PORT, SERIAL_PORTS, serial.clone())?;
        set.migratable.push(serial);
        let i8042 = I8042::new(context);
        set.buses
            .pio
            .insert(I8042_PORT, I8042_PORTS, i8042.clone())?;
        set.migratable.push(i8042);
        if matches!(file.boot, Boot::SelfCheck { .. }) {
            let port = SelfCheck::new(context, REPORT_ADDRESS, witness);
            set.buses
                .pio
                .insert(REPORT_PORT, REPORT_PORTS, port.clone())?;
            set.migratable.push(port.clone());
            selfcheck = Some(port);
        }
        for (index, disk) in disks.iter().enumerate() {
            let (address, irq) = (virtio_mmio_address(index), virtio_irq(index));
            let serial = format!("{}-{index}", file.vm_id);
            let config = BlockConfig {
                index,
                address,
                irq,
                serial,
                read_only: false,
            };
            let block = Block::new(context, &config, disk.clone())?;
            set.buses
                .mmio
                .insert(address, VIRTIO_MMIO_SLOT_BYTES, block.clone())?;
            set.migratable.push(block);
        }
        for (index, (tap, mac)) in taps.into_iter().zip(spec.macs()).enumerate() {
            let slot = disks.len() + index;
            let (address, irq) = (virtio_mmio_address(slot), virtio_irq(slot));
            let tap = Tap::new(tap)?;
            let net = Net::new(
                context,
                &NetConfig {
                    index,
                    address,
                    irq,
                    mac: MacAddress(*mac),
                },
                tap,
            )?;
            set.buses
                .mmio
                .insert(address, VIRTIO_MMIO_SLOT_BYTES, net.clone())?;
            set.migratable.push(net.clone());
            nics.push(net);
        }
        Ok(set)
    };
    let load =
        |memory: &GuestMemory, tsc_khz: u64| load_guest(spec, images.as_ref(), memory, tsc_khz);
    let load = spec.incoming().is_none().then_some(load);
    let machine = Machine::assemble(config, events, attach, load, lapsed)?;
    Ok(Platform {
        machine,
        console,
        selfcheck,
        nics,
        memory_counts,
    })
}

async fn open_disks(
    spec: &ValidatedSpec,
    directory_disks: Vec<Option<File>>,
) -> Result<Vec<Arc<dyn Disk>>, BuildError> {
    let dialer = spec
        .file()
        .node_address
        .map_or_else(Dialer::default, Dialer::from_source);
    let mut disks = Vec::new();
    let opened = directory_disks
        .into_iter()
        .chain(std::iter::repeat_with(|| None));
    for (index, ((open, recorded), file)) in spec
        .disks()
        .iter()
        .zip(&spec.file().disks)
        .zip(opened)
        .enumerate()
    {
        let disk: Arc<dyn Disk> = match file {
            Some(file) => Arc::new(DirDisk::from_file(file, open)?),
            None => open_disk(open, &dialer).await?,
        };
        let (found, expected) = (disk.size_bytes(), recorded.size_bytes);
        if found != expected {
            return Err(BuildError::DiskSize {
                index,
                found,
                expected,
            });
        }
        disks.push(disk);
    }
    Ok(disks)
}

fn load_guest(
    spec: &ValidatedSpec,
    images: Option<&Images>,
    memory: &GuestMemory,
    tsc_khz: u64,
) -> Result<Start, BootError> {
    let file = spec.file();
    match &file.boot {
        Boot::SelfCheck {
            working_set_mib,
            dirty_mib_s,
        } => {
            let disk = file.disks.first().map(|disk| GuestDisk {
                mmio_address: virtio_mmio_address(0),
                bytes: disk.size_bytes,
            });
            let working_set_mib = u64::from(*working_set_mib);
            let params = boot_params(
                file.vm_id.0,
                file.memory_mib,
                file.vcpus,
                working_set_mib,
                *dirty_mib_s,
                disk,
                tsc_khz,
            )?;
            selfcheck::load(memory, &params)
        }
        Boot::Linux { cmdline, .. } => {
            let images = images.ok_or(BootError::NotOpened)?;
            let image = LinuxImage {
                kernel: &images.kernel,
                initrd: images.initrd.as_ref(),
                cmdline,
                vcpus: file.vcpus,
                virtio_slots: file.disks.len() + file.nics.len(),
            };
            linux::load(memory, &image)
        }
    }
}
