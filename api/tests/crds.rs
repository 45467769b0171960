//! The checked-in CRDs are those of the types.

use std::collections::BTreeMap;

#[allow(dead_code, reason = "its main is for cargo crdgen")]
#[path = "../examples/crdgen.rs"]
mod crdgen;

#[test]
fn the_checked_in_crds_are_those_of_the_types() {
    let expected: BTreeMap<String, String> = crdgen::files().unwrap().into_iter().collect();
    let found: BTreeMap<String, String> = std::fs::read_dir(crdgen::folder())
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (entry.file_name().into_string().unwrap(), std::fs::read_to_string(entry.path()).unwrap())
        })
        .collect();
    assert!(found == expected, "{:?} are stale: run cargo crdgen", expected.keys());
}
