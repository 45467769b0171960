//! `list`: the `StatefulSetBackups`, a line each.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::json;
use sts_backup_api::backup::{Phase, StatefulSetBackup, StatefulSetBackupStatus};
use sts_backup_api::conditions;
use sts_backup_service::clock;

use super::args::{DataFormat, List, ListFormat};
use super::cluster::{Cluster, Scope, understand};
use super::error::Error;
use super::follow::{result_word, step_word};
use super::timing::{next_word, schedule};
use super::{Exit, output};
use sts_backup_service::table::{age, lines, table};

/// What kubectl calls the kind.
const RESOURCE: &str = "statefulsetbackup.backup.sts-backup.io";

/// Lists the backups of a namespace or of all.
pub(super) async fn list(cluster: &Cluster, how: &List) -> Result<Exit, Error> {
    let scope = cluster.scope(how.all_namespaces);
    let mut backups = cluster.backups(&scope).await?;
    for backup in &mut backups {
        // As kubectl does: nobody reads them.
        backup.metadata.managed_fields = None;
    }
    let text = match how.output {
        Some(ListFormat::Json) => output::data(&as_list(&backups), DataFormat::Json)?,
        Some(ListFormat::Yaml) => output::data(&as_list(&backups), DataFormat::Yaml)?,
        Some(ListFormat::Name) => names(&backups),
        None | Some(ListFormat::Wide) if backups.is_empty() => {
            output::complain(&nothing_in(&scope));
            String::new()
        }
        None => render(&backups, &scope, false, clock::now()),
        Some(ListFormat::Wide) => render(&backups, &scope, true, clock::now()),
    };
    output::print(&text)?;
    Ok(Exit::Success)
}

/// The objects as kubectl wraps them.
pub(super) fn as_list(objects: &[DynamicObject]) -> serde_json::Value {
    json!({ "apiVersion": "v1", "kind": "List", "metadata": {}, "items": objects })
}

fn names(backups: &[DynamicObject]) -> String {
    lines(backups.iter().map(|backup| format!("{RESOURCE}/{}", backup.name_any())))
}

/// Where was looked, and what to do next.
fn nothing_in(scope: &Scope) -> String {
    let elsewhere = match scope {
        Scope::All => "",
        Scope::Namespace(_) => "  kubectl stsbackup list -A looks in all namespaces\n",
    };
    format!(
        "No StatefulSetBackup in {}.\n{elsewhere}  \
         To protect a StatefulSet, create one that names it in spec.statefulSetRef: \
         kubectl explain statefulsetbackup.spec",
        scope.describe()
    )
}

fn render(backups: &[DynamicObject], scope: &Scope, wide: bool, now: Timestamp) -> String {
    let everywhere = *scope == Scope::All;
    let mut header = Vec::new();
    if everywhere {
        header.push("NAMESPACE");
    }
    header.extend([
        "NAME",
        "STATEFULSET",
        "SCHEDULE",
        "PHASE",
        "LAST-BACKUP",
        "NEXT-BACKUP",
        "POINTS",
        "READY",
    ]);
    if wide {
        header.extend(["LAST-SUCCESS", "LAST-RESULT", "MISSED", "HELD", "STEP", "CLASS", "AGE"]);
    }
    let row = |object: &DynamicObject| {
        let mut row = Vec::new();
        if everywhere {
            row.push(object.namespace().unwrap_or_default());
        }
        row.push(object.name_any());
        match understand::<StatefulSetBackup>(object) {
            Ok(backup) => {
                row.extend(columns(&backup, now));
                if wide {
                    row.extend(wide_columns(&backup, now));
                }
            }
            // Made by a newer agent; the others are shown all the same.
            Err(_) => {
                row.extend(
                    ["?", "?", "?", "?", "?", "?", "unknown to this version of the plugin"].map(String::from),
                );
            }
        }
        row
    };
    table(&header, &backups.iter().map(row).collect::<Vec<_>>())
}

fn columns(backup: &StatefulSetBackup, now: Timestamp) -> [String; 7] {
    let unseen = StatefulSetBackupStatus::default();
    let status = backup.status.as_ref().unwrap_or(&unseen);
    [
        target(backup),
        schedule(&backup.spec).unwrap_or("-").to_owned(),
        status.phase.map_or("-", phase_word).to_owned(),
        time_ago(status.last_backup_time.as_ref(), now),
        next_word(backup, now),
        status.recovery_point_count.to_string(),
        readiness(backup, status),
    ]
}

fn wide_columns(backup: &StatefulSetBackup, now: Timestamp) -> [String; 7] {
    let unseen = StatefulSetBackupStatus::default();
    let status = backup.status.as_ref().unwrap_or(&unseen);
    [
        time_ago(status.last_successful_time.as_ref(), now),
        status.history.first().map_or("-".to_owned(), |run| result_word(run.result).to_owned()),
        status.missed_runs.to_string(),
        status.recovery_points.iter().filter(|point| point.hold).count().to_string(),
        status.current_run.as_ref().map_or("-".to_owned(), |run| step_word(run.step).to_owned()),
        backup.spec.snapshot_class().unwrap_or("<default>").to_owned(),
        backup.creation_timestamp().map_or("-".to_owned(), |created| age(created.0, now)),
    ]
}

/// The `StatefulSet`, with its namespace where that is another one.
pub(super) fn target(backup: &StatefulSetBackup) -> String {
    let own = backup.namespace().unwrap_or_default();
    let target = &backup.spec.stateful_set_ref;
    match target.namespace_or(&own) {
        namespace if namespace == own => target.name.clone(),
        namespace => format!("{namespace}/{}", target.name),
    }
}

/// The word of a phase, as the API writes it.
pub(super) fn phase_word(phase: Phase) -> &'static str {
    match phase {
        Phase::Pending => "Pending",
        Phase::InProgress => "InProgress",
        Phase::Ready => "Ready",
        Phase::Failed => "Failed",
        Phase::Suspended => "Suspended",
    }
}

/// `True`, or why not.
fn readiness(backup: &StatefulSetBackup, status: &StatefulSetBackupStatus) -> String {
    match conditions::find(&status.conditions, conditions::READY) {
        Some(ready) if ready.status == "True" => "True".to_owned(),
        Some(ready) => ready.reason.clone(),
        None if backup.status.is_none() => "NotSeenByAgent".to_owned(),
        None => "Unknown".to_owned(),
    }
}

fn time_ago(time: Option<&MicroTime>, now: Timestamp) -> String {
    time.map_or("-".to_owned(), |time| age(time.0, now))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: serde_json::Value) -> DynamicObject {
        serde_json::from_value(value).unwrap()
    }

    fn three() -> Vec<DynamicObject> {
        vec![
            object(json!({
                "apiVersion": "backup.sts-backup.io/v1alpha1", "kind": "StatefulSetBackup",
                "metadata": { "name": "nightly", "namespace": "shop", "creationTimestamp": "2026-02-01T00:00:00Z" },
                "spec": { "statefulSetRef": { "name": "db" }, "volumeSnapshotClassName": "fast",
                    "schedule": "0 8 * * *" },
                "status": {
                    "phase": "Ready", "recoveryPointCount": 3, "missedRuns": 2,
                    "nextScheduleTime": "2026-02-03T08:00:00Z",
                    "recoveryPoints": [{ "id": "run-1", "time": "2026-02-03T02:00:00.000000Z", "complete": true,
                        "readyVolumes": 1, "expectedVolumes": 1, "replicas": 1, "consistency": "Application",
                        "sizeBytes": 1, "hold": true }],
                    "lastBackupTime": "2026-02-03T02:00:00.000000Z",
                    "lastSuccessfulTime": "2026-02-03T02:00:00.000000Z",
                    "conditions": [{ "type": "Ready", "status": "True", "reason": "Usable", "message": "",
                        "lastTransitionTime": "2026-02-01T00:00:00Z" }],
                },
            })),
            object(json!({
                "metadata": { "name": "far", "namespace": "shop", "creationTimestamp": "2026-02-01T00:00:00Z" },
                "spec": { "statefulSetRef": { "name": "db", "namespace": "prod" } },
                "status": {
                    "phase": "Failed",
                    "conditions": [{ "type": "Ready", "status": "False", "reason": "NamespaceNotGranted",
                        "message": "no", "lastTransitionTime": "2026-02-01T00:00:00Z" }],
                },
            })),
            object(
                json!({ "metadata": { "name": "new", "namespace": "shop" }, "spec": { "statefulSetRef": { "name": "db" }, "suspend": true } }),
            ),
            object(json!({
                "metadata": { "name": "odd", "namespace": "shop" },
                "spec": { "statefulSetRef": { "name": "db" } }, "status": { "phase": "Levitating" },
            })),
        ]
    }

    fn now() -> Timestamp {
        "2026-02-03T05:00:00Z".parse().unwrap()
    }

    #[test]
    fn the_list_says_why_a_backup_is_not_ready_and_survives_unknown_ones() {
        let here = Scope::Namespace("shop".to_owned());
        assert_eq!(
            render(&three(), &here, false, now()),
            "NAME      STATEFULSET   SCHEDULE    PHASE    LAST-BACKUP   NEXT-BACKUP   POINTS   READY\n\
             nightly   db            0 8 * * *   Ready    3h            in 3h         3        True\n\
             far       prod/db       -           Failed   -             -             0        NamespaceNotGranted\n\
             new       db            -           -        -             suspended     0        NotSeenByAgent\n\
             odd       ?             ?           ?        ?             ?             ?        unknown to this version of the plugin\n"
        );
    }

    #[test]
    fn all_namespaces_and_wide_add_their_columns() {
        assert_eq!(
            render(&three()[..1], &Scope::All, true, now()),
            "NAMESPACE   NAME      STATEFULSET   SCHEDULE    PHASE   LAST-BACKUP   NEXT-BACKUP   POINTS   READY   LAST-SUCCESS   LAST-RESULT   MISSED   HELD   STEP   CLASS   AGE\n\
             shop        nightly   db            0 8 * * *   Ready   3h            in 3h         3        True    3h             -             2        1      -      fast    2d5h\n"
        );
    }

    #[test]
    fn names_are_what_kubectl_takes() {
        assert_eq!(names(&three()[..1]), "statefulsetbackup.backup.sts-backup.io/nightly\n");
    }

    #[test]
    fn an_empty_list_says_where_it_looked_and_what_to_do() {
        let text = nothing_in(&Scope::Namespace("shop".to_owned()));
        assert_eq!(
            text,
            "No StatefulSetBackup in namespace shop.\n  \
             kubectl stsbackup list -A looks in all namespaces\n  \
             To protect a StatefulSet, create one that names it in spec.statefulSetRef: \
             kubectl explain statefulsetbackup.spec"
        );
        assert!(!nothing_in(&Scope::All).contains("-A"));
    }
}
