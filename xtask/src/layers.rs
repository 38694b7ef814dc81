//! Checks the crates' arrows against the table in ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;

use anyhow::{Context, bail};

use crate::build;

/// Reads the table rows ``| `crate` | … | `a`, `b` |`` between the two marks.
fn allowed(architecture: &str) -> anyhow::Result<BTreeMap<String, BTreeSet<String>>> {
    let table = architecture
        .split_once("<!-- layers -->")
        .and_then(|(_, rest)| rest.split_once("<!-- /layers -->"))
        .context("ARCHITECTURE.md has no table between <!-- layers --> and <!-- /layers -->")?
        .0;
    let names = |cell: &str| -> BTreeSet<String> {
        cell.split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect()
    };
    let mut arrows = BTreeMap::new();
    for row in table.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
        let (Some(first), Some(last)) = (cells.first(), cells.last()) else {
            continue;
        };
        for name in names(first) {
            arrows.insert(name, names(last));
        }
    }
    Ok(arrows)
}

/// Fails when a crate depends on one of ours that its row does not name.
pub fn run() -> anyhow::Result<()> {
    let architecture = std::fs::read_to_string(build::root().join("ARCHITECTURE.md"))?;
    let allowed = allowed(&architecture)?;
    let output = build::cargo()
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .stderr(Stdio::inherit())
        .output()?;
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("cargo metadata gave no JSON")?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata names no packages")?;
    let ours: BTreeSet<&str> = packages
        .iter()
        .filter_map(|package| package["name"].as_str())
        .collect();
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(may) = allowed.get(name) else {
            wrong.push(format!("{name} has no row in ARCHITECTURE.md's table"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let on = dependency["name"].as_str().unwrap_or_default();
            if ours.contains(on) && !may.contains(on) {
                wrong.push(format!(
                    "{name} depends on {on}, which its row does not allow"
                ));
            }
        }
    }
    if wrong.is_empty() {
        println!(
            "layers: {} crates keep to ARCHITECTURE.md's table",
            packages.len()
        );
        Ok(())
    } else {
        bail!("{}", wrong.join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_names_a_crate_and_what_it_may_use() {
        let text = "<!-- layers -->\n| crate | is | may |\n|---|---|---|\n| `a` | x `y` | `b`, `c` |\n| `b` | z | nothing of ours |\n<!-- /layers -->";
        let arrows = allowed(text).expect("a table");
        assert_eq!(
            arrows["a"],
            BTreeSet::from(["b".to_owned(), "c".to_owned()])
        );
        assert!(arrows["b"].is_empty());
    }

    #[test]
    fn a_missing_table_is_an_error() {
        assert!(allowed("nothing").is_err());
    }
}
