//! `points`: what can be restored, as the snapshots themselves say.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use serde::Serialize;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::names::{BACKUP_LABEL, BACKUP_NAMESPACE_LABEL, RUN_LABEL, STATEFUL_SET_LABEL};
use sts_backup_api::points::recovery_points;
use sts_backup_api::run::RecoveryPoint;
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_service::clock;

use super::args::{DataFormat, Points};
use super::cluster::{Cluster, Scope, list_all, understand};
use super::error::Error;
use super::{Exit, output};
use sts_backup_service::table::{age, count, second, size, table};

/// A backup by namespace and name.
type BackupKey = (String, String);

/// A recovery point, and whose it is.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    /// Where the snapshots are.
    namespace: String,
    backup_namespace: String,
    backup: String,
    /// The `StatefulSetBackup` is gone; absent when that could not be learned.
    #[serde(skip_serializing_if = "Option::is_none")]
    backup_deleted: Option<bool>,
    stateful_set: String,
    #[serde(flatten)]
    point: RecoveryPoint,
}

/// What of the cluster the points are made from.
#[derive(Debug, Default)]
struct Facts {
    snapshots: Vec<VolumeSnapshot>,
    /// Whether a backup exists, for those where that could be learned.
    exists: BTreeMap<BackupKey, bool>,
}

/// Lists recovery points.
pub(super) async fn points(cluster: &Cluster, how: &Points) -> Result<Exit, Error> {
    let scope = cluster.scope(how.all_namespaces);
    let facts = observe(cluster, &scope, how.name.as_deref()).await?;
    let listed = listed(&facts);
    let originals = originals(&facts.snapshots);
    let format = match how.output {
        Some(format) => Some(format),
        None if listed.is_empty() => {
            output::complain(&nothing_in(&scope, how.name.as_deref()));
            None
        }
        None => {
            output::print(&render(&listed, clock::now()))?;
            None
        }
    };
    if let Some(format) = format {
        output::print(&data(&listed, format)?)?;
    }
    if originals > 0 {
        output::complain(&originals_line(originals));
    }
    Ok(Exit::Success)
}

fn data(listed: &[Listed], format: DataFormat) -> Result<String, Error> {
    output::data(&serde_json::json!({ "recoveryPoints": listed }), format)
}

/// The snapshots there: those of the scope, and those that its backups made in the namespaces of their targets.
async fn observe(cluster: &Cluster, scope: &Scope, name: Option<&str>) -> Result<Facts, Error> {
    let mut facts = Facts::default();
    let labels = name.map_or(BACKUP_LABEL.to_owned(), |name| format!("{BACKUP_LABEL}={name}"));
    let how = ListParams::default().labels(&labels);
    let what = format!("list VolumeSnapshots in {}", scope.describe());
    facts.snapshots = list_all(&cluster.api(scope), &how, &what).await?;

    let mut targets = BTreeSet::new();
    let backups = match cluster.backups(scope).await {
        Ok(backups) => Some(backups),
        // The snapshots are there all the same.
        Err(err @ (Error::NotServed { .. } | Error::Forbidden { .. })) => {
            output::complain(&format!(
                "points of deleted StatefulSetBackups may not be marked: {}",
                err.brief()
            ));
            None
        }
        Err(err) => return Err(err),
    };
    for object in backups.iter().flatten() {
        let (namespace, backup) = (object.namespace().unwrap_or_default(), object.name_any());
        if let Ok(known) = understand::<StatefulSetBackup>(object).as_ref()
            && name.is_none_or(|name| name == backup)
        {
            targets
                .insert((namespace.clone(), known.spec.stateful_set_ref.namespace_or(&namespace).to_owned()));
        }
        facts.exists.insert((namespace, backup), true);
    }
    if backups.is_some() {
        // What is there in the scope is known to be all.
        for (namespace, backup) in keys(&facts.snapshots) {
            if *scope == Scope::All || *scope == Scope::Namespace(namespace.clone()) {
                facts.exists.entry((namespace, backup)).or_insert(false);
            }
        }
    }
    if let Scope::Namespace(_) = scope {
        for (namespace, target) in targets.into_iter().filter(|(namespace, target)| namespace != target) {
            let how = ListParams::default().labels(&format!("{labels},{BACKUP_NAMESPACE_LABEL}={namespace}"));
            let api = cluster.api(&Scope::Namespace(target.clone()));
            facts
                .snapshots
                .extend(list_all(&api, &how, &format!("list VolumeSnapshots in namespace {target}")).await?);
        }
        for key in keys(&facts.snapshots) {
            learn(cluster, &mut facts.exists, key).await;
        }
    }
    Ok(facts)
}

/// Whether a backup of another namespace exists; who may not know shows the points all the same.
async fn learn(cluster: &Cluster, exists: &mut BTreeMap<BackupKey, bool>, key: BackupKey) {
    if exists.contains_key(&key) {
        return;
    }
    let api: Api<StatefulSetBackup> = cluster.api(&Scope::Namespace(key.0.clone()));
    if let Ok(found) = api.get_metadata_opt(&key.1).await {
        exists.insert(key, found.is_some());
    }
}

/// The backup that a snapshot says it is of.
fn key(snapshot: &VolumeSnapshot) -> BackupKey {
    let label = |name| snapshot.labels().get(name).cloned();
    let namespace = label(BACKUP_NAMESPACE_LABEL).or_else(|| snapshot.namespace()).unwrap_or_default();
    (namespace, label(BACKUP_LABEL).unwrap_or_default())
}

fn keys(snapshots: &[VolumeSnapshot]) -> BTreeSet<BackupKey> {
    snapshots.iter().filter(|snapshot| snapshot.labels().contains_key(RUN_LABEL)).map(key).collect()
}

/// The recovery points with their owners, newest first within a `StatefulSet`'s namespace and backup.
fn listed(facts: &Facts) -> Vec<Listed> {
    let mut groups: BTreeMap<(String, BackupKey, String), Vec<&VolumeSnapshot>> = BTreeMap::new();
    for snapshot in &facts.snapshots {
        let stateful_set = snapshot.labels().get(STATEFUL_SET_LABEL).cloned().unwrap_or_default();
        let group = (snapshot.namespace().unwrap_or_default(), key(snapshot), stateful_set);
        groups.entry(group).or_default().push(snapshot);
    }
    let of_group = |((namespace, (backup_namespace, backup), stateful_set), snapshots)| {
        let exists = facts.exists.get(&(String::clone(&backup_namespace), String::clone(&backup))).copied();
        let points = recovery_points(Vec::into_iter(snapshots));
        points.into_iter().map(move |point| Listed {
            namespace: String::clone(&namespace),
            backup_namespace: backup_namespace.clone(),
            backup: backup.clone(),
            backup_deleted: exists.map(|exists| !exists),
            stateful_set: String::clone(&stateful_set),
            point,
        })
    };
    groups.into_iter().flat_map(of_group).collect()
}

fn render(listed: &[Listed], now: Timestamp) -> String {
    let row = |listed: &Listed| {
        let Listed { namespace, backup_namespace, backup, backup_deleted, stateful_set, point } = listed;
        let owner = if backup_namespace == namespace {
            backup.clone()
        } else {
            format!("{backup_namespace}/{backup}")
        };
        vec![
            namespace.clone(),
            if *backup_deleted == Some(true) { format!("{owner} (deleted)") } else { owner },
            stateful_set.clone(),
            point.id.to_string(),
            format!("{} ({})", second(point.time.0), age(point.time.0, now)),
            format!("{}/{}", point.ready_volumes, point.expected_volumes),
            if point.complete { "yes" } else { "no" }.to_owned(),
            point.consistency.as_str().to_owned(),
            size(point.size_bytes),
            if point.hold { "yes" } else { "no" }.to_owned(),
        ]
    };
    table(
        &[
            "NAMESPACE",
            "BACKUP",
            "STATEFULSET",
            "POINT",
            "TIME",
            "VOLUMES",
            "COMPLETE",
            "CONSISTENCY",
            "SIZE",
            "HOLD",
        ],
        &listed.iter().map(row).collect::<Vec<_>>(),
    )
}

/// Snapshots of the original operator: it labels them with a backup, and knows no runs.
fn originals(snapshots: &[VolumeSnapshot]) -> usize {
    snapshots.iter().filter(|snapshot| !snapshot.labels().contains_key(RUN_LABEL)).count()
}

fn originals_line(originals: usize) -> String {
    format!(
        "not shown: {} of the original operator ({BACKUP_LABEL} without a run): kubectl get volumesnapshots -l {BACKUP_LABEL},'!{RUN_LABEL}'",
        count(originals, "snapshot")
    )
}

fn nothing_in(scope: &Scope, name: Option<&str>) -> String {
    let of = name.map(|name| format!(" of StatefulSetBackup {name}")).unwrap_or_default();
    let elsewhere = match scope {
        Scope::All => "",
        Scope::Namespace(_) => "\n  kubectl stsbackup points -A looks in all namespaces",
    };
    format!(
        "No recovery point{of} in {}.{elsewhere}\n  kubectl stsbackup run NAME --wait makes one",
        scope.describe()
    )
}

#[cfg(test)]
#[path = "points_tests.rs"]
mod tests;
