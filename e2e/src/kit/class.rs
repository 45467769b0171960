//! Classes of the test driver with faults of their own, for one test.
//!
//! They are cluster-scoped, so each is named after the test's namespace (one of each kind per test), which
//! also owns it: it goes with the namespace. The name is the driver's `scope` as well, so that one test's
//! faults do not count another's calls.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::PersistentVolume;
use k8s_openapi::api::storage::v1::StorageClass;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::PostParams;
use serde_json::json;
use sts_backup_api::snapshot::VolumeSnapshotClass;

use super::Namespace;
use crate::csi::DRIVER_NAME;

/// When a claim of a class gets its volume.
#[derive(Clone, Copy, Debug)]
pub enum Binding {
    /// At once.
    Immediate,
    /// When a node is selected for it, by the scheduler for the claim's first pod.
    WaitForFirstConsumer,
}

/// Makes a `StorageClass` of the test driver with these parameters, and returns its name.
///
/// # Errors
/// When the API server refuses it.
pub async fn create_storage_class(
    ns: &Namespace,
    binding: Binding,
    parameters: &[(&str, &str)],
) -> Result<String> {
    let name = ns.name();
    let class = StorageClass {
        metadata: metadata(ns)?,
        provisioner: DRIVER_NAME.to_owned(),
        parameters: Some(scoped(name, parameters)),
        reclaim_policy: Some("Delete".to_owned()),
        volume_binding_mode: Some(format!("{binding:?}")),
        ..StorageClass::default()
    };
    let classes: Api<StorageClass> = Api::all(ns.cluster().client());
    classes
        .create(&PostParams::default(), &class)
        .await
        .with_context(|| format!("create the StorageClass {name}"))?;
    Ok(name.to_owned())
}

/// Makes a `VolumeSnapshotClass` of the test driver with these parameters, and returns its name.
///
/// # Errors
/// When the API server refuses it.
pub async fn create_snapshot_class(ns: &Namespace, parameters: &[(&str, &str)]) -> Result<String> {
    let name = ns.name();
    let class = VolumeSnapshotClass {
        metadata: metadata(ns)?,
        parameters: scoped(name, parameters),
        ..VolumeSnapshotClass::new(name, DRIVER_NAME, "Delete")
    };
    let classes: Api<VolumeSnapshotClass> = Api::all(ns.cluster().client());
    classes
        .create(&PostParams::default(), &class)
        .await
        .with_context(|| format!("create the VolumeSnapshotClass {name}"))?;
    Ok(name.to_owned())
}

fn metadata(ns: &Namespace) -> Result<ObjectMeta> {
    Ok(ObjectMeta {
        name: Some(ns.name().to_owned()),
        owner_references: Some(vec![ns.owner_reference()?]),
        ..ObjectMeta::default()
    })
}

fn scoped(scope: &str, parameters: &[(&str, &str)]) -> BTreeMap<String, String> {
    let scope = ("scope", scope);
    let all = parameters.iter().copied().chain([scope]);
    all.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// Makes one volume that is a folder of the node, without any CSI driver, and returns the name of the `StorageClass`
/// that claims get it by. What is written to it stays on the node: a test writes nothing.
///
/// # Errors
/// When the API server refuses it.
pub async fn create_host_volume(ns: &Namespace) -> Result<String> {
    let name = format!("{}-host", ns.name());
    let volume: PersistentVolume = serde_json::from_value(json!({
        "metadata": { "name": name, "ownerReferences": [ns.owner_reference()?] },
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "capacity": { "storage": "16Mi" },
            "storageClassName": name,
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": { "path": "/opt" },
        },
    }))?;
    let volumes: Api<PersistentVolume> = Api::all(ns.cluster().client());
    let created = volumes.create(&PostParams::default(), &volume).await;
    created.with_context(|| format!("create the PersistentVolume {name}"))?;
    Ok(name)
}

/// Makes a `VolumeSnapshotClass` of a driver that does not exist, and returns its name.
///
/// # Errors
/// When the API server refuses it.
pub async fn create_foreign_snapshot_class(ns: &Namespace) -> Result<String> {
    let name = format!("{}-foreign", ns.name());
    let mut class = VolumeSnapshotClass::new(&name, "foreign.e2e.sts-backup.io", "Delete");
    class.metadata.owner_references = Some(vec![ns.owner_reference()?]);
    let classes: Api<VolumeSnapshotClass> = Api::all(ns.cluster().client());
    let created = classes.create(&PostParams::default(), &class).await;
    created.with_context(|| format!("create the VolumeSnapshotClass {name}"))?;
    Ok(name)
}
