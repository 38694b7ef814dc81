//! Machines with several virtual processors: let in within the limits, moved, and every processor goes on.

use anyhow::ensure;
use tests::cluster::{Setup, TestCluster};

/// Moves of the machine: to each other node, and back.
const MOVES: usize = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_with_four_vcpus_moves_about_and_its_guest_finds_nothing_wrong()
-> anyhow::Result<()> {
    let test = "a_machine_with_four_vcpus_moves_about_and_its_guest_finds_nothing_wrong";
    if !tests::kvm_or_skip(test) {
        return Ok(());
    }
    let cluster = TestCluster::start(Setup::default()).await?;
    let create = ["vm", "create", "vm-a", "--working-set", "32"];
    // What no monitor can be is refused before any is asked to be it.
    for (wrong, words) in [
        (
            ["--cpu", "64"],
            ["E-SPEC", "use 1 to 32 virtual processors"],
        ),
        (["--disk", "vol-a:64KiB"], ["E-SPEC", "disks[0]"]),
    ] {
        let said = cluster.ctl(&[&create[..], &wrong].concat()).await?;
        ensure!(said.refuses_with(&words), "{wrong:?}: {}", said.err);
    }
    let right = ["--cpu", "4", "--disk", "vol-a:16MiB"];
    let said = cluster.ctl(&[&create[..], &right].concat()).await?;
    ensure!(said.code == 0, "{}", said.err);
    let mut vm = cluster.wait_running("vm-a").await?;
    cluster.wait_progress("vm-a").await?;
    for round in 0..MOVES {
        let names = cluster.local.nodes.iter().map(|node| node.name.clone());
        let others: Vec<String> = names.filter(|name| *name != vm.node).collect();
        let end = cluster.migrate("vm-a", &others[round % 2]).await?;
        ensure!(
            end.state == "cut-over",
            "round {round}: {} {}",
            end.state,
            end.reason
        );
        // A step is one that every vCPU has made; an error of any of them is the guest's.
        let guest = cluster.wait_progress("vm-a").await?;
        ensure!(
            guest.found_at_boot == 0,
            "round {round}: the guest was booted again"
        );
        println!(
            "round {round}: blackout {:.1} ms, the guest's longest gap {:.1} ms",
            end.blackout_us as f64 / 1e3,
            guest.longest_gap_us as f64 / 1e3
        );
        vm = cluster.vm("vm-a").await?;
    }
    let said = cluster.ctl(&["vm", "show", "vm-a"]).await?;
    ensure!(
        said.out.contains("4 vCPUs") && said.out.contains(" 0 errors,"),
        "{}",
        said.out
    );
    Ok(())
}
