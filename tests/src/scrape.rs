//! A node's figures, fetched and read as Prometheus does.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::cluster::TestCluster;

/// One node's figures: `name{labels}` to value.
pub type Figures = BTreeMap<String, f64>;

/// Fetches and parses `/metrics`: every sample has a type, every value is a number.
///
/// # Errors
/// The node does not answer within 10 s, or with something that Prometheus would refuse.
pub async fn figures(cluster: &TestCluster, node: &str) -> anyhow::Result<Figures> {
    let address = cluster.address_of(node).context("no such node")?;
    let address = SocketAddr::new(address.ip(), clusterctl::local::METRICS_PORT);
    let fetch = async {
        let mut stream = TcpStream::connect(address).await?;
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")
            .await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        anyhow::Ok(text)
    };
    let text = tokio::time::timeout(Duration::from_secs(10), fetch).await??;
    let (head, body) = text.split_once("\r\n\r\n").context("no body")?;
    ensure!(
        head.starts_with("HTTP/1.1 200") && head.to_ascii_lowercase().contains("text/plain"),
        "{head}"
    );
    let mut typed = BTreeSet::new();
    let mut figures = Figures::new();
    for line in body.lines().filter(|line| !line.is_empty()) {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            typed.insert(rest.split(' ').next().unwrap_or_default().to_owned());
            continue;
        }
        if line.starts_with('#') {
            continue;
        }
        let (series, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
        let name = series.split('{').next().unwrap_or(series);
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|suffix| name.strip_suffix(suffix))
            .find(|family| typed.contains(*family))
            .unwrap_or(name);
        ensure!(typed.contains(family), "{name} has no type");
        ensure!(
            name.starts_with("clusterd_"),
            "{name} does not bear the program's name"
        );
        figures.insert(series.to_owned(), value.parse().context(line.to_owned())?);
    }
    Ok(figures)
}

/// A figure, 0 where it has not been counted yet.
pub fn at(figures: &Figures, series: &str) -> f64 {
    figures.get(series).copied().unwrap_or(0.0)
}

/// A histogram's buckets: upper bound in seconds, and how many values lie at or below it.
pub type Buckets = Vec<(f64, f64)>;

/// The buckets of a histogram without labels, by bound.
pub fn buckets(figures: &Figures, name: &str) -> Buckets {
    let prefix = format!("{name}_bucket{{le=\"");
    let bound = |series: &str| {
        let text = series.strip_prefix(&prefix)?.strip_suffix("\"}")?;
        text.parse::<f64>().ok()
    };
    let mut buckets: Buckets = figures
        .iter()
        .filter_map(|(series, count)| Some((bound(series)?, *count)))
        .collect();
    buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
    buckets
}

/// What came in between two looks at a histogram.
pub fn since(before: &Buckets, after: &Buckets) -> Buckets {
    let old = |bound: f64| {
        let found = before.iter().find(|(at, _)| *at == bound);
        found.map_or(0.0, |(_, count)| *count)
    };
    let new = after.iter();
    new.map(|(bound, count)| (*bound, count - old(*bound)))
        .collect()
}

/// Adds one histogram's counts to another's of the same bounds.
pub fn add(to: &mut Buckets, more: &Buckets) {
    if to.is_empty() {
        to.clone_from(more);
        return;
    }
    for ((_, count), (_, added)) in to.iter_mut().zip(more) {
        *count += added;
    }
}

/// The value below which that share of the values lies, interpolated within its bucket as Prometheus' `histogram_quantile`
/// does; 0 of none.
pub fn quantile(buckets: &Buckets, share: f64) -> f64 {
    let total = buckets.last().map_or(0.0, |(_, count)| *count);
    if total == 0.0 {
        return 0.0;
    }
    let rank = share * total;
    let (mut bound_before, mut count_before) = (0.0, 0.0);
    for (bound, count) in buckets {
        if *count >= rank && *count > count_before {
            if !bound.is_finite() {
                return bound_before;
            }
            let part = (rank - count_before) / (count - count_before);
            return bound_before + (bound - bound_before) * part;
        }
        (bound_before, count_before) = (*bound, *count);
    }
    bound_before
}

#[cfg(test)]
mod tests {
    use super::{Figures, add, buckets, quantile, since};

    #[test]
    fn a_quantile_lies_within_its_bucket() {
        let figures: Figures = [("0.1", 2.0), ("0.2", 4.0), ("+Inf", 4.0)]
            .into_iter()
            .map(|(le, count)| (format!("renew_bucket{{le=\"{le}\"}}"), count))
            .collect();
        let all = buckets(&figures, "renew");
        assert_eq!(all.len(), 3);
        assert!((quantile(&all, 0.75) - 0.15).abs() < 1e-9);
        assert!((quantile(&all, 1.0) - 0.2).abs() < 1e-9);
        assert_eq!(quantile(&since(&all, &all), 0.99), 0.0);
        let mut twice = all.clone();
        add(&mut twice, &all);
        assert!((quantile(&twice, 0.75) - 0.15).abs() < 1e-9);
    }
}
