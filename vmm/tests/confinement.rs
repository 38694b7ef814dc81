//! What is left to a monitor: seen from outside on a running one, and tried from inside as whoever breaks out of one would.

#[allow(dead_code)]
#[path = "common/process.rs"]
mod process;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use process::{LEASE, Process, machine_file};
use proto::monitor::Phase;
use serde_json::json;
use vmm::confine;
use vmm::spec::ValidatedSpec;

/// A user that no host has.
const UID: u32 = 1_879_049_000;

/// Tells the attacker's process where to look, and that it is one.
const ATTACKER: &str = "BATON_TEST_ATTACKER";

fn skip_unless(test: &str, root: bool) -> bool {
    if let Err(error) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        proto::skip!(test, "/dev/kvm cannot be opened: {error}");
        return true;
    }
    if root && !nix::unistd::geteuid().is_root() {
        proto::skip!(test, "takes root: sudo cargo xtask test --all");
        return true;
    }
    false
}

/// A value of `/proc/…/status`.
fn status(folder: &Path, key: &str) -> String {
    let text = std::fs::read_to_string(folder.join("status")).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("no {key} in {text}"));
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn a_monitor_started_by_root_is_a_user_without_rights_in_an_empty_root_and_its_guest_runs() {
    if skip_unless("a confined monitor of root", true) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut file = machine_file(folder.path(), 32, 8, 8);
    file["confinement"] = json!({"uid": UID, "measures": [
        {"name": "memory-limit", "applied": false, "detail": "not tried here"}
    ]});
    let mut monitor = Process::start(folder.path(), "confined", &file, "").await;
    monitor.run(5, LEASE).await.unwrap();
    let status_now = monitor
        .wait("flushing", |status| {
            status.guest.as_ref().is_some_and(|guest| guest.flushed > 3)
        })
        .await;
    assert_eq!(status_now.phase(), Phase::Running);
    assert!(status_now.usage.unwrap().memory_resident_bytes > 1 << 20);

    let proc = PathBuf::from(format!("/proc/{}", status_now.pid));
    let own = format!("{UID} {UID} {UID} {UID}");
    assert_eq!(status(&proc, "Uid"), own);
    assert_eq!(status(&proc, "Gid"), own);
    assert_eq!(status(&proc, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(&proc, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(&proc, "NoNewPrivs"), "1");
    for namespace in ["mnt", "ipc", "uts"] {
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&status_now.pid.to_string()), of("self"), "{namespace}");
    }
    let names = |place: &str| -> BTreeSet<String> {
        std::fs::read_dir(proc.join(place))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    };
    assert_eq!(names("root"), BTreeSet::from(["etc".to_owned()]));
    let etc = names("root/etc");
    assert!(
        etc.iter()
            .all(|name| !name.contains("passwd") && !name.contains("shadow")),
        "{etc:?}"
    );

    // Every thread under the process's two filters, the vCPU's and the lease's under one more.
    for thread in names("task") {
        let task = proc.join("task").join(&thread);
        let (name, filters) = (status(&task, "Name"), status(&task, "Seccomp_filters"));
        assert_eq!(status(&task, "Seccomp"), "2", "{name}");
        let narrow = name.starts_with("vcpu-") || name == "lease";
        // KVM's own thread is started by whichever came first.
        if !name.starts_with("kvm-") {
            assert_eq!(filters, if narrow { "3" } else { "2" }, "{name}");
        }
    }

    let limits = std::fs::read_to_string(proc.join("limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"));
    let core: Vec<&str> = core.unwrap().split_whitespace().collect();
    assert_eq!(core[4..6], ["0", "0"]);

    // Nothing is open but what it needs.
    let disk = folder.path().join("disk.raw");
    let (witness, log) = (
        folder.path().join("witness"),
        folder.path().join("confined.log"),
    );
    // Asked for by the tests alone.
    let runs = folder.path().join("confined.runs");
    for descriptor in names("fd") {
        let Ok(target) = std::fs::read_link(proc.join("fd").join(&descriptor)) else {
            continue;
        };
        let text = target.to_string_lossy();
        let known = [
            "anon_inode:",
            "socket:",
            "pipe:",
            "/memfd:guest-memory",
            "/dev/kvm",
            "/dev/null",
        ];
        assert!(
            known.iter().any(|known| text.starts_with(known))
                || text.ends_with("/statm")
                || [&disk, &witness, &log, &runs].contains(&&target)
                || (descriptor == "0" || descriptor == "1"),
            "descriptor {descriptor} is {text}"
        );
    }
    let refused: Vec<_> = status_now
        .measures
        .iter()
        .filter(|measure| !measure.applied)
        .map(|measure| (&measure.name, &measure.detail))
        .collect();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_eq!(refused[0].0, "memory-limit");
    for name in [
        "uid",
        "capabilities",
        "mounts",
        "landlock",
        "seccomp",
        "network",
    ] {
        assert!(
            status_now
                .measures
                .iter()
                .any(|measure| measure.name == name),
            "{name}"
        );
    }
}

#[test]
fn whoever_breaks_out_of_a_monitor_finds_nothing_to_open_to_start_or_to_talk_to() {
    if skip_unless("whoever breaks out of a monitor", false) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // What a host has: a daemon's socket, a secret.
    let socket = folder.path().join("admin.sock");
    let _daemon = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    std::fs::write(folder.path().join("secret"), "").unwrap();
    let file = machine_file(folder.path(), 32, 8, 8);
    std::fs::write(folder.path().join("machine.json"), file.to_string()).unwrap();
    std::fs::create_dir(folder.path().join("own")).unwrap();
    let attacker = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_attacker", "--ignored", "--nocapture"])
        .env(ATTACKER, folder.path())
        .output()
        .unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&attacker.stdout),
        String::from_utf8_lossy(&attacker.stderr)
    );
    assert!(attacker.status.success(), "{said}");
    assert!(said.contains("tried 24"), "{said}");
    assert!(!said.contains("SUCCEEDED"), "{said}");
}

/// One system call; its error, 0 when it succeeded.
fn call(number: libc::c_long, arguments: [libc::c_long; 4]) -> i32 {
    let [a, b, c, d] = arguments;
    // SAFETY: the calls made here are to be refused; each gets numbers, or pointers to text that outlives it.
    if unsafe { libc::syscall(number, a, b, c, d, 0, 0) } < 0 {
        std::io::Error::last_os_error().raw_os_error().unwrap_or(-1)
    } else {
        0
    }
}

#[test]
#[ignore = "run by the test above, in a process of its own"]
fn the_attacker() {
    let Some(folder) = std::env::var_os(ATTACKER).map(PathBuf::from) else {
        proto::skip!(
            "the_attacker",
            "run by another test, in a process of its own"
        );
        return;
    };
    let spec = ValidatedSpec::read(&folder.join("machine.json")).unwrap();
    let daemon = folder.join("admin.sock");
    let parent = i64::from(nix::unistd::getppid().as_raw());
    confine::enter(&spec, &folder.join("own")).unwrap();

    let text = |text: &str| std::ffi::CString::new(text).unwrap();
    let (shell, secret) = (
        text("/bin/sh"),
        text(folder.join("secret").to_str().unwrap()),
    );
    let proc = text(&format!("/proc/{parent}/mem"));
    let at = |text: &std::ffi::CString| text.as_ptr() as libc::c_long;
    let cwd = i64::from(libc::AT_FDCWD);
    let family =
        |family: libc::c_int, kind: libc::c_int| [i64::from(family), i64::from(kind), 0, 0];
    let open = |path, flags: libc::c_int| [cwd, at(path), i64::from(flags), 0o600];
    let tried: Vec<(&str, i32)> = vec![
        (
            "read a secret",
            call(libc::SYS_openat, open(&secret, libc::O_RDONLY)),
        ),
        (
            "write a secret",
            call(libc::SYS_openat, open(&secret, libc::O_WRONLY)),
        ),
        (
            "read /etc/passwd",
            call(libc::SYS_openat, open(&text("/etc/passwd"), libc::O_RDONLY)),
        ),
        (
            "make a file",
            call(
                libc::SYS_openat,
                open(&text("/tmp/x"), libc::O_CREAT | libc::O_RDWR),
            ),
        ),
        (
            "open KVM",
            call(libc::SYS_openat, open(&text("/dev/kvm"), libc::O_RDWR)),
        ),
        (
            "write another's memory",
            call(libc::SYS_openat, open(&proc, libc::O_RDWR)),
        ),
        ("execute", call(libc::SYS_execve, [at(&shell), 0, 0, 0])),
        ("fork", call(libc::SYS_fork, [0; 4])),
        (
            "clone a process",
            call(libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0, 0]),
        ),
        ("clone3", call(libc::SYS_clone3, [0; 4])),
        ("become root", call(libc::SYS_setresuid, [0; 4])),
        (
            "trace",
            call(
                libc::SYS_ptrace,
                [i64::from(libc::PTRACE_ATTACH), parent, 0, 0],
            ),
        ),
        (
            "read another's memory",
            call(libc::SYS_process_vm_readv, [parent, 0, 0, 0]),
        ),
        (
            "kill another",
            call(libc::SYS_kill, [parent, i64::from(libc::SIGKILL), 0, 0]),
        ),
        ("mount", call(libc::SYS_mount, [0; 4])),
        (
            "a user namespace",
            call(libc::SYS_unshare, [i64::from(libc::CLONE_NEWUSER), 0, 0, 0]),
        ),
        (
            "a packet socket",
            call(libc::SYS_socket, family(libc::AF_PACKET, libc::SOCK_RAW)),
        ),
        (
            "a netlink socket",
            call(libc::SYS_socket, family(libc::AF_NETLINK, libc::SOCK_RAW)),
        ),
        (
            "a raw socket",
            call(libc::SYS_socket, family(libc::AF_INET, libc::SOCK_RAW)),
        ),
        (
            "a datagram",
            call(libc::SYS_socket, family(libc::AF_INET, libc::SOCK_DGRAM)),
        ),
        ("io_uring", call(libc::SYS_io_uring_setup, [8, 0, 0, 0])),
        ("bpf", call(libc::SYS_bpf, [0; 4])),
        ("keys", call(libc::SYS_keyctl, [0; 4])),
        (
            "talk to the daemon",
            i32::from(std::os::unix::net::UnixStream::connect(&daemon).is_err()),
        ),
    ];
    println!("tried {}", tried.len());
    for (what, error) in &tried {
        let expected: &[i32] = match *what {
            "clone3" => &[libc::ENOSYS],
            "talk to the daemon" => &[1],
            _ => &[libc::EPERM, libc::EACCES, libc::ENOENT],
        };
        if !expected.contains(error) {
            println!("SUCCEEDED or failed otherwise: {what}: {error}");
        }
    }
    // What it does need goes on.
    assert_eq!(
        call(libc::SYS_socket, family(libc::AF_INET, libc::SOCK_STREAM)),
        0
    );
    std::thread::spawn(|| ()).join().unwrap();
}
