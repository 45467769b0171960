//! Which backup and recovery point `--to` means.

use std::collections::BTreeMap;

use kube::api::ListParams;
use kube::{Api, ResourceExt};
use sts_backup_api::backup::{StatefulSetBackup, StatefulSetBackupStatus};
use sts_backup_api::names::{BACKUP_LABEL, BACKUP_NAMESPACE_LABEL, RUN_LABEL, STATEFUL_SET_LABEL};
use sts_backup_api::points::points_of;
use sts_backup_api::restore::StatefulSetRestoreSpec;
use sts_backup_api::run::RecoveryPoint;
use sts_backup_api::snapshot::VolumeSnapshot;

use crate::plugin::args::To;
use crate::plugin::cluster::{Cluster, list_all, understand};
use crate::plugin::error::Error;
use crate::plugin::{Exit, output};
use sts_backup_service::table::second;

/// A backup by namespace and name.
type BackupKey = (String, String);

/// Where a restore takes its data from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The newest complete recovery point of all backups of the `StatefulSet`, which the agent finds.
    Latest,
    /// A recovery point of a backup of the namespace.
    Point {
        /// The `StatefulSetBackup`, which may be gone.
        backup: String,
        /// Its run.
        point: String,
    },
}

impl Source {
    /// Writes it into a spec without a source.
    pub(super) fn write(self, spec: &mut StatefulSetRestoreSpec) {
        match self {
            Self::Latest => spec.use_latest_backup = Some(true),
            Self::Point { backup, point } => {
                spec.backup_name = Some(backup);
                spec.recovery_point = Some(point);
            }
        }
    }
}

/// What of the cluster the answer is made from.
#[derive(Debug, Default)]
struct Facts {
    namespace: String,
    stateful_set: String,
    /// The snapshots of the `StatefulSet` that belong to a run.
    snapshots: Vec<VolumeSnapshot>,
    /// What the backups of the namespace say of their runs, where that may be read.
    statuses: BTreeMap<String, StatefulSetBackupStatus>,
}

/// A recovery point, and whose it is.
struct Known {
    backup: BackupKey,
    point: RecoveryPoint,
}

/// Finds what is meant among the snapshots in the namespace of the `StatefulSet`.
pub(super) async fn choose(cluster: &Cluster, stateful_set: &str, to: &To) -> Result<Source, Error> {
    if *to == To::Latest {
        return Ok(Source::Latest);
    }
    let namespace = cluster.namespace();
    let labels = ListParams::default().labels(&format!("{STATEFUL_SET_LABEL}={stateful_set},{RUN_LABEL}"));
    let api: Api<VolumeSnapshot> = cluster.api(&cluster.scope(false));
    let snapshots =
        list_all(&api, &labels, &format!("list VolumeSnapshots in namespace {namespace}")).await?;
    let facts = Facts {
        namespace: namespace.to_owned(),
        stateful_set: stateful_set.to_owned(),
        snapshots,
        statuses: statuses(cluster).await?,
    };
    pick(&facts, to)
}

/// Only they know which runs failed, and which one is under way; the agent judges the point once more.
async fn statuses(cluster: &Cluster) -> Result<BTreeMap<String, StatefulSetBackupStatus>, Error> {
    let backups = match cluster.backups(&cluster.scope(false)).await {
        Ok(backups) => backups,
        Err(err @ (Error::NotServed { .. } | Error::Forbidden { .. })) => {
            output::complain(&format!("the points of failed runs may look complete: {}", err.brief()));
            Vec::new()
        }
        Err(err) => return Err(err),
    };
    let known = backups.iter().filter_map(|object| understand::<StatefulSetBackup>(object).ok());
    Ok(known.map(|backup| (backup.name_any(), backup.status.unwrap_or_default())).collect())
}

/// The recovery points of the `StatefulSet`.
fn known(facts: &Facts) -> Vec<Known> {
    let mut groups: BTreeMap<BackupKey, Vec<&VolumeSnapshot>> = BTreeMap::new();
    for snapshot in &facts.snapshots {
        let label = |name| snapshot.labels().get(name).cloned();
        let namespace = label(BACKUP_NAMESPACE_LABEL).unwrap_or_else(|| facts.namespace.clone());
        if let Some(backup) = label(BACKUP_LABEL) {
            groups.entry((namespace, backup)).or_default().push(snapshot);
        }
    }
    let unseen = StatefulSetBackupStatus::default();
    let of_group = |(backup, snapshots): (BackupKey, Vec<&VolumeSnapshot>)| {
        let status = facts.statuses.get(&backup.1).filter(|_| backup.0 == facts.namespace);
        let status = status.unwrap_or(&unseen);
        let mut points = points_of(snapshots, &status.history);
        for point in &mut points {
            // Its snapshots can all be ready before the run is known to have succeeded.
            point.complete &= status.current_run.as_ref().is_none_or(|run| run.id != point.id);
        }
        points.into_iter().map(|point| Known { backup: backup.clone(), point }).collect::<Vec<_>>()
    };
    groups.into_iter().flat_map(of_group).collect()
}

fn pick(facts: &Facts, to: &To) -> Result<Source, Error> {
    let known = known(facts);
    let found = match to {
        To::Latest => return Ok(Source::Latest),
        To::Point(id) => known.into_iter().find(|known| known.point.id.as_str() == id),
        To::Time(time) => known
            .into_iter()
            .filter(|known| known.point.complete && known.point.time.0 <= *time)
            .max_by(|one, other| (&one.point.time, &one.point.id).cmp(&(&other.point.time, &other.point.id))),
    };
    let Known { backup: (namespace, backup), point } = found.ok_or_else(|| none(facts, to))?;
    if namespace == facts.namespace {
        return Ok(Source::Point { backup, point: point.id.to_string() });
    }
    Err(Error::Ended {
        exit: Exit::Failure,
        message: format!(
            "recovery point {} of {} is of StatefulSetBackup {namespace}/{backup}, and a restore in namespace {} names only backups of its own",
            point.id,
            second(point.time.0),
            facts.namespace
        ),
        remedy: Some(format!(
            "write a StatefulSetRestore that names its snapshots in spec.snapshotNames: kubectl get volumesnapshots -n {} -l {RUN_LABEL}={}",
            facts.namespace, point.id
        )),
    })
}

fn none(facts: &Facts, to: &To) -> Error {
    let Facts { namespace, stateful_set, .. } = facts;
    let what = match to {
        To::Latest => "no recovery point".to_owned(),
        To::Point(id) => format!("no recovery point {id}"),
        To::Time(time) => format!("no complete recovery point that is not later than {}", second(*time)),
    };
    Error::Ended {
        exit: Exit::Usage,
        message: format!("StatefulSet {namespace}/{stateful_set} has {what}"),
        remedy: Some(format!(
            "kubectl stsbackup points -n {namespace} shows those there are; a time has its zone: 2026-11-24T14:00:00Z"
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use sts_backup_api::names::{TIME_ANNOTATION, VOLUMES_ANNOTATION};

    use super::*;

    fn snapshot((namespace, backup): (&str, &str), run: &str, time: &str, ready: bool) -> VolumeSnapshot {
        serde_json::from_value(json!({
            "apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshot",
            "metadata": {
                "name": format!("data-db-0-{run}"), "namespace": "shop",
                "labels": {
                    BACKUP_LABEL: backup, BACKUP_NAMESPACE_LABEL: namespace, STATEFUL_SET_LABEL: "db", RUN_LABEL: run,
                },
                "annotations": { TIME_ANNOTATION: time, VOLUMES_ANNOTATION: "1" },
            },
            "spec": { "source": {} },
            "status": { "readyToUse": ready },
        }))
        .unwrap()
    }

    fn facts() -> Facts {
        let (nightly, weekly, far) = (("shop", "nightly"), ("shop", "weekly"), ("ops", "far"));
        let status = json!({
            "history": [{ "id": "failed", "slot": { "due": "Creation", "value": "x", "attempt": 1 }, "durationMs": 1,
                "started": "2026-02-05T00:00:00.000000Z", "result": "Failed", "reason": "Any", "message": "" }],
            "currentRun": { "id": "running", "slot": { "due": "Request", "value": "x", "attempt": 1 },
                "started": "2026-02-06T00:00:00.000000Z", "step": "Readying" },
        });
        Facts {
            namespace: "shop".to_owned(),
            stateful_set: "db".to_owned(),
            snapshots: vec![
                snapshot(nightly, "n1", "2026-02-01T00:00:00Z", true),
                snapshot(weekly, "w1", "2026-02-02T00:00:00Z", true),
                snapshot(nightly, "n2", "2026-02-03T00:00:00Z", true),
                snapshot(nightly, "partial", "2026-02-04T00:00:00Z", false),
                snapshot(nightly, "failed", "2026-02-05T00:00:00Z", true),
                snapshot(nightly, "running", "2026-02-06T00:00:00Z", true),
                snapshot(far, "f1", "2026-02-07T00:00:00Z", true),
            ],
            statuses: [("nightly".to_owned(), serde_json::from_value(status).unwrap())].into(),
        }
    }

    fn point(backup: &str, point: &str) -> Source {
        Source::Point { backup: backup.to_owned(), point: point.to_owned() }
    }

    fn at(time: &str) -> To {
        To::Time(time.parse().unwrap())
    }

    #[test]
    fn a_point_is_found_with_its_backup_also_when_it_is_not_complete() {
        for (id, backup) in [("n1", "nightly"), ("w1", "weekly"), ("partial", "nightly")] {
            assert_eq!(pick(&facts(), &To::Point(id.to_owned())).unwrap(), point(backup, id));
        }
    }

    #[test]
    fn a_time_means_the_newest_complete_point_of_any_backup_that_is_not_later() {
        for (time, backup, id) in [
            ("2026-02-01T00:00:00Z", "nightly", "n1"),
            ("2026-02-02T23:00:00Z", "weekly", "w1"),
            ("2026-02-03T00:00:00Z", "nightly", "n2"),
            // The partial one, that of the failed run and that of the run under way do not count.
            ("2026-02-06T12:00:00Z", "nightly", "n2"),
        ] {
            assert_eq!(pick(&facts(), &at(time)).unwrap(), point(backup, id), "{time}");
        }
    }

    #[test]
    fn a_point_of_another_namespace_s_backup_cannot_be_named() {
        for to in [To::Point("f1".to_owned()), at("2026-02-08T00:00:00Z")] {
            let refused = pick(&facts(), &to).unwrap_err();
            assert_eq!(refused.exit(), Exit::Failure);
            assert_eq!(
                refused.to_text(),
                "error: recovery point f1 of 2026-02-07T00:00:00Z is of StatefulSetBackup ops/far, and a restore in namespace shop names only backups of its own\n  \
                 to do: write a StatefulSetRestore that names its snapshots in spec.snapshotNames: kubectl get volumesnapshots -n shop -l backup.sts-backup.io/run=f1"
            );
        }
    }

    #[test]
    fn what_is_not_there_is_wrong_usage_and_says_where_to_look() {
        let said = |to| {
            let refused = pick(&facts(), &to).unwrap_err();
            assert_eq!(refused.exit(), Exit::Usage);
            refused.brief()
        };
        assert_eq!(said(To::Point("n9".to_owned())), "StatefulSet shop/db has no recovery point n9");
        assert_eq!(
            said(at("2026-01-31T23:59:59Z")),
            "StatefulSet shop/db has no complete recovery point that is not later than 2026-01-31T23:59:59Z"
        );
    }

    #[test]
    fn a_source_is_written_as_the_schema_wants_it() {
        let written = |source: Source| {
            let mut spec = StatefulSetRestoreSpec::new("db");
            source.write(&mut spec);
            (spec.use_latest_backup, spec.backup_name, spec.recovery_point)
        };
        assert_eq!(written(Source::Latest), (Some(true), None, None));
        let named = (None, Some("nightly".to_owned()), Some("n1".to_owned()));
        assert_eq!(written(point("nightly", "n1")), named);
    }
}
