//! Taps on a real bridge, in a network namespace of the test's own.

use std::io;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use vmm::devices::virtio::net::announce::{MacAddress, rarp};
use vmm::devices::virtio::net::tap::{PluggedTap, Tap, TapError};

/// Runs `test` on a thread of its own that has a fresh network namespace; says so when the host does not allow it.
fn in_namespace(name: &'static str, test: impl FnOnce() + Send + 'static) {
    let ran = std::thread::spawn(move || {
        let tools = ["ip", "bridge"].map(|tool| Command::new(tool).arg("-V").output());
        let missing = if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            format!(
                "it needs root for a network namespace ({error}); run `cargo xtask test --all` as root"
            )
        } else if tools.iter().any(Result::is_err) {
            "it needs iproute2; apt-get install iproute2".into()
        } else if let Err(error) = std::fs::File::open("/dev/net/tun") {
            format!("it needs /dev/net/tun ({error}); modprobe tun")
        } else {
            test();
            return;
        };
        proto::skip!(name, "{missing}");
    });
    ran.join().unwrap();
}

fn run(command: &str) -> String {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Announces `mac` from `tap` until the bridge sends frames for it to `port`: a port whose carrier has just come
/// is not forwarding yet.
async fn move_to(mac: MacAddress, tap: &Tap, port: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        tap.write(&rarp(mac)).await.unwrap();
        let table = run("bridge fdb show br br0");
        let entry = table
            .lines()
            .find(|line| line.starts_with(&mac.to_string()))
            .unwrap_or_default();
        if entry.contains(&format!("dev {port} ")) {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{mac} is not at {port} but at {entry:?}"
        );
        std::thread::yield_now();
    }
}

#[test]
fn an_announcement_moves_the_bridges_entry() {
    in_namespace("an_announcement_moves_the_bridges_entry", || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        run("ip link add br0 type bridge");
        run("ip link set br0 up");
        let mac: MacAddress = "52:54:00:aa:bb:cc".parse().unwrap();
        runtime.block_on(async {
            let source = Tap::new(PluggedTap::open("tap-s", "br0").unwrap()).unwrap();
            let destination = Tap::new(PluggedTap::open("tap-d", "br0").unwrap()).unwrap();
            // The kernel looks at carriers that went once a second.
            let deadline = Instant::now() + Duration::from_secs(10);
            while !run("ip -br link show tap-s").contains("NO-CARRIER") {
                assert!(Instant::now() < deadline, "its link is down at first");
                std::thread::yield_now();
            }
            source.set_link(true).unwrap();
            destination.set_link(true).unwrap();
            for (tap, port) in [
                (&source, "tap-s"),
                (&destination, "tap-d"),
                (&source, "tap-s"),
            ] {
                move_to(mac, tap, port).await;
            }
        });
        // The taps were made for the test, and are gone with it.
        assert!(!run("ip -br link").contains("tap-"));
    });
}

#[test]
fn a_tap_without_its_bridge_or_with_an_impossible_name_is_refused() {
    in_namespace(
        "a_tap_without_its_bridge_or_with_an_impossible_name_is_refused",
        || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
            let refused = PluggedTap::open("tap-x", "no-bridge").unwrap_err();
            assert!(matches!(&refused, TapError::Bridge { source, .. } if source.kind() != io::ErrorKind::Other));
            for name in ["", "a name", "sixteen-letters-", "../x"] {
                assert!(matches!(PluggedTap::open(name, "br0"), Err(TapError::Name(_))), "{name:?}");
            }
        });
        },
    );
}
