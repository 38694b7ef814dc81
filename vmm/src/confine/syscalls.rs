//! seccomp: the system calls that are left to each kind of thread (Documentation/userspace-api/seccomp_filter.rst).
//!
//! A call that is not listed fails with EPERM rather than ending the machine: a C library that asks for a new one
//! after an update gets its answer, whoever broke out gets nothing.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Threads that need less than the rest of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU and the devices that it reaches.
    Vcpu,
    /// Stops the machine when its lease runs out.
    Lease,
}

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilterError {
    /// It cannot be made.
    #[error("cannot build the filter of system calls: {0}")]
    Build(#[from] seccompiler::BackendError),
    /// The kernel does not take it.
    #[error("this kernel takes no filter of system calls: {0}")]
    Install(#[from] seccompiler::Error),
}

/// Memory, locks, time, the thread itself: what any thread needs to run and to end.
const EVERY: [c_long; 34] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Beyond [`EVERY`]: files, events, sockets that there are, and those of TCP that are made.
const PROCESS: [c_long; 58] = [
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_clone3,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpeername,
    libc::SYS_getresgid,
    libc::SYS_getresuid,
    libc::SYS_getrusage,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_getuid,
    libc::SYS_listen,
    libc::SYS_lseek,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendfile,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
    libc::SYS_splice,
    libc::SYS_stat,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_tee,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    libc::SYS_uname,
    libc::SYS_vmsplice,
];

/// The group of KVM's requests, in bits 8 to 15 (linux/kvm.h: KVMIO).
const KVM_REQUESTS: u64 = 0xae00;
const REQUEST_GROUP: u64 = 0xff00;

/// Switches a tap's carrier (linux/if_tun.h), and asks for non-blocking I/O and for waiting bytes.
pub(crate) const TUNSETCARRIER: u64 = 0x4004_54e2;
const REQUESTS: [u64; 3] = [TUNSETCARRIER, libc::FIONBIO, libc::FIONREAD];

/// Whether the process is confined: threads of one that is not (a test's) are left alone too.
static CONFINED: AtomicBool = AtomicBool::new(false);

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

fn compare(
    argument: u8,
    length: SeccompCmpArgLen,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, FilterError> {
    let condition = SeccompCondition::new(argument, length, operator, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

fn equals(argument: u8, value: u64) -> Result<SeccompRule, FilterError> {
    compare(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, FilterError> {
    compare(
        argument,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(mask),
        value,
    )
}

fn every() -> Result<Rules, FilterError> {
    let mut rules: Rules = EVERY.into_iter().map(|call| (call, Vec::new())).collect();
    let own = u64::from(std::process::id());
    // To its own threads: a vCPU is kicked by a signal.
    rules.insert(libc::SYS_tgkill, vec![equals(0, own)?]);
    Ok(rules)
}

fn process(names: bool) -> Result<Rules, FilterError> {
    let mut rules = every()?;
    rules.extend(PROCESS.into_iter().map(|call| (call, Vec::new())));
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_kill, vec![equals(0, own)?]);
    // Threads, no processes; clone3 hides its flags from filters, and is answered as by a kernel without it.
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![masked(0, thread, thread)?]);
    let mut requests = vec![masked(1, REQUEST_GROUP, KVM_REQUESTS)?];
    for request in REQUESTS {
        requests.push(equals(1, request)?);
    }
    rules.insert(libc::SYS_ioctl, requests);
    let mut sockets = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let kinds = [Some(libc::SOCK_STREAM), names.then_some(libc::SOCK_DGRAM)];
        for kind in kinds.into_iter().flatten() {
            // The low bits are the kind, the others flags.
            sockets.push(SeccompRule::new(vec![
                SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, family as u64)?,
                SeccompCondition::new(
                    1,
                    SeccompCmpArgLen::Dword,
                    SeccompCmpOp::MaskedEq(0xf),
                    kind as u64,
                )?,
            ])?);
        }
    }
    rules.insert(libc::SYS_socket, sockets);
    rules.insert(
        libc::SYS_prctl,
        vec![
            equals(0, libc::PR_SET_NAME as u64)?,
            // Threads narrow themselves further.
            equals(0, libc::PR_SET_NO_NEW_PRIVS as u64)?,
            // Anonymous memory's name, which newer C libraries give.
            equals(0, libc::PR_SET_VMA as u64)?,
        ],
    );
    rules.insert(
        libc::SYS_seccomp,
        vec![equals(0, libc::SECCOMP_SET_MODE_FILTER.into())?],
    );
    // Reading limits, not setting them.
    rules.insert(
        libc::SYS_prlimit64,
        vec![compare(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?],
    );
    Ok(rules)
}

fn thread(kind: ThreadKind) -> Result<Rules, FilterError> {
    let mut rules = every()?;
    match kind {
        ThreadKind::Vcpu => {
            rules.insert(
                libc::SYS_ioctl,
                vec![masked(1, REQUEST_GROUP, KVM_REQUESTS)?],
            );
        }
        ThreadKind::Lease => {
            let carrier = vec![equals(1, TUNSETCARRIER)?];
            rules.insert(libc::SYS_ioctl, carrier);
            rules.insert(libc::SYS_timerfd_settime, Vec::new());
        }
    }
    Ok(rules)
}

fn install(
    rules: Rules,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<(), FilterError> {
    let target = TargetArch::try_from(std::env::consts::ARCH)?;
    let program: BpfProgram = SeccompFilter::new(rules, otherwise, listed, target)?.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}

/// Confines this thread and all that it starts; with `names` it may ask name servers (UDP).
pub(super) fn enter_process(names: bool) -> Result<(), FilterError> {
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    // Built before the first is installed.
    let rules = process(names)?;
    let hidden = Rules::from([(libc::SYS_clone3, Vec::new())]);
    install(
        hidden,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    install(rules, refused, SeccompAction::Allow)?;
    CONFINED.store(true, Ordering::SeqCst);
    Ok(())
}

/// Confines the calling thread further. Without a filter on the process there is none on its threads.
pub(super) fn enter_thread(kind: ThreadKind) -> Result<(), FilterError> {
    if !CONFINED.load(Ordering::SeqCst) {
        return Ok(());
    }
    install(
        thread(kind)?,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
    )
}
