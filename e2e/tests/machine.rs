//! A machine that cannot make clusters is told why, before anything on it changes.

use std::process::{Command, Output};

/// Runs `cargo e2e up` without any program to be found and with a cache of its own.
fn up_on_a_bare_machine(cache: &std::path::Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_e2e"))
        .arg("up")
        .env("PATH", "")
        .env("XDG_CACHE_HOME", cache)
        .env_remove("DOCKER_HOST")
        .output()
        .expect("the harness starts")
}

#[test]
fn a_bare_machine_is_told_everything_that_is_missing_at_once() {
    let cache = tempfile::tempdir().expect("a folder for the cache");
    let output = up_on_a_bare_machine(cache.path());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    for remedy in ["nothing was changed", "install Go 1.26", "apt-get is missing", "apt-get install gcc"] {
        assert!(said.contains(remedy), "{remedy:?} is not in:\n{said}");
    }
    let built = std::fs::read_dir(cache.path().join("sts-backup-e2e/cache")).expect("the cache").count();
    assert_eq!(built, 0, "something was built");
}
