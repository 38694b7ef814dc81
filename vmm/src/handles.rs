//! What a monitor opens of its host before it gives up the right to: KVM, taps, files.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use cluster_model::state::Boot;
use kvm_ioctls::Kvm;
use storage_broker::disk::DirDisk;
use storage_broker::volume::VolumeUrl;

use crate::boot::linux::ImageFile;
use crate::devices::selfcheck::witness::Witness;
use crate::devices::virtio::net::tap::PluggedTap;
use crate::kvm::vm;
use crate::platform::BuildError;
use crate::run_log::RunLog;
use crate::spec::ValidatedSpec;

/// Everything of the host that a monitor needs and can open once only.
#[derive(Debug)]
pub struct Handles {
    /// KVM.
    pub kvm: Kvm,
    /// The taps, in the order of the machine's interfaces, plugged in.
    pub taps: Vec<PluggedTap>,
    /// For each disk its file, where its volume is a directory of this host.
    pub directory_disks: Vec<Option<File>>,
    /// The kernel and the initramfs, of a machine that boots Linux here.
    pub images: Option<Images>,
    /// Where the self-checking guest's promises are written down.
    pub witness: Option<Witness>,
    /// The kernel's count of this process's memory.
    pub memory_counts: Option<File>,
    /// Where it is written down when the guest executed, if a test asks for it.
    pub run_log: Option<Arc<RunLog>>,
}

/// What Linux boots from.
#[derive(Debug)]
pub struct Images {
    /// An ELF vmlinux or a bzImage.
    pub kernel: ImageFile,
    /// An initramfs.
    pub initrd: Option<ImageFile>,
}

impl Handles {
    /// Opens what `spec` names, and the files by which tests reach in, for a monitor that listens on `control`.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn open(spec: &ValidatedSpec, control: &Path) -> Result<Handles, BuildError> {
        proto::failpoint::prepare();
        proto::clock::prepare();
        let file = spec.file();
        let directory_disks = spec
            .disks()
            .iter()
            .map(|disk| match &disk.volume {
                VolumeUrl::Dir(directory) => DirDisk::open_file(directory, disk).map(Some),
                VolumeUrl::Nfs(_) => Ok(None),
            })
            .collect::<Result<_, _>>()?;
        let taps = file
            .nics
            .iter()
            .map(|nic| PluggedTap::open(&nic.tap, &nic.bridge))
            .collect::<Result<_, _>>()?;
        let images = match &file.boot {
            Boot::Linux { kernel, initrd, .. } if spec.incoming().is_none() => Some(Images {
                kernel: ImageFile::open("kernel", kernel.as_ref())?,
                initrd: initrd
                    .as_ref()
                    .map(|initrd| ImageFile::open("initrd", initrd.as_ref()))
                    .transpose()?,
            }),
            _ => None,
        };
        let witness = match (&file.boot, &file.witness) {
            (Boot::SelfCheck { .. }, Some(path)) => Some(Witness::open(path.clone())?),
            _ => None,
        };
        Ok(Handles {
            kvm: vm::open()?,
            taps,
            directory_disks,
            images,
            witness,
            memory_counts: File::open("/proc/self/statm").ok(),
            run_log: RunLog::asked(control, file.vm_id, file.vcpus)?,
        })
    }
}
