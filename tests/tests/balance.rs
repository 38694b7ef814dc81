//! Evening out load: what a plan says and why, that it moves live, never past the room there is, never
//! a machine that has just moved; and that nothing comes back to a node without being asked to.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use proto::admin::{
    BalancePlan, BalanceRunRequest, BalanceStatusRequest, MigrationListRequest, MigrationView,
    VmView, WhyRequest,
};
use tests::cluster::{Machine, Setup, TestCluster};

/// Three machines of 128 MiB fill a node of this size to 96 %, over the threshold of 80 %.
const NODE_MIB: u64 = 400;
const HOT: &str = "n1";
const SMALL: [&str; 3] = ["vm-a", "vm-b", "vm-c"];

/// The command must succeed.
async fn done(cluster: &TestCluster, arguments: &[&str]) -> anyhow::Result<String> {
    let said = cluster.ctl(arguments).await?;
    ensure!(
        said.code == 0,
        "clusterctl {arguments:?}: {} {}",
        said.out,
        said.err
    );
    Ok(said.out)
}

/// A cluster whose `n1` alone takes machines until `released`.
async fn only_n1_takes_machines() -> anyhow::Result<TestCluster> {
    let cluster = TestCluster::start(Setup {
        memory_mib: NODE_MIB,
        ..Setup::default()
    })
    .await?;
    for node in ["n2", "n3"] {
        done(&cluster, &["drain", node, "--yes"]).await?;
    }
    Ok(cluster)
}

async fn release(cluster: &TestCluster) -> anyhow::Result<()> {
    for node in ["n2", "n3"] {
        done(cluster, &["uncordon", node]).await?;
    }
    Ok(())
}

/// `n1` is 96 % full, the others are empty, and no machine has moved yet.
async fn overloaded() -> anyhow::Result<TestCluster> {
    let cluster = only_n1_takes_machines().await?;
    for name in SMALL {
        let vm = cluster.create(&Machine::small(name)).await?;
        ensure!(vm.node == HOT, "{name} is on {}", vm.node);
    }
    release(&cluster).await?;
    Ok(cluster)
}

async fn balance(cluster: &TestCluster, dry_run: bool) -> anyhow::Result<BalancePlan> {
    let request = BalanceRunRequest {
        change: Some(clusterctl::client::change(None, "test")),
        dry_run,
    };
    Ok(cluster
        .api()
        .await?
        .api
        .balance_run(request)
        .await?
        .into_inner())
}

async fn status(cluster: &TestCluster) -> anyhow::Result<BalancePlan> {
    let mut api = cluster.api().await?;
    Ok(api
        .api
        .balance_status(BalanceStatusRequest {})
        .await?
        .into_inner())
}

async fn migrations(cluster: &TestCluster) -> anyhow::Result<Vec<MigrationView>> {
    let request = MigrationListRequest {
        all: true,
        vm: String::new(),
    };
    Ok(cluster
        .api()
        .await?
        .api
        .migration_list(request)
        .await?
        .into_inner()
        .migrations)
}

/// The small machines on the node that is too full.
async fn on_the_hot_node(cluster: &TestCluster) -> anyhow::Result<Vec<VmView>> {
    let mut there = Vec::new();
    for name in SMALL {
        let vm = cluster.vm(name).await?;
        if vm.node == HOT {
            there.push(vm);
        }
    }
    Ok(there)
}

/// Waits for the one migration that there is, and that its guest lives on, not booted again.
async fn the_move(cluster: &TestCluster) -> anyhow::Result<MigrationView> {
    let id = cluster
        .wait("a migration", async || {
            Ok(migrations(cluster).await?.pop().map(|view| view.id))
        })
        .await?;
    let end = cluster.wait_migration(&id).await?;
    ensure!(end.state == "cut-over", "{}: {}", end.state, end.reason);
    let guest = cluster.wait_progress(&end.vm).await?;
    ensure!(guest.found_at_boot == 0, "{} was booted again", end.vm);
    ensure!(cluster.vm(&end.vm).await?.node == end.to);
    Ok(end)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_says_what_and_why_and_a_run_moves_it_live() -> anyhow::Result<()> {
    if !tests::kvm_or_skip("balance") {
        return Ok(());
    }
    let cluster = overloaded().await?;
    let plan = balance(&cluster, true).await?;
    ensure!(plan.moves.len() == 1 && !plan.started, "{plan:?}");
    let planned = plan.moves[0].clone();
    ensure!(
        planned.from == HOT && planned.to != HOT && planned.gain > 0.1 && planned.cost_ms > 0,
        "{planned:?}"
    );
    for word in [
        "too full and the move pays",
        "threshold, %: 80",
        "source before, %: 96",
        "destination after, %: 32",
        "memory to copy, MiB: 128",
    ] {
        ensure!(
            planned.why.contains(word),
            "no `{word}` in: {}",
            planned.why
        );
    }
    let printed = done(&cluster, &["balance", "run", "--dry-run"]).await?;
    ensure!(
        printed.contains(&planned.vm)
            && printed.contains(&format!("{HOT} → "))
            && printed.contains("too full")
            && !printed.contains("queued"),
        "{printed}"
    );
    let told = status(&cluster).await?;
    ensure!(
        !told.automatic && told.level == "low" && told.moves.len() == 1,
        "{told:?}"
    );
    ensure!(
        migrations(&cluster).await?.is_empty() && on_the_hot_node(&cluster).await?.len() == 3,
        "a dry run moved something"
    );

    let printed = done(&cluster, &["balance", "run"]).await?;
    ensure!(printed.contains("clusterctl migration list"), "{printed}");
    let end = the_move(&cluster).await?;
    ensure!(end.from == HOT && end.cause.contains("balance"), "{end:?}");
    let why = cluster
        .api()
        .await?
        .api
        .why(WhyRequest {
            object: format!("vm/{}", end.vm),
            not_on: String::new(),
        })
        .await?
        .into_inner();
    let reason = why
        .chain
        .iter()
        .find(|event| event.rule.starts_with("balance:"))
        .context("no event names the balancer's rule")?;
    ensure!(
        reason.inputs.get("source before, %").map(String::as_str) == Some("96"),
        "{reason:?}"
    );
    let printed = done(&cluster, &["why", &format!("vm/{}", end.vm)]).await?;
    ensure!(printed.contains("too full and the move pays"), "{printed}");

    let after = balance(&cluster, false).await?;
    ensure!(
        after.moves.is_empty() && !after.started && after.verdict.contains("no node is over 80 %"),
        "{after:?}"
    );
    ensure!(on_the_hot_node(&cluster).await?.len() == 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_moves_past_the_room_there_is_nor_before_it_has_rested() -> anyhow::Result<()> {
    if !tests::kvm_or_skip("balance") {
        return Ok(());
    }
    let cluster = TestCluster::start(Setup {
        memory_mib: NODE_MIB,
        ..Setup::default()
    })
    .await?;
    // Where n1 takes nothing, each of these finds room on one of the others; then only n1 has room.
    done(&cluster, &["drain", HOT, "--yes"]).await?;
    for name in ["big-1", "big-2"] {
        let big = Machine {
            memory_mib: 300,
            ..Machine::small(name)
        };
        cluster.create(&big).await?;
    }
    done(&cluster, &["uncordon", HOT]).await?;
    for name in SMALL {
        let vm = cluster.create(&Machine::small(name)).await?;
        ensure!(vm.node == HOT, "{name} is on {}", vm.node);
    }
    let plan = balance(&cluster, false).await?;
    ensure!(plan.moves.is_empty() && !plan.started, "{plan:?}");
    ensure!(
        plan.verdict.contains("n1 is over 80 %") && plan.left_alone.len() == 3,
        "{plan:?}"
    );
    for left in &plan.left_alone {
        ensure!(left.from == HOT && left.why.contains("room"), "{left:?}");
    }
    let printed = done(&cluster, &["balance", "status"]).await?;
    ensure!(
        printed.contains("n1 is over 80 %") && printed.contains("Left alone"),
        "{printed}"
    );
    ensure!(migrations(&cluster).await?.is_empty());

    // Room on one node, but one of the machines has just been there and back.
    let emptied = cluster.vm("big-1").await?.node;
    cluster.stop("big-1").await?;
    for to in [emptied.as_str(), HOT] {
        let end = cluster.migrate("vm-a", to).await?;
        ensure!(end.state == "cut-over", "{}", end.reason);
        cluster.wait_progress("vm-a").await?;
    }
    let plan = balance(&cluster, true).await?;
    ensure!(
        plan.moves.len() == 1 && plan.moves[0].vm == "vm-b" && plan.moves[0].to == emptied,
        "{plan:?}"
    );
    ensure!(
        plan.left_alone
            .iter()
            .any(|left| left.vm == "vm-a" && left.why.contains("rests for 3600 s")),
        "{:?}",
        plan.left_alone
    );
    done(&cluster, &["cluster", "set", "balance_cooldown_s=0"]).await?;
    let plan = balance(&cluster, true).await?;
    ensure!(
        plan.moves.len() == 1 && plan.moves[0].vm == "vm-a",
        "after its rest it is the first choice: {plan:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_automatic_mode_moves_once_by_itself_and_then_rests() -> anyhow::Result<()> {
    if !tests::kvm_or_skip("balance") {
        return Ok(());
    }
    let cluster = overloaded().await?;
    ensure!(!status(&cluster).await?.automatic);
    done(
        &cluster,
        &[
            "cluster",
            "set",
            "balance_auto=true",
            "balance_interval_s=1",
        ],
    )
    .await?;
    ensure!(status(&cluster).await?.automatic);
    let end = the_move(&cluster).await?;
    ensure!(
        end.from == HOT && end.cause.contains("balance") && end.actor == "controller/balance",
        "{end:?}"
    );
    // Three of its intervals, in which it looks and finds nothing to do.
    let until = Instant::now() + Duration::from_secs(3);
    cluster
        .wait("three quiet intervals", async || {
            ensure!(on_the_hot_node(&cluster).await?.len() == 2);
            Ok((Instant::now() > until).then_some(()))
        })
        .await?;
    let all = migrations(&cluster).await?;
    ensure!(all.len() == 1, "{all:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_taken_back_without_failback_gets_nothing_back() -> anyhow::Result<()> {
    if !tests::kvm_or_skip("balance") {
        return Ok(());
    }
    let cluster = TestCluster::start(Setup::default()).await?;
    let mut drained = String::new();
    for name in ["vm-a", "vm-b"] {
        drained = cluster.create(&Machine::small(name)).await?.node;
    }
    done(&cluster, &["drain", &drained, "--yes"]).await?;
    ensure!(cluster.vm("vm-b").await?.node != drained);
    let moved = migrations(&cluster).await?.len();
    done(&cluster, &["uncordon", &drained]).await?;
    let node = |nodes: Vec<proto::admin::NodeView>| {
        nodes
            .into_iter()
            .find(|node| node.name == drained)
            .context("the node is gone")
    };
    ensure!(node(cluster.nodes().await?)?.state == "up");
    // The planners have looked again when a machine created after the uncordon runs; it may run there.
    cluster.create(&Machine::small("vm-c")).await?;
    ensure!(
        migrations(&cluster).await?.len() == moved,
        "something moved: {:?}",
        migrations(&cluster).await?
    );
    for name in ["vm-a", "vm-b"] {
        let vm = cluster.vm(name).await?;
        ensure!(vm.node != drained, "{name} came back to {drained}");
        ensure!(cluster.wait_progress(name).await?.found_at_boot == 0);
    }
    Ok(())
}
