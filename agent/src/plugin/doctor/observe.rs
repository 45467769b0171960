//! Reads what the checks need. Whatever may not be read is a fact as well.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::ListParams;
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::snapshot::VolumeSnapshotClass;

use super::Read;
use super::cluster_checks::{NEEDED_KINDS, ServedKinds};
use crate::plugin::cluster::{Cluster, Scope, list_all};
use crate::plugin::error::not_found;

/// The agent's Lease, in the namespace that it runs in.
pub(super) const LEASE: &str = "sts-backup-agent";

/// What is checked once a cluster.
#[derive(Debug)]
pub(super) struct ClusterFacts {
    pub(super) served: Vec<ServedKinds>,
    pub(super) leases: Read<Vec<Lease>>,
    pub(super) deployments: Read<Vec<Deployment>>,
    pub(super) daemon_sets: Read<Vec<DaemonSet>>,
    pub(super) stateful_sets: Read<Vec<StatefulSet>>,
    pub(super) classes: Read<Vec<VolumeSnapshotClass>>,
}

/// What the backups' targets look like.
#[derive(Debug)]
pub(super) struct TargetFacts {
    /// By namespace.
    pub(super) namespaces: BTreeMap<String, NamespaceFacts>,
    /// The driver of each volume by the volume's name; `None`: not CSI.
    pub(super) drivers: Read<BTreeMap<String, Option<String>>>,
}

/// What is in a namespace.
#[derive(Debug)]
pub(super) struct NamespaceFacts {
    pub(super) stateful_sets: Read<Vec<StatefulSet>>,
    pub(super) claims: Read<Vec<PersistentVolumeClaim>>,
    pub(super) pods: Read<Vec<Pod>>,
}

/// Reads what is checked once a cluster.
pub(super) async fn cluster_facts(cluster: &Cluster) -> ClusterFacts {
    let mut served = Vec::new();
    for (group_version, _) in NEEDED_KINDS {
        // Discovery is open to every user, unlike the CRDs.
        let kinds = match cluster.client().list_api_group_resources(group_version).await {
            Ok(list) => Ok(list.resources.into_iter().map(|resource| resource.name).collect()),
            Err(kube::Error::Api(status)) if not_found(&status) => Ok(Vec::new()),
            Err(err) => Err(err.to_string()),
        };
        served.push(ServedKinds { group_version, kinds });
    }
    let named = ListParams::default().fields(&format!("metadata.name={LEASE}"));
    let leases: Api<Lease> = cluster.api(&Scope::All);
    let classes: Api<VolumeSnapshotClass> = Api::all(cluster.client());
    ClusterFacts {
        served,
        leases: read(&leases, &named).await,
        deployments: read_all(cluster, &Scope::All).await,
        daemon_sets: read_all(cluster, &Scope::All).await,
        stateful_sets: read_all(cluster, &Scope::All).await,
        classes: read(&classes, &ListParams::default()).await,
    }
}

/// Reads the namespaces that the backups' targets are in, each once.
pub(super) async fn target_facts(cluster: &Cluster, backups: &[StatefulSetBackup]) -> TargetFacts {
    let target = |backup: &StatefulSetBackup| {
        let own = backup.namespace().unwrap_or_default();
        backup.spec.stateful_set_ref.namespace_or(&own).to_owned()
    };
    let mut namespaces = BTreeMap::new();
    for namespace in backups.iter().map(target).collect::<BTreeSet<_>>() {
        let scope = Scope::Namespace(namespace.clone());
        let facts = NamespaceFacts {
            stateful_sets: read_all(cluster, &scope).await,
            claims: read_all(cluster, &scope).await,
            pods: read_all(cluster, &scope).await,
        };
        namespaces.insert(namespace, facts);
    }
    let drivers = if namespaces.is_empty() { Ok(BTreeMap::new()) } else { drivers(cluster).await };
    TargetFacts { namespaces, drivers }
}

async fn drivers(cluster: &Cluster) -> Read<BTreeMap<String, Option<String>>> {
    let volumes: Api<PersistentVolume> = Api::all(cluster.client());
    let volumes = read(&volumes, &ListParams::default()).await?;
    let driver = |volume: PersistentVolume| {
        let name = volume.name_any();
        (name, volume.spec.and_then(|spec| spec.csi).map(|csi| csi.driver))
    };
    Ok(volumes.into_iter().map(driver).collect())
}

async fn read_all<K>(cluster: &Cluster, scope: &Scope) -> Read<Vec<K>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
{
    read(&cluster.api(scope), &ListParams::default()).await
}

async fn read<K>(api: &Api<K>, how: &ListParams) -> Read<Vec<K>>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    list_all(api, how, &format!("list {}", K::plural(&()))).await.map_err(|err| err.brief())
}
