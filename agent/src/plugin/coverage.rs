//! `coverage`: which `StatefulSets` nothing protects, and which are overdue, as the agent's metrics count them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::ListParams;
use kube::core::PartialObjectMeta;
use kube::{Api, ResourceExt};
use serde::Serialize;
use serde_json::json;
use sts_backup_api::backup::{Span, StatefulSetBackup};
use sts_backup_api::coverage::{Protectee, SetName, coverage as judge};
use sts_backup_api::names::ALLOW_BACKUP_FROM_ANNOTATION;
use sts_backup_api::policy::StatefulSetBackupPolicy;
use sts_backup_service::clock;

use super::args::Coverage;
use super::cluster::{Cluster, Scope, list_all, understand};
use super::error::Error;
use super::{Exit, output};
use crate::policy::observe::{BackupFacts, KnownSet, World};
use sts_backup_service::table::{age, count, table};

/// How a `StatefulSet` fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum State {
    /// A backup that is not suspended names it, and it is not overdue.
    Protected,
    /// Only backups name it that begin no runs by themselves: suspended ones, or without a schedule.
    Idle,
    /// A backup that is not suspended names it, and its newest complete recovery point is older than the RPO.
    Overdue,
    /// No backup names it.
    Unprotected,
    /// It, or its namespace, is excluded from protection.
    Excluded,
}

impl State {
    const ALL: [Self; 5] = [Self::Protected, Self::Idle, Self::Overdue, Self::Unprotected, Self::Excluded];

    fn word(self) -> &'static str {
        match self {
            Self::Protected => "Protected",
            Self::Idle => "Idle",
            Self::Overdue => "Overdue",
            Self::Unprotected => "Unprotected",
            Self::Excluded => "Excluded",
        }
    }

    /// Whether something is to be done: what is Idle counts as unprotected, as in the metrics.
    fn is_gap(self) -> bool {
        match self {
            Self::Idle | Self::Overdue | Self::Unprotected => true,
            Self::Protected | Self::Excluded => false,
        }
    }
}

/// A `StatefulSet` with claims, and what protects it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Covered {
    namespace: String,
    stateful_set: String,
    state: State,
    /// Those that are not suspended first.
    backups: Vec<Backup>,
    /// The time of the newest complete recovery point.
    #[serde(skip_serializing_if = "Option::is_none")]
    newest_point: Option<MicroTime>,
    /// The policy that protects it.
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<String>,
    /// What it was judged by.
    #[serde(skip_serializing_if = "Option::is_none")]
    rpo: Option<Span>,
}

/// A backup that names a `StatefulSet`.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Backup {
    namespace: String,
    name: String,
    suspended: bool,
}

/// Shows what is protected and what is not.
pub(super) async fn coverage(cluster: &Cluster, how: &Coverage) -> Result<Exit, Error> {
    let scope = cluster.scope(how.all_namespaces);
    let world = observe(cluster, &scope, how).await?;
    let now = clock::now();
    let covered = covered(&world, how.rpo, now);
    match how.output {
        Some(format) => output::print(&output::data(&data(&covered), format)?)?,
        None if covered.is_empty() => output::complain(&nothing_in(&scope)),
        None => output::print(&render(&covered, now))?,
    }
    Ok(exit(&covered, how.fail))
}

/// With `--fail` a gap is a failure.
fn exit(covered: &[Covered], fail: bool) -> Exit {
    if fail && covered.iter().any(|covered| covered.state.is_gap()) { Exit::Failure } else { Exit::Success }
}

/// What of the cluster the answer is made from.
async fn observe(cluster: &Cluster, scope: &Scope, how: &Coverage) -> Result<World, Error> {
    let namespaces = namespaces(cluster, scope).await?;
    let what = format!("list StatefulSets in {}", scope.describe());
    let sets: Vec<KnownSet> = list_all(&cluster.api(scope), &ListParams::default(), &what).await?;
    let backups = backups(cluster, scope, &namespaces).await?;
    let policies = policies(cluster, how).await?;
    Ok(World::of(policies, backups, &sets, &namespaces))
}

/// The namespaces: what they exclude, and whose backups they let in.
async fn namespaces(cluster: &Cluster, scope: &Scope) -> Result<Vec<PartialObjectMeta<Namespace>>, Error> {
    let api = Api::all(cluster.client());
    match scope {
        Scope::All => list_all(&api, &ListParams::default(), "list Namespaces").await,
        Scope::Namespace(name) => {
            let found = api.get_opt(name).await;
            let found = found.map_err(|err| Error::of(&format!("read Namespace {name}"), None, err))?;
            Ok(found.into_iter().collect())
        }
    }
}

/// The backups that may be of `StatefulSets` there.
async fn backups(
    cluster: &Cluster,
    scope: &Scope,
    namespaces: &[PartialObjectMeta<Namespace>],
) -> Result<Vec<Arc<StatefulSetBackup>>, Error> {
    let lets_in = |namespace: &PartialObjectMeta<Namespace>| {
        namespace.annotations().contains_key(ALLOW_BACKUP_FROM_ANNOTATION)
    };
    let listed = if namespaces.iter().any(lets_in) {
        match cluster.backups(&Scope::All).await {
            Err(err @ Error::Forbidden { .. }) if *scope != Scope::All => {
                output::complain(&format!("backups of other namespaces are not counted: {}", err.brief()));
                cluster.backups(scope).await?
            }
            listed => listed?,
        }
    } else {
        cluster.backups(scope).await?
    };
    let mut backups = Vec::new();
    for object in &listed {
        match understand(object) {
            Ok(backup) => backups.push(Arc::new(backup)),
            // Made by a newer agent; the others count all the same.
            Err(err) => output::complain(&format!("not counted: {}", err.brief())),
        }
    }
    Ok(backups)
}

/// The policies, where their RPOs matter.
async fn policies(cluster: &Cluster, how: &Coverage) -> Result<Vec<Arc<StatefulSetBackupPolicy>>, Error> {
    if how.rpo.is_some() {
        return Ok(Vec::new());
    }
    let api = Api::all(cluster.client());
    match list_all(&api, &ListParams::default(), "list StatefulSetBackupPolicies").await {
        Ok(policies) => Ok(policies.into_iter().map(Arc::new).collect()),
        // They are of the cluster: who may view one namespace may not view them. A check must not pass for that.
        Err(err @ Error::Forbidden { .. }) if !how.fail => {
            output::complain(&format!(
                "nothing is overdue, as no rpo is known: {}\n  to do: name one by --rpo",
                err.brief()
            ));
            Ok(Vec::new())
        }
        Err(err) => Err(err),
    }
}

/// The `StatefulSets` with claims in the namespaces that are known, in order; each is judged by `rpo`, or else by that of
/// the policy that protects it.
fn covered<'w>(world: &'w World, rpo: Option<Duration>, now: Timestamp) -> Vec<Covered> {
    let mut backups: HashMap<SetName<'_>, Vec<&BackupFacts>> = HashMap::new();
    for backup in &world.backups {
        backups.entry(backup.protection().set).or_default().push(backup);
    }
    for of_set in backups.values_mut() {
        of_set.sort_unstable_by_key(|backup| (backup.object.spec.suspend, &backup.key));
    }
    let rpos: HashMap<&str, Duration> = world
        .policies
        .iter()
        .filter_map(|policy| Some((policy.uid.as_str(), policy.object.spec.rpo?.into())))
        .collect();
    let backups_of = |set: SetName<'w>| backups.get(&set).map_or(&[][..], Vec::as_slice);
    let owned_of =
        |set: SetName<'w>| backups_of(set).iter().find_map(|backup| Some((backup, backup.owner.as_ref()?)));
    let rpo_of = |set| rpo.or_else(|| owned_of(set).and_then(|(_, uid)| rpos.get(uid.as_str()).copied()));

    // One question for each RPO.
    let mut by_rpo: BTreeMap<Option<Duration>, Vec<Protectee<'_>>> = BTreeMap::new();
    for set in world.protectees() {
        by_rpo.entry(rpo_of(set.set)).or_default().push(set);
    }
    let (mut unprotected, mut overdue) = (BTreeSet::new(), BTreeSet::new());
    for (rpo, sets) in by_rpo {
        let found = judge(sets, world.protections(), rpo, now);
        unprotected.extend(found.unprotected);
        overdue.extend(found.overdue);
    }

    let shown = world.protectees().zip(world.sets.values()).filter(|(Protectee { set, .. }, facts)| {
        facts.has_claims && world.namespaces.contains_key(set.namespace)
    });
    let covered = shown.map(|(Protectee { set, excluded, created: _ }, _)| Covered {
        namespace: set.namespace.to_owned(),
        stateful_set: set.name.to_owned(),
        state: match (unprotected.contains(&set), backups_of(set)) {
            _ if excluded => State::Excluded,
            (true, []) => State::Unprotected,
            (true, _) => State::Idle,
            (false, _) if overdue.contains(&set) => State::Overdue,
            (false, _) => State::Protected,
        },
        backups: backups_of(set).iter().map(|backup| Backup::of(backup)).collect(),
        newest_point: backups_of(set).iter().filter_map(|backup| backup.newest).max().map(MicroTime),
        policy: owned_of(set).and_then(|(backup, _)| backup.from_policy.clone()),
        rpo: rpo_of(set).filter(|_| !excluded).map(Span::from),
    });
    covered.collect()
}

impl Backup {
    fn of(facts: &BackupFacts) -> Self {
        let (namespace, name) = facts.key.clone();
        Self { namespace, name, suspended: facts.object.spec.suspend }
    }

    /// With its namespace where that is not the `StatefulSet`'s.
    fn seen_from(&self, home: &str) -> String {
        let Self { namespace, name, suspended: _ } = self;
        if namespace == home { name.clone() } else { format!("{namespace}/{name}") }
    }
}

fn number(covered: &[Covered], state: State) -> usize {
    covered.iter().filter(|covered| covered.state == state).count()
}

fn data(covered: &[Covered]) -> serde_json::Value {
    json!({
        "statefulSets": covered,
        "summary": {
            "statefulSets": covered.len() - number(covered, State::Excluded),
            "protected": number(covered, State::Protected),
            "idle": number(covered, State::Idle),
            "overdue": number(covered, State::Overdue),
            "unprotected": number(covered, State::Unprotected),
            "excluded": number(covered, State::Excluded),
        },
    })
}

fn render(covered: &[Covered], now: Timestamp) -> String {
    let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    let row = |covered: &Covered| {
        let Covered { namespace, stateful_set, state, backups, newest_point, policy, rpo: _ } = covered;
        let names: Vec<_> = backups.iter().map(|backup| backup.seen_from(namespace)).collect();
        vec![
            namespace.clone(),
            stateful_set.clone(),
            state.word().to_owned(),
            or_dash(names.join(",")),
            newest_point.as_ref().map_or("-".to_owned(), |newest| age(newest.0, now)),
            or_dash(policy.clone().unwrap_or_default()),
        ]
    };
    let rows: Vec<_> = covered.iter().map(row).collect();
    let header = ["NAMESPACE", "STATEFULSET", "STATE", "BACKUP", "NEWEST-POINT", "POLICY"];
    format!("{}\n{}\n", table(&header, &rows), summary(covered))
}

/// How many there are of each state, the excluded apart: they are not to be protected.
fn summary(covered: &[Covered]) -> String {
    let excluded = number(covered, State::Excluded);
    let told = State::ALL.into_iter().filter(|state| *state != State::Excluded);
    let told = told.map(|state| (number(covered, state), state)).filter(|(number, _)| *number > 0);
    let told: Vec<_> =
        told.map(|(number, state)| format!("{number} {}", state.word().to_lowercase())).collect();
    let sets = count(covered.len() - excluded, "StatefulSet");
    let states = if told.is_empty() { String::new() } else { format!(": {}", told.join(", ")) };
    let rest = if excluded > 0 { format!("; {excluded} excluded") } else { String::new() };
    format!("{sets}{states}{rest}")
}

/// Where was looked, and where else to look.
fn nothing_in(scope: &Scope) -> String {
    let elsewhere = match scope {
        Scope::All => "",
        Scope::Namespace(_) => "\n  kubectl stsbackup coverage -A looks in all namespaces",
    };
    format!("No StatefulSet with volumeClaimTemplates in {}.{elsewhere}", scope.describe())
}

#[cfg(test)]
#[path = "coverage_tests.rs"]
mod tests;
