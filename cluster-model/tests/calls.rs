//! Every method of the admin API has a place in the table of calls: none is served without a role.

use std::fs;
use std::path::Path;

use cluster_model::Call;

#[test]
fn every_method_of_the_admin_service_is_in_the_table_of_calls() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto/proto/admin.proto");
    let proto = fs::read_to_string(path).expect("the admin API's contract");
    let service = proto
        .split_once("service Admin {")
        .and_then(|(_, rest)| rest.split_once("\n}"))
        .map(|(service, _)| service)
        .expect("service Admin");
    let methods: Vec<&str> = service
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("rpc "))
        .filter_map(|line| line.split('(').next())
        .collect();
    assert!(methods.len() > 25, "only {methods:?} were found");
    let missing: Vec<&&str> = methods
        .iter()
        .filter(|method| Call::parse(method).is_none())
        .collect();
    assert!(missing.is_empty(), "no role is set for {missing:?}");
}
