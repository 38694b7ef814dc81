//! A daemon has every safeguard: to leave one out is the simulation's alone.

use std::path::Path;

/// Product code: whatever a host runs.
const PRODUCT: [&str; 6] = [
    "clusterd/src",
    "storage-broker/src",
    "vmm/src",
    "migration-core/src",
    "proto/src",
    "cli/src",
];

fn sources(folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            let text = std::fs::read_to_string(&path).expect("a source file");
            found.push((path.display().to_string(), text));
        }
    }
}

#[test]
fn product_code_leaves_no_safeguard_out() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found = Vec::new();
    for folder in PRODUCT {
        sources(&root.join(folder), &mut found);
    }
    let names: Vec<&(String, String)> = found
        .iter()
        .filter(|(_, text)| text.contains("Safeguards::ALL"))
        .collect();
    assert!(
        !names.is_empty(),
        "the agent names the safeguards that it has"
    );
    for (path, text) in &found {
        for forbidden in ["Safeguards::without", "Safeguard::", "Memory::with("] {
            assert!(!text.contains(forbidden), "{path} says {forbidden}");
        }
    }
}
