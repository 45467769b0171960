//! The fields of `VolumeSnapshot`, `VolumeSnapshotContent` and `VolumeSnapshotClass` that this project reads
//! or writes.
//!
//! The CRDs belong to <https://github.com/kubernetes-csi/external-snapshotter> (`snapshot.storage.k8s.io/v1`);
//! fields not named here are dropped when read. So change an object by a patch, which leaves them as they are
//! in the cluster; a replacement would remove them.

use std::borrow::Cow;
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::core::{ClusterResourceScope, TypeMeta};
use kube::{CustomResource, Resource};
use serde::{Deserialize, Serialize};

/// Asks for a snapshot of one claim, or names an existing one.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "snapshot.storage.k8s.io",
    version = "v1",
    kind = "VolumeSnapshot",
    namespaced,
    status = "VolumeSnapshotStatus",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase")]
pub struct VolumeSnapshotSpec {
    /// What is snapshotted.
    pub source: VolumeSnapshotSource,
    /// The class; absent: the default class of the claim's CSI driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume_snapshot_class_name: Option<String>,
}

/// Exactly one of the two is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeSnapshotSource {
    /// The claim to snapshot, in the snapshot's namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim_name: Option<String>,
    /// An existing `VolumeSnapshotContent`, for a snapshot that the storage already holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume_snapshot_content_name: Option<String>,
}

/// Written by the snapshot-controller.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeSnapshotStatus {
    /// The content bound to this snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound_volume_snapshot_content_name: Option<String>,
    /// When the storage cut the snapshot, whole seconds. Present means *cut*, not yet *ready*.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub creation_time: Option<Time>,
    /// Whether a volume can be made from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_to_use: Option<bool>,
    /// The smallest size of a volume made from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore_size: Option<Quantity>,
    /// The last error; the controllers go on trying, and clear it on success.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<VolumeSnapshotError>,
}

/// What the storage or a controller said when it failed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VolumeSnapshotError {
    /// When.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
    /// The text; may hold the storage's own words, never secrets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// The storage's side of a snapshot, cluster-scoped.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "snapshot.storage.k8s.io",
    version = "v1",
    kind = "VolumeSnapshotContent",
    status = "VolumeSnapshotContentStatus",
    schema = "disabled"
)]
#[serde(rename_all = "camelCase")]
pub struct VolumeSnapshotContentSpec {
    /// `Delete` or `Retain`: what happens in the storage when the `VolumeSnapshot` goes.
    pub deletion_policy: String,
    /// The CSI driver's name.
    pub driver: String,
    /// The snapshot it is bound to.
    pub volume_snapshot_ref: ObjectReference,
    /// The class it was made with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume_snapshot_class_name: Option<String>,
}

/// Written by the csi-snapshotter sidecar.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeSnapshotContentStatus {
    /// When the storage cut the snapshot, nanoseconds since 1970-01-01 UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub creation_time: Option<i64>,
    /// Whether a volume can be made from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_to_use: Option<bool>,
    /// The smallest size of a volume made from it, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore_size: Option<i64>,
    /// The storage's own name of the snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_handle: Option<String>,
    /// The last error; cleared on success.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<VolumeSnapshotError>,
}

/// How a driver takes snapshots, cluster-scoped. It has no `spec`: the fields stand at the top level, so
/// [`kube::CustomResource`] cannot be derived.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeSnapshotClass {
    /// `apiVersion` and `kind`, without which the API server refuses a custom object.
    #[serde(flatten)]
    pub types: TypeMeta,
    /// Standard metadata. The annotation [`DEFAULT_CLASS_ANNOTATION`] marks a driver's default class.
    pub metadata: ObjectMeta,
    /// The CSI driver's name.
    pub driver: String,
    /// `Delete` or `Retain`, for contents made with this class.
    pub deletion_policy: String,
    /// Parameters handed to the driver.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<String, String>,
}

impl VolumeSnapshotClass {
    /// A class of `driver` without parameters.
    #[must_use]
    pub fn new(name: &str, driver: &str, deletion_policy: &str) -> Self {
        Self {
            types: TypeMeta::resource::<Self>(),
            metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
            driver: driver.to_owned(),
            deletion_policy: deletion_policy.to_owned(),
            parameters: BTreeMap::new(),
        }
    }
}

impl Resource for VolumeSnapshotClass {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "VolumeSnapshotClass".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "snapshot.storage.k8s.io".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "volumesnapshotclasses".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// On a `VolumeSnapshot`, by csi-provisioner from version 6.2, where it may update snapshots: a volume is being made
/// from it. A claim that was deleted before it was bound leaves it there; from 6.3 it is swept every 5 minutes.
///
/// `snapshot.storage.kubernetes.io/volumesnapshot-as-source-protection` looks alike and says nothing: the
/// snapshot-controller puts it on every snapshot.
/// <https://github.com/kubernetes-csi/external-provisioner/blob/v6.4.0/pkg/controller/controller.go>
pub const SOURCE_PROTECTION_FINALIZER: &str =
    "provisioner.storage.kubernetes.io/volumesnapshot-as-source-protection";

/// On a `VolumeSnapshotClass`, with the value `"true"`: the default class of its driver.
pub const DEFAULT_CLASS_ANNOTATION: &str = "snapshot.storage.kubernetes.io/is-default-class";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_snapshot_of_the_api_server_survives_reading_and_writing() {
        let snapshot = json!({
            "apiVersion": "snapshot.storage.k8s.io/v1",
            "kind": "VolumeSnapshot",
            "metadata": {
                "name": "nightly-data-db-0",
                "namespace": "shop",
                "uid": "6a2f9b8e-8a55-4d4e-9d38-6b8b4ff5a3f1",
                "resourceVersion": "4711",
                "creationTimestamp": "2026-02-03T02:00:00Z",
                "finalizers": ["snapshot.storage.kubernetes.io/volumesnapshot-bound-protection"],
            },
            "spec": {
                "source": { "persistentVolumeClaimName": "data-db-0" },
                "volumeSnapshotClassName": "fast",
            },
            "status": {
                "boundVolumeSnapshotContentName": "snapcontent-6a2f9b8e-8a55-4d4e-9d38-6b8b4ff5a3f1",
                "creationTime": "2026-02-03T02:00:01Z",
                "readyToUse": false,
                "restoreSize": "1Gi",
                "error": { "time": "2026-02-03T02:00:02Z", "message": "storage is busy" },
            },
        });

        let read: VolumeSnapshot = serde_json::from_value(snapshot.clone()).unwrap();

        assert_eq!(serde_json::to_value(&read).unwrap(), snapshot);
    }

    #[test]
    fn a_content_tells_the_cut_to_the_nanosecond() {
        let content: VolumeSnapshotContent = serde_json::from_value(json!({
            "apiVersion": "snapshot.storage.k8s.io/v1",
            "kind": "VolumeSnapshotContent",
            "metadata": { "name": "snapcontent-1" },
            "spec": {
                "deletionPolicy": "Delete",
                "driver": "csi.example.com",
                "source": { "volumeHandle": "vol-1" },
                "sourceVolumeMode": "Filesystem",
                "volumeSnapshotRef": { "kind": "VolumeSnapshot", "name": "s", "namespace": "shop" },
            },
            "status": {
                "creationTime": 1_770_084_001_123_456_789_i64,
                "readyToUse": true,
                "restoreSize": 1_073_741_824,
                "snapshotHandle": "snap-1",
            },
        }))
        .unwrap();

        assert_eq!(content.spec.volume_snapshot_ref.name.as_deref(), Some("s"));
        assert_eq!(content.status.unwrap().creation_time, Some(1_770_084_001_123_456_789));
    }

    #[test]
    fn a_class_without_parameters_is_read_and_one_we_make_names_its_kind() {
        let read: VolumeSnapshotClass = serde_json::from_value(json!({
            "apiVersion": "snapshot.storage.k8s.io/v1",
            "kind": "VolumeSnapshotClass",
            "metadata": { "name": "fast" },
            "driver": "csi.example.com",
            "deletionPolicy": "Retain",
        }))
        .unwrap();

        assert_eq!(read, VolumeSnapshotClass::new("fast", "csi.example.com", "Retain"));
        assert_eq!(
            VolumeSnapshotClass::url_path(&(), None),
            "/apis/snapshot.storage.k8s.io/v1/volumesnapshotclasses"
        );
    }
}
