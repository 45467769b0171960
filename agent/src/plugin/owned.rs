//! The snapshots of one `StatefulSetBackup`, which may be gone, and the recovery points that they amount to.

use std::collections::BTreeSet;

use kube::api::ListParams;
use kube::{Api, ResourceExt};
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::names::{BACKUP_LABEL, BACKUP_NAMESPACE_LABEL, RUN_LABEL, STATEFUL_SET_LABEL};
use sts_backup_api::points::{is_in_use, points_of};
use sts_backup_api::run::{RecoveryPoint, RunId};
use sts_backup_api::snapshot::VolumeSnapshot;

use super::Exit;
use super::cluster::{Cluster, Scope, list_all};
use super::error::Error;

/// How many snapshots are changed at once: a point of many volumes is quick, and the API server has others to serve.
pub(super) const PARALLEL: usize = 8;

/// A backup and its snapshots.
#[derive(Clone, Debug)]
pub(super) struct Owned {
    pub(super) namespace: String,
    pub(super) name: String,
    /// Absent when it was deleted: its snapshots stay.
    pub(super) backup: Option<StatefulSetBackup>,
    pub(super) snapshots: Vec<VolumeSnapshot>,
}

impl Owned {
    /// Those of the backup of that name in the namespace that is meant.
    pub(super) async fn read(cluster: &Cluster, name: &str) -> Result<Self, Error> {
        let namespace = cluster.namespace().to_owned();
        match cluster.backup(name).await {
            Ok(backup) => Self::of(cluster, backup).await,
            Err(missing @ (Error::NotFound { .. } | Error::NotServed { .. })) => {
                let snapshots = left_behind(cluster, &namespace, name).await?;
                if snapshots.is_empty() {
                    return Err(missing);
                }
                Ok(Self { namespace, name: name.to_owned(), backup: None, snapshots })
            }
            Err(err) => Err(err),
        }
    }

    /// Those of a backup that is there.
    pub(super) async fn of(cluster: &Cluster, backup: StatefulSetBackup) -> Result<Self, Error> {
        let (namespace, name) = (backup.namespace().unwrap_or_default(), backup.name_any());
        let target = backup.spec.stateful_set_ref.namespace_or(&namespace).to_owned();
        let mut snapshots = list(cluster, Scope::Namespace(target), &namespace, &name).await?;
        // A backup that had the same name may have been of another StatefulSet.
        let set = &backup.spec.stateful_set_ref.name;
        snapshots.retain(|snapshot| snapshot.labels().get(STATEFUL_SET_LABEL) == Some(set));
        Ok(Self { namespace, name, backup: Some(backup), snapshots })
    }

    /// `namespace/name` of the backup.
    pub(super) fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Its recovery points, newest first.
    pub(super) fn points(&self) -> Vec<RecoveryPoint> {
        let status = self.backup.as_ref().and_then(|backup| backup.status.as_ref());
        points_of(&self.snapshots, status.map(|status| &status.history[..]).unwrap_or_default())
    }

    /// The run under way: its snapshots are no recovery point yet.
    pub(super) fn current_run(&self) -> Option<&RunId> {
        Some(&self.backup.as_ref()?.status.as_ref()?.current_run.as_ref()?.id)
    }

    /// The points that a volume is being made from.
    pub(super) fn in_use(&self) -> BTreeSet<RunId> {
        self.snapshots.iter().filter(|snapshot| is_in_use(snapshot)).filter_map(run_of).collect()
    }

    /// The snapshots of a point, without those that are being deleted.
    pub(super) fn members(&self, point: &RunId) -> Vec<&VolumeSnapshot> {
        let is_member = |snapshot: &&VolumeSnapshot| {
            run_of(snapshot).as_ref() == Some(point) && snapshot.metadata.deletion_timestamp.is_none()
        };
        self.snapshots.iter().filter(is_member).collect()
    }

    /// The point of that name.
    pub(super) fn point(&self, name: &str) -> Result<RecoveryPoint, Error> {
        let found = self.points().into_iter().find(|point| point.id.as_str() == name);
        found.ok_or_else(|| Error::Ended {
            exit: Exit::Usage,
            message: format!("StatefulSetBackup {} has no recovery point {name}", self.full_name()),
            remedy: Some(format!(
                "kubectl stsbackup points {} -n {} shows those it has",
                self.name, self.namespace
            )),
        })
    }
}

fn run_of(snapshot: &VolumeSnapshot) -> Option<RunId> {
    snapshot.labels().get(RUN_LABEL).cloned().map(RunId::from)
}

async fn list(
    cluster: &Cluster,
    scope: Scope,
    namespace: &str,
    name: &str,
) -> Result<Vec<VolumeSnapshot>, Error> {
    let labels = format!("{BACKUP_LABEL}={name},{BACKUP_NAMESPACE_LABEL}={namespace},{RUN_LABEL}");
    let api: Api<VolumeSnapshot> = cluster.api(&scope);
    let what = format!("list VolumeSnapshots in {}", scope.describe());
    list_all(&api, &ListParams::default().labels(&labels), &what).await
}

/// The snapshots of a backup that is gone: nothing says any more where its `StatefulSet` was.
async fn left_behind(cluster: &Cluster, namespace: &str, name: &str) -> Result<Vec<VolumeSnapshot>, Error> {
    match list(cluster, Scope::All, namespace, name).await {
        Err(Error::Forbidden { .. }) => {
            list(cluster, Scope::Namespace(namespace.to_owned()), namespace, name).await
        }
        listed => listed,
    }
}

/// A backup with one complete point of two snapshots for each of the runs, the newest first.
#[cfg(test)]
pub(super) fn owned(runs: &[&str]) -> Owned {
    use serde_json::json;
    use sts_backup_api::names::{TIME_ANNOTATION, VOLUMES_ANNOTATION};

    let snapshots = runs.iter().enumerate().flat_map(|(at, run)| {
        (0..2).map(move |ordinal| {
            serde_json::from_value(json!({
                "apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshot",
                "metadata": {
                    "name": format!("data-db-{ordinal}-{run}"), "namespace": "shop",
                    "labels": { RUN_LABEL: run, STATEFUL_SET_LABEL: "db" },
                    "annotations": {
                        TIME_ANNOTATION: format!("2026-02-{:02}T02:00:00Z", 28 - at), VOLUMES_ANNOTATION: "2",
                    },
                },
                "spec": { "source": {} },
                "status": { "readyToUse": true, "restoreSize": "10Mi" },
            }))
            .unwrap()
        })
    });
    let backup: StatefulSetBackup = serde_json::from_value(json!({
        "metadata": { "name": "nightly", "namespace": "shop", "uid": "uid-1" },
        "spec": { "statefulSetRef": { "name": "db" } },
        "status": {},
    }))
    .unwrap();
    Owned {
        namespace: "shop".to_owned(),
        name: "nightly".to_owned(),
        backup: Some(backup),
        snapshots: snapshots.collect(),
    }
}

#[cfg(test)]
mod tests {
    use sts_backup_api::snapshot::SOURCE_PROTECTION_FINALIZER;

    use super::*;

    #[test]
    fn a_point_is_found_by_its_run_and_a_wrong_name_says_where_to_look() {
        let owned = owned(&["new", "old"]);
        assert!(owned.point("old").unwrap().complete);
        let refused = owned.point("else").unwrap_err();
        assert_eq!(refused.exit(), Exit::Usage);
        assert_eq!(
            refused.to_text(),
            "error: StatefulSetBackup shop/nightly has no recovery point else\n  \
             to do: kubectl stsbackup points nightly -n shop shows those it has"
        );
    }

    #[test]
    fn the_members_of_a_point_are_its_snapshots_that_are_not_being_deleted() {
        let mut owned = owned(&["new", "old"]);
        let names = |owned: &Owned| -> Vec<_> {
            owned.members(&RunId::from("old".to_owned())).into_iter().map(ResourceExt::name_any).collect()
        };
        assert_eq!(names(&owned), ["data-db-0-old", "data-db-1-old"]);
        owned.snapshots[3].metadata.deletion_timestamp = Some(jiff::Timestamp::UNIX_EPOCH.into());
        assert_eq!(names(&owned), ["data-db-0-old"]);
    }

    #[test]
    fn one_member_that_is_in_use_makes_the_point_so() {
        let mut owned = owned(&["new", "old"]);
        assert_eq!(owned.in_use(), BTreeSet::new());
        owned.snapshots[1].finalizers_mut().push(SOURCE_PROTECTION_FINALIZER.to_owned());
        assert_eq!(owned.in_use(), [RunId::from("new".to_owned())].into());
    }
}
