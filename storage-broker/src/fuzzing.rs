//! What stands behind sockets and files, without them, for the fuzzer: an interface for nobody else.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use cluster_model::ids::Token;
use proto::broker as wire;
use tokio::net::TcpStream;
use tonic::Status;

use crate::nfs::{Connection, FileHandle, MountError, NfsClient, mount};
use crate::nfs_server::{JournalError, StartError, journal, serve_one};
use crate::store::dir::Record;
use crate::store::image::Image;
use crate::store::{ImageError, VolumeRef};
use crate::volume::{DiskPath, NfsUrl};

/// A file as a server may name it.
pub fn file_handle(handle: &[u8]) -> FileHandle {
    FileHandle(Bytes::copy_from_slice(handle))
}

/// A client whose server is at the other end of `stream`.
pub fn client(stream: TcpStream, call_timeout: Duration, root: FileHandle) -> NfsClient {
    NfsClient::new(Connection::new(stream, call_timeout), root)
}

/// Asks the portmapper at the other end of `stream` for the MOUNT service's port.
///
/// # Errors
/// As a mount fails.
pub async fn ask_portmapper(
    stream: TcpStream,
    url: &NfsUrl,
    call_timeout: Duration,
) -> Result<u16, MountError> {
    mount::ask_portmapper_over(stream, url, call_timeout).await
}

/// Asks the MOUNT service at the other end of `stream` for the export's root.
///
/// # Errors
/// As a mount fails.
pub async fn ask_mount(
    stream: TcpStream,
    url: &NfsUrl,
    call_timeout: Duration,
) -> Result<FileHandle, MountError> {
    mount::ask_mount_over(stream, url, call_timeout).await
}

/// Serves one client, at the other end of `stream`, the directory `root`.
///
/// # Errors
/// When the directory cannot be served.
pub async fn serve(stream: TcpStream, root: &Path) -> Result<(), StartError> {
    serve_one(stream, root).await
}

/// Reads an attribute journal; answers how many records it has.
///
/// # Errors
/// When it is damaged or foreign.
pub fn read_journal(directory: &Path) -> Result<Option<usize>, JournalError> {
    journal::read(directory).map(|contents| contents.written)
}

/// Reads a disk image to its end; answers how many of its blocks are not all zeroes.
///
/// # Errors
/// As the creation of a disk from it fails.
pub async fn read_image(path: &Path, disk_bytes: u64) -> Result<usize, ImageError> {
    let image = Image::open(path, disk_bytes).await?;
    let mut blocks = 0;
    let mut offset = 0;
    while offset < image.size_bytes {
        blocks += usize::from(image.block(offset).await?.is_some());
        offset += crate::store::image::BLOCK_BYTES as u64;
    }
    Ok(blocks)
}

/// Whether these bytes are the record of a disk on a `dir:` volume.
pub fn is_disk_record(content: &[u8]) -> bool {
    serde_json::from_slice::<Record>(content).is_ok()
}

/// Parses the files and the token of a request, as each of the broker's methods begins.
///
/// # Errors
/// The answer to the request.
pub fn broker_request(
    files: Vec<wire::File>,
    token: u32,
) -> Result<(Vec<(VolumeRef, DiskPath)>, Token), Status> {
    Ok((crate::daemon::files(files)?, crate::daemon::token(token)?))
}
