//! Every input that is kept goes through its target again. One test, since memory is counted for the whole process.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use fuzz::targets::TARGETS;

/// Panics of any thread: a task's does not end the thread that waits for it.
static PANICS: AtomicUsize = AtomicUsize::new(0);

#[test]
fn every_corpus_input_is_taken_without_a_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        report(panic);
    }));
    for target in TARGETS {
        for seed in (target.seeds)() {
            target.check(&seed);
            assert_eq!(PANICS.load(Ordering::SeqCst), 0, "{}: a seed", target.name);
        }
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(target.name);
        for entry in std::fs::read_dir(&corpus).unwrap() {
            let path = entry.unwrap().path();
            target.check(&std::fs::read(&path).unwrap());
            assert_eq!(PANICS.load(Ordering::SeqCst), 0, "{}", path.display());
        }
    }
}
