use serde_json::{Value, json};

use super::super::Level;
use super::*;

fn now() -> Timestamp {
    "2026-02-03T02:00:00Z".parse().unwrap()
}

fn lease(namespace: &str, holder: &str, renewed: &str) -> Lease {
    serde_json::from_value(json!({
        "metadata": { "name": "sts-backup-agent", "namespace": namespace },
        "spec": { "holderIdentity": holder, "leaseDurationSeconds": 15, "renewTime": renewed },
    }))
    .unwrap()
}

fn deployment(name: &str, available: i32) -> Deployment {
    serde_json::from_value(json!({
        "metadata": { "name": name, "namespace": "system", "labels": { "app.kubernetes.io/name": name } },
        "status": { "availableReplicas": available },
    }))
    .unwrap()
}

fn class(name: &str, driver: &str, policy: &str, default: bool) -> VolumeSnapshotClass {
    let mut class = VolumeSnapshotClass::new(name, driver, policy);
    if default {
        class.annotations_mut().insert(DEFAULT_CLASS_ANNOTATION.to_owned(), "true".to_owned());
    }
    class
}

fn summary(findings: &[Finding]) -> Vec<(Level, String)> {
    findings
        .iter()
        .map(|finding| (finding.level, format!("{}: {}", finding.object, finding.reason)))
        .collect()
}

fn agent(leases: Vec<Lease>, deployments: Vec<Deployment>) -> Vec<(Level, String)> {
    summary(&check_agent(&Ok(leases), &Ok(deployments), now()))
}

#[test]
fn kinds_that_are_not_served_are_named() {
    let served = |kinds: Value| ServedKinds {
        group_version: "snapshot.storage.k8s.io/v1",
        kinds: Ok(serde_json::from_value(kinds).unwrap()),
    };
    let all = served(json!([
        "volumesnapshots",
        "volumesnapshotcontents",
        "volumesnapshotclasses",
        "volumesnapshots/status"
    ]));
    assert_eq!(check_kinds(&all), Finding::ok("CRDs of snapshot.storage.k8s.io/v1", "installed"));
    let some = check_kinds(&served(json!(["volumesnapshots"])));
    assert_eq!(
        (some.level, some.reason.as_str()),
        (Level::Fail, "not installed: volumesnapshotcontents, volumesnapshotclasses")
    );
    let ours = ServedKinds { group_version: OURS, kinds: Ok(Vec::new()) };
    assert_eq!(check_kinds(&ours).remedy.unwrap(), "install the chart sts-backup-agent, which brings them");
}

#[test]
fn an_agent_is_alive_by_its_lease() {
    assert_eq!(
        agent(vec![lease("system", "a-1", "2026-02-03T01:59:55.000000Z")], Vec::new()),
        [(Level::Ok, "Lease system/sts-backup-agent: held by a-1, renewed 5s ago".to_owned())]
    );
    assert_eq!(
        agent(vec![lease("system", "a-1", "2026-02-03T01:00:00.000000Z")], Vec::new()),
        [(Level::Warn, "Lease system/sts-backup-agent: held by a-1, but last renewed 60m ago".to_owned())]
    );
    assert_eq!(
        agent(vec![lease("system", "", "2026-02-03T01:59:55.000000Z")], Vec::new()),
        [(Level::Warn, "Lease system/sts-backup-agent: nobody holds it, last renewed 5s ago".to_owned())]
    );
}

#[test]
fn no_agent_and_two_agents_are_failures() {
    let missing = "Agent: no Lease sts-backup-agent in any namespace: no backup runs".to_owned();
    assert_eq!(agent(Vec::new(), Vec::new()), [(Level::Fail, missing)]);
    let broken = "Deployment system/sts-backup-agent: 0 of its pods available, and none has taken the Lease sts-backup-agent";
    assert_eq!(
        agent(Vec::new(), vec![deployment("sts-backup-agent", 0)]),
        [(Level::Fail, broken.to_owned())]
    );

    let fresh = "2026-02-03T01:59:55.000000Z";
    let two = agent(vec![lease("one", "a", fresh), lease("two", "b", fresh)], Vec::new());
    assert_eq!(
        two[2],
        (
            Level::Fail,
            "Agent: several are alive, in the namespaces one, two: they do the same work twice".to_owned()
        )
    );
    let stale =
        agent(vec![lease("one", "a", fresh), lease("two", "b", "2026-02-01T00:00:00.000000Z")], Vec::new());
    assert_eq!(stale.len(), 2);
}

#[test]
fn a_snapshot_controller_is_looked_for_by_name() {
    let check = |deployments| check_snapshot_controller(&Ok(deployments));
    assert_eq!(
        check(vec![deployment("snapshot-controller", 1)]),
        Finding::ok("Deployment system/snapshot-controller", "available")
    );
    assert_eq!(check(vec![deployment("snapshot-controller", 0)]).level, Level::Warn);
    assert_eq!(check(Vec::new()).level, Level::Warn);
}

#[test]
fn every_driver_has_one_default_class() {
    let classes = vec![
        class("a", "one.csi", "Retain", true),
        class("b", "none.csi", "Retain", false),
        class("c", "two.csi", "Delete", true),
        class("d", "two.csi", "Delete", true),
    ];
    assert_eq!(
        summary(&check_classes(&Ok(classes))),
        [
            (
                Level::Warn,
                "CSI driver none.csi: no default VolumeSnapshotClass: backups must name one".to_owned()
            ),
            (Level::Ok, "CSI driver one.csi: default VolumeSnapshotClass a".to_owned()),
            (
                Level::Fail,
                "CSI driver two.csi: 2 default VolumeSnapshotClasses, nothing says which is meant: c, d"
                    .to_owned()
            ),
            (
                Level::Warn,
                "VolumeSnapshotClass c, d: deletionPolicy is Delete: snapshots die with their namespace"
                    .to_owned()
            ),
        ]
    );
    assert_eq!(check_classes(&Ok(Vec::new()))[0].level, Level::Fail);
}

#[test]
fn a_policy_that_does_not_do_its_work_says_why() {
    let check = |conditions: &[(&str, &str, &str)]| {
        let conditions: Vec<Value> = conditions
            .iter()
            .map(|(type_, status, reason)| {
                json!({
                    "type": type_, "status": status, "reason": reason, "message": "so it is",
                    "lastTransitionTime": "2026-02-03T00:00:00Z",
                })
            })
            .collect();
        let policy = json!({
            "metadata": { "name": "gold" }, "spec": { "template": { "spec": {} } },
            "status": { "conditions": conditions },
        });
        summary(&check_policies(&Ok(vec![serde_json::from_value(policy).unwrap()])))
    };
    let said = |level, what: &str| [(level, format!("StatefulSetBackupPolicy gold: {what}"))];
    let good = said(Level::Ok, "its conditions are good");
    assert_eq!(check(&[("Ready", "True", "Usable"), ("Applied", "True", "Applied")]), good);
    assert_eq!(check(&[]), good);
    assert_eq!(
        check(&[("Ready", "False", "InvalidSchedule"), ("Applied", "False", "InvalidSchedule")]),
        said(Level::Fail, "Ready is False: InvalidSchedule: so it is")
    );
    assert_eq!(
        check(&[("Ready", "True", "Usable"), ("Applied", "False", "NameTaken")]),
        said(Level::Fail, "Applied is False: NameTaken: so it is")
    );
    assert_eq!(
        check(&[("Ready", "True", "Usable"), ("Applied", "False", "Waiting")]),
        said(Level::Warn, "Applied is False: Waiting: so it is")
    );
}

#[test]
fn what_may_not_be_read_is_a_warning_and_backups_are_still_looked_at() {
    let no = || "you may not".to_owned();
    let facts = ClusterFacts {
        served: vec![ServedKinds { group_version: OURS, kinds: Err(no()) }],
        leases: Err(no()),
        deployments: Err(no()),
        daemon_sets: Err(no()),
        stateful_sets: Err(no()),
        classes: Err(no()),
        policies: Err(no()),
    };
    let findings = check_cluster(&facts, now());
    assert_eq!(findings.len(), 8);
    assert!(findings.iter().all(|finding| finding.level == Level::Warn), "{findings:?}");
    assert!(serves_backups(&facts));
    let absent =
        ClusterFacts { served: vec![ServedKinds { group_version: OURS, kinds: Ok(Vec::new()) }], ..facts };
    assert!(!serves_backups(&absent));
}
