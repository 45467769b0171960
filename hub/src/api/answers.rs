//! The shapes of the API's answers, and how they are put together. Fields are only ever added.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sts_backup_api::report::{
    BACKUP, BackupReport, COVERAGE, CoverageReport, RESTORE, RestoreReport, RunReport,
};

use super::BackupQuery;
use crate::fleet::{AgentInfo, AppliedInfo, Cluster, Fleet, FleetError};
use crate::store::{ObjectRow, StoreError};

/// The fleet as a whole.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FleetAnswer {
    /// The hub's version.
    pub version: String,
    /// Which store it has.
    pub store_id: String,
    /// How many policies are in use; none: no set has been good since the hub began.
    pub policies: Option<usize>,
    /// When they were read.
    pub policies_read: Option<Timestamp>,
    /// Why what is there now is not used.
    pub policies_error: Option<String>,
    /// Its clusters, by name.
    pub clusters: Vec<ClusterSummary>,
}

/// A cluster and the sums over it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterSummary {
    /// The cluster.
    #[serde(flatten)]
    pub cluster: ClusterAnswer,
    /// How many backups it has.
    pub backups: usize,
    /// How many of them have no recent recovery point.
    pub overdue: usize,
    /// How many of them failed the last time.
    pub failed: usize,
    /// What of its `StatefulSets` is protected; none: its agent has not told yet.
    pub coverage: Option<CoverageReport>,
    /// How many restores are under way.
    pub restoring: usize,
}

/// A cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterAnswer {
    /// Its id.
    pub id: String,
    /// What people call it.
    pub name: String,
    /// What policies select it by.
    pub labels: BTreeMap<String, String>,
    /// Connected, Unknown (it was, or will be), or Revoked.
    pub state: String,
    /// Since when it is connected; or when it was last heard of.
    pub since: Option<Timestamp>,
    /// Where its agent connects from.
    pub address: Option<String>,
    /// What its agent said of itself.
    pub agent: Option<AgentInfo>,
    /// Of what is placed on it.
    pub revision: u64,
    /// What its agent has made of it.
    pub applied: Option<AppliedInfo>,
    /// Several agents connect as it.
    pub flapping: bool,
}

/// A cluster with what is placed on it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterDetail {
    /// The cluster.
    #[serde(flatten)]
    pub cluster: ClusterAnswer,
    /// The specs of its policies, by name.
    pub policies: BTreeMap<String, Value>,
    /// What of its `StatefulSets` is protected; none: its agent has not told yet.
    pub coverage: Option<CoverageReport>,
}

/// A cluster that is added.
#[derive(Debug, Serialize, Deserialize)]
pub struct NewCluster {
    /// What people call it.
    pub name: String,
    /// Its id; none: a new one.
    #[serde(default)]
    pub id: Option<String>,
    /// What policies select it by.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// A backup of some cluster.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackupAnswer {
    /// The cluster's name.
    pub cluster: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its newest recovery point is too old.
    pub overdue: bool,
    /// Its newest run failed.
    pub failed: bool,
    /// What its agent tells of it.
    #[serde(flatten)]
    pub report: BackupReport,
}

/// A run that has ended.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunAnswer {
    /// The cluster's name.
    pub cluster: String,
    /// The backup's namespace.
    pub namespace: String,
    /// The backup's name.
    pub backup: String,
    /// The run.
    #[serde(flatten)]
    pub run: RunReport,
}

/// A restore that is under way or has ended.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RestoreAnswer {
    /// The cluster's name.
    pub cluster: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What its agent tells of it.
    #[serde(flatten)]
    pub report: RestoreReport,
}

/// A fleet policy.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyAnswer {
    /// Its name.
    pub name: String,
    /// The spec that clusters get.
    pub spec: Value,
    /// The clusters that have it, as it is now.
    pub active: Vec<String>,
    /// The clusters that do not have it yet.
    pub pending: Vec<String>,
    /// The clusters that do not take it, and why.
    pub rejected: BTreeMap<String, String>,
}

/// Who did what.
#[derive(Debug, Serialize, Deserialize)]
pub struct AuditEntry {
    /// When.
    pub at: Timestamp,
    /// What.
    pub action: String,
    /// To what.
    pub object: String,
    /// More of it.
    pub detail: String,
}

pub(super) fn cluster(cluster: &Cluster) -> ClusterAnswer {
    let state = cluster.state();
    let (word, since) = match (&state.revoked, &state.session) {
        (Some(revoked), _) => ("Revoked", Some(*revoked)),
        (None, Some(session)) => ("Connected", Some(session.since)),
        (None, None) => ("Unknown", state.seen),
    };
    let flapping = state.is_flapping();
    ClusterAnswer {
        id: cluster.id.to_string(),
        name: state.name,
        labels: state.labels,
        state: word.to_owned(),
        since,
        address: state.session.map(|session| session.address.to_string()),
        agent: state.agent,
        revision: state.revision,
        applied: state.applied,
        flapping,
    }
}

pub(super) async fn cluster_detail(fleet: &Fleet, name: &str) -> Result<ClusterDetail, FleetError> {
    let of = fleet.named(name)?;
    let placed = of.state().placed.into_iter();
    let policies = placed.filter_map(|(name, body)| Some((name, spec(&body?.json)))).collect();
    let coverage =
        fleet.store.objects(COVERAGE, Some(of.id)).await?.first().map(|(_, object)| report(object));
    Ok(ClusterDetail { cluster: cluster(&of), policies, coverage })
}

fn spec(json: &[u8]) -> Value {
    serde_json::from_slice(json).unwrap_or_default()
}

/// The names of all clusters by their ids, as the store has them.
fn names(fleet: &Fleet) -> BTreeMap<String, String> {
    fleet.clusters().into_iter().map(|(name, cluster)| (cluster.id.to_string(), name)).collect()
}

fn report<T: Default + for<'a> Deserialize<'a>>(object: &ObjectRow) -> T {
    serde_json::from_str(&object.body).unwrap_or_default()
}

pub(super) async fn fleet(fleet: &Fleet, now: Timestamp) -> Result<FleetAnswer, StoreError> {
    let mut clusters: BTreeMap<String, ClusterSummary> = fleet
        .clusters()
        .values()
        .map(|found| {
            let cluster = cluster(found);
            let (backups, overdue, failed, coverage, restoring) = (0, 0, 0, None, 0);
            let summary = ClusterSummary { cluster, backups, overdue, failed, coverage, restoring };
            (found.id.to_string(), summary)
        })
        .collect();
    for (id, object) in fleet.store.objects(BACKUP, None).await? {
        let Some(summary) = clusters.get_mut(&id) else { continue };
        let backup: BackupReport = report(&object);
        summary.backups += 1;
        summary.overdue += usize::from(backup.is_overdue(now));
        summary.failed += usize::from(backup.has_failed());
    }
    for (id, object) in fleet.store.objects(COVERAGE, None).await? {
        let Some(summary) = clusters.get_mut(&id) else { continue };
        summary.coverage = Some(report(&object));
    }
    for (id, object) in fleet.store.objects(RESTORE, None).await? {
        let Some(summary) = clusters.get_mut(&id) else { continue };
        summary.restoring += usize::from(report::<RestoreReport>(&object).completed.is_none());
    }
    let policies = fleet.policies();
    let mut clusters: Vec<_> = clusters.into_values().collect();
    clusters.sort_by(|one, other| one.cluster.name.cmp(&other.cluster.name));
    Ok(FleetAnswer {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        store_id: fleet.store.id().to_string(),
        policies: policies.set.map(|set| set.len()),
        policies_read: policies.read,
        policies_error: policies.error,
        clusters,
    })
}

pub(super) async fn backups(
    fleet: &Fleet,
    query: &BackupQuery,
    now: Timestamp,
) -> Result<Vec<BackupAnswer>, FleetError> {
    let id = query.cluster.as_deref().map(|name| fleet.named(name)).transpose()?.map(|cluster| cluster.id);
    let names = names(fleet);
    let objects = fleet.store.objects(BACKUP, id).await?;
    let answer = |(id, object): (String, ObjectRow)| {
        let report: BackupReport = report(&object);
        let (overdue, failed) = (report.is_overdue(now), report.has_failed());
        let cluster = names.get(&id)?.clone();
        let is_wanted =
            !(query.overdue || query.failed) || (query.overdue && overdue) || (query.failed && failed);
        let key = object.key;
        is_wanted.then_some(BackupAnswer {
            cluster,
            namespace: key.namespace,
            name: key.name,
            overdue,
            failed,
            report,
        })
    };
    Ok(objects.into_iter().filter_map(answer).collect())
}

pub(super) async fn runs(
    fleet: &Fleet,
    cluster: Option<&str>,
    limit: u32,
) -> Result<Vec<RunAnswer>, FleetError> {
    let id = cluster.map(|name| fleet.named(name)).transpose()?.map(|cluster| cluster.id);
    let names = names(fleet);
    let history = fleet.store.history(BACKUP, id, limit).await?.into_iter();
    let answer = |(id, row): (String, crate::store::HistoryRow)| {
        let run = serde_json::from_str(&row.body).unwrap_or_default();
        let cluster = names.get(&id)?.clone();
        Some(RunAnswer { cluster, namespace: row.key.namespace, backup: row.key.name, run })
    };
    Ok(history.filter_map(answer).collect())
}

pub(super) async fn restores(fleet: &Fleet) -> Result<Vec<RestoreAnswer>, FleetError> {
    let names = names(fleet);
    let answer = |id: &str, namespace: String, name: String, body: &str| {
        let report = serde_json::from_str(body).unwrap_or_default();
        Some(RestoreAnswer { cluster: names.get(id)?.clone(), namespace, name, report })
    };
    let present = fleet.store.objects(RESTORE, None).await?;
    let mut all: Vec<_> = present
        .into_iter()
        .filter_map(|(id, row)| answer(&id, row.key.namespace, row.key.name, &row.body))
        .collect();
    let known: std::collections::BTreeSet<_> = all.iter().map(|restore| restore.report.uid.clone()).collect();
    for (id, row) in fleet.store.history(RESTORE, None, super::MOST).await? {
        if !known.contains(&row.uid) {
            all.extend(answer(&id, row.key.namespace, row.key.name, &row.body));
        }
    }
    Ok(all)
}

pub(super) fn policies(fleet: &Fleet) -> Vec<PolicyAnswer> {
    let mut policies: BTreeMap<String, PolicyAnswer> = BTreeMap::new();
    let blank = |name: &str, json: &[u8]| PolicyAnswer {
        name: name.to_owned(),
        spec: spec(json),
        active: Vec::new(),
        pending: Vec::new(),
        rejected: BTreeMap::new(),
    };
    if let Some(set) = fleet.policies().set {
        policies.extend(set.all().map(|(name, body)| (name.to_owned(), blank(name, &body.json))));
    }
    for (cluster, found) in fleet.clusters() {
        let state = found.state();
        let applied = state.applied.as_ref();
        let is_current = applied.is_some_and(|applied| {
            applied.revision == state.revision && applied.outcome == crate::fleet::ACTIVE
        });
        for (name, body) in &state.placed {
            let Some(body) = body else { continue };
            let policy = policies.entry(name.clone()).or_insert_with(|| blank(name, &body.json));
            if let Some(rejected) = applied.and_then(|applied| applied.rejected.get(name)) {
                policy.rejected.insert(cluster.clone(), format!("{}: {}", rejected.code, rejected.detail));
            } else if is_current {
                policy.active.push(cluster.clone());
            } else {
                policy.pending.push(cluster.clone());
            }
        }
    }
    policies.into_values().collect()
}
