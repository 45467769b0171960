//! A machine that cannot make clusters is told why, before anything on it changes.

use std::process::Command;

#[test]
fn a_machine_without_go_is_told_to_install_it() {
    let cache = tempfile::tempdir().expect("a folder for the cache");
    let output = Command::new(env!("CARGO_BIN_EXE_e2e"))
        .arg("up")
        .env("PATH", "")
        .env("XDG_CACHE_HOME", cache.path())
        .output()
        .expect("the harness starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    for words in ["nothing was changed", "Go is missing: install Go 1.26"] {
        assert!(said.contains(words), "{words:?} is not in:\n{said}");
    }
    let built = std::fs::read_dir(cache.path().join("sts-backup-e2e/cache")).expect("the cache").count();
    assert_eq!(built, 0, "something was built");
}
