//! A namespace per test: made before it, explained when it fails, always removed after it.

use std::panic::{AssertUnwindSafe, resume_unwind};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::FutureExt;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{self, PersistentVolume, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use sts_backup_api::snapshot::VolumeSnapshotContent;

use super::Cluster;
use super::condition::{await_condition, await_deleted, await_none};
use super::report::print_state;

/// On every namespace of a test, so that what a killed test run left behind can be found and removed.
pub const TEST_NAMESPACE_LABEL: (&str, &str) = ("app.kubernetes.io/managed-by", "sts-backup-e2e");

/// Set to `1` to keep the namespaces of tests, to look at them.
const KEEP_VARIABLE: &str = "STSB_E2E_KEEP";

/// No test takes this long unless it hangs, and then its state must still be printed.
const TEST_DEADLINE: Duration = Duration::from_mins(5);

/// An API server that is down must not keep a failed test from ending.
const REPORT_TIMEOUT: Duration = Duration::from_secs(30);

/// Covers detaching and deleting a few volumes and snapshots on a busy machine.
const REMOVAL_TIMEOUT: Duration = Duration::from_mins(2);

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

    /// Makes the namespace own a cluster-scoped object: the garbage collector removes the object with the
    /// namespace, even when the test was killed.
    ///
    /// # Errors
    /// Never for a namespace that the API server made.
    pub fn owner_reference(&self) -> Result<OwnerReference> {
        self.object.owner_ref(&()).context("a namespace of the API server has a name and a uid")
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

    /// Removes the namespace and waits until its volumes and snapshots have left the storage, so that the next
    /// test starts from nothing. What a test chose to `Retain` stays.
    async fn remove(&self) -> Result<()> {
        let name = &self.name;
        let client = self.cluster.client();
        let namespaces: Api<v1::Namespace> = Api::all(client.clone());
        namespaces
            .delete(name, &DeleteParams::default())
            .await
            .with_context(|| format!("delete the namespace {name}"))?;
        await_deleted(&namespaces, &self.object, REMOVAL_TIMEOUT).await?;

        let volumes: Api<PersistentVolume> = Api::all(client.clone());
        await_none(&volumes, "volumes of the namespace", REMOVAL_TIMEOUT, |volume| {
            volume.spec.as_ref().is_some_and(|spec| {
                spec.persistent_volume_reclaim_policy.as_deref() == Some("Delete")
                    && spec.claim_ref.as_ref().and_then(|claim| claim.namespace.as_ref()) == Some(name)
            })
        })
        .await?;

        let contents: Api<VolumeSnapshotContent> = Api::all(client);
        await_none(&contents, "snapshot contents of the namespace", REMOVAL_TIMEOUT, |content| {
            content.spec.deletion_policy == "Delete"
                && content.spec.volume_snapshot_ref.namespace.as_ref() == Some(name)
        })
        .await
    }
}

/// Runs a test in a namespace of its own, named `<prefix>-` and a few random characters.
///
/// Whether the test succeeds, fails, panics or hangs, the namespace is removed with everything in it; before
/// that, the state of a failed test is printed. With `STSB_E2E_KEEP=1` the namespace stays.
///
/// # Errors
/// The test's own error, or that it ran into its deadline of five minutes, or that the namespace could not be
/// made or removed.
///
/// # Panics
/// When the test panics, after the removal.
pub async fn with_temp_namespace(
    cluster: &Cluster,
    prefix: &str,
    test: impl AsyncFnOnce(&Namespace) -> Result<()>,
) -> Result<()> {
    let ns = Namespace::create(cluster, prefix).await?;
    let run = Box::pin(async {
        // Until it exists the API server refuses every pod of the namespace.
        let accounts: Api<ServiceAccount> = ns.api();
        await_condition(&accounts, "default", "created", Duration::from_secs(30), |_| true).await?;
        match tokio::time::timeout(TEST_DEADLINE, test(&ns)).await {
            Ok(result) => result,
            Err(_elapsed) => bail!("the test did not end within {TEST_DEADLINE:?}"),
        }
    });
    let outcome = AssertUnwindSafe(run).catch_unwind().await;

    let failed = !matches!(outcome, Ok(Ok(())));
    if failed {
        let printed = tokio::time::timeout(REPORT_TIMEOUT, print_state(&ns)).await;
        if printed.is_err() {
            eprintln!("the API server of {} did not answer", cluster.name());
        }
    }
    let removed = if std::env::var_os(KEEP_VARIABLE).is_some_and(|keep| keep == "1") {
        eprintln!("kept the namespace {} in {} ({KEEP_VARIABLE}=1)", ns.name, cluster.name());
        Ok(())
    } else {
        ns.remove().await
    };
    if let (true, Err(err)) = (failed, &removed) {
        eprintln!("the namespace {} was not removed: {err:#}", ns.name);
    }
    outcome.unwrap_or_else(|panic| resume_unwind(panic)).and(removed)
}
