//! A namespace per test: made before it, explained when it fails, always removed after it.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures::FutureExt;
use futures::future::join_all;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{self, PersistentVolume, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;
use sts_backup_api::names::RESTORE_LABEL;
use sts_backup_api::snapshot::VolumeSnapshotContent;

use super::Cluster;
use super::backend::backend_handles;
use super::local_agent::log_dir;
use super::report::print_state;
use crate::condition::{await_condition, await_deleted, await_none};
use crate::harness::cache::remove_dir;

/// On every namespace of a test, so that what a killed test run left behind can be found and removed.
const TEST_NAMESPACE_LABEL: (&str, &str) = ("app.kubernetes.io/managed-by", "sts-backup-e2e");

/// Set to `1` to keep the namespaces of tests, to look at them.
const KEEP_VARIABLE: &str = "E2E_KEEP";

/// No test takes this long unless it hangs, and then its state must still be printed.
const TEST_DEADLINE: Duration = Duration::from_mins(15);

/// An API server that is down must not keep a failed test from ending.
const REPORT_TIMEOUT: Duration = Duration::from_secs(30);

/// Covers detaching and deleting a few volumes and snapshots on a busy machine.
const REMOVAL_TIMEOUT: Duration = Duration::from_mins(2);

/// Before a request is repeated that the API server did not answer.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// The namespace of one test. It is named like nothing else in the cluster.
#[derive(Clone)]
pub struct Namespace {
    cluster: Cluster,
    object: v1::Namespace,
    name: String,
}

impl Namespace {
    /// Its unique name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cluster it is in.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The objects of one kind in it.
    #[must_use]
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.cluster.client(), &self.name)
    }

    /// Sets an annotation of it, or removes it.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn annotate(&self, annotation: &str, value: Option<&str>) -> Result<()> {
        let namespaces: Api<v1::Namespace> = Api::all(self.cluster.client());
        let patch = Patch::Merge(json!({ "metadata": { "annotations": { annotation: value } } }));
        let patched = namespaces.patch(&self.name, &PatchParams::default(), &patch).await;
        patched.with_context(|| format!("annotate the namespace {}", self.name))?;
        Ok(())
    }

    /// Makes the namespace own a cluster-scoped object: the garbage collector removes the object with the
    /// namespace, even when the test was killed.
    ///
    /// # Errors
    /// Never for a namespace that the API server made.
    pub(super) fn owner_reference(&self) -> Result<OwnerReference> {
        self.object.owner_ref(&()).context("a namespace of the API server has a name and a uid")
    }

    /// A namespace of exactly that name, new: one that exists is removed with all that is in it.
    ///
    /// # Errors
    /// When the old one does not go in time, or the new one cannot be made.
    pub async fn fresh(cluster: &Cluster, name: &str) -> Result<Self> {
        let namespaces: Api<v1::Namespace> = Api::all(cluster.client());
        if let Some(old) = namespaces.get_opt(name).await? {
            namespaces.delete(name, &DeleteParams::default()).await?;
            await_deleted(&namespaces, &old, REMOVAL_TIMEOUT).await?;
        }
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        let wanted = v1::Namespace { metadata, ..v1::Namespace::default() };
        let object = namespaces.create(&PostParams::default(), &wanted).await?;
        let ns = Self { cluster: cluster.clone(), object, name: name.to_owned() };
        ns.await_account().await?;
        Ok(ns)
    }

    /// Waits for the service account, without which the API server refuses every pod.
    async fn await_account(&self) -> Result<()> {
        let accounts: Api<ServiceAccount> = self.api();
        await_condition(&accounts, "default", "created", Duration::from_secs(30), |_| true).await?;
        Ok(())
    }

    async fn create(cluster: &Cluster, prefix: &str) -> Result<Self> {
        let (key, value) = TEST_NAMESPACE_LABEL;
        let wanted = v1::Namespace {
            metadata: ObjectMeta {
                generate_name: Some(format!("{prefix}-")),
                labels: Some([(key.to_owned(), value.to_owned())].into()),
                ..ObjectMeta::default()
            },
            ..v1::Namespace::default()
        };
        let namespaces: Api<v1::Namespace> = Api::all(cluster.client());
        let object = namespaces
            .create(&PostParams::default(), &wanted)
            .await
            .with_context(|| format!("create the namespace {prefix}-* in {}", cluster.name()))?;
        let name = object.name_any();
        Ok(Self { cluster: cluster.clone(), object, name })
    }

    /// Removes the namespace and makes sure that its volumes and snapshots have left the storage, so that the
    /// next test starts from nothing. What a test chose to `Retain` stays.
    async fn remove(&self) -> Result<()> {
        let client = self.cluster.client();
        let volumes: Api<PersistentVolume> = Api::all(client.clone());
        let contents: Api<VolumeSnapshotContent> = Api::all(client);
        let everything = ListParams::default();
        let (listed_volumes, listed_contents) = until_answered("list volumes and snapshots", async || {
            tokio::try_join!(volumes.list(&everything), contents.list(&everything))
        })
        .await?;
        let listed_volumes = listed_volumes.into_iter().filter(|volume| self.deletes_volume(volume));
        let listed_contents = listed_contents.into_iter().filter(|content| self.deletes_content(content));
        let handles: BTreeSet<String> = listed_volumes
            .filter_map(|volume| Some(volume.spec?.csi?.volume_handle))
            .chain(listed_contents.filter_map(|content| content.status?.snapshot_handle))
            .collect();

        let namespaces: Api<v1::Namespace> = Api::all(self.cluster.client());
        until_answered("delete the namespace", async || {
            match namespaces.delete(&self.name, &DeleteParams::default()).await {
                // Gone, or already being deleted by a request whose answer was lost.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
                other => other.map(drop),
            }
        })
        .await?;
        await_deleted(&namespaces, &self.object, REMOVAL_TIMEOUT).await?;
        await_none(&volumes, "volumes of the namespace", REMOVAL_TIMEOUT, |volume| {
            self.deletes_volume(volume)
        })
        .await?;
        await_none(&contents, "snapshot contents of the namespace", REMOVAL_TIMEOUT, |content| {
            self.deletes_content(content)
        })
        .await?;

        self.remove_kept_volumes(&volumes).await?;
        if handles.is_empty() {
            return Ok(());
        }
        // The sidecars delete from the storage before they let go of the objects: one look is enough.
        let held = backend_handles(&self.cluster).await?;
        let left: Vec<&String> = handles.intersection(&held).collect();
        ensure!(left.is_empty(), "the test driver still holds {left:?}");
        Ok(())
    }

    /// Removes the volumes that restores have kept for a rollback window which is longer than the test, or had in hand
    /// when it ended.
    async fn remove_kept_volumes(&self, volumes: &Api<PersistentVolume>) -> Result<()> {
        let is_kept = |volume: &PersistentVolume| {
            self.is_volume_of(volume) && volume.labels().contains_key(RESTORE_LABEL)
        };
        for volume in volumes.list(&ListParams::default()).await?.into_iter().filter(is_kept) {
            // One that is reserved for a claim that does not come, and has no uid of it, would never go.
            let uid = volume.spec.and_then(|spec| spec.claim_ref?.uid).unwrap_or_else(|| "gone".to_owned());
            let goes = json!({
                "spec": { "persistentVolumeReclaimPolicy": "Delete", "claimRef": { "uid": uid } },
            });
            let name = volume.metadata.name.unwrap_or_default();
            match volumes.patch(&name, &PatchParams::default(), &Patch::Merge(goes)).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                other => drop(other.with_context(|| format!("let go of the volume {name}"))?),
            }
        }
        await_none(volumes, "volumes that a restore kept", REMOVAL_TIMEOUT, is_kept).await
    }

    /// Whether the volume is of a claim of this namespace, or was.
    fn is_volume_of(&self, volume: &PersistentVolume) -> bool {
        let claim = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
        claim.and_then(|claim| claim.namespace.as_ref()) == Some(&self.name)
    }

    /// Whether the volume is of this namespace and is to go with it.
    fn deletes_volume(&self, volume: &PersistentVolume) -> bool {
        let policy = volume.spec.as_ref().and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref());
        // A volume that a restore has kept and lets go of meanwhile goes by the rules of that.
        policy == Some("Delete") && self.is_volume_of(volume) && !volume.labels().contains_key(RESTORE_LABEL)
    }

    /// Whether the content is of this namespace and is to go with it.
    fn deletes_content(&self, content: &VolumeSnapshotContent) -> bool {
        content.spec.deletion_policy == "Delete"
            && content.spec.volume_snapshot_ref.namespace.as_ref() == Some(&self.name)
    }
}

/// Repeats a request until the API server answers it, for a test may restart the API server.
async fn until_answered<T>(what: &str, request: impl AsyncFn() -> kube::Result<T>) -> Result<T> {
    let mut last_error = None;
    let answered = async {
        loop {
            match request().await {
                Ok(answer) => return answer,
                Err(err) => last_error = Some(err),
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    };
    let answered = tokio::time::timeout(REMOVAL_TIMEOUT, answered).await;
    answered.map_err(|elapsed| {
        let cause = last_error.map_or_else(|| elapsed.into(), anyhow::Error::new);
        cause.context(format!("{what}: no answer within {REMOVAL_TIMEOUT:?}"))
    })
}

/// Runs a test in a namespace of its own: [`with_temp_namespaces`] for one cluster.
///
/// # Errors
/// As [`with_temp_namespaces`].
///
/// # Panics
/// As [`with_temp_namespaces`].
pub async fn with_temp_namespace(
    cluster: &Cluster,
    prefix: &str,
    test: impl AsyncFnOnce(&Namespace) -> Result<()>,
) -> Result<()> {
    with_temp_namespaces(&[cluster], prefix, async |namespaces| test(&namespaces[0]).await).await
}

/// Runs a test in a namespace of its own in each of some clusters, in their order. Each is named `<prefix>-`
/// and a few random characters.
///
/// Whether the test succeeds, fails, panics or hangs, the namespaces are removed with everything in them;
/// before that, the state of a failed test is printed. With `E2E_KEEP=1` the namespaces stay.
///
/// # Errors
/// The test's own error, or that it ran into its deadline of 15 minutes, or that a namespace could not be made
/// or removed.
///
/// # Panics
/// When the test panics, after the removal.
pub async fn with_temp_namespaces(
    clusters: &[&Cluster],
    prefix: &str,
    test: impl AsyncFnOnce(&[Namespace]) -> Result<()>,
) -> Result<()> {
    let mut namespaces = Vec::new();
    let run = Box::pin(async {
        for cluster in clusters {
            let ns = Namespace::create(cluster, prefix).await?;
            namespaces.push(ns.clone());
            ns.await_account().await?;
        }
        match tokio::time::timeout(TEST_DEADLINE, test(&namespaces)).await {
            Ok(result) => result,
            Err(_elapsed) => bail!("the test did not end within {TEST_DEADLINE:?}"),
        }
    });
    let outcome = AssertUnwindSafe(run).catch_unwind().await;

    let failed = !matches!(outcome, Ok(Ok(())));
    for ns in namespaces.iter().filter(|_| failed) {
        if tokio::time::timeout(REPORT_TIMEOUT, print_state(ns)).await.is_err() {
            eprintln!("the API server of {} did not answer", ns.cluster.name());
        }
    }
    for ns in namespaces.iter().filter(|_| !failed) {
        remove_dir(&log_dir(&ns.cluster, &ns.name)?)?;
    }
    let mut removed = Ok(());
    for (ns, result) in namespaces.iter().zip(join_all(namespaces.iter().map(remove_or_keep)).await) {
        let result = result
            .with_context(|| format!("the namespace {} in {} was not removed", ns.name, ns.cluster.name()));
        if let (true, Err(err)) = (failed || removed.is_err(), &result) {
            eprintln!("{err:#}");
        }
        removed = removed.and(result);
    }
    outcome.unwrap_or_else(|panic| resume_unwind(panic)).and(removed)
}

async fn remove_or_keep(ns: &Namespace) -> Result<()> {
    if std::env::var_os(KEEP_VARIABLE).is_some_and(|keep| keep == "1") {
        eprintln!("kept the namespace {} in {} ({KEEP_VARIABLE}=1)", ns.name, ns.cluster.name());
        return Ok(());
    }
    ns.remove().await
}
