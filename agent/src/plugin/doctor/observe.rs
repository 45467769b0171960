//! Reads what the checks need. Whatever may not be read is a fact as well.

use std::fmt::Debug;

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{ListParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::policy::StatefulSetBackupPolicy;
use sts_backup_api::snapshot::VolumeSnapshotClass;

use super::Read;
use super::cluster_checks::{NEEDED_KINDS, ServedKinds};
use super::rights_checks::{Account, Right, review};
use crate::backup::observe::{Target, is_granted, read_target};
use crate::error::Error as ReadError;
use crate::plugin::cluster::{Cluster, Scope, list_all};
use crate::plugin::error::{Error, not_found};

/// The agent's Lease, in the namespace that it runs in.
pub(super) const LEASE: &str = "sts-backup-agent";

/// How many questions are asked at once.
const PARALLEL: usize = 8;

/// What is checked once a cluster.
#[derive(Debug)]
pub(super) struct ClusterFacts {
    pub(super) served: Vec<ServedKinds>,
    pub(super) leases: Read<Vec<Lease>>,
    pub(super) deployments: Read<Vec<Deployment>>,
    pub(super) daemon_sets: Read<Vec<DaemonSet>>,
    pub(super) stateful_sets: Read<Vec<StatefulSet>>,
    pub(super) classes: Read<Vec<VolumeSnapshotClass>>,
    pub(super) policies: Read<Vec<StatefulSetBackupPolicy>>,
}

/// Reads the `StatefulSet` that a backup names as the agent's preflight does.
pub(super) async fn target(cluster: &Cluster, backup: &StatefulSetBackup) -> Read<Target> {
    let own = backup.namespace().unwrap_or_default();
    let target = &backup.spec.stateful_set_ref;
    let home = target.namespace_or(&own);
    let client = cluster.client();
    let read = async {
        if home != own && !is_granted(&client, home, &own).await? {
            return Ok(Target::NotGranted);
        }
        read_target(&client, home, &target.name).await
    };
    read.await.map_err(|err| match err {
        ReadError::Request { operation, source } => Error::of(operation, None, source).brief(),
        err @ ReadError::NoAnswer { .. } => err.to_string(),
    })
}

/// Those of the rights that an account of the cluster does not have.
pub(super) async fn missing_rights(
    cluster: &Cluster,
    account: &Account,
    rights: Vec<Right>,
) -> Read<Vec<Right>> {
    let api: Api<SubjectAccessReview> = Api::all(cluster.client());
    let asked: Vec<_> = stream::iter(rights)
        .map(async |right| {
            let answer = api.create(&PostParams::default(), &review(account, &right)).await?;
            Ok((right, answer.status.is_some_and(|status| status.allowed)))
        })
        .buffered(PARALLEL)
        .try_collect()
        .await
        .map_err(|err| Error::of("ask for the rights of the agent", None, err).brief())?;
    Ok(asked.into_iter().filter(|(_, allowed)| !allowed).map(|(right, _)| right).collect())
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
        deployments: read_all(cluster).await,
        daemon_sets: read_all(cluster).await,
        stateful_sets: read_all(cluster).await,
        classes: read(&classes, &ListParams::default()).await,
        policies: policies(cluster).await,
    }
}

async fn policies(cluster: &Cluster) -> Read<Vec<StatefulSetBackupPolicy>> {
    let api: Api<StatefulSetBackupPolicy> = Api::all(cluster.client());
    match list_all(&api, &ListParams::default(), "list StatefulSetBackupPolicies").await {
        // That the kind is missing is a finding of its own.
        Err(Error::NotServed { .. }) => Ok(Vec::new()),
        listed => listed.map_err(|err| err.brief()),
    }
}

async fn read_all<K>(cluster: &Cluster) -> Read<Vec<K>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
{
    read(&cluster.api(&Scope::All), &ListParams::default()).await
}

async fn read<K>(api: &Api<K>, how: &ListParams) -> Read<Vec<K>>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    list_all(api, how, &format!("list {}", K::plural(&()))).await.map_err(|err| err.brief())
}
