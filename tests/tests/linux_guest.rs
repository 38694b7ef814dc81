//! A real Linux on a cluster: it boots to a shell on the serial console and works on through live migrations.

use std::time::Instant;

use anyhow::ensure;
use tests::cluster::{Setup, TestCluster};
use tests::linux::{LinuxGuest, PROMPT, Status, Terminal};

/// What a migration may cost one turn of the worker beyond the blackout that was reported, µs: its pages are mapped
/// anew, and where kernel mode is emulated, a page fault alone takes milliseconds.
const EMULATION_ALLOWANCE_US: u64 = 1_000_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn linux_boots_to_a_shell_and_works_on_through_live_migrations() -> anyhow::Result<()> {
    let test = "linux_boots_to_a_shell_and_works_on_through_live_migrations";
    if !tests::all_or_skip(test) || !tests::kvm_or_skip(test) {
        return Ok(());
    }
    let guest = LinuxGuest::find()?;
    // Default timing: an emulated boot keeps a processor busy for long.
    let mut cluster = TestCluster::start(Setup {
        fast: false,
        ..Setup::default()
    })
    .await?;
    let outcome = scenario(&cluster, &guest).await;
    if outcome.is_err()
        && let Some(kept) = cluster.keep_logs()
    {
        eprintln!("the cluster's logs: {}", kept.display());
    }
    outcome
}

async fn scenario(cluster: &TestCluster, guest: &LinuxGuest) -> anyhow::Result<()> {
    let begun = Instant::now();
    guest.create(cluster, "linux-1", None).await?;
    let mut terminal = Terminal::open(cluster, "linux-1").await?;
    terminal.wait_for("baton guest ready").await?;
    terminal.wait_for(PROMPT).await?;
    println!("a shell after {:.1} s", begun.elapsed().as_secs_f64());
    terminal.run("kept=41").await?;
    let mut status = terminal.wait_progress(Status::default()).await?;
    // The worker says its longest turn ever: emulated, that of its boot may be the longest.
    let mut allowed_us = status.gap_us;
    for round in 0..3 {
        let vm = cluster.vm("linux-1").await?;
        let names = cluster.local.nodes.iter().map(|node| node.name.clone());
        let others: Vec<String> = names.filter(|name| *name != vm.node).collect();
        let to = &others[round % others.len()];
        let end = cluster.migrate("linux-1", to).await?;
        ensure!(
            end.state == "cut-over",
            "round {round}: {} {}",
            end.state,
            end.reason
        );
        allowed_us = allowed_us.max(end.blackout_us + EMULATION_ALLOWANCE_US);
        // The console of the new monitor; the shell and its variables came along.
        terminal = Terminal::open(cluster, "linux-1").await?;
        let answer = terminal.run("echo $((kept+1))").await?;
        ensure!(
            answer.contains("42"),
            "round {round}: the shell says `{answer}`"
        );
        status = terminal.wait_progress(status).await?;
        println!(
            "round {round}: to {to}, blackout {:.1} ms, {status:?}",
            end.blackout_us as f64 / 1e3
        );
        ensure!(
            status.gap_us <= allowed_us,
            "round {round}: the worker stood for {} µs at a blackout of {} µs",
            status.gap_us,
            end.blackout_us
        );
    }
    Ok(())
}
