//! Reads the cluster into plain facts about one backup: the only room that asks the API server questions.
//!
//! It judges nothing. What a step does not need is not read.

use std::collections::BTreeMap;

use futures::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::ListParams;
use kube::core::Selector;
use kube::{Api, Client, ResourceExt};
use sts_backup_api::backup::{StatefulSetBackup, StatefulSetBackupSpec, StatefulSetBackupStatus};
use sts_backup_api::names::{
    ALLOW_BACKUP_FROM_ANNOTATION, BACKUP_LABEL, BACKUP_NAMESPACE_LABEL, CLAIM_MANIFEST_ANNOTATION,
    REQUESTED_AT_ANNOTATION, RUN_FINALIZER, RUN_LABEL, STATEFUL_SET_LABEL,
};
use sts_backup_api::run::{RunId, RunStep};
use sts_backup_api::snapshot::{DEFAULT_CLASS_ANNOTATION, VolumeSnapshot, VolumeSnapshotClass};
use sts_backup_service::clock;

use crate::error::{Error, Result};

/// How many volumes are read at once.
const PARALLEL_READS: usize = 16;

/// All that is known of one backup at one moment.
#[derive(Clone, Debug)]
pub(super) struct BackupFacts {
    pub(super) namespace: String,
    pub(super) uid: String,
    pub(super) generation: Option<i64>,
    pub(super) created: Timestamp,
    /// The object is being deleted.
    pub(super) deleting: bool,
    /// Our finalizer holds it.
    pub(super) has_finalizer: bool,
    /// The annotation that asks for a run.
    pub(super) request: Option<String>,
    pub(super) spec: StatefulSetBackupSpec,
    pub(super) status: StatefulSetBackupStatus,
    /// This process runs the frozen section of the current run.
    pub(super) in_section: bool,
    pub(super) target: Target,
    /// Another backup or a restore that has the same `StatefulSet` in hand.
    pub(super) busy_with: Option<String>,
    /// The snapshots of all runs of this backup; none where they were not looked at.
    pub(super) snapshots: Option<Vec<VolumeSnapshot>>,
}

impl BackupFacts {
    /// The snapshots that a run took, by name.
    pub(super) fn snapshots_of(&self, run: &RunId) -> BTreeMap<&str, &VolumeSnapshot> {
        let mut of_run = BTreeMap::new();
        for snapshot in self.snapshots.iter().flatten() {
            if snapshot.labels().get(RUN_LABEL).map(String::as_str) == Some(run.as_str())
                && let Some(name) = &snapshot.metadata.name
            {
                of_run.insert(name.as_str(), snapshot);
            }
        }
        of_run
    }

    /// The namespace of the `StatefulSet`, and so of its claims and their snapshots.
    pub(super) fn target_namespace(&self) -> &str {
        self.spec.stateful_set_ref.namespace_or(&self.namespace)
    }

    /// `namespace/name` of the `StatefulSet`, for messages.
    pub(super) fn target_name(&self) -> String {
        format!("{}/{}", self.target_namespace(), self.spec.stateful_set_ref.name)
    }
}

/// The `StatefulSet`, as far as it was looked at.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// It was not looked at.
    Unread,
    /// It is in another namespace, which does not let this one in.
    NotGranted,
    /// It does not exist.
    Missing,
    /// It exists.
    Exists,
    /// It was read with all that a run needs to know.
    Read(Box<TargetFacts>),
}

/// What a run needs to know of a `StatefulSet`.
#[derive(Clone, Debug)]
pub(crate) struct TargetFacts {
    pub(super) replicas: i32,
    /// The ordinal of the first replica.
    pub(super) start: i32,
    /// Whether its controller has nothing left to do: all replicas are ready, at the newest revision.
    pub(super) settled: bool,
    /// The names of its claim templates.
    pub(super) templates: Vec<String>,
    /// Its pods by ordinal.
    pub(super) pods: BTreeMap<i32, Pod>,
    /// Claims of its templates by name, also those of ordinals that do not run.
    pub(super) claims: BTreeMap<String, ClaimFacts>,
    /// All snapshot classes.
    pub(super) classes: Vec<ClassFacts>,
}

/// A claim.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ClaimFacts {
    pub(super) template: String,
    pub(super) ordinal: i32,
    pub(super) bound: bool,
    pub(super) deleting: bool,
    /// The CSI driver of its volume; none: another kind of volume.
    pub(super) driver: Option<String>,
}

/// A snapshot class.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ClassFacts {
    pub(super) name: String,
    pub(super) driver: String,
    /// It is marked as the default of its driver.
    pub(super) is_default: bool,
}

/// Reads what the next decision about `backup` needs; what this process alone knows comes with the call.
pub(super) async fn observe(
    client: &Client,
    backup: &StatefulSetBackup,
    in_section: bool,
    busy_with: Option<String>,
) -> Result<BackupFacts> {
    let namespace = backup.namespace().expect("a StatefulSetBackup is namespaced");
    let spec = backup.spec.clone();
    let status = backup.status.clone().unwrap_or_default();
    let deleting = backup.metadata.deletion_timestamp.is_some();
    let step = status.current_run.as_ref().map(|run| run.step);
    let home = spec.stateful_set_ref.namespace_or(&namespace);

    let set = &spec.stateful_set_ref.name;
    let target = async {
        let is_granted = async || Ok(home == namespace || is_granted(client, home, &namespace).await?);
        match step {
            _ if deleting || in_section => Ok(Target::Unread),
            None | Some(RunStep::Preflight | RunStep::Frozen) if !is_granted().await? => {
                Ok(Target::NotGranted)
            }
            None => find_target(client, home, set).await,
            Some(RunStep::Preflight) => read_target(client, home, set).await,
            Some(RunStep::Frozen | RunStep::Thawing | RunStep::Readying | RunStep::CleaningUp) => {
                Ok(Target::Unread)
            }
        }
    };
    let snapshots = async {
        match step {
            // Nothing else may come between a frozen pod and its thaw.
            Some(RunStep::Frozen | RunStep::Thawing) => Ok(None),
            // A run that is due is not to be later for it; the look after that has the next time.
            None if status.next_schedule_time.as_ref().is_some_and(|next| next.0 <= clock::now()) => Ok(None),
            None | Some(RunStep::Preflight | RunStep::Readying | RunStep::CleaningUp) => {
                list_snapshots(client, home, (&namespace, &backup.name_any()), set).await.map(Some)
            }
        }
    };
    let (target, snapshots) = tokio::try_join!(target, snapshots)?;
    // What is in a namespace that does not let us in is not shown, and not touched.
    let snapshots = snapshots.filter(|_| !matches!(target, Target::NotGranted));
    Ok(BackupFacts {
        uid: backup.uid().unwrap_or_default(),
        generation: backup.metadata.generation,
        created: backup.creation_timestamp().map(|time| time.0).unwrap_or_default(),
        deleting,
        has_finalizer: backup.finalizers().iter().any(|finalizer| finalizer == RUN_FINALIZER),
        request: backup.annotations().get(REQUESTED_AT_ANNOTATION).cloned(),
        spec,
        status,
        in_section,
        target,
        busy_with,
        snapshots,
        namespace,
    })
}

/// Whether a namespace lets the backups of another one in.
pub(crate) async fn is_granted(client: &Client, namespace: &str, to: &str) -> Result<bool> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let found = namespaces.get_metadata_opt(namespace).await.map_err(Error::request("get the Namespace"))?;
    Ok(found.is_some_and(|found| is_granted_by(&found, to)))
}

/// Whether a namespace's annotation names another one.
pub(crate) fn is_granted_by<K: ResourceExt>(namespace: &K, to: &str) -> bool {
    lets_in(namespace, ALLOW_BACKUP_FROM_ANNOTATION, to)
}

/// Whether that annotation of a namespace names another one.
pub(crate) fn lets_in<K: ResourceExt>(namespace: &K, annotation: &str, other: &str) -> bool {
    let granted = namespace.annotations().get(annotation);
    granted.is_some_and(|granted| granted.split(',').any(|granted| granted.trim() == other))
}

/// The snapshots in a namespace that carry the labels of a backup, which may be of another one. A backup that had the same
/// name may have been of another `StatefulSet`.
async fn list_snapshots(
    client: &Client,
    namespace: &str,
    (backup_namespace, backup): (&str, &str),
    set: &str,
) -> Result<Vec<VolumeSnapshot>> {
    let selector = format!(
        "{BACKUP_LABEL}={backup},{BACKUP_NAMESPACE_LABEL}={backup_namespace},{STATEFUL_SET_LABEL}={set},{RUN_LABEL}"
    );
    let snapshots: Api<VolumeSnapshot> = Api::namespaced(client.clone(), namespace);
    let listed = snapshots.list(&ListParams::default().labels(&selector)).await;
    let mut listed = listed.map_err(Error::request("list the VolumeSnapshots"))?.items;
    for snapshot in &mut listed {
        // They are most of it, and nobody here reads them.
        snapshot.annotations_mut().remove(CLAIM_MANIFEST_ANNOTATION);
        snapshot.metadata.managed_fields = None;
    }
    Ok(listed)
}

async fn find_target(client: &Client, namespace: &str, name: &str) -> Result<Target> {
    let sets: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
    let found = sets.get_metadata_opt(name).await.map_err(Error::request("get the StatefulSet"))?;
    Ok(if found.is_some() { Target::Exists } else { Target::Missing })
}

/// Reads the `StatefulSet` with all that a run of it needs to know.
pub(crate) async fn read_target(client: &Client, namespace: &str, name: &str) -> Result<Target> {
    let sets: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
    let classes: Api<VolumeSnapshotClass> = Api::all(client.clone());

    let Some(set) = sets.get_opt(name).await.map_err(Error::request("get the StatefulSet"))? else {
        return Ok(Target::Missing);
    };
    let everything = ListParams::default();
    let of_selector = selected_by(&set);
    let pods = async { pods.list(&of_selector).await.map_err(Error::request("list the Pods")) };
    let claims =
        async { claims.list(&everything).await.map_err(Error::request("list the PersistentVolumeClaims")) };
    let classes =
        async { classes.list(&everything).await.map_err(Error::request("list the VolumeSnapshotClasses")) };
    let (pods, claims, classes) = tokio::try_join!(pods, claims, classes)?;

    let templates: Vec<String> = set
        .spec
        .iter()
        .flat_map(|spec| spec.volume_claim_templates.iter().flatten())
        .map(ResourceExt::name_any)
        .collect();
    let of_set = claims.into_iter().filter_map(|claim| {
        let claim_name = claim.metadata.name.clone()?;
        let (template, ordinal) = templates.iter().find_map(|template| {
            Some((template.clone(), ordinal_of(&claim_name, &format!("{template}-{name}"))?))
        })?;
        Some(async move {
            let facts = claim_facts(client, claim, template, ordinal).await?;
            Ok::<_, Error>((claim_name, facts))
        })
    });
    let claims = stream::iter(of_set).buffer_unordered(PARALLEL_READS).try_collect().await?;

    let uid = set.uid();
    let owned = |pod: &Pod| {
        pod.owner_references()
            .iter()
            .any(|owner| owner.controller == Some(true) && Some(&owner.uid) == uid.as_ref())
    };
    let pods =
        pods.into_iter().filter(owned).filter_map(|pod| Some((ordinal_of(&pod.name_any(), name)?, pod)));
    let pods: BTreeMap<i32, Pod> = pods.collect();
    // The status of the set lags behind a pod that was just deleted.
    let is_ending = |pod: &Pod| pod.metadata.deletion_timestamp.is_some();
    let settled = is_settled(&set) && !pods.values().any(is_ending);
    let classes = classes.into_iter().map(|class| ClassFacts {
        is_default: class.annotations().get(DEFAULT_CLASS_ANNOTATION).is_some_and(|value| value == "true"),
        name: class.name_any(),
        driver: class.driver,
    });
    let spec = set.spec.as_ref();
    Ok(Target::Read(Box::new(TargetFacts {
        replicas: spec.and_then(|spec| spec.replicas).unwrap_or(1),
        start: spec.and_then(|spec| spec.ordinals.as_ref()?.start).unwrap_or(0),
        settled,
        templates,
        pods,
        claims,
        classes: classes.collect(),
    })))
}

/// What lists the pods of a `StatefulSet`, and perhaps some that are not its own.
fn selected_by(set: &StatefulSet) -> ListParams {
    let selector = set.spec.as_ref().and_then(|spec| Selector::try_from(spec.selector.clone()).ok());
    selector.map_or_else(ListParams::default, |selector| ListParams::default().labels_from(&selector))
}

/// The number after `<stem>-` in the name of a pod or claim of a `StatefulSet`.
pub(crate) fn ordinal_of(name: &str, stem: &str) -> Option<i32> {
    let digits = name.strip_prefix(stem)?.strip_prefix('-')?;
    // Another set's claim may start alike: `data-db-x-0` is none of `db`.
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

fn is_settled(set: &StatefulSet) -> bool {
    let (Some(spec), Some(status)) = (&set.spec, &set.status) else { return false };
    let replicas = spec.replicas.unwrap_or(1);
    status.observed_generation == set.metadata.generation
        && status.replicas == replicas
        && status.ready_replicas.unwrap_or(0) == replicas
        && status.current_revision == status.update_revision
}

async fn claim_facts(
    client: &Client,
    claim: PersistentVolumeClaim,
    template: String,
    ordinal: i32,
) -> Result<ClaimFacts> {
    let bound = claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
    let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).filter(|_| bound);
    let driver = match volume {
        Some(volume) => {
            let volumes: Api<PersistentVolume> = Api::all(client.clone());
            let found = volumes.get_opt(&volume).await.map_err(Error::request("get the PersistentVolume"))?;
            found.and_then(|volume| Some(volume.spec?.csi?.driver))
        }
        None => None,
    };
    Ok(ClaimFacts { template, ordinal, bound, deleting: claim.metadata.deletion_timestamp.is_some(), driver })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_claims_and_pods_of_the_set_itself_have_an_ordinal() {
        for (name, ordinal) in [
            ("data-db-0", Some(0)),
            ("data-db-12", Some(12)),
            ("data-db-x-0", None),
            ("data-db", None),
            ("data-db-", None),
            ("data-db-+1", None),
            ("data-db2-0", None),
        ] {
            assert_eq!(ordinal_of(name, "data-db"), ordinal, "{name}");
        }
    }
}
