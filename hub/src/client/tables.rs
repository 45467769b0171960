//! Answers as people read them.

use std::fmt::Write as _;

use jiff::Timestamp;
use sts_backup_api::report::CoverageReport;
use sts_backup_service::clock;
use sts_backup_service::table::{age, second, span, table};

use crate::api::{
    AuditEntry, BackupAnswer, ClusterAnswer, ClusterDetail, FleetAnswer, PolicyAnswer, RestoreAnswer,
    RunAnswer,
};
use crate::fleet::ACTIVE;

/// Rows below a head; without rows it says that there are none.
fn rows<T>(head: &[&str], items: &[T], row: impl FnMut(&T) -> Vec<String>) -> String {
    if items.is_empty() {
        return "none\n".to_owned();
    }
    table(head, &items.iter().map(row).collect::<Vec<_>>())
}

fn ago(time: Option<Timestamp>) -> String {
    time.map_or_else(|| "-".to_owned(), |time| age(time, clock::now()))
}

fn at(time: Option<Timestamp>) -> String {
    time.map_or_else(|| "-".to_owned(), second)
}

fn text(text: Option<&str>) -> String {
    text.filter(|text| !text.is_empty()).unwrap_or("-").to_owned()
}

/// What of its policies a cluster has.
fn policies_of(cluster: &ClusterAnswer) -> String {
    let Some(applied) = &cluster.applied else {
        return if cluster.revision == 0 { "none".to_owned() } else { "Pending".to_owned() };
    };
    if applied.outcome == ACTIVE && applied.revision < cluster.revision {
        return "Pending".to_owned();
    }
    match applied.rejected.len() {
        0 => applied.outcome.clone(),
        count => format!("{}, {count} rejected", applied.outcome),
    }
}

/// How many `StatefulSets` of all that there are.
fn protected_of(CoverageReport { stateful_sets, unprotected, .. }: &CoverageReport) -> String {
    format!("{}/{stateful_sets}", stateful_sets.saturating_sub(*unprotected))
}

pub(super) fn clusters(clusters: &[ClusterAnswer]) -> String {
    rows(&["NAME", "STATE", "FOR", "AGENT", "POLICIES", "LABELS", "ID"], clusters, |cluster| {
        let labels: Vec<_> = cluster.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        vec![
            cluster.name.clone(),
            cluster.state.clone(),
            ago(cluster.since),
            text(cluster.agent.as_ref().map(|agent| &*agent.agent_version)),
            policies_of(cluster),
            text(Some(&labels.join(","))),
            cluster.id.clone(),
        ]
    })
}

pub(super) fn cluster(detail: &ClusterDetail) -> String {
    let mut said = clusters(std::slice::from_ref(&detail.cluster));
    let applied = detail.cluster.applied.as_ref();
    if let Some(applied) = applied.filter(|applied| !applied.detail.is_empty()) {
        let _ = writeln!(said, "\n{} at revision {}: {}", applied.outcome, applied.revision, applied.detail);
    }
    if detail.cluster.flapping {
        said += "\nSeveral agents connect as this cluster: revoke it, and issue new certificates.\n";
    }
    if let Some(coverage) = &detail.coverage {
        let _ = writeln!(said, "\n{} StatefulSets are protected", protected_of(coverage));
        let named = coverage.first_unprotected.len();
        for set in &coverage.first_unprotected {
            let _ = writeln!(said, "  unprotected: {set}");
        }
        if coverage.unprotected > named {
            let _ = writeln!(said, "  and {} more", coverage.unprotected - named);
        }
    }
    said += "\n";
    let names: Vec<_> = detail.policies.keys().collect();
    let listed = rows(&["POLICY", "STATE", "WHY"], &names, |name| {
        let rejected = applied.and_then(|applied| applied.rejected.get(*name));
        let is_current = applied
            .is_some_and(|applied| applied.revision == detail.cluster.revision && applied.outcome == ACTIVE);
        let (state, why) = match rejected {
            Some(rejected) => ("Rejected", format!("{}: {}", rejected.code, rejected.detail)),
            None if is_current => ("Active", "-".to_owned()),
            None => ("Pending", "-".to_owned()),
        };
        vec![(*name).clone(), state.to_owned(), why]
    });
    let _ = write!(said, "{listed}");
    said
}

pub(super) fn fleet(fleet: &FleetAnswer) -> String {
    let head =
        &["CLUSTER", "STATE", "FOR", "POLICIES", "PROTECTED", "BACKUPS", "OVERDUE", "FAILED", "RESTORING"];
    let listed = rows(head, &fleet.clusters, |one| {
        vec![
            one.cluster.name.clone(),
            one.cluster.state.clone(),
            ago(one.cluster.since),
            policies_of(&one.cluster),
            one.coverage.as_ref().map_or_else(|| "-".to_owned(), protected_of),
            one.backups.to_string(),
            one.overdue.to_string(),
            one.failed.to_string(),
            one.restoring.to_string(),
        ]
    });
    let policies = match (&fleet.policies_error, fleet.policies) {
        (Some(error), Some(count)) => {
            format!("{count}, as of {}, for the newest cannot be used: {error}", at(fleet.policies_read))
        }
        (Some(error), None) => format!("as they were placed, for they cannot be used: {error}"),
        (None, count) => count.unwrap_or_default().to_string(),
    };
    format!("{listed}\nFleet policies: {policies}\n")
}

pub(super) fn backups(backups: &[BackupAnswer]) -> String {
    let head =
        &["CLUSTER", "NAMESPACE", "BACKUP", "SCHEDULE", "LAST POINT", "NEXT", "POINTS", "STATE", "WHY"];
    rows(head, backups, |backup| {
        let report = &backup.report;
        let newest = report.runs.last();
        let state = match (backup.failed, backup.overdue, report.suspended) {
            (true, true, _) => "Failed, overdue",
            (true, false, _) => "Failed",
            (false, true, _) => "Overdue",
            (false, false, true) => "Suspended",
            (false, false, false) if report.running => "Running",
            (false, false, false) => "Ok",
        };
        vec![
            backup.cluster.clone(),
            backup.namespace.clone(),
            backup.name.clone(),
            text(report.schedule.as_deref()),
            ago(report.last_success),
            at(report.next),
            report.points.to_string(),
            state.to_owned(),
            text(newest.filter(|_| backup.failed).map(|run| &*run.message)),
        ]
    })
}

pub(super) fn runs(runs: &[RunAnswer]) -> String {
    let head = &["CLUSTER", "NAMESPACE", "BACKUP", "RUN", "STARTED", "TOOK", "FROZEN", "RESULT", "REASON"];
    rows(head, runs, |answer| {
        let run = &answer.run;
        vec![
            answer.cluster.clone(),
            answer.namespace.clone(),
            answer.backup.clone(),
            run.id.clone(),
            at(Some(run.started)),
            span(run.duration_ms),
            run.freeze_ms.map_or_else(|| "-".to_owned(), span),
            run.result.clone(),
            text(Some(&run.reason)),
        ]
    })
}

pub(super) fn restores(restores: &[RestoreAnswer]) -> String {
    let head =
        &["CLUSTER", "NAMESPACE", "RESTORE", "STATEFULSET", "PHASE", "STARTED", "DOWN S", "UNDO UNTIL"];
    rows(head, restores, |answer| {
        let report = &answer.report;
        vec![
            answer.cluster.clone(),
            answer.namespace.clone(),
            answer.name.clone(),
            report.stateful_set.clone(),
            text(Some(&report.phase)),
            at(report.started),
            report.downtime_seconds.map_or_else(|| "-".to_owned(), |seconds| seconds.to_string()),
            at(report.rollback_until),
        ]
    })
}

pub(super) fn policies(policies: &[PolicyAnswer]) -> String {
    rows(&["NAME", "ACTIVE", "PENDING", "REJECTED"], policies, |policy| {
        vec![
            policy.name.clone(),
            policy.active.len().to_string(),
            policy.pending.len().to_string(),
            policy.rejected.len().to_string(),
        ]
    })
}

pub(super) fn policy(policy: &PolicyAnswer) -> String {
    let spec = serde_saphyr::to_string(&policy.spec).unwrap_or_else(|_| policy.spec.to_string());
    let mut clusters: Vec<(&str, &str, &str)> =
        policy.active.iter().map(|cluster| (&**cluster, "Active", "-")).collect();
    clusters.extend(policy.pending.iter().map(|cluster| (&**cluster, "Pending", "-")));
    clusters.extend(policy.rejected.iter().map(|(cluster, why)| (&**cluster, "Rejected", &**why)));
    clusters.sort_unstable();
    let listed = rows(&["CLUSTER", "STATE", "WHY"], &clusters, |(cluster, state, why)| {
        vec![(*cluster).to_owned(), (*state).to_owned(), (*why).to_owned()]
    });
    format!("{}\n\n{listed}", spec.trim_end())
}

pub(super) fn diff(policies: &[PolicyAnswer]) -> String {
    let differences = policies.iter().flat_map(|policy| {
        let row = |cluster: &str, state: &str, why: &str| {
            vec![cluster.to_owned(), policy.name.clone(), state.to_owned(), why.to_owned()]
        };
        let pending = policy.pending.iter().map(move |cluster| row(cluster, "Pending", "-"));
        pending.chain(policy.rejected.iter().map(move |(cluster, why)| row(cluster, "Rejected", why)))
    });
    rows(&["CLUSTER", "POLICY", "STATE", "WHY"], &differences.collect::<Vec<_>>(), Clone::clone)
}

pub(super) fn audit(entries: &[AuditEntry]) -> String {
    rows(&["AT", "ACTION", "OBJECT", "DETAIL"], entries, |entry| {
        vec![at(Some(entry.at)), entry.action.clone(), entry.object.clone(), entry.detail.clone()]
    })
}
