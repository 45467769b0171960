//! `delete-points`: deletes recovery points, each as a whole, one after the other.

use futures::{StreamExt, stream};
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, ResourceExt};
use sts_backup_api::points::{is_held, is_in_use};
use sts_backup_api::run::{RecoveryPoint, RunId};
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_service::clock;

use super::args::DeletePoints;
use super::ask::confirmed;
use super::cluster::{Cluster, Scope};
use super::describe_run;
use super::error::{Error, not_found};
use super::owned::{Owned, PARALLEL};
use super::{Exit, output};
use sts_backup_service::table::count;

/// How often a snapshot that changes all the time is looked at again.
const TRIES: usize = 10;

/// Said when it ends before the first deletion.
const UNDONE: &str = "nothing was deleted";

/// Deletes the points that are named.
pub(super) async fn delete_points(cluster: &Cluster, which: &DeletePoints) -> Result<Exit, Error> {
    let owned = Owned::read(cluster, &which.name).await?;
    let chosen = chosen(&owned, which)?;
    if !which.yes {
        output::complain(describe_run::points(&chosen, clock::now()).trim_end());
        if !confirmed(&question(&owned, &chosen, cluster.address()), UNDONE)? {
            return Err(Error::Ended { exit: Exit::Failure, message: UNDONE.to_owned(), remedy: None });
        }
    }
    let mut failures = Vec::new();
    for RecoveryPoint { id, .. } in chosen {
        match delete_point(cluster, which, &id).await {
            Ok(snapshots) => {
                let snapshots = count(snapshots, "VolumeSnapshot");
                output::print(&format!("recovery point {id} deleted: {snapshots}\n"))?;
            }
            Err(why) => failures.push(format!("recovery point {id}: {why}")),
        }
    }
    if failures.is_empty() {
        return Ok(Exit::Success);
    }
    Err(Error::Ended {
        exit: Exit::Failure,
        message: format!("not deleted as a whole: {}", failures.join("; ")),
        remedy: Some(format!(
            "kubectl stsbackup points {} -n {} shows what is left; the same command goes on",
            owned.name, owned.namespace
        )),
    })
}

/// Deletes a point with all of its snapshots, and says how many there were; or why not.
async fn delete_point(cluster: &Cluster, which: &DeletePoints, id: &RunId) -> Result<usize, String> {
    for _ in 0..TRIES {
        // While somebody thought about it, or the point before it was deleted, this one can have been held, or taken into
        // use.
        let owned = Owned::read(cluster, &which.name).await.map_err(|err| err.brief())?;
        let point = owned.point(id.as_str()).map_err(|err| err.brief())?;
        let refusals = refusals(&owned, &[point], which.force);
        if !refusals.is_empty() {
            return Err(refusals.join("; "));
        }
        let members = owned.members(id);
        let Some((first, others)) = members.split_first() else { return Ok(0) };
        // With one gone the point is incomplete, and nobody takes it into use any more. Until then it stays whole.
        if !delete_as_seen(cluster, first).await.map_err(|err| err.brief())? {
            continue;
        }
        let deleted = stream::iter(others).map(async |snapshot| delete(cluster, snapshot).await);
        let deleted: Vec<_> = deleted.buffer_unordered(PARALLEL).collect().await;
        let failed: Vec<_> = deleted.into_iter().filter_map(Result::err).map(|err| err.brief()).collect();
        return if failed.is_empty() { Ok(members.len()) } else { Err(failed.join("; ")) };
    }
    Err("it changes all the time".to_owned())
}

/// The points that are named, if all of them may be deleted.
fn chosen(owned: &Owned, which: &DeletePoints) -> Result<Vec<RecoveryPoint>, Error> {
    let mut chosen: Vec<RecoveryPoint> = Vec::new();
    for name in &which.points {
        let point = owned.point(name)?;
        if !chosen.contains(&point) {
            chosen.push(point);
        }
    }
    let refusals = refusals(owned, &chosen, which.force);
    if refusals.is_empty() {
        return Ok(chosen);
    }
    Err(Error::Ended {
        exit: Exit::Failure,
        message: format!("{UNDONE}: {}", refusals.join("; ")),
        remedy: None,
    })
}

/// Why points may not be deleted.
fn refusals(owned: &Owned, chosen: &[RecoveryPoint], force: bool) -> Vec<String> {
    let Owned { namespace, name, .. } = owned;
    let in_use = owned.in_use();
    let mut refusals = Vec::new();
    for RecoveryPoint { id, hold, .. } in chosen {
        if Some(id) == owned.current_run() {
            refusals.push(format!("{id} is the run under way: wait for its end"));
        } else if *hold {
            refusals.push(format!("{id} is on hold: kubectl stsbackup release {name} {id} -n {namespace}"));
        } else if in_use.contains(id) {
            refusals.push(format!("a volume is being made from {id}: wait until it is bound"));
        }
    }
    let mut complete = owned.points();
    complete.retain(|point| point.complete && Some(&point.id) != owned.current_run());
    if let Some(newest) = complete.first()
        && complete.iter().all(|point| chosen.contains(point))
        && !force
    {
        refusals.push(format!(
            "{} is the last complete recovery point: --force deletes it all the same",
            newest.id
        ));
    }
    refusals
}

fn question(owned: &Owned, chosen: &[RecoveryPoint], cluster: &str) -> String {
    let snapshots = chosen.iter().map(|point| owned.members(&point.id).len()).sum();
    format!(
        "Delete {} ({}) of {} in the cluster of {cluster}?",
        count(chosen.len(), "recovery point"),
        count(snapshots, "VolumeSnapshot"),
        owned.full_name()
    )
}

/// Deletes a snapshot as it was seen: one that has changed since is looked at again.
async fn delete(cluster: &Cluster, snapshot: &VolumeSnapshot) -> Result<(), Error> {
    let (namespace, name) = (snapshot.namespace().unwrap_or_default(), snapshot.name_any());
    let object = format!("VolumeSnapshot {namespace}/{name}");
    let api: Api<VolumeSnapshot> = cluster.api(&Scope::Namespace(namespace));
    let mut seen = snapshot.clone();
    for _ in 0..TRIES {
        if delete_as_seen(cluster, &seen).await? {
            return Ok(());
        }
        let found = api.get_opt(&name).await;
        let found = found.map_err(|err| Error::of(&format!("read {object}"), None, err))?;
        match found.filter(|found| found.uid() == seen.uid()) {
            Some(found) => seen = still_to_delete(found, &object)?,
            None => return Ok(()),
        }
    }
    Err(Error::Ended {
        exit: Exit::Failure,
        message: format!("delete {object}: it changes all the time"),
        remedy: None,
    })
}

/// Deletes a snapshot, unless it has changed since it was seen: then no.
async fn delete_as_seen(cluster: &Cluster, snapshot: &VolumeSnapshot) -> Result<bool, Error> {
    let (namespace, name) = (snapshot.namespace().unwrap_or_default(), snapshot.name_any());
    let api: Api<VolumeSnapshot> = cluster.api(&Scope::Namespace(namespace.clone()));
    match api.delete(&name, &as_seen(snapshot)).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if not_found(&status) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(err) => {
            let object = format!("VolumeSnapshot {namespace}/{name}");
            Err(Error::of(&format!("delete {object}"), Some((&namespace, &object)), err))
        }
    }
}

fn as_seen(snapshot: &VolumeSnapshot) -> DeleteParams {
    let preconditions = Preconditions { resource_version: snapshot.resource_version(), uid: snapshot.uid() };
    DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() }
}

/// The snapshot, unless somebody wants it now.
fn still_to_delete(snapshot: VolumeSnapshot, object: &str) -> Result<VolumeSnapshot, Error> {
    let why = if is_held(&snapshot) {
        "it was put on hold meanwhile"
    } else if is_in_use(&snapshot) {
        "a volume is being made from it"
    } else {
        return Ok(snapshot);
    };
    let message = format!("delete {object}: {why}");
    Err(Error::Ended { exit: Exit::Failure, message, remedy: None })
}

#[cfg(test)]
#[path = "delete_points_tests.rs"]
mod tests;
