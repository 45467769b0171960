//! `hold` and `release`: whether a recovery point may be pruned.

use futures::{StreamExt, TryStreamExt, stream};
use kube::api::Patch;
use kube::{Api, ResourceExt};
use serde_json::json;
use sts_backup_api::names::HOLD_LABEL;
use sts_backup_api::points::is_held;
use sts_backup_api::snapshot::VolumeSnapshot;

use super::args::Point;
use super::cluster::{Cluster, Scope, patch_params};
use super::error::Error;
use super::owned::{Owned, PARALLEL};
use super::{Exit, output};
use sts_backup_service::table::count;

/// Holds a point.
pub(super) async fn hold(cluster: &Cluster, which: &Point) -> Result<Exit, Error> {
    label(cluster, which, true).await
}

/// Releases a point.
pub(super) async fn release(cluster: &Cluster, which: &Point) -> Result<Exit, Error> {
    label(cluster, which, false).await
}

async fn label(cluster: &Cluster, which: &Point, hold: bool) -> Result<Exit, Error> {
    let owned = Owned::read(cluster, &which.name).await?;
    let point = owned.point(&which.point)?;
    let members = owned.members(&point.id);
    let others: Vec<_> = members.iter().filter(|snapshot| !is_so(snapshot, hold)).collect();
    let changed: Vec<VolumeSnapshot> = stream::iter(&others)
        .map(async |snapshot| set_label(cluster, snapshot, hold).await)
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await?;
    let going = changed.iter().filter(|snapshot| snapshot.metadata.deletion_timestamp.is_some());
    let going: Vec<_> = going.map(ResourceExt::name_any).collect();
    if hold && !going.is_empty() {
        return Err(Error::Ended {
            exit: Exit::Failure,
            message: format!(
                "recovery point {} was being deleted already: VolumeSnapshot {} cannot be kept",
                point.id,
                going.join(", ")
            ),
            remedy: None,
        });
    }
    let point = format!("recovery point {} of {}", point.id, owned.full_name());
    output::print(&format!("{}\n", said(&point, hold, changed.len(), members.len())))?;
    Ok(Exit::Success)
}

/// Whether nothing is to be done to the snapshot. Any value of the label goes when it is released.
fn is_so(snapshot: &VolumeSnapshot, hold: bool) -> bool {
    if hold { is_held(snapshot) } else { !snapshot.labels().contains_key(HOLD_LABEL) }
}

async fn set_label(
    cluster: &Cluster,
    snapshot: &VolumeSnapshot,
    hold: bool,
) -> Result<VolumeSnapshot, Error> {
    let (namespace, name) = (snapshot.namespace().unwrap_or_default(), snapshot.name_any());
    let api: Api<VolumeSnapshot> = cluster.api(&Scope::Namespace(namespace.clone()));
    let object = format!("VolumeSnapshot {namespace}/{name}");
    let patch = Patch::Merge(json!({ "metadata": { "labels": { HOLD_LABEL: hold.then_some("true") } } }));
    let labelled = api.patch(&name, &patch_params(), &patch).await;
    labelled.map_err(|err| Error::of(&format!("label {object}"), Some((&namespace, &object)), err))
}

fn said(point: &str, hold: bool, changed: usize, members: usize) -> String {
    match (hold, changed) {
        (true, 0) => format!("{point} was on hold already"),
        (false, 0) => format!("{point} was not on hold"),
        (true, _) => format!(
            "{point} is on hold: {changed} of {} labelled {HOLD_LABEL}=true",
            count(members, "VolumeSnapshot")
        ),
        (false, _) => format!(
            "{point} is released: label {HOLD_LABEL} removed from {changed} of {}",
            count(members, "VolumeSnapshot")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::owned::owned;

    #[test]
    fn only_snapshots_that_are_otherwise_are_labelled() {
        let mut snapshot = owned(&["run"]).snapshots.remove(0);
        let needs = |snapshot: &VolumeSnapshot| (!is_so(snapshot, true), !is_so(snapshot, false));
        assert_eq!(needs(&snapshot), (true, false));
        snapshot.labels_mut().insert(HOLD_LABEL.to_owned(), "true".to_owned());
        assert_eq!(needs(&snapshot), (false, true));
        snapshot.labels_mut().insert(HOLD_LABEL.to_owned(), "no".to_owned());
        assert_eq!(needs(&snapshot), (true, true));
    }

    #[test]
    fn it_says_what_it_did_and_that_it_did_nothing() {
        let said = |hold, changed| said("recovery point r of shop/nightly", hold, changed, 3);
        assert_eq!(
            said(true, 2),
            "recovery point r of shop/nightly is on hold: 2 of 3 VolumeSnapshots labelled backup.sts-backup.io/hold=true"
        );
        assert_eq!(said(true, 0), "recovery point r of shop/nightly was on hold already");
        assert_eq!(
            said(false, 3),
            "recovery point r of shop/nightly is released: label backup.sts-backup.io/hold removed from 3 of 3 VolumeSnapshots"
        );
        assert_eq!(said(false, 0), "recovery point r of shop/nightly was not on hold");
    }
}
