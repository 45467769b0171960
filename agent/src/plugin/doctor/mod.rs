//! `doctor`: checks everything that backups need. It changes nothing.
//!
//! [`observe`] reads the cluster; the checks are pure functions of what it read and the present time.

mod backup_checks;
mod cluster_checks;
mod observe;
mod rights_checks;
mod sidecar_checks;

use serde::Serialize;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_service::clock;

use super::args::{DataFormat, Doctor};
use super::cluster::{Cluster, Scope, understand};
use super::error::Error;
use super::{Exit, output};
use sts_backup_service::table::lines;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
enum Level {
    /// As it should be.
    Ok,
    /// It may go wrong, or could not be checked.
    Warn,
    /// It goes wrong.
    Fail,
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    level: Level,
    /// What was looked at: its kind and name.
    object: String,
    /// What is the matter with it.
    reason: String,
    /// What to do about it; absent when all is well, or when the reason says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn ok(object: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { level: Level::Ok, object: object.into(), reason: reason.into(), remedy: None }
    }

    fn warn(object: impl Into<String>, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::bad(Level::Warn, object, reason, remedy)
    }

    fn fail(object: impl Into<String>, reason: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::bad(Level::Fail, object, reason, remedy)
    }

    fn bad(
        level: Level,
        object: impl Into<String>,
        reason: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { level, object: object.into(), reason: reason.into(), remedy: Some(remedy.into()) }
    }

    /// Something that may not or could not be read.
    fn unread(object: impl Into<String>, why: &str) -> Self {
        Self::warn(
            object,
            format!("not checked: {why}"),
            "ask the administrator of the cluster to run this check",
        )
    }
}

/// What was read, or why not.
type Read<T> = Result<T, String>;

/// Checks the cluster and the backups that are asked for.
pub(super) async fn doctor(cluster: &Cluster, how: &Doctor) -> Result<Exit, Error> {
    let facts = observe::cluster_facts(cluster).await;
    let mut findings = cluster_checks::check_cluster(&facts, clock::now());

    let scope = cluster.scope(how.all_namespaces);
    let mut backups = Vec::new();
    let of_cluster = findings.len();
    if cluster_checks::serves_backups(&facts) {
        for object in objects(cluster, &scope, how.name.as_deref()).await {
            match object {
                Ok(backup) => backups.push(backup),
                // Everything else can still be checked.
                Err(err @ (Error::Forbidden { .. } | Error::Unreadable { .. })) => {
                    findings.push(Finding::unread("StatefulSetBackup", &err.brief()));
                }
                Err(err) => return Err(err),
            }
        }
    }
    if backups.is_empty() && findings.len() == of_cluster {
        findings.push(Finding::ok("StatefulSetBackups", format!("none to check in {}", scope.describe())));
    }
    let hooked = |backup: &StatefulSetBackup| {
        backup.spec.pre_backup_hook.is_some() || backup.spec.post_backup_hook.is_some()
    };
    let needed = rights_checks::needed(backups.iter().any(hooked));
    for account in rights_checks::accounts(facts.deployments.as_deref().unwrap_or_default()) {
        let missing = observe::missing_rights(cluster, &account, needed.clone()).await;
        findings.push(rights_checks::check_rights(&account, &missing));
    }
    for backup in &backups {
        let target = observe::target(cluster, backup).await;
        findings.extend(backup_checks::check_backup(backup, &target, clock::now()));
    }

    let text = match how.output {
        Some(_json) => output::data(&serde_json::json!({ "findings": findings }), DataFormat::Json)?,
        None => render(&findings),
    };
    output::print(&text)?;
    let broken = findings.iter().any(|finding| finding.level == Level::Fail);
    Ok(if broken { Exit::Failure } else { Exit::Success })
}

/// The backups that are asked for, or what keeps them from being read.
async fn objects(
    cluster: &Cluster,
    scope: &Scope,
    name: Option<&str>,
) -> Vec<Result<StatefulSetBackup, Error>> {
    if let Some(name) = name {
        return vec![cluster.backup(name).await];
    }
    match cluster.backups(scope).await {
        Ok(objects) => objects.iter().map(understand).collect(),
        Err(err) => vec![Err(err)],
    }
}

/// A line for each finding with its remedy below, and how many there are of each level.
fn render(findings: &[Finding]) -> String {
    let mut said = Vec::new();
    for Finding { level, object, reason, remedy } in findings {
        said.push(format!("{:<4}  {object}: {reason}", level.word()));
        if let Some(remedy) = remedy {
            said.push(format!("      to do: {remedy}"));
        }
    }
    let number = |level| findings.iter().filter(|finding| finding.level == level).count();
    let [ok, warn, fail] = [Level::Ok, Level::Warn, Level::Fail].map(number);
    said.extend([String::new(), format!("{ok} OK, {warn} WARN, {fail} FAIL")]);
    lines(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_a_line_each_with_their_remedy_below() {
        let findings = [
            Finding::ok("snapshot.storage.k8s.io/v1", "served"),
            Finding::warn("Lease sts-backup-agent", "stale", "look at it"),
            Finding::fail("StatefulSet shop/db", "does not exist", "create it"),
        ];
        assert_eq!(
            render(&findings),
            "OK    snapshot.storage.k8s.io/v1: served\n\
             WARN  Lease sts-backup-agent: stale\n      to do: look at it\n\
             FAIL  StatefulSet shop/db: does not exist\n      to do: create it\n\
             \n1 OK, 1 WARN, 1 FAIL\n"
        );
    }

    #[test]
    fn programs_read_the_same() {
        let finding = Finding::unread("Leases", "forbidden");
        assert_eq!(
            serde_json::to_value(finding).unwrap(),
            serde_json::json!({
                "level": "WARN", "object": "Leases", "reason": "not checked: forbidden",
                "remedy": "ask the administrator of the cluster to run this check",
            })
        );
    }
}
