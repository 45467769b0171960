use serde_json::{Value, json};

use super::*;

fn set(replicas: i32, start: i32, templates: &[&str]) -> StatefulSet {
    let templates: Vec<_> = templates.iter().map(|name| json!({ "metadata": { "name": name } })).collect();
    serde_json::from_value(json!({
        "metadata": { "name": "db", "namespace": "shop" },
        "spec": {
            "replicas": replicas, "ordinals": { "start": start }, "selector": {}, "serviceName": "", "template": {},
            "volumeClaimTemplates": templates,
        },
    }))
    .unwrap()
}

fn claim(name: &str, phase: &str, volume: &str) -> PersistentVolumeClaim {
    serde_json::from_value(json!({
        "metadata": { "name": name }, "spec": { "volumeName": volume }, "status": { "phase": phase },
    }))
    .unwrap()
}

fn class(name: &str, driver: &str, default: bool) -> VolumeSnapshotClass {
    let mut class = VolumeSnapshotClass::new(name, driver, "Retain");
    if default {
        let annotation = sts_backup_api::snapshot::DEFAULT_CLASS_ANNOTATION;
        class.annotations_mut().insert(annotation.to_owned(), "true".to_owned());
    }
    class
}

/// The check of a backup with this spec; the claims data-db-5, -6 and -7 exist, -6 is not bound, -7 is not CSI.
fn check(spec: &Value, set: &StatefulSet, classes: Vec<VolumeSnapshotClass>) -> Vec<(Level, String)> {
    let mut spec = spec.clone();
    spec["statefulSetRef"] = json!({ "name": "db" });
    let backup = serde_json::from_value(json!({ "metadata": {}, "spec": spec })).unwrap();
    let facts = NamespaceFacts {
        stateful_sets: Ok(Vec::new()),
        claims: Ok(vec![
            claim("data-db-5", "Bound", "pv-csi"),
            claim("data-db-6", "Pending", ""),
            claim("data-db-7", "Bound", "pv-local"),
        ]),
        pods: Ok(Vec::new()),
    };
    let drivers = [("pv-csi".to_owned(), Some("one.csi".to_owned())), ("pv-local".to_owned(), None)];
    let targets = TargetFacts { namespaces: BTreeMap::new(), drivers: Ok(drivers.into()) };
    let findings = check_claims(&backup, set, &facts, &targets, &Ok(classes));
    findings
        .iter()
        .map(|finding| (finding.level, format!("{}: {}", finding.object, finding.reason)))
        .collect()
}

fn default_class() -> Vec<VolumeSnapshotClass> {
    vec![class("fast", "one.csi", true)]
}

#[test]
fn every_ordinal_and_template_must_have_a_fit_claim() {
    assert_eq!(
        check(&json!({}), &set(4, 5, &["data"]), default_class()),
        [
            (Level::Fail, "PersistentVolumeClaim shop/data-db-6: is not bound to a volume".to_owned()),
            (
                Level::Fail,
                "PersistentVolumeClaim shop/data-db-7: is not a CSI volume: it cannot be snapshotted"
                    .to_owned()
            ),
            (Level::Fail, "PersistentVolumeClaim shop/data-db-8: does not exist".to_owned()),
        ]
    );
    assert_eq!(
        check(&json!({}), &set(1, 5, &["data"]), default_class()),
        [(Level::Ok, "StatefulSet shop/db: 1 claim can be snapshotted".to_owned())]
    );
}

#[test]
fn a_partial_backup_does_without_a_claim_but_not_without_a_class() {
    let partial = json!({ "allowPartial": true });
    assert_eq!(check(&partial, &set(1, 6, &["data"]), default_class())[0].0, Level::Warn);
    assert_eq!(check(&partial, &set(1, 5, &["data"]), Vec::new())[0].0, Level::Fail);
}

#[test]
fn the_class_must_exist_be_one_and_be_of_the_driver() {
    let one = set(1, 5, &["data"]);
    for (spec, classes, reason) in [
        (
            json!({}),
            vec![class("a", "one.csi", false)],
            "has no VolumeSnapshotClass: none of driver one.csi is the default",
        ),
        (
            json!({}),
            vec![class("a", "one.csi", true), class("b", "one.csi", true)],
            "has 2 default VolumeSnapshotClasses of driver one.csi",
        ),
        (
            json!({ "volumeSnapshotClassName": "gone" }),
            default_class(),
            "needs VolumeSnapshotClass gone, which does not exist",
        ),
        (
            json!({ "volumeSnapshotClassName": "other" }),
            vec![class("other", "two.csi", true)],
            "is of the driver one.csi, and VolumeSnapshotClass other is of two.csi",
        ),
    ] {
        let expected = format!("PersistentVolumeClaim shop/data-db-5: {reason}");
        assert_eq!(check(&spec, &one, classes), [(Level::Fail, expected)]);
    }
    let named = json!({ "volumeSnapshotClassName": "a" });
    assert_eq!(check(&named, &one, vec![class("a", "one.csi", false)])[0].0, Level::Ok);
}

#[test]
fn templates_are_those_of_the_stateful_set() {
    let spec = json!({ "volumeClaimTemplates": ["wal"] });
    assert_eq!(
        check(&spec, &set(1, 5, &["data"]), default_class()),
        [(Level::Fail, "StatefulSet shop/db: has no claim template wal".to_owned())]
    );
    let spec = json!({ "volumeClaimTemplates": ["data"] });
    assert_eq!(check(&spec, &set(1, 5, &["data", "wal"]), default_class())[0].0, Level::Ok);
    assert_eq!(
        check(&json!({}), &set(1, 5, &[]), default_class()),
        [(
            Level::Fail,
            "StatefulSet shop/db: has no volumeClaimTemplates: there is nothing to snapshot".to_owned()
        )]
    );
}

#[test]
fn a_set_without_replicas_is_backed_up_by_the_claims_that_are_left() {
    let findings = check(&json!({}), &set(0, 0, &["data"]), default_class());
    assert_eq!(findings.len(), 2, "{findings:?}");
    assert_eq!(
        check(&json!({}), &set(0, 0, &["wal"]), default_class()),
        [(
            Level::Fail,
            "StatefulSet shop/db: has no replicas and no claims: there is nothing to snapshot".to_owned()
        )]
    );
}

#[test]
fn too_many_claims_are_refused() {
    assert_eq!(
        check(&json!({}), &set(101, 0, &["data"]), default_class()),
        [(Level::Fail, "StatefulSet shop/db: has 101 claims; a backup takes 100 at most".to_owned())]
    );
}
