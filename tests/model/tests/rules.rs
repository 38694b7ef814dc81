//! What is known of single rules; that each is needed is what `command_line.rs` sees `protocol-model` find.

use protocol_model::{Mutant, Protocol, SMALL, count_out, hunt};

#[test]
fn every_mutant_is_listed_once() {
    use clap::ValueEnum;
    let listed = [&Mutant::ALL[..], &Mutant::SPARE[..]].concat();
    assert_eq!(Mutant::value_variants(), listed);
}

#[test]
fn the_rekey_after_an_abort_is_not_what_keeps_the_disk_safe() {
    for rule in Mutant::SPARE {
        let protocol = Protocol {
            bounds: SMALL[0],
            mutant: Some(rule),
        };
        let outcome = count_out(protocol, 2);
        assert!(outcome.broken.is_empty(), "{rule:?}: {:?}", outcome.broken);
    }
}

/// The gap that the storage server leaves and the settle time closes: it had let the dead owner's WRITE in
/// before the new owner's SETATTR, and wrote it down after the new owner had begun to run.
#[test]
fn without_settle_a_write_lands_late() {
    let found = hunt(Mutant::NoSettle).expect("a history");
    let history: Vec<String> = found.steps.iter().map(ToString::to_string).collect();
    assert_eq!(
        history,
        [
            "S's guest writes",
            "S's monitor dies",
            "log: Release by S",
            "log: StartVm on T",
            "T sends the SETATTR of its token",
            "server: checks the WRITE of S under 1",
            "server: SETATTR of 3 is executed",
            "T's claim is acknowledged",
            "T has settled",
            "T confirms its token in the log",
            "T runs under its token",
            "server: the WRITE of S under 1 lands",
        ]
    );
}
