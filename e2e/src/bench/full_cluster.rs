//! A cluster full of backups, as a year leaves it, for the bench of the agent; and its removal.
//!
//! No `StatefulSet` has pods, and only those that are to run have claims, for the agent backs up the existing claims
//! of what is scaled to zero. The standing snapshots are the API's objects in every detail, each bound to a content
//! that is ready; but their driver is one that nobody serves, so that no storage has to cut or to delete them.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt, stream};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{self, PersistentVolumeClaim};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::core::DynamicObject;
use kube::core::discovery::ApiResource;
use kube::{Api, ResourceExt};
use serde_json::json;
use sts_backup_api::backup::{RetentionPolicy, StatefulSetBackup, StatefulSetBackupSpec};
use sts_backup_api::names::{
    BACKUP_LABEL, BACKUP_NAMESPACE_LABEL, CLAIM_ANNOTATION, CLAIM_MANIFEST_ANNOTATION,
    CONSISTENCY_ANNOTATION, ORDINAL_ANNOTATION, REPLICAS_ANNOTATION, RUN_LABEL, SLOT_ANNOTATION,
    STATEFUL_SET_LABEL, TEMPLATE_ANNOTATION, TIME_ANNOTATION, VOLUMES_ANNOTATION, snapshot_name,
};
use sts_backup_api::run::{Consistency, RunId, Slot};
use sts_backup_api::snapshot::{VolumeSnapshot, VolumeSnapshotContent};

use crate::condition::{await_none, pvc_bound, statefulset_ready};
use crate::kit::claim::empty_claim;
use crate::kit::snapshot_controller::Outage;
use crate::kit::{Cluster, Namespace};

/// How many backups there are, each of a `StatefulSet` of its own with one claim.
pub(super) const BACKUPS: usize = 1000;

/// How many recovery points each has from before.
pub(super) const POINTS: usize = 5;

/// The first of them, and how many run together.
pub(super) const RUNS: usize = 200;

const NAMESPACES: usize = 50;

/// What the namespaces' names begin with.
const PREFIX: &str = "bench-agent-";

/// On the contents of the standing snapshots, which are not in a namespace.
const LABEL: (&str, &str) = ("e2e.sts-backup.io/bench", "agent");

/// The driver of the standing snapshots.
const NOBODYS_DRIVER: &str = "nobody.e2e.sts-backup.io";

/// The class of all snapshots.
pub(super) const CLASS: &str = "stsb-e2e";

/// What the snapshot-controller puts on a snapshot and on a content. They have it from the start, so that it finds
/// nothing to do.
const SNAPSHOT_FINALIZER: &str = "snapshot.storage.kubernetes.io/volumesnapshot-as-source-protection";
const CONTENT_FINALIZER: &str = "snapshot.storage.kubernetes.io/volumesnapshotcontent-bound-protection";

/// Requests at a time: a handful of connections that are warm.
const PARALLEL: usize = 32;

/// For controllers that are told of a thousand objects at once.
const CONTROLLERS_TIMEOUT: Duration = Duration::from_mins(2);

/// For runs to end that are under way.
const BACKUPS_TIMEOUT: Duration = Duration::from_mins(1);

/// The snapshot-controller is to let go of all snapshots, with 200 requests a second.
const NAMESPACES_TIMEOUT: Duration = Duration::from_mins(3);

/// All that was made.
pub(super) struct FullCluster {
    cluster: Cluster,
    namespaces: Vec<Namespace>,
}

impl FullCluster {
    /// Makes it, in a cluster without an agent; no backup is due before half a year is over.
    pub(super) async fn make(cluster: &Cluster, now: Timestamp) -> Result<Self> {
        // It would not understand a snapshot that is only half made.
        let outage = Outage::begin(cluster).await?;
        let fresh = async |number| Namespace::fresh(cluster, &namespace(number)).await;
        let namespaces = at_once((0..NAMESPACES).map(fresh)).await?;
        let fleet = Self { cluster: cluster.clone(), namespaces };

        at_once((0..RUNS).map(async |number| fleet.create_claim(number).await)).await?;
        at_once((0..BACKUPS).map(async |number| fleet.create_set(number).await)).await?;
        let claims: Api<PersistentVolumeClaim> = Api::all(cluster.client());
        let is_unbound = |claim: &PersistentVolumeClaim| is_ours(claim) && !pvc_bound(claim);
        await_none(&claims, "claims without a volume", CONTROLLERS_TIMEOUT, is_unbound).await?;

        let manifest = fleet.claim_manifest().await?;
        let points = (0..BACKUPS).flat_map(|number| (1..=POINTS).map(move |age| (number, age)));
        let points = points.map(async |(number, age)| fleet.create_point(number, age, &manifest, now).await);
        at_once(points).await?;
        let schedule = in_half_a_year(now)?;
        at_once((0..BACKUPS).map(async |number| fleet.create_backup(number, &schedule).await)).await?;
        outage.end().await?;

        let sets: Api<StatefulSet> = Api::all(cluster.client());
        let is_new = |set: &StatefulSet| is_ours(set) && !statefulset_ready(0)(set);
        await_none(&sets, "StatefulSets that their controller has not seen", CONTROLLERS_TIMEOUT, is_new)
            .await?;
        Ok(fleet)
    }

    /// Where the backup with that number is.
    pub(super) fn namespace(&self, number: usize) -> &Namespace {
        &self.namespaces[number % NAMESPACES]
    }

    /// Gives the backups that run together their schedule.
    pub(super) async fn schedule(&self, schedule: &str) -> Result<()> {
        let patch = Patch::Merge(json!({ "spec": { "schedule": schedule } }));
        let change = async |number| {
            let backups: Api<StatefulSetBackup> = self.namespace(number).api();
            let changed = backups.patch(&app(number), &PatchParams::default(), &patch).await;
            changed.with_context(|| format!("set the schedule of {}", app(number)))
        };
        at_once((0..RUNS).map(change)).await?;
        Ok(())
    }

    /// The first `count` backups, in the order of their numbers.
    pub(super) async fn backups(&self, count: usize) -> Result<Vec<StatefulSetBackup>> {
        let read = async |number| {
            let backups: Api<StatefulSetBackup> = self.namespace(number).api();
            backups.get(&app(number)).await.with_context(|| format!("read {}", app(number)))
        };
        at_once((0..count).map(read)).await
    }

    /// Waits until the first `count` backups are as wanted.
    pub(super) async fn await_backups(
        &self,
        count: usize,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&StatefulSetBackup) -> bool,
    ) -> Result<()> {
        let names: BTreeSet<String> = (0..count).map(app).collect();
        let backups: Api<StatefulSetBackup> = Api::all(self.cluster.client());
        let is_late = |backup: &StatefulSetBackup| {
            is_ours(backup) && names.contains(&backup.name_any()) && !wanted(backup)
        };
        await_none(&backups, &format!("backups that are not {what}"), timeout, is_late).await
    }

    async fn create_claim(&self, number: usize) -> Result<()> {
        let claims: Api<PersistentVolumeClaim> = self.namespace(number).api();
        let wanted = empty_claim(&claim(number), "stsb-e2e", "64Mi");
        let created = claims.create(&PostParams::default(), &wanted).await;
        created.with_context(|| format!("create the claim {}", claim(number)))?;
        Ok(())
    }

    async fn create_set(&self, number: usize) -> Result<()> {
        let name = app(number);
        let set = json!({
            "metadata": { "name": name },
            "spec": {
                "replicas": 0,
                "serviceName": name,
                "selector": { "matchLabels": { "app": name } },
                "template": {
                    "metadata": { "labels": { "app": name } },
                    "spec": {
                        "containers": [{
                            "name": "app",
                            "image": self.cluster.images().shell,
                            "volumeMounts": [{ "name": "data", "mountPath": "/data" }],
                        }],
                    },
                },
                "volumeClaimTemplates": [{
                    "metadata": { "name": "data" },
                    "spec": {
                        "accessModes": ["ReadWriteOnce"],
                        "storageClassName": "stsb-e2e",
                        "resources": { "requests": { "storage": "64Mi" } },
                    },
                }],
            },
        });
        let sets: Api<StatefulSet> = self.namespace(number).api();
        let created = sets.create(&PostParams::default(), &serde_json::from_value(set)?).await;
        created.with_context(|| format!("create the StatefulSet {name}"))?;
        Ok(())
    }

    /// A claim as the agent keeps it at a snapshot: one serves for all, as they are of one length.
    async fn claim_manifest(&self) -> Result<String> {
        let claims: Api<PersistentVolumeClaim> = self.namespace(0).api();
        let mut claim = claims.get(&claim(0)).await.context("read a claim")?;
        claim.metadata.managed_fields = None;
        Ok(serde_json::to_string(&claim)?)
    }

    async fn create_backup(&self, number: usize, schedule: &str) -> Result<()> {
        let mut spec = StatefulSetBackupSpec::new(&app(number));
        spec.schedule = Some(schedule.to_owned());
        // More than there will be: retention looks at every point, and none goes.
        let keep_last = i32::try_from(POINTS + 5).ok();
        spec.retention_policy = Some(RetentionPolicy { keep_last, ..RetentionPolicy::default() });
        spec.volume_snapshot_class_name = Some(CLASS.to_owned());
        let backups: Api<StatefulSetBackup> = self.namespace(number).api();
        let wanted = StatefulSetBackup::new(&app(number), spec);
        let created = backups.create(&PostParams::default(), &wanted).await;
        created.with_context(|| format!("create the StatefulSetBackup {}", app(number)))?;
        Ok(())
    }

    /// The recovery point of a run that many days ago, as agent, snapshot-controller and csi-snapshotter leave it.
    async fn create_point(
        &self,
        number: usize,
        days_ago: usize,
        manifest: &str,
        now: Timestamp,
    ) -> Result<()> {
        let (ns, set) = (self.namespace(number), app(number));
        let time = now - SignedDuration::from_hours(24 * i64::try_from(days_ago)?);
        let slot = Slot::schedule(time);
        let run = RunId::new(&set, &slot, time);
        let name = snapshot_name(&claim(number), &run);
        let snapshot = json!({
            "apiVersion": "snapshot.storage.k8s.io/v1",
            "kind": "VolumeSnapshot",
            "metadata": {
                "name": name,
                "finalizers": [SNAPSHOT_FINALIZER],
                "labels": {
                    BACKUP_LABEL: set,
                    BACKUP_NAMESPACE_LABEL: ns.name(),
                    STATEFUL_SET_LABEL: set,
                    RUN_LABEL: run,
                },
                "annotations": {
                    CLAIM_ANNOTATION: claim(number),
                    CLAIM_MANIFEST_ANNOTATION: manifest,
                    TEMPLATE_ANNOTATION: "data",
                    ORDINAL_ANNOTATION: "0",
                    SLOT_ANNOTATION: format!("{:?} {}", slot.due, slot.value),
                    TIME_ANNOTATION: time.to_string(),
                    CONSISTENCY_ANNOTATION: Consistency::CrashPerVolume.as_str(),
                    REPLICAS_ANNOTATION: "0",
                    VOLUMES_ANNOTATION: "1",
                },
            },
            "spec": {
                "source": { "persistentVolumeClaimName": claim(number) },
                "volumeSnapshotClassName": CLASS,
            },
        });
        let snapshots: Api<VolumeSnapshot> = ns.api();
        let created = snapshots.create(&PostParams::default(), &serde_json::from_value(snapshot)?).await;
        let created = created.with_context(|| format!("create the VolumeSnapshot {name}"))?;

        let content = self.create_content(&created, time).await?;
        let status = json!({
            "boundVolumeSnapshotContentName": content,
            "creationTime": Time(time),
            "readyToUse": true,
            "restoreSize": "64Mi",
        });
        let status = Patch::Merge(json!({ "status": status }));
        let written = snapshots.patch_status(&name, &PatchParams::default(), &status).await;
        written.with_context(|| format!("write the status of the VolumeSnapshot {name}"))?;
        Ok(())
    }

    /// The storage's side of a standing snapshot; returns its name, which the snapshot-controller knows it by.
    async fn create_content(&self, snapshot: &VolumeSnapshot, time: Timestamp) -> Result<String> {
        let uid = snapshot.uid().context("an object of the API server has a uid")?;
        let name = format!("snapcontent-{uid}");
        let (key, value) = LABEL;
        let content = json!({
            "apiVersion": "snapshot.storage.k8s.io/v1",
            "kind": "VolumeSnapshotContent",
            "metadata": { "name": name, "labels": { key: value }, "finalizers": [CONTENT_FINALIZER] },
            "spec": {
                "deletionPolicy": "Retain",
                "driver": NOBODYS_DRIVER,
                "source": { "volumeHandle": "nobodys-volume" },
                "sourceVolumeMode": "Filesystem",
                "volumeSnapshotClassName": CLASS,
                "volumeSnapshotRef": {
                    "apiVersion": "snapshot.storage.k8s.io/v1",
                    "kind": "VolumeSnapshot",
                    "name": snapshot.name_any(),
                    "namespace": snapshot.namespace(),
                    "uid": uid,
                },
            },
        });
        let status = json!({
            "creationTime": i64::try_from(time.as_nanosecond())?,
            "readyToUse": true,
            "restoreSize": 64 << 20,
            "snapshotHandle": format!("nobodys-{uid}"),
        });
        // Not by our type of it, which leaves out the source.
        let kind = ApiResource::erase::<VolumeSnapshotContent>(&());
        let contents: Api<DynamicObject> = Api::all_with(self.cluster.client(), &kind);
        let created = contents.create(&PostParams::default(), &serde_json::from_value(content)?).await;
        created.with_context(|| format!("create the VolumeSnapshotContent {name}"))?;
        let status = Patch::Merge(json!({ "status": status }));
        let written = contents.patch_status(&name, &PatchParams::default(), &status).await;
        written.with_context(|| format!("write the status of the VolumeSnapshotContent {name}"))?;
        Ok(name)
    }
}

/// Removes what this bench has made, or an earlier one that was killed, from a cluster with an agent.
pub(super) async fn clear(cluster: &Cluster) -> Result<()> {
    // First, so that the agent does not look at each of them again for every snapshot that goes.
    let backups: Api<StatefulSetBackup> = Api::all(cluster.client());
    let everything = ListParams::default();
    let delete_backups = async |number| {
        let backups: Api<StatefulSetBackup> = Api::namespaced(cluster.client(), &namespace(number));
        let deleted = backups.delete_collection(&DeleteParams::default(), &everything).await;
        deleted.map(drop).with_context(|| format!("delete the backups in {}", namespace(number)))
    };
    at_once((0..NAMESPACES).map(delete_backups)).await?;
    await_none(&backups, "backups of the bench", BACKUPS_TIMEOUT, is_ours).await?;

    let namespaces: Api<v1::Namespace> = Api::all(cluster.client());
    at_once((0..NAMESPACES).map(async |number| delete(&namespaces, &namespace(number)).await)).await?;
    let is_one = |namespace: &v1::Namespace| namespace.name_any().starts_with(PREFIX);
    await_none(&namespaces, "namespaces of the bench", NAMESPACES_TIMEOUT, is_one).await?;

    let contents: Api<VolumeSnapshotContent> = Api::all(cluster.client());
    let (key, value) = LABEL;
    let ours = ListParams::default().labels(&format!("{key}={value}"));
    let left = contents.list_metadata(&ours).await.context("list the contents of the bench")?;
    // No csi-snapshotter serves their driver, and would let go of them.
    let free = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
    let remove = async |name: String| {
        delete(&contents, &name).await?;
        let freed = contents.patch_metadata(&name, &PatchParams::default(), &free).await;
        unless_gone(freed).with_context(|| format!("remove the finalizer of {name}"))
    };
    at_once(left.iter().map(ResourceExt::name_any).map(remove)).await?;
    Ok(())
}

/// Deletes an object, which may be gone or on its way already.
pub(super) async fn delete<K>(api: &Api<K>, name: &str) -> Result<()>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let deleted = api.delete(name, &DeleteParams::default()).await;
    unless_gone(deleted).with_context(|| format!("delete {name}"))
}

fn unless_gone<T>(answer: kube::Result<T>) -> kube::Result<()> {
    match answer {
        // 409: a namespace that is being deleted.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        other => other.map(drop),
    }
}

/// Carries out many requests, some at a time; the answers are in the order of the requests.
pub(super) async fn at_once<T>(
    requests: impl Iterator<Item = impl Future<Output = Result<T>>>,
) -> Result<Vec<T>> {
    stream::iter(requests).buffered(PARALLEL).try_collect().await
}

/// The names of a `StatefulSet` and its backup; no two namespaces have the same.
pub(super) fn app(number: usize) -> String {
    format!("app-{number}")
}

/// Its only claim.
pub(super) fn claim(number: usize) -> String {
    format!("data-{}-0", app(number))
}

fn namespace(number: usize) -> String {
    format!("{PREFIX}{number}")
}

fn is_ours<K: ResourceExt>(object: &K) -> bool {
    object.namespace().is_some_and(|namespace| namespace.starts_with(PREFIX))
}

/// A schedule that has no time in the months before and after now.
fn in_half_a_year(now: Timestamp) -> Result<String> {
    let month: i8 = now.strftime("%m").to_string().parse()?;
    Ok(format!("0 0 1 {} *", (month + 5) % 12 + 1))
}
