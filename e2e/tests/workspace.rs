//! The workspace keeps the direction that docs/architecture.md draws: agent and hub never meet in code.

use std::collections::BTreeSet;
use std::path::Path;

/// The crates of this workspace that `member`'s manifest names; it is called as its folder.
fn dependencies_of(member: &str) -> BTreeSet<String> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(member).join("Cargo.toml");
    let manifest = std::fs::read_to_string(&manifest).expect("every member has a manifest");
    let (package, rest) =
        manifest.split_once("[package]").and_then(|(_, rest)| rest.split_once("\n[")).expect("a package");
    let name = member.rsplit('/').next().expect("a folder");
    assert!(package.contains(&format!("name = \"sts-backup-{name}\"")), "{member} has another name");
    rest.lines()
        .filter_map(|line| line.strip_prefix("sts-backup-")?.split(['.', ' ', '=']).next())
        .map(str::to_owned)
        .collect()
}

#[test]
fn agent_hub_and_tests_meet_only_in_the_api() {
    let only_api = BTreeSet::from(["api".to_owned(), "service".to_owned()]);
    for member in ["api", "api/service"] {
        assert_eq!(dependencies_of(member), BTreeSet::new());
    }
    for member in ["agent", "hub", "e2e"] {
        let dependencies = dependencies_of(member);
        assert!(dependencies.is_subset(&only_api), "{member} depends on {dependencies:?}");
    }
}
