//! Getting a thread out of KVM_RUN: a signal whose handler sets `immediate_exit` in the thread's own run page.
//!
//! The handler writes the flag even when the signal arrives just before KVM_RUN, so that no kick is
//! lost: KVM looks at the flag when it enters the guest.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Once;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

thread_local! {
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int) {
    let page = RUN_PAGE.get();
    if !page.is_null() {
        // SAFETY: the pointer was set by this thread to the run page of a vCPU that lives until
        // `Registration` is dropped on this thread; only the field's address is taken here.
        let flag = unsafe { ptr::addr_of_mut!((*page).immediate_exit) };
        // SAFETY: as above; KVM reads the byte only at KVM_RUN.
        unsafe { flag.write_volatile(1) };
    }
}

fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the handler, once a process.
fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: all-zero is a valid `sigaction`: no flags (so KVM_RUN is not restarted), empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_kick as *const () as usize;
        // SAFETY: the handler is async-signal-safe: it reads a const-initialised thread-local and
        // writes one byte.
        let answer = unsafe { libc::sigaction(signal(), &action, ptr::null_mut()) };
        assert_eq!(answer, 0, "SIGRTMIN is a valid signal to handle");
    });
}

/// This thread's right to be kicked, while it runs one vCPU.
#[derive(Debug)]
pub struct Registration {
    thread: libc::pthread_t,
}

/// A thread to kick.
#[derive(Clone, Copy, Debug)]
pub struct Target(libc::pthread_t);

impl Registration {
    /// Registers the calling thread for `vcpu`, which must outlive the registration on this thread.
    pub fn of_this_thread(vcpu: &mut VcpuFd) -> Registration {
        install();
        RUN_PAGE.set(vcpu.get_kvm_run());
        // SAFETY: no precondition.
        let thread = unsafe { libc::pthread_self() };
        Registration { thread }
    }

    /// What others kick.
    pub fn target(&self) -> Target {
        Target(self.thread)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        RUN_PAGE.set(ptr::null_mut());
    }
}

impl Target {
    /// Kicks the thread.
    ///
    /// # Errors
    /// When there is no such thread any more.
    pub fn kick(self) -> io::Result<()> {
        // SAFETY: the caller keeps the thread's handle unjoined, so that the id stays valid.
        let answer = unsafe { libc::pthread_kill(self.0, signal()) };
        if answer == 0 {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(answer))
        }
    }
}
