//! What to do about the reasons that conditions and runs give. Pure.
//!
//! The agent's messages say what to do about the one object that they speak of; here is the next command.

use jiff::{SignedDuration, Timestamp};
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::conditions;
use sts_backup_api::names::ALLOW_BACKUP_FROM_ANNOTATION;

use sts_backup_service::table::age;

/// What to do about `reason` for the backup, whatever the message says.
pub(super) fn remedy(reason: &str, namespace: &str, name: &str) -> String {
    match reason {
        "NamespaceNotGranted" => format!(
            "create the StatefulSetBackup in the namespace of its StatefulSet, or let it in there: kubectl annotate namespace NAME {ALLOW_BACKUP_FROM_ANNOTATION}={namespace}"
        ),
        "InvalidSchedule" => format!(
            "correct spec.schedule, spec.timeZone or spec.spread: kubectl edit statefulsetbackup {name} -n {namespace}"
        ),
        "StatefulSetNotFound" => format!(
            "create the StatefulSet, or delete this object and create one that names the right one: kubectl get statefulset -n {namespace}"
        ),
        "NoSnapshotClass" => {
            "name a class in spec.volumeSnapshotClassName, or mark one of the driver's as its default: kubectl get volumesnapshotclass".to_owned()
        }
        "PreBackupHookFailed" => "run the command of the hook by hand in the container, and correct it: kubectl exec".to_owned(),
        "FrozenTooLong" => format!(
            "make the preBackupHook quicker or raise spec.maxFreezeSeconds; kubectl stsbackup doctor -n {namespace} tells whether snapshots are slowed down"
        ),
        "ThawFailed" => format!(
            "the application may still be frozen: run the postBackupHook by hand (kubectl exec) and correct it; kubectl stsbackup describe {name} -n {namespace} shows what it said"
        ),
        "Interrupted" => format!("ask again: kubectl stsbackup run {name} -n {namespace} --wait"),
        _ => format!("kubectl stsbackup doctor {name} -n {namespace} checks all that the backup needs"),
    }
}

/// That the application may be frozen although it should not: the thaw fails, or nobody has thawed in time. A
/// run that is in its frozen section is no trouble, and neither is a thaw that is only to be repeated.
pub(super) fn thaw_trouble(backup: &StatefulSetBackup, now: Timestamp) -> Option<String> {
    let status = backup.status.as_ref()?;
    let thawed = conditions::find(&status.conditions, conditions::THAWED)?;
    if thawed.status != "False" {
        return None;
    }
    if thawed.reason == "ThawFailed" {
        return Some(format!("{}: {}", thawed.reason, thawed.message));
    }
    if thawed.reason != "Frozen" {
        return None;
    }
    let since = status.current_run.as_ref()?.frozen_since.as_ref()?.0;
    let limit = SignedDuration::try_from(backup.spec.max_freeze()).ok()?;
    (now.duration_since(since) > limit).then(|| {
        format!(
            "{}: pods have been frozen for {}, and spec.maxFreezeSeconds is {}: is the agent alive?",
            thawed.reason,
            age(since, now),
            backup.spec.max_freeze_seconds
        )
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_reason_has_a_next_command() {
        for reason in [
            "NamespaceNotGranted",
            "InvalidSchedule",
            "StatefulSetNotFound",
            "NoSnapshotClass",
            "PreBackupHookFailed",
            "FrozenTooLong",
            "ThawFailed",
            "Interrupted",
            "Else",
        ] {
            assert!(remedy(reason, "shop", "nightly").contains("kubectl"), "{reason}");
        }
    }

    #[test]
    fn a_frozen_application_is_trouble_only_when_it_should_be_thawed() {
        let trouble = |status: &str, reason: &str, now: &str| {
            let backup: StatefulSetBackup = serde_json::from_value(json!({
                "metadata": { "name": "nightly", "namespace": "shop" },
                "spec": { "statefulSetRef": { "name": "db" }, "maxFreezeSeconds": 60 },
                "status": {
                    "conditions": [{ "type": "Thawed", "status": status, "reason": reason, "message": "db-0: no",
                        "lastTransitionTime": "2026-02-03T02:00:00Z" }],
                    "currentRun": {
                        "id": "r", "slot": { "due": "Creation", "value": "x", "attempt": 1 }, "step": "Frozen",
                        "started": "2026-02-03T02:00:00.000000Z", "frozenSince": "2026-02-03T02:00:00.000000Z",
                    },
                },
            }))
            .unwrap();
            thaw_trouble(&backup, now.parse().unwrap())
        };
        let (soon, late) = ("2026-02-03T02:00:30Z", "2026-02-03T02:05:00Z");
        assert_eq!(trouble("True", "Thawed", late), None);
        assert_eq!(trouble("False", "Frozen", soon), None);
        assert_eq!(trouble("False", "ThawDue", late), None);
        assert_eq!(trouble("False", "ThawFailed", soon).as_deref(), Some("ThawFailed: db-0: no"));
        assert_eq!(
            trouble("False", "Frozen", late).as_deref(),
            Some(
                "Frozen: pods have been frozen for 5m, and spec.maxFreezeSeconds is 60: is the agent alive?"
            )
        );
    }
}
