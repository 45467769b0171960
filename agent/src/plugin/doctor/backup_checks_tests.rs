use serde_json::{Value, json};

use super::*;
use crate::backup::preflight::ProblemKind;

fn backup(spec: &Value, status: &Value) -> StatefulSetBackup {
    let mut spec = spec.clone();
    spec["statefulSetRef"] = json!({ "name": "db" });
    serde_json::from_value(json!({
        "metadata": { "name": "nightly", "namespace": "shop", "generation": 2 }, "spec": spec, "status": status,
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

#[test]
fn conditions_that_are_false_are_findings_and_a_running_freeze_is_none() {
    let condition = |type_: &str, reason: &str| {
        json!({ "type": type_, "status": "False", "reason": reason, "message": "told",
            "lastTransitionTime": "2026-02-03T02:00:00Z" })
    };
    let check = |status: Value| summary(&check_conditions(&backup(&json!({}), &status), &[], now()));
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
fn problems_of_the_preflight_are_failures_unless_they_may_heal() {
    let check = |starting| {
        let message = "PersistentVolumeClaim data-db-2 does not exist: wait".to_owned();
        let problem = Problem { kind: ProblemKind::ClaimMissing, message };
        check_plan("StatefulSet shop/db", Err(vec![problem]), starting)
    };
    let said = "ClaimMissing: PersistentVolumeClaim data-db-2 does not exist: wait";
    assert_eq!(summary(&check(false)), [(Level::Fail, format!("StatefulSet shop/db: {said}"))]);
    assert_eq!(
        summary(&check(true)),
        [(Level::Warn, format!("StatefulSet shop/db: still starting: {said}"))]
    );
}

#[test]
fn a_plan_that_leaves_claims_out_is_a_warning_for_each() {
    let run: CurrentRun = serde_json::from_value(json!({
        "id": "r", "slot": { "due": "Creation", "value": "x", "attempt": 1 }, "step": "Frozen",
        "started": "2026-02-03T02:00:00.000000Z", "leftOut": ["PersistentVolumeClaim data-db-1 is not bound"],
        "volumes": [{ "claim": "data-db-0", "template": "data", "ordinal": 0, "snapshot": "s",
            "snapshotClass": "fast", "state": "Pending" }],
        "pods": [{ "name": "db-0", "uid": "p", "freezeContainer": "db" }],
    }))
    .unwrap();
    let object = "StatefulSet shop/db";
    assert_eq!(
        summary(&check_plan(object, Ok(run), false)),
        [
            (Level::Ok, format!("{object}: 1 claim can be snapshotted, 1 pod ready for hooks")),
            (Level::Warn, format!("{object}: left out: PersistentVolumeClaim data-db-1 is not bound")),
        ]
    );
}

#[test]
fn a_target_that_is_missing_elsewhere_or_unread_ends_the_check() {
    let check = |target| summary(&check_backup(&backup(&json!({}), &json!({})), &target, now())).split_off(1);
    let fails = |reason: &str| [(Level::Fail, format!("StatefulSet shop/db: {reason}"))];
    assert_eq!(check(Ok(Target::Missing)), fails("StatefulSetNotFound: it does not exist"));
    assert_eq!(
        check(Ok(Target::NotGranted)),
        fails("NamespaceNotGranted: namespace shop does not let backups of shop in")
    );
    assert_eq!(
        check(Err("you may not".to_owned())),
        [(Level::Warn, "StatefulSet shop/db, its claims and its pods: not checked: you may not".to_owned())]
    );
}

#[test]
fn one_cause_is_one_failure() {
    let condition = |type_: &str, reason: &str| {
        json!({ "type": type_, "status": "False", "reason": reason, "message": "told",
            "lastTransitionTime": "2026-02-03T02:00:00Z" })
    };
    let missing = condition("Ready", "StatefulSetNotFound");
    let check = |last_run: &str| {
        let conditions = json!([missing, condition("LastBackupSucceeded", last_run)]);
        summary(&check_backup(
            &backup(&json!({}), &json!({ "conditions": conditions })),
            &Ok(Target::Missing),
            now(),
        ))
    };
    let fails = |reason: &str| (Level::Fail, reason.to_owned());
    let missing = fails("StatefulSet shop/db: StatefulSetNotFound: it does not exist");
    let failed = fails("StatefulSetBackup shop/nightly: LastBackupSucceeded is False: FrozenTooLong: told");
    assert_eq!(check("FrozenTooLong"), [failed, missing.clone()]);
    assert_eq!(check("StatefulSetNotFound"), [missing]);
}

#[test]
fn a_schedule_or_zone_that_cannot_be_used_fails_and_the_next_run_is_told() {
    let check = |spec: Value| summary(&check_times(&backup(&spec, &json!({})), now()));
    let object = "StatefulSetBackup shop/nightly";
    assert_eq!(check(json!({})), []);
    assert_eq!(
        check(json!({ "schedule": "0 4 * * *" })),
        [(Level::Ok, format!("{object}: the next run begins at 2026-02-03T04:00:00Z (in 120m)"))]
    );
    for spec in [
        json!({ "schedule": "0 4 * *" }),
        json!({ "schedule": "0 4 * * *", "timeZone": "Mars/Olympus" }),
        json!({ "schedule": "0 4 * * *", "spread": "25h" }),
    ] {
        let [(Level::Fail, reason)] = &check(spec.clone())[..] else { unreachable!("one failure: {spec}") };
        assert!(reason.starts_with(&format!("{object}: InvalidSchedule: ")), "{reason}");
    }
    let zone = json!({ "timeZone": "Mars/Olympus", "retentionPolicy": { "keepDaily": 1 } });
    let [(Level::Fail, reason)] = &check(zone)[..] else { unreachable!("one failure") };
    assert!(
        reason.starts_with(&format!("{object}: nothing is pruned: timeZone \"Mars/Olympus\"")),
        "{reason}"
    );
    assert_eq!(
        check(json!({ "schedule": "0 4 * * *", "suspend": true })),
        [(Level::Warn, format!("{object}: suspended: no run begins, and nothing is pruned"))]
    );
}
