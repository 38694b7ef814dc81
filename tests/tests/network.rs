//! A machine on a network: the bridges learn where it went, and a TCP connection to it lives through migrations.

use std::time::{Duration, Instant};

use anyhow::ensure;
use tests::cluster::TestCluster;
use tests::lab::{self, EchoPeer, RarpEar, SWITCH};
use tests::linux::{LinuxGuest, Terminal};

/// How many migrations one connection has to live through: in a landing, and in the long tier.
const MIGRATIONS: [usize; 2] = [5, 20];
/// How much longer than the blackout a connection may stand still: what was sent into it is sent again after TCP's 200, 400
/// and 800 ms, and the guest's kernel is emulated where this machine is itself a guest (1.2 s was seen beside other work).
const PAUSE_ALLOWANCE: Duration = Duration::from_secs(3);
const VM: &str = "linux-1";

#[test]
fn a_tcp_connection_to_a_machine_lives_through_many_migrations() -> anyhow::Result<()> {
    let test = "a_tcp_connection_to_a_machine_lives_through_many_migrations";
    if !tests::all_or_skip(test) || !tests::kvm_or_skip(test) {
        return Ok(());
    }
    let guest = LinuxGuest::find()?;
    // Before any other thread is started: threads and processes inherit their starter's network.
    lab::enter()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut cluster = lab::cluster_with_guest(&guest, VM).await?;
        let outcome = scenario(&cluster).await;
        if outcome.is_err()
            && let Some(kept) = cluster.keep_logs()
        {
            eprintln!("the cluster's logs: {}", kept.display());
        }
        outcome
    })
}

async fn scenario(cluster: &TestCluster) -> anyhow::Result<()> {
    a_silent_guest_is_found_by_its_announcement(cluster).await?;
    let mut peer = EchoPeer::connect().await?;
    let mut gaps = Vec::new();
    let [landing, long] = MIGRATIONS;
    let migrations = proto::testing::by_tier(landing, long);
    for round in 0..migrations {
        let to = lab::next_node(cluster, VM, round).await?;
        let begun = Instant::now();
        let end = cluster.migrate(VM, &to).await?;
        ensure!(
            end.state == "cut-over",
            "round {round}: {} {}",
            end.state,
            end.reason
        );
        peer.wait_answers(50).await?;
        let gap = peer.longest_pause(begun);
        let blackout = Duration::from_micros(end.blackout_us);
        ensure!(
            gap <= blackout + PAUSE_ALLOWANCE,
            "round {round}: no answer for {gap:?} at a blackout of {blackout:?}"
        );
        gaps.push(gap.as_millis());
        ensure!(
            lab::forwarding_entries(SWITCH)? == [format!("to-{to}")],
            "round {round}: the machine is on {to}, and the switch has {:?}",
            lab::forwarding_entries(SWITCH)?
        );
    }
    println!("{migrations} migrations, one connection; the longest pause in each, ms: {gaps:?}");
    let status = Terminal::open(cluster, VM).await?.status().await?;
    ensure!(status.errors == 0, "the guest's worker found: {status:?}");
    cluster.stop(VM).await?;
    cluster
        .wait("the taps' end", async || {
            Ok(lab::taps()?.is_empty().then_some(()))
        })
        .await
}

/// Nobody talks to the guest and it does not talk by itself: only the announcement can move the switch's entry.
async fn a_silent_guest_is_found_by_its_announcement(cluster: &TestCluster) -> anyhow::Result<()> {
    let mut ear = RarpEar::open()?;
    for round in 0..3 {
        let to = lab::next_node(cluster, VM, round).await?;
        ear.heard_guest()?;
        let end = cluster.migrate(VM, &to).await?;
        ensure!(
            end.state == "cut-over",
            "silent round {round}: {} {}",
            end.state,
            end.reason
        );
        let mut heard = false;
        cluster
            .wait("the switch's entry", async || {
                heard |= ear.heard_guest()?;
                let moved = lab::forwarding_entries(SWITCH)? == [format!("to-{to}")];
                Ok((moved && heard).then_some(()))
            })
            .await?;
        // Of the migration's two taps one is left, on the new node's bridge, and its link is up.
        cluster
            .wait("one tap", async || {
                let taps = lab::taps()?;
                let here = lab::forwarding_entries(&format!("{SWITCH}-{to}"))?;
                let one = matches!(&taps[..], [(name, true)] if here == [name.clone()]);
                Ok(one.then_some(()))
            })
            .await?;
    }
    Ok(())
}
