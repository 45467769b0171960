//! `suspend` and `resume`: whether runs begin.

use jiff::Timestamp;
use kube::api::Patch;
use kube::{Api, ResourceExt};
use serde_json::json;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::names::FROM_POLICY_LABEL;
use sts_backup_api::policy::StatefulSetBackupPolicy;
use sts_backup_api::schedule::Timetable;
use sts_backup_service::clock;

use super::cluster::{Cluster, patch_params, understand};
use super::error::Error;
use super::timing::coming;
use super::{Exit, output};
use sts_backup_service::table::lines;

/// Begins no further runs.
pub(super) async fn suspend(cluster: &Cluster, name: &str) -> Result<Exit, Error> {
    set(cluster, name, true).await
}

/// Begins runs again.
pub(super) async fn resume(cluster: &Cluster, name: &str) -> Result<Exit, Error> {
    set(cluster, name, false).await
}

async fn set(cluster: &Cluster, name: &str, suspend: bool) -> Result<Exit, Error> {
    let backup = cluster.backup(name).await?;
    if !suspend && let Some(policy) = backup.labels().get(FROM_POLICY_LABEL) {
        may_resume(cluster, &backup, policy).await?;
    }
    if backup.spec.suspend != suspend {
        let namespace = cluster.namespace();
        let api = cluster.whole::<StatefulSetBackup>(&cluster.scope(false));
        let object = format!("StatefulSetBackup {namespace}/{name}");
        let what = if suspend { "suspend" } else { "resume" };
        let patch = Patch::Merge(json!({ "spec": { "suspend": suspend } }));
        let patched = api.patch(name, &patch_params(), &patch).await;
        understand::<StatefulSetBackup>(
            &patched
                .map_err(|err| Error::of(&format!("{what} {object}"), Some((namespace, &object)), err))?,
        )?;
    }
    output::print(&said(&backup, suspend, clock::now()))?;
    Ok(Exit::Success)
}

/// Whether a policy's backup stays resumed: people may suspend one, and resume it, unless the template suspends all.
async fn may_resume(cluster: &Cluster, backup: &StatefulSetBackup, policy: &str) -> Result<(), Error> {
    let policies: Api<StatefulSetBackupPolicy> = Api::all(cluster.client());
    match policies.get_opt(policy).await {
        Ok(Some(found)) => refusal(backup, &found).map_or(Ok(()), Err),
        Ok(None) => Ok(()),
        // Who may not read policies may still resume a backup.
        Err(err) => {
            let what = format!("read StatefulSetBackupPolicy {policy}");
            let why = Error::of(&what, None, err).brief();
            output::complain(&format!(
                "{why}; if its template suspends, the agent suspends this backup again"
            ));
            Ok(())
        }
    }
}

/// Why a policy's backup cannot be resumed.
fn refusal(backup: &StatefulSetBackup, policy: &StatefulSetBackupPolicy) -> Option<Error> {
    let template = policy.spec.template.spec_for(&backup.spec.stateful_set_ref.name);
    let (namespace, name) = (backup.namespace().unwrap_or_default(), backup.name_any());
    let policy = policy.name_any();
    template.suspend.then(|| Error::Ended {
        exit: Exit::Failure,
        message: format!(
            "{namespace}/{name} is not resumed: the template of StatefulSetBackupPolicy {policy} suspends all backups of the \
             policy"
        ),
        remedy: Some(format!(
            "set spec.template.spec.suspend to false there: kubectl edit statefulsetbackuppolicy {policy}"
        )),
    })
}

/// What was and what is; `backup` is as it was before.
fn said(backup: &StatefulSetBackup, suspend: bool, now: Timestamp) -> String {
    let name = format!("{}/{}", backup.namespace().unwrap_or_default(), backup.name_any());
    let status = backup.status.as_ref();
    let mut said = vec![match (backup.spec.suspend, suspend) {
        (false, true) => format!("{name} is suspended: no further run begins"),
        (true, true) => format!("{name} was suspended already"),
        (true, false) => format!("{name} is resumed: what was due meanwhile is not caught up with"),
        (false, false) => format!("{name} was not suspended"),
    }];
    if suspend {
        let run = status.and_then(|status| status.current_run.as_ref());
        said.extend(run.map(|run| format!("run {} is under way, and is finished", run.id)));
        let next = status.and_then(|status| status.next_schedule_time.as_ref());
        let next = next.filter(|_| !backup.spec.suspend);
        said.extend(next.map(|next| format!("the next run would have been at {}", coming(next.0, now))));
    } else {
        said.push(next_run(backup, now));
    }
    lines(said)
}

/// When the next run begins once the backup is not suspended.
fn next_run(backup: &StatefulSetBackup, now: Timestamp) -> String {
    match Timetable::of(&backup.spec, &backup.uid().unwrap_or_default()) {
        Ok(None) => "it has no schedule: runs begin when they are asked for".to_owned(),
        Ok(Some(timetable)) => match timetable.look(now, now).next {
            Some(next) => format!("the next run begins at {}", coming(next, now)),
            None => "its schedule has no further time".to_owned(),
        },
        Err(err) => format!("but no run begins by itself: {err}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn backup(spec: &Value, status: &Value) -> StatefulSetBackup {
        let mut spec = spec.clone();
        spec["statefulSetRef"] = json!({ "name": "db" });
        serde_json::from_value(json!({
            "metadata": { "name": "nightly", "namespace": "shop", "uid": "uid-1" }, "spec": spec, "status": status,
        }))
        .unwrap()
    }

    fn told(spec: &Value, status: &Value, suspend: bool) -> String {
        said(&backup(spec, status), suspend, "2026-02-03T00:00:00Z".parse().unwrap())
    }

    #[test]
    fn suspending_says_what_goes_on_and_what_does_not_come() {
        let status = json!({
            "nextScheduleTime": "2026-02-03T02:00:00Z",
            "currentRun": { "id": "run-1", "slot": { "due": "Request", "value": "x", "attempt": 1 },
                "step": "Readying", "started": "2026-02-02T23:59:00.000000Z" },
        });
        assert_eq!(
            told(&json!({ "schedule": "0 2 * * *" }), &status, true),
            "shop/nightly is suspended: no further run begins\n\
             run run-1 is under way, and is finished\n\
             the next run would have been at 2026-02-03T02:00:00Z (in 120m)\n"
        );
        assert_eq!(
            told(&json!({ "schedule": "0 2 * * *", "suspend": true }), &json!({}), true),
            "shop/nightly was suspended already\n"
        );
    }

    #[test]
    fn a_backup_is_not_resumed_against_the_template_of_its_policy() {
        let policy = |template: &Value| -> StatefulSetBackupPolicy {
            let object =
                json!({ "metadata": { "name": "gold" }, "spec": { "template": { "spec": template } } });
            serde_json::from_value(object).unwrap()
        };
        let backup = backup(&json!({ "suspend": true }), &json!({}));
        assert!(refusal(&backup, &policy(&json!({}))).is_none());
        assert!(refusal(&backup, &policy(&json!({ "suspend": false }))).is_none());
        let refused = refusal(&backup, &policy(&json!({ "suspend": true }))).unwrap();
        assert_eq!(refused.exit(), Exit::Failure);
        assert_eq!(
            refused.to_text(),
            "error: shop/nightly is not resumed: the template of StatefulSetBackupPolicy gold suspends all backups of the \
             policy\n  to do: set spec.template.spec.suspend to false there: kubectl edit statefulsetbackuppolicy gold"
        );
    }

    #[test]
    fn resuming_says_when_the_next_run_begins() {
        let resumed = "shop/nightly is resumed: what was due meanwhile is not caught up with\n";
        assert_eq!(
            told(
                &json!({ "schedule": "0 2 * * *", "timeZone": "Europe/Paris", "suspend": true }),
                &json!({}),
                false
            ),
            format!("{resumed}the next run begins at 2026-02-03T01:00:00Z (in 60m)\n")
        );
        assert_eq!(
            told(&json!({ "suspend": true }), &json!({}), false),
            format!("{resumed}it has no schedule: runs begin when they are asked for\n")
        );
        assert!(
            told(&json!({ "schedule": "at noon", "suspend": true }), &json!({}), false)
                .contains("\nbut no run begins by itself: schedule \"at noon\": ")
        );
        assert_eq!(
            told(&json!({ "schedule": "0 2 * * *" }), &json!({}), false),
            "shop/nightly was not suspended\nthe next run begins at 2026-02-03T02:00:00Z (in 120m)\n"
        );
    }
}
