//! The plugin's commands that keep, prune, delete and count recovery points, as a person runs them.

use anyhow::{Context, Result, ensure};
use kube::ResourceExt;
use serde::Deserialize;
use serde_json::{Value, json};
use sts_backup_api::backup::StatefulSetBackupSpec;
use sts_backup_api::names::{EXCLUDE_ANNOTATION, HOLD_LABEL};
use sts_backup_api::run::{RunId, RunRecord};
use sts_backup_e2e::kit::policy::{NEVER, change_set, create_idle_set};
use sts_backup_e2e::kit::{Backup, Namespace, Policy};

use crate::plugin::{plugin, plugin_answered};
use crate::with_app;

/// What `retention --dry-run` says of each point: its id, whether it stays, and why.
async fn verdicts(ns: &Namespace) -> Result<Vec<(RunId, bool, String)>> {
    #[derive(Deserialize)]
    struct Judged {
        id: RunId,
        keep: bool,
        why: String,
    }
    let said = plugin(ns, &["retention", "nightly", "--dry-run", "-o", "json"]).await?.ended_with(0)?;
    let judged = said.list::<Judged>("recoveryPoints")?;
    Ok(judged.into_iter().map(|Judged { id, keep, why }| (id, keep, why)).collect())
}

/// The runs that `history` shows, the newest first.
async fn history(ns: &Namespace) -> Result<Vec<RunRecord>> {
    plugin(ns, &["history", "nightly", "-o", "json"]).await?.ended_with(0)?.list("runs")
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn what_the_plugin_foretells_of_retention_the_agent_does() -> Result<()> {
    with_app("plugin", &[], async |ns, _app, _class| {
        let home = ns.name();
        let spec = json!({ "statefulSetRef": { "name": "app" }, "schedule": NEVER });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        for _ in 0..2 {
            plugin(ns, &["run", "nightly", "--wait"]).await?.ended_with(0)?;
        }
        let runs: Vec<RunId> = history(ns).await?.into_iter().map(|run| run.id).collect();
        let [new, old] = &runs[..] else { anyhow::bail!("two runs: {runs:?}") };

        // Nothing is pruned meanwhile.
        let said = plugin(ns, &["suspend", "nightly"]).await?.ended_with(0)?;
        ensure!(said.stdout.starts_with(&format!("{home}/nightly is suspended")), "{}", said.stdout);
        ensure!(said.stdout.contains("the next run would have been at "), "{}", said.stdout);
        let said = plugin(ns, &["run", "nightly"]).await?.ended_with(1)?;
        let remedy = format!("to do: kubectl stsbackup resume nightly -n {home}\n");
        ensure!(said.stderr.contains("is suspended") && said.stderr.ends_with(&remedy), "{}", said.stderr);
        backup.change(&json!({ "retentionPolicy": { "keepLast": 1 } })).await?;

        let stays = (new.clone(), true, "keepLast".to_owned());
        let goes = (old.clone(), false, "no rule keeps it".to_owned());
        ensure!(verdicts(ns).await? == [stays.clone(), goes.clone()], "{:?}", verdicts(ns).await?);
        let said = plugin(ns, &["retention", "nightly", "--dry-run"]).await?.ended_with(0)?;
        ensure!(said.stdout.contains("\n2 recovery points: 1 stay, 1 go (16Mi)\n"), "{}", said.stdout);
        for note in ["retentionPolicy: keepLast 1 (calendar of UTC)", "nothing is pruned until it is resumed"]
        {
            ensure!(said.stderr.contains(note), "{}", said.stderr);
        }
        let said = plugin(ns, &["retention", "nightly"]).await?.ended_with(2)?;
        ensure!(said.stderr.contains("to do: add --dry-run"), "{}", said.stderr);

        let held =
            format!("recovery point {old} of {home}/nightly is on hold: 1 of 1 VolumeSnapshot labelled");
        let said = plugin(ns, &["hold", "nightly", old.as_str()]).await?.ended_with(0)?;
        ensure!(said.stdout.starts_with(&held), "{}", said.stdout);
        let said = plugin(ns, &["hold", "nightly", old.as_str()]).await?.ended_with(0)?;
        ensure!(said.stdout.contains("was on hold already"), "{}", said.stdout);
        let snapshots = backup.snapshots_of(old).await?;
        ensure!(snapshots[0].labels().get(HOLD_LABEL).is_some_and(|hold| hold == "true"), "{snapshots:?}");
        ensure!(verdicts(ns).await? == [stays.clone(), (old.clone(), true, "on hold".to_owned())]);
        let said = plugin(ns, &["delete-points", "nightly", old.as_str(), "--yes"]).await?.ended_with(1)?;
        let remedy = format!("{old} is on hold: kubectl stsbackup release nightly {old} -n {home}\n");
        ensure!(said.stderr.ends_with(&remedy), "{}", said.stderr);

        let said = plugin(ns, &["release", "nightly", old.as_str()]).await?.ended_with(0)?;
        ensure!(said.stdout.contains("removed from 1 of 1 VolumeSnapshot"), "{}", said.stdout);
        ensure!(verdicts(ns).await? == [stays.clone(), goes], "{:?}", verdicts(ns).await?);
        let said = plugin(ns, &["resume", "nightly"]).await?.ended_with(0)?;
        ensure!(said.stdout.contains("\nthe next run begins at "), "{}", said.stdout);
        backup.await_points(std::slice::from_ref(new)).await?;
        ensure!(verdicts(ns).await? == [stays]);
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn points_go_when_somebody_says_yes_and_the_last_complete_one_by_force_only() -> Result<()> {
    with_app("plugin", &[], async |ns, _app, _class| {
        let backup = Backup::create(ns, "nightly", StatefulSetBackupSpec::new("app")).await?;
        let old = backup.await_runs(1).await?.id;
        plugin(ns, &["run", "nightly", "--wait"]).await?.ended_with(0)?;
        let runs = history(ns).await?;
        let new = runs[0].id.clone();
        let both = [new.clone(), old.clone()];
        ensure!(runs.iter().map(|run| &run.id).eq(&both), "{runs:?}");
        let said = plugin(ns, &["history", "nightly"]).await?.ended_with(0)?;
        for (run, due) in both.iter().zip([" request ", " creation "]) {
            let line = said.stdout.lines().find(|line| line.starts_with(run.as_str()));
            ensure!(line.is_some_and(|line| line.contains(due)), "{}", said.stdout);
        }

        let delete = ["delete-points", "nightly", old.as_str()];
        let said = plugin(ns, &delete).await?.ended_with(2)?;
        ensure!(said.stderr.contains("to do: --yes"), "{}", said.stderr);
        let said = plugin_answered(ns, &delete, "n").await?.ended_with(1)?;
        let question = format!(
            "Delete 1 recovery point (1 VolumeSnapshot) of {}/nightly in the cluster of context kind-{}, https://",
            ns.name(),
            ns.cluster().name()
        );
        ensure!(said.stderr.contains(&question) && said.stderr.contains("nothing was deleted"), "{}", said.stderr);
        backup.await_points(&both).await?;
        let said = plugin_answered(ns, &delete, "y").await?.ended_with(0)?;
        ensure!(said.stdout == format!("recovery point {old} deleted: 1 VolumeSnapshot\n"), "{}", said.stdout);
        backup.await_points(std::slice::from_ref(&new)).await?;
        let said = plugin(ns, &delete).await?.ended_with(2)?;
        ensure!(said.stderr.contains(&format!("has no recovery point {old}\n  to do: ")), "{}", said.stderr);

        // Nobody prunes what a backup has left behind: people have to.
        backup.remove().await?;
        let last = ["delete-points", "nightly", new.as_str(), "--yes"];
        let said = plugin(ns, &last).await?.ended_with(1)?;
        ensure!(said.stderr.contains("is the last complete recovery point: --force deletes it"), "{}", said.stderr);
        ensure!(backup.snapshots().await?.len() == 1, "it was deleted all the same");
        plugin(ns, &[&last[..], &["--force"]].concat()).await?.ended_with(0)?;
        backup.await_no_snapshots().await
    })
    .await
}

/// What `coverage` says of a `StatefulSet`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Covered {
    stateful_set: String,
    state: String,
    newest_point: Option<String>,
    policy: Option<String>,
    rpo: Option<String>,
}

async fn coverage(ns: &Namespace, arguments: &[&str]) -> Result<(Vec<Covered>, Value)> {
    let said = plugin(ns, &[&["coverage", "-o", "json"], arguments].concat()).await?.ended_with(0)?;
    let summary: Value = serde_json::from_str(&said.stdout)?;
    Ok((said.list("statefulSets")?, summary["summary"].clone()))
}

fn states(covered: &[Covered]) -> Vec<(&str, &str)> {
    covered.iter().map(|covered| (covered.stateful_set.as_str(), covered.state.as_str())).collect()
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn coverage_names_the_gaps_and_a_check_passes_once_they_are_closed() -> Result<()> {
    with_app("plugin", &[], async |ns, _app, _class| {
        for (name, labels) in [("bare", json!({})), ("gold", json!({ "tier": "gold" })), ("left", json!({}))]
        {
            create_idle_set(ns, name, &labels).await?;
        }
        let exclude = json!({ "annotations": { EXCLUDE_ANNOTATION: "true" } });
        change_set(ns, "left", &exclude).await?;
        let policy = json!({
            "rpo": "24h",
            "statefulSetSelector": { "matchLabels": { "tier": "gold" } },
            "template": { "spec": { "schedule": NEVER, "suspend": true } },
        });
        let policy = Policy::write(ns, "gold", &policy).await?;
        policy.await_backup("gold", "suspended", |backup| backup.spec.suspend).await?;
        let spec = json!({ "statefulSetRef": { "name": "app" }, "schedule": NEVER });
        Backup::write(ns, "nightly", &spec).await?;
        plugin(ns, &["run", "nightly", "--wait"]).await?.ended_with(0)?;

        let (covered, summary) = coverage(ns, &[]).await?;
        let expected =
            [("app", "Protected"), ("bare", "Unprotected"), ("gold", "Idle"), ("left", "Excluded")];
        ensure!(states(&covered) == expected, "{covered:?}");
        ensure!(covered[0].newest_point.is_some() && covered[0].policy.is_none(), "{covered:?}");
        let gold = &covered[2];
        ensure!(
            gold.policy.as_deref() == Some(policy.name()) && gold.rpo.as_deref() == Some("86400s"),
            "{gold:?}"
        );
        let sums = json!({
            "statefulSets": 3, "protected": 1, "idle": 1, "overdue": 0, "unprotected": 1, "excluded": 1,
        });
        ensure!(summary == sums, "{summary}");
        // The run is over: its point is older than that.
        let (covered, _) = coverage(ns, &["--rpo", "1ms"]).await?;
        ensure!(states(&covered)[0] == ("app", "Overdue"), "{covered:?}");
        let said = plugin(ns, &["coverage", "--fail"]).await?.ended_with(1)?;
        let sums = "\n3 StatefulSets: 1 protected, 1 idle, 1 unprotected; 1 excluded\n";
        ensure!(said.stdout.ends_with(sums), "{}", said.stdout);

        let name = policy.backup_name("gold");
        let said = plugin(ns, &["resume", &name]).await?.ended_with(1)?;
        let remedy = format!("kubectl edit statefulsetbackuppolicy {}\n", policy.name());
        ensure!(said.stderr.ends_with(&remedy), "{}", said.stderr);
        policy.change(&json!({ "template": { "spec": { "suspend": false } } })).await?;
        policy.await_backup("gold", "resumed", |backup| !backup.spec.suspend).await?;
        change_set(ns, "bare", &exclude).await?;
        let said = plugin(ns, &["coverage", "--fail"]).await?.ended_with(0)?;
        let sums = said.stdout.lines().last().context("it says the sums")?;
        ensure!(sums == "2 StatefulSets: 2 protected; 2 excluded", "{}", said.stdout);
        Ok(())
    })
    .await
}
