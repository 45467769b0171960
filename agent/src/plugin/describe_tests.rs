use serde_json::json;

use super::*;

fn now() -> Timestamp {
    "2026-02-03T05:00:00Z".parse().unwrap()
}

#[test]
fn a_backup_that_nobody_has_looked_at_says_what_to_do() {
    let backup: StatefulSetBackup = serde_json::from_value(json!({
        "metadata": { "name": "new", "namespace": "shop", "creationTimestamp": "2026-02-03T04:59:00Z" },
        "spec": { "statefulSetRef": { "name": "db" } },
    }))
    .unwrap();
    assert_eq!(
        render(&backup, &Err("list Events: you may not".to_owned()), now()),
        "Name:         new\n\
         Namespace:    shop\n\
         StatefulSet:  db\n\
         Created:      2026-02-03T04:59:00Z (60s ago)\n\
         Phase:        not seen by the agent yet\n\
         Schedule:     none: one run at creation, others when they are asked for\n\
         Next run:     none: no schedule\n\
         Retention:    none: nothing is ever pruned\n\
         Class:        the default of each volume's CSI driver\n\
         Templates:    all\n\
         Pre hook:     none\n\
         Post hook:    none\n\
         Limits:       frozen at most 120 s, snapshots ready within 3600 s\n\
         Last success: never\n\
         Conditions: none yet\n\
         Current run: none\n\
         Recovery points: none\n\
         History: no run has ended yet\n\
         Events: list Events: you may not\n\
         What to do:\n  \
         The agent has not looked at this object: kubectl stsbackup doctor tells whether one is alive\n"
    );
}

#[test]
fn everything_that_is_known_is_shown_and_what_is_wrong_has_a_remedy() {
    let backup: StatefulSetBackup = serde_json::from_value(json!({
        "metadata": { "name": "nightly", "namespace": "shop", "creationTimestamp": "2026-02-01T05:00:00Z" },
        "spec": {
            "statefulSetRef": { "name": "db" }, "volumeSnapshotClassName": "fast", "volumeClaimTemplates": ["data"],
            "allowPartial": true, "schedule": "0 2 * * *", "retentionPolicy": { "keepDaily": 7 },
            "preBackupHook": { "command": ["sh", "-c", "a\n  && b"], "containerName": "db", "pods": "First" },
            "postBackupHook": { "command": ["thaw"], "onError": "Continue", "timeoutSeconds": 5 },
        },
        "status": {
            "phase": "InProgress", "missedRuns": 1, "nextScheduleTime": "2026-02-04T02:00:00Z",
            "lastSuccessfulTime": "2026-02-02T05:00:00.000000Z",
            "conditions": [
                { "type": "Thawed", "status": "False", "reason": "ThawFailed", "message": "db-0:\nexit code 1",
                  "lastTransitionTime": "2026-02-03T04:59:30Z" },
            ],
            "currentRun": {
                "id": "run-3", "slot": { "due": "Request", "value": "x", "attempt": 1 }, "step": "Thawing",
                "started": "2026-02-03T04:59:00.000000Z", "frozenSince": "2026-02-03T04:59:10.000000Z",
                "leftOut": ["data-db-1 is missing"],
                "volumes": [{ "claim": "data-db-0", "template": "data", "ordinal": 0, "snapshot": "data-db-0-run-3",
                    "snapshotClass": "fast", "state": "Cut" }],
                "pods": [{ "name": "db-0", "uid": "p", "freezeContainer": "db", "thaw": { "container": "db",
                    "state": "Owed", "failures": 2, "message": "exit code 1",
                    "notBefore": "2026-02-03T05:00:10.000000Z" } }],
            },
            "recoveryPoints": [{ "id": "run-1", "time": "2026-02-02T05:00:00.000000Z", "complete": true,
                "readyVolumes": 1, "expectedVolumes": 1, "replicas": 1, "consistency": "CrashPerVolume",
                "sizeBytes": 1_073_741_824, "hold": true }],
            "history": [
                { "id": "run-2", "slot": { "due": "Request", "value": "y", "attempt": 2 },
                  "started": "2026-02-03T02:00:00.000000Z", "durationMs": 500, "result": "Failed",
                  "reason": "ClaimMissing", "message": "no claim" },
                { "id": "run-1", "slot": { "due": "Creation", "value": "z", "attempt": 1 },
                  "started": "2026-02-02T05:00:00.000000Z", "durationMs": 2100, "freezeMs": 120, "cutSkewMs": 35,
                  "result": "Completed", "reason": "Completed", "message": "1/1 volumes" },
            ],
        },
    }))
    .unwrap();
    let event = |seen: &str, reason: &str, count: i32| -> Event {
        serde_json::from_value(json!({
            "metadata": { "name": reason }, "eventTime": seen, "type": "Normal", "reason": reason, "note": "of\nrun-3",
            "series": (count > 1).then(|| json!({ "count": count, "lastObservedTime": seen })),
        }))
        .unwrap()
    };
    let events = vec![
        event("2026-02-03T04:59:50.000000Z", "ThawFailed", 2),
        event("2026-02-03T04:59:00.000000Z", "BackupStarted", 1),
    ];
    assert_eq!(
        render(&backup, &Ok(events), now()),
        "Name:         nightly\n\
         Namespace:    shop\n\
         StatefulSet:  db\n\
         Created:      2026-02-01T05:00:00Z (2d ago)\n\
         Phase:        InProgress\n\
         Schedule:     0 2 * * * (UTC)\n\
         Next run:     2026-02-04T02:00:00Z (in 21h)\n\
         Missed runs:  1\n\
         Retention:    keepDaily 7\n\
         Class:        fast\n\
         Templates:    data\n\
         Partial:      allowed: claims that are missing or unfit are left out\n\
         Pre hook:     sh -c a && b (container db of the first pod, 60 s, onError Fail)\n\
         Post hook:    thaw (container default of every pod, 5 s, onError Continue)\n\
         Limits:       frozen at most 120 s, snapshots ready within 3600 s\n\
         Last success: 2026-02-02T05:00:00Z (24h ago)\n\
         Conditions:\n  \
         TYPE     STATUS   REASON       SINCE   MESSAGE\n  \
         Thawed   False    ThawFailed   30s     db-0: exit code 1\n\
         Current run:\n  \
         run-3, started 2026-02-03T04:59:00Z (60s ago)\n  \
         thawing: 1/1 volumes cut, 0/1 ready, 0/1 pods thawed, db-0 failed 2 times: exit code 1\n  \
         left out: data-db-1 is missing\n  \
         CLAIM       SNAPSHOT          CLASS   STATE\n  \
         data-db-0   data-db-0-run-3   fast    cut\n  \
         POD    THAW   FAILURES   NEXT TRY   MESSAGE\n  \
         db-0   owed   2          in 10s     exit code 1\n\
         Recovery points:\n  \
         POINT   TIME                   AGE   VOLUMES   COMPLETE   CONSISTENCY      SIZE   HOLD\n  \
         run-1   2026-02-02T05:00:00Z   24h   1/1       yes        CrashPerVolume   1Gi    yes\n\
         History:\n  \
         RUN     AGE   DUE                   DURATION   FROZEN   CUT SKEW   RESULT      REASON         MESSAGE\n  \
         run-2   3h    request (attempt 2)   500 ms     -        -          Failed      ClaimMissing   no claim\n  \
         run-1   24h   creation              2.1 s      120 ms   35 ms      Completed   Completed      1/1 volumes\n\
         Events:\n  \
         LAST SEEN   TYPE     REASON          MESSAGE\n  \
         60s         Normal   BackupStarted   of run-3\n  \
         10s (x2)    Normal   ThawFailed      of run-3\n\
         What to do:\n  \
         ThawFailed: db-0: exit code 1: the application may still be frozen: run the postBackupHook by hand (kubectl exec) and correct it; kubectl stsbackup describe nightly -n shop shows what it said\n  \
         Run run-2 failed (ClaimMissing): kubectl stsbackup doctor nightly -n shop checks all that the backup needs\n"
    );
}
