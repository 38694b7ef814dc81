//! Reading a raw disk image of this host, block by block, leaving out what is all zeroes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

/// How much is read at a time.
pub(crate) const BLOCK_BYTES: usize = 256 << 10;

/// Why an image cannot become a disk.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be read.
    #[error("cannot read the disk image {}: {source}; give the path of a raw image on this node", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not a file.
    #[error("the disk image {} is not a regular file", path.display())]
    NotAFile {
        /// The image.
        path: PathBuf,
    },
    /// It is in a format of its own.
    #[error(
        "the disk image {} is not raw but {format}: convert it (`qemu-img convert -O raw`)", path.display()
    )]
    NotRaw {
        /// The image.
        path: PathBuf,
        /// What it is.
        format: &'static str,
    },
    /// It does not fit.
    #[error(
        "the disk image {} has {image_bytes} bytes, more than the disk's {disk_bytes}: make the disk larger", path.display()
    )]
    TooLarge {
        /// The image.
        path: PathBuf,
        /// Its size.
        image_bytes: u64,
        /// The disk's.
        disk_bytes: u64,
    },
}

/// An image, opened and found usable.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    path: PathBuf,
    file: Arc<File>,
    pub(crate) size_bytes: u64,
}

impl Image {
    /// Opens a raw image that fits into a disk.
    pub(crate) async fn open(path: &Path, disk_bytes: u64) -> Result<Image, ImageError> {
        let path = path.to_owned();
        let failed = {
            let path = path.clone();
            move |error| ImageError::Read {
                path,
                source: io::Error::other(error),
            }
        };
        tokio::task::spawn_blocking(move || Image::open_now(path, disk_bytes))
            .await
            .unwrap_or_else(|error| Err(failed(error)))
    }

    fn open_now(path: PathBuf, disk_bytes: u64) -> Result<Image, ImageError> {
        let read = |source| ImageError::Read {
            path: path.clone(),
            source,
        };
        let kind = std::fs::metadata(&path).map_err(read)?;
        if !kind.is_file() {
            // Also keeps the open below from waiting on a FIFO.
            return Err(ImageError::NotAFile { path });
        }
        let file = File::open(&path).map_err(read)?;
        let image_bytes = file.metadata().map_err(read)?.len();
        let mut magic = [0; 8];
        let length = file.read_at(&mut magic, 0).map_err(read)?;
        for (format, sign) in [
            ("qcow2", &b"QFI\xfb"[..]),
            ("VHDX", b"vhdxfile"),
            ("VMDK", b"KDMV"),
        ] {
            if magic[..length].starts_with(sign) {
                return Err(ImageError::NotRaw { path, format });
            }
        }
        if image_bytes > disk_bytes {
            return Err(ImageError::TooLarge {
                path,
                image_bytes,
                disk_bytes,
            });
        }
        Ok(Image {
            path,
            file: Arc::new(file),
            size_bytes: image_bytes,
        })
    }

    /// The block at `offset`; `None` where it is all zeroes.
    pub(crate) async fn block(&self, offset: u64) -> Result<Option<Bytes>, ImageError> {
        let (file, path) = (self.file.clone(), self.path.clone());
        let length = (self.size_bytes - offset).min(BLOCK_BYTES as u64) as usize;
        let block = tokio::task::spawn_blocking(move || {
            let mut block = vec![0; length];
            file.read_exact_at(&mut block, offset).map(|()| block)
        })
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
        .map_err(|source| ImageError::Read { path, source })?;
        Ok(block
            .iter()
            .any(|byte| *byte != 0)
            .then(|| Bytes::from(block)))
    }
}
