use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::super::observe::NamespaceFacts;
use super::*;

fn backup(spec: &Value, status: &Value) -> StatefulSetBackup {
    let mut spec = spec.clone();
    spec["statefulSetRef"] = json!({ "name": "db" });
    serde_json::from_value(json!({
        "metadata": { "name": "nightly", "namespace": "shop", "generation": 2 }, "spec": spec, "status": status,
    }))
    .unwrap()
}

fn set() -> StatefulSet {
    serde_json::from_value(json!({
        "metadata": { "name": "db", "namespace": "shop" },
        "spec": { "replicas": 2, "selector": {}, "serviceName": "", "template": {},
            "volumeClaimTemplates": [{ "metadata": { "name": "data" } }] },
    }))
    .unwrap()
}

fn pod(ordinal: i32, ready: &str) -> Pod {
    serde_json::from_value(json!({
        "metadata": { "name": format!("db-{ordinal}") },
        "spec": { "containers": [{ "name": "db" }, { "name": "proxy" }] },
        "status": { "conditions": [{ "type": "Ready", "status": ready }] },
    }))
    .unwrap()
}

fn now() -> Timestamp {
    "2026-02-03T02:00:00Z".parse().unwrap()
}

fn summary(findings: &[Finding]) -> Vec<(Level, String)> {
    findings
        .iter()
        .map(|finding| (finding.level, format!("{}: {}", finding.object, finding.reason)))
        .collect()
}

fn hook_check(hook: Value, pods: Vec<Pod>) -> Vec<(Level, String)> {
    let hook: Hook = serde_json::from_value(hook).unwrap();
    summary(&check_hook("preBackupHook", &hook, &set(), &Ok(pods)))
}

#[test]
fn hooks_need_their_pods_ready() {
    let pods = || vec![pod(0, "True"), pod(1, "False")];
    let ready = (Level::Ok, "preBackupHook of StatefulSet shop/db: 1 pod ready for it".to_owned());
    assert_eq!(hook_check(json!({ "command": ["x"], "pods": "First" }), pods()), [ready]);
    let unready = "Pod shop/db-1: preBackupHook: the pod is not ready".to_owned();
    assert_eq!(hook_check(json!({ "command": ["x"] }), pods()), [(Level::Fail, unready.clone())]);
    assert_eq!(
        hook_check(json!({ "command": ["x"], "onError": "Continue" }), pods()),
        [(Level::Warn, unready)]
    );
    let missing = "Pod shop/db-1: preBackupHook: the pod does not exist".to_owned();
    assert_eq!(hook_check(json!({ "command": ["x"] }), vec![pod(0, "True")]), [(Level::Fail, missing)]);
}

#[test]
fn hooks_need_their_container() {
    let named = |name: &str| json!({ "command": ["x"], "containerName": name, "pods": "First" });
    assert_eq!(hook_check(named("proxy"), vec![pod(0, "True")])[0].0, Level::Ok);
    assert_eq!(
        hook_check(named("gone"), vec![pod(0, "True")]),
        [(Level::Fail, "Pod shop/db-0: preBackupHook: the pod has no container gone".to_owned())]
    );
    let mut annotated = pod(0, "True");
    annotated.annotations_mut().insert(DEFAULT_CONTAINER.to_owned(), "lost".to_owned());
    assert_eq!(hook_check(json!({ "command": ["x"], "pods": "First" }), vec![annotated])[0].0, Level::Fail);
}

#[test]
fn conditions_that_are_false_are_findings_and_a_running_freeze_is_none() {
    let condition = |type_: &str, reason: &str| {
        json!({ "type": type_, "status": "False", "reason": reason, "message": "told",
            "lastTransitionTime": "2026-02-03T02:00:00Z" })
    };
    let check = |status: Value| summary(&check_conditions(&backup(&json!({}), &status), now()));
    let object = "StatefulSetBackup shop/nightly";
    assert_eq!(
        check(
            json!({ "conditions": [condition("Ready", "ClaimMissing"), condition("Thawed", "ThawFailed")] })
        ),
        [
            (Level::Fail, format!("{object}: ThawFailed: told")),
            (Level::Fail, format!("{object}: Ready is False: ClaimMissing: told")),
        ]
    );
    let good = [(Level::Ok, format!("{object}: its conditions are good"))];
    assert_eq!(check(json!({ "conditions": [condition("Thawed", "Frozen")] })), good);
    assert_eq!(
        check(json!({
            "conditions": [condition("LastBackupSucceeded", "ClaimsLeftOut")],
            "history": [{ "id": "r", "slot": { "due": "Creation", "value": "x", "attempt": 1 },
                "started": "2026-02-03T01:00:00.000000Z", "durationMs": 1, "result": "PartiallyFailed",
                "reason": "ClaimsLeftOut", "message": "" }],
        })),
        [(Level::Warn, format!("{object}: LastBackupSucceeded is False: ClaimsLeftOut: told"))]
    );
    assert_eq!(
        check(json!({ "observedGeneration": 1 })),
        [(Level::Warn, format!("{object}: the agent has not looked at its newest spec"))]
    );
    assert_eq!(check(json!(null)), [(Level::Warn, format!("{object}: the agent has not looked at it"))]);
}

#[test]
fn a_target_that_is_missing_or_unread_ends_the_check() {
    let check = |stateful_sets: Read<Vec<StatefulSet>>| {
        let facts = NamespaceFacts { stateful_sets, claims: Ok(Vec::new()), pods: Ok(Vec::new()) };
        let namespaces = BTreeMap::from([("shop".to_owned(), facts)]);
        let targets = TargetFacts { namespaces, drivers: Ok(BTreeMap::new()) };
        summary(&check_backup(&backup(&json!({}), &json!({})), &targets, &Ok(Vec::new()), now())).split_off(1)
    };
    assert_eq!(
        check(Ok(Vec::new())),
        [(
            Level::Fail,
            "StatefulSet shop/db: does not exist; StatefulSetBackup shop/nightly names it".to_owned()
        )]
    );
    assert_eq!(
        check(Err("you may not".to_owned())),
        [(Level::Warn, "StatefulSet shop/db: not checked: you may not".to_owned())]
    );
    assert_eq!(check(Ok(vec![set()])).len(), 2);
}
