//! What the bad-input suites share.

use anyhow::ensure;

use crate::cluster::TestCluster;
use crate::ctl::Said;

/// The frame of a request that changes something.
pub fn change() -> Option<proto::admin::Change> {
    Some(clusterctl::client::change(None, "test"))
}

/// The command must refuse, in these words, without a panic.
pub fn refused(what: &str, said: &Said, words: &[&str]) -> anyhow::Result<()> {
    ensure!(
        said.refuses_with(words) && !said.err.contains("panicked"),
        "{what} should be refused with {words:?}; code {}: {} {}",
        said.code,
        said.out,
        said.err
    );
    Ok(())
}

/// The guest of `name` lives on where it was, under its token, and was never booted again.
pub async fn unhurt(cluster: &TestCluster, before: &proto::admin::VmView) -> anyhow::Result<()> {
    let guest = cluster.wait_progress(&before.name).await?;
    let now = cluster.vm(&before.name).await?;
    ensure!(
        guest.found_at_boot == 0 && now.token == before.token && now.node == before.node,
        "{before:?} became {now:?}"
    );
    Ok(())
}
