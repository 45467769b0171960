//! What a snapshot of ours says about itself: enough to find its recovery point, and to restore its claim when nothing
//! else is left.

use std::collections::BTreeMap;

use futures::future::try_join_all;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Api, Client, ResourceExt};
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::names::{
    BACKUP_LABEL, BACKUP_NAMESPACE_LABEL, CLAIM_ANNOTATION, CLAIM_MANIFEST_ANNOTATION,
    CONSISTENCY_ANNOTATION, ORDINAL_ANNOTATION, REPLICAS_ANNOTATION, RUN_LABEL, SLOT_ANNOTATION,
    STATEFUL_SET_LABEL, TEMPLATE_ANNOTATION, TIME_ANNOTATION, VOLUMES_ANNOTATION,
};
use sts_backup_api::run::{Consistency, CurrentRun, RunVolume};
use sts_backup_api::snapshot::{VolumeSnapshot, VolumeSnapshotSource, VolumeSnapshotSpec};

use crate::error::{Error, Result};

/// The manifests of a run's claims, as JSON by name, without managed fields. One that is gone has none: its snapshot
/// says what is wrong.
pub(super) async fn claim_manifests(
    client: &Client,
    namespace: &str,
    run: &CurrentRun,
) -> Result<BTreeMap<String, String>> {
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
    let manifest = async |volume: &RunVolume| {
        let claim =
            claims.get_opt(&volume.claim).await.map_err(Error::request("get the PersistentVolumeClaim"))?;
        Ok::<_, Error>(claim.map(|claim| (volume.claim.clone(), manifest_of(claim))))
    };
    Ok(try_join_all(run.volumes.iter().map(manifest)).await?.into_iter().flatten().collect())
}

fn manifest_of(mut claim: PersistentVolumeClaim) -> String {
    claim.metadata.managed_fields = None;
    serde_json::to_string(&claim).expect("a claim that was read can be written")
}

/// The snapshot that a run takes of one of its claims, whose manifest is given, from `now` on.
pub(super) fn snapshot_of(
    backup: &StatefulSetBackup,
    run: &CurrentRun,
    volume: &RunVolume,
    manifest: Option<&String>,
    consistency: Consistency,
    now: Timestamp,
) -> VolumeSnapshot {
    let labels = [
        (BACKUP_LABEL, backup.name_any()),
        (BACKUP_NAMESPACE_LABEL, backup.namespace().unwrap_or_default()),
        (STATEFUL_SET_LABEL, backup.spec.stateful_set_ref.name.clone()),
        (RUN_LABEL, run.id.to_string()),
    ];
    let annotations = [
        (CLAIM_ANNOTATION, volume.claim.clone()),
        (CLAIM_MANIFEST_ANNOTATION, manifest.cloned().unwrap_or_default()),
        (TEMPLATE_ANNOTATION, volume.template.clone()),
        (ORDINAL_ANNOTATION, volume.ordinal.to_string()),
        (SLOT_ANNOTATION, format!("{:?} {}", run.slot.due, run.slot.value)),
        (TIME_ANNOTATION, now.to_string()),
        (CONSISTENCY_ANNOTATION, consistency.as_str().to_owned()),
        (REPLICAS_ANNOTATION, run.replicas.to_string()),
        (VOLUMES_ANNOTATION, (run.volumes.len() + run.left_out.len()).to_string()),
    ];
    let owned = |(key, value): (&str, String)| (key.to_owned(), value);
    VolumeSnapshot {
        metadata: ObjectMeta {
            name: Some(volume.snapshot.clone()),
            labels: Some(labels.into_iter().map(owned).collect()),
            annotations: Some(annotations.into_iter().map(owned).collect()),
            ..ObjectMeta::default()
        },
        spec: VolumeSnapshotSpec {
            source: VolumeSnapshotSource {
                persistent_volume_claim_name: Some(volume.claim.clone()),
                volume_snapshot_content_name: None,
            },
            volume_snapshot_class_name: Some(volume.snapshot_class.clone()),
        },
        status: None,
    }
}
