//! What Baton's end-to-end suites share: a cluster of real processes whose every link can be cut.

#![forbid(unsafe_code)]

pub mod bad_input;
pub mod chaos;
pub mod cluster;
pub mod ctl;
pub mod cutover;
pub mod figures;
pub mod lab;
pub mod linux;
pub mod loopback;
pub mod relay;
pub mod scrape;
pub mod wire;

/// Whether machines can run here; prints the reason as a skip if not.
pub fn kvm_or_skip(test: &str) -> bool {
    match std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) => true,
        Err(error) => {
            proto::skip!(test, "/dev/kvm cannot be opened ({error})");
            false
        }
    }
}

/// Whether suites that need root and packages were asked for; prints how to run them if not.
pub fn all_or_skip(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    let asked = std::env::var_os("BATON_TEST_ALL").is_some();
    if asked && root {
        return true;
    }
    proto::skip!(
        test,
        "needs root and installed packages; run as root: cargo xtask test --all"
    );
    false
}
