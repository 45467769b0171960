//! Claims of the two kinds that tests make: empty, and restored from a snapshot.

use k8s_openapi::api::core::v1::{
    PersistentVolumeClaim, PersistentVolumeClaimSpec, TypedLocalObjectReference, VolumeResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// A claim for an empty volume of `size` (a Kubernetes quantity such as `64Mi`), for one node.
#[must_use]
pub fn empty_claim(name: &str, storage_class: &str, size: &str) -> PersistentVolumeClaim {
    PersistentVolumeClaim {
        metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            storage_class_name: Some(storage_class.to_owned()),
            resources: Some(VolumeResourceRequirements {
                requests: Some([("storage".to_owned(), Quantity(size.to_owned()))].into()),
                limits: None,
            }),
            ..PersistentVolumeClaimSpec::default()
        }),
        status: None,
    }
}

/// A claim for a volume with what the `VolumeSnapshot` of this name, in the same namespace, holds. `size` may
/// exceed the snapshot's.
#[must_use]
pub fn restored_claim(name: &str, snapshot: &str, storage_class: &str, size: &str) -> PersistentVolumeClaim {
    let mut claim = empty_claim(name, storage_class, size);
    claim.spec.get_or_insert_default().data_source = Some(TypedLocalObjectReference {
        api_group: Some("snapshot.storage.k8s.io".to_owned()),
        kind: "VolumeSnapshot".to_owned(),
        name: snapshot.to_owned(),
    });
    claim
}

/// The size of the volume a claim is bound to, as the storage reported it.
#[must_use]
pub fn capacity(claim: &PersistentVolumeClaim) -> Option<&str> {
    let capacity = claim.status.as_ref()?.capacity.as_ref()?.get("storage")?;
    Some(capacity.0.as_str())
}
