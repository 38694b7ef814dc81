//! Waiting for a file or an event on the runtime.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use vmm_sys_util::eventfd::EventFd;

/// A file that does not block, to be waited for. Called on a tokio runtime.
pub(crate) fn watch_file(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: a `File` owns its descriptor and answers the same number until it is dropped.
    let watched =
        unsafe { AsyncFd::register_with_interest(file, Interest::READABLE | Interest::WRITABLE) };
    Ok(watched?)
}

/// An event that does not block, to be waited for. Called on a tokio runtime.
pub(crate) fn watch_event(event: EventFd) -> io::Result<AsyncFd<EventFd>> {
    // SAFETY: an `EventFd` owns its descriptor and answers the same number until it is dropped.
    let watched = unsafe { AsyncFd::register_with_interest(event, Interest::READABLE) };
    Ok(watched?)
}
