use std::cell::RefCell;

use serde_json::Value;

use super::*;
use crate::plugin::args::{OnUnready, To};

/// A restore of `shop/db` with that status.
pub(super) fn restore(status: &Value) -> StatefulSetRestore {
    serde_json::from_value(json!({
        "apiVersion": "backup.sts-backup.io/v1alpha1", "kind": "StatefulSetRestore",
        "metadata": {
            "name": "db-20260203-040000", "namespace": "shop", "uid": "uid-1",
            "creationTimestamp": "2026-02-03T04:00:00Z",
        },
        "spec": { "statefulSetRef": { "name": "db" }, "useLatestBackup": true, "dryRun": true },
        "status": status,
    }))
    .unwrap()
}

/// A plan that replaces a volume, makes one and keeps one.
pub(super) fn plan() -> Value {
    json!({
        "hash": "hash-1", "backup": "nightly", "point": "run-1", "time": "2026-02-03T02:00:00.000000Z",
        "consistency": "Application", "replicas": 3, "replicasMeanwhile": 1, "expectedDowntimeSeconds": 6,
        "volumes": [
            { "claim": "data-db-1", "action": "Replace", "snapshot": "data-db-1-run-1", "sizeBytes": 1 << 30,
                "oldVolume": "pv-1" },
            { "claim": "data-db-2", "action": "Create", "snapshot": "data-db-2-run-1", "sizeBytes": 1 << 30 },
            { "claim": "logs-db-1", "action": "Keep", "oldVolume": "pv-9" },
        ],
        "warnings": ["the point is older than a week"],
    })
}

/// The swap of that plan: the old volume has 3 GiB.
pub(super) fn swap() -> Value {
    let pv = |name: &str, manifest: Option<&str>| json!({ "name": name, "uid": name, "reclaimPolicy": "Delete", "claimUid": "claim", "manifest": manifest });
    let large = pv("pv-1", Some(r#"{"spec":{"capacity":{"storage":"3Gi"}}}"#));
    let volume = |claim: &str, snapshot: Option<&str>, previous: Value, restored: Value| {
        json!({ "claim": claim, "template": "data", "ordinal": 1, "snapshot": snapshot, "sizeBytes": 1 << 30,
            "manifest": "{}", "previous": previous, "restored": restored })
    };
    json!({
        "step": "Releasing", "stepSince": "2026-02-03T04:00:00.000000Z", "toward": "Restored", "statefulSetUid": "any",
        "replicas": 3, "replicasMeanwhile": 1,
        "volumes": [
            volume("data-db-1", Some("data-db-1-run-1"), large, pv("pv-new-1", None)),
            volume("data-db-2", Some("data-db-2-run-1"), Value::Null, pv("pv-new-2", None)),
            volume("logs-db-1", None, pv("pv-9", None), Value::Null),
        ],
    })
}

fn order(stateful_set: &str, replicas: &[i32]) -> Order {
    Order {
        stateful_set: stateful_set.to_owned(),
        to: To::Latest,
        replicas: replicas.to_vec(),
        rollback_window: None,
        on_failure: OnUnready::Hold,
        dry_run: false,
        wait: false,
        yes: false,
        timeout: Duration::from_hours(1),
        output: None,
    }
}

#[test]
fn what_is_made_only_plans_and_is_named_by_set_and_time() {
    let now = "2026-02-03T04:05:06Z".parse().unwrap();
    let made = order_object(&order("db", &[2, 1, 2]), Source::Latest, now);
    assert_eq!(made.name_any(), "db-20260203-040506");
    assert_eq!((made.spec.dry_run, made.spec.use_latest_backup), (true, Some(true)));
    assert_eq!(made.spec.replicas, [1, 2]);
    assert_eq!(made.spec, {
        // What is not asked for is as in a manifest that does not say it.
        let mut spec = StatefulSetRestoreSpec::new("db");
        (spec.dry_run, spec.use_latest_backup, spec.replicas) = (true, Some(true), vec![1, 2]);
        spec
    });
    let careful = Order {
        rollback_window: Some(Duration::from_hours(72)),
        on_failure: OnUnready::Rollback,
        ..order("db", &[])
    };
    let made = order_object(&careful, Source::Latest, now).spec;
    assert_eq!(
        (Duration::from(made.rollback_window), made.on_failure),
        (Duration::from_hours(72), OnFailure::Rollback)
    );

    let long = restore_name(&format!("{}-{}", "x".repeat(46), "y".repeat(20)), now);
    assert_eq!(long, format!("{}-20260203-040506", "x".repeat(46)));
    assert_eq!(restore_name(&"x".repeat(253), now).len(), 63);
}

fn refused(reason: &str, message: &str) -> Planning {
    let status = json!({ "phase": "Failed", "conditions": [{ "type": "Succeeded", "status": "False", "reason": reason,
        "message": message, "lastTransitionTime": "2026-02-03T05:00:00Z" }] });
    match planning(Some(&restore(&status)), "uid-1") {
        Look::Ends(planning) => Some(planning),
        Look::Goes(_) => None,
    }
    .unwrap()
}

#[test]
fn a_refused_plan_is_a_failure_with_every_reason() {
    let refused = planned(refused("QuotaTooSmall", "no room; no class fast; nothing was touched"), "shop/db")
        .unwrap_err();
    assert_eq!(refused.exit(), Exit::Failure);
    assert_eq!(
        refused.to_text(),
        "error: the restore of StatefulSet shop/db is refused: QuotaTooSmall: no room; no class fast; nothing was touched"
    );
    let deleted = planned(Planning::Deleted, "shop/db").unwrap_err();
    assert_eq!(deleted.to_text(), "error: nothing was restored: somebody deleted the StatefulSetRestore");
    let plan: RestorePlan = serde_json::from_value(plan()).unwrap();
    assert_eq!(planned(Planning::Planned(Box::new(plan.clone())), "shop/db").unwrap(), plan);
}

/// The exit code, and what is said on the way or as the error.
fn ended(end: &End, status: &Value, back: bool) -> (u8, String) {
    let said = RefCell::new(String::new());
    let say = |line: &str| {
        said.borrow_mut().push_str(line);
        Ok(())
    };
    match verdict(end, &restore(status), back, say) {
        Ok(exit) => (exit.code(), said.into_inner()),
        Err(err) => (err.exit().code(), err.to_text()),
    }
}

#[test]
fn a_completed_restore_says_for_how_long_pods_were_down_and_how_to_go_back() {
    let restored = |claim| json!({ "snapshotName": "s", "pvcName": claim, "success": true });
    let mut status = json!({
        "phase": "Completed", "plan": plan(), "downtimeSeconds": 65, "rollbackUntil": "2026-02-04T04:00:00Z",
        "restoredSnapshots": [restored("data-db-1"), restored("data-db-2")],
    });
    assert_eq!(
        ended(&End::Completed, &status, false),
        (
            0,
            "StatefulSet shop/db has the data of recovery point run-1: 2 volumes, pods were down for 1 min 5 s\n\
             until 2026-02-04T04:00:00Z kubectl stsbackup restore rollback db-20260203-040000 -n shop brings the old volumes back"
                .to_owned()
        )
    );
    status["rollbackUntil"] = Value::Null;
    status["downtimeSeconds"] = Value::Null;
    assert_eq!(
        ended(&End::Completed, &status, false),
        (0, "StatefulSet shop/db has the data of recovery point run-1: 2 volumes".to_owned())
    );
}

#[test]
fn the_old_data_is_a_failure_of_a_restore_and_the_success_of_a_rollback() {
    let status = json!({ "downtimeSeconds": 4 });
    for end in [End::RolledBack(progress::Why::default()), End::Failed(progress::Why::default())] {
        let (code, said) = ended(&end, &status, false);
        assert!(code == 1 && said.contains("has its old data"), "{code}: {said}");
        let success = "StatefulSet shop/db has its old data, pods were down for 4.0 s";
        assert_eq!(ended(&end, &status, true), (0, success.to_owned()));
    }
}

#[test]
fn other_ends_are_failures_that_say_what_to_do() {
    let why = progress::Why::default;
    for (end, back, words) in [
        (End::Held(why()), false, "or kubectl stsbackup restore rollback db-20260203-040000 -n shop brings"),
        (End::Held(why()), true, "kubectl get pods -n shop"),
        (End::PlanChanged, false, "the same command again"),
        (End::RollbackRefused(why()), true, "StatefulSet shop/db is not rolled back"),
        (End::Deleted, false, "StatefulSetRestore shop/db-20260203-040000 was deleted"),
    ] {
        let (code, said) = ended(&end, &json!({}), back);
        assert!(code == 1 && said.contains(words), "{code}: {said}");
    }
}
