//! Hooks in real pods: where they run, what their failures mean, and that a thaw comes in every case.
//!
//! A pre hook leaves a line in `/dev/shm/pre` of its pod, a post hook in `/dev/shm/post`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use sts_backup_api::backup::StatefulSetBackupStatus;
use sts_backup_api::conditions::{LAST_BACKUP_SUCCEEDED, THAWED};
use sts_backup_api::run::{Consistency, RunResult, RunStep};
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_e2e::condition::{await_none, snapshot_ready};
use sts_backup_e2e::kit::agent::Agent;
use sts_backup_e2e::kit::class::create_snapshot_class;
use sts_backup_e2e::kit::{App, Backup, Cluster, Namespace, with_temp_namespace};

/// A snapshot is ready at its latest: twelve seconds after it was asked for, and some of the machine's.
const SNAPSHOTS_TIMEOUT: Duration = Duration::from_mins(1);

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn one_failed_pre_hook_fails_the_run_or_lowers_its_consistency_and_every_pod_is_thawed() -> Result<()> {
    with_app(3, async |ns, app| {
        let mut pre = noting("pre; case $HOSTNAME in *-1) exit 3; esac");
        let spec = |pre: &Value| hooked(pre, &noting("post"));
        let backup = Backup::write(ns, "strict", &spec(&pre)).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Failed, "{record:?}");
        ensure!(record.reason == "PreBackupHookFailed", "{record:?}");
        ensure!(record.message.contains("pod app-1: exit code 3"), "{record:?}");
        backup.await_condition(LAST_BACKUP_SUCCEEDED, "False", "PreBackupHookFailed").await?;
        backup.await_condition(THAWED, "True", "Thawed").await?;
        backup.await_event("PreBackupHookFailed").await?;
        backup.await_event("BackupFailed").await?;
        backup.await_no_snapshots().await?;
        for ordinal in 0..3 {
            ensure!(lines(app, ordinal, "pre").await? == ["main"], "the pre hook ran more than once");
            ensure!(!lines(app, ordinal, "post").await?.is_empty(), "{ordinal} was not thawed");
        }

        pre["onError"] = json!("Continue");
        let backup = Backup::write(ns, "lenient", &spec(&pre)).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        let status = backup.status().await?;
        let [point] = &status.recovery_points[..] else { anyhow::bail!("{status:?}") };
        ensure!(point.complete && point.consistency == Consistency::CrashPerVolume, "{point:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_hook_runs_in_the_container_it_names_else_in_the_pod_s_default_one() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "hooks", async |ns| {
        let app = App::new(ns, "app").replicas(2).default_container("side");
        app.deploy().await?;
        let (mut pre, mut post) = (noting("pre"), noting("post"));
        pre["pods"] = json!("First");
        post["containerName"] = json!("main");
        let backup = Backup::write(ns, "nightly", &hooked(&pre, &post)).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        let status = backup.status().await?;
        ensure!(status.recovery_points[0].consistency == Consistency::Application, "{status:?}");
        ensure!(lines(&app, 0, "pre").await? == ["side"], "not in the default container");
        ensure!(lines(&app, 1, "pre").await?.is_empty(), "First ran in the second pod");
        for ordinal in 0..2 {
            ensure!(lines(&app, ordinal, "post").await? == ["main"], "not in the named container");
        }
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_pod_whose_pre_hook_may_still_run_is_thawed_at_once_and_again_after_its_timeout() -> Result<()> {
    with_app(1, async |ns, app| {
        let mut pre = noting("pre; sleep 600");
        pre["timeoutSeconds"] = json!(2);
        let backup = Backup::write(ns, "nightly", &hooked(&pre, &noting("post"))).await?;
        let due = backup.await_condition(THAWED, "False", "ThawDue").await?;
        ensure!(due.message.contains("app-0"), "{due:?}");
        let once = lines(app, 0, "post").await?.len();
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Failed, "{record:?}");
        ensure!(record.reason == "PreBackupHookFailed", "{record:?}");
        ensure!(record.message.contains("pod app-0: no end was seen within 2 s"), "{record:?}");
        let twice = lines(app, 0, "post").await?.len();
        ensure!(once >= 1 && twice > once, "thawed {once} times at once and {twice} times in all");
        backup.await_condition(THAWED, "True", "Thawed").await?;
        backup.await_no_snapshots().await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_thaw_that_fails_is_said_and_repeated_until_it_succeeds_or_the_hook_is_corrected() -> Result<()> {
    with_app(1, async |ns, app| {
        let post = hook("[ -e /dev/shm/thaws ] || exit 7");
        let backup = Backup::write(ns, "nightly", &hooked(&noting("pre"), &post)).await?;
        let failed = backup.await_condition(THAWED, "False", "ThawFailed").await?;
        ensure!(failed.message.contains("app-0: exit code 7"), "{failed:?}");
        ensure!(failed.message.contains("Thaw by hand, or correct postBackupHook"), "{failed:?}");
        backup.await_event("ThawFailed").await?;
        let status = backup.status().await?;
        ensure!(status.current_run.is_some_and(|run| run.step == RunStep::Thawing), "it went on");
        app.sh(0, "touch /dev/shm/thaws").await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        backup.await_condition(THAWED, "True", "Thawed").await?;

        // The other way out is the one that the message names.
        app.sh(0, "rm /dev/shm/thaws").await?;
        backup.request("the hook is corrected").await?;
        backup.await_condition(THAWED, "False", "ThawFailed").await?;
        let corrected = Patch::Merge(json!({ "spec": { "postBackupHook": noting("post") } }));
        backup.api().patch("nightly", &PatchParams::default(), &corrected).await?;
        let record = backup.await_runs(2).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        ensure!(!lines(app, 0, "post").await?.is_empty(), "the corrected hook did not run");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_thaw_that_fails_is_owed_no_longer_than_its_pod_exists() -> Result<()> {
    with_app(1, async |ns, _app| {
        // A pod that is new when the hooks have just started may be the frozen one: this freeze is older.
        let class = create_snapshot_class(ns, &[("cutDelay", "7s")]).await?;
        let mut spec = hooked(&noting("pre"), &hook("exit 7"));
        spec["volumeSnapshotClassName"] = json!(class);
        let backup = Backup::write(ns, "nightly", &spec).await?;
        backup.await_condition(THAWED, "False", "ThawFailed").await?;
        ns.api::<Pod>().delete("app-0", &DeleteParams::default()).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        backup.await_condition(THAWED, "True", "Thawed").await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_backup_that_is_torn_away_in_its_freeze_is_thawed_before_the_next_of_its_set_begins() -> Result<()>
{
    with_app(1, async |ns, app| {
        let class = create_snapshot_class(ns, &[("cutDelay", "12s")]).await?;
        let log = |word: &str| hook(&format!("echo {word} >>/dev/shm/log"));
        let mut spec = hooked(&log("frozen"), &log("thawed"));
        spec["volumeSnapshotClassName"] = json!(class);
        let torn = Backup::write(ns, "torn", &spec).await?;
        let is_frozen = |status: &StatefulSetBackupStatus| {
            status.current_run.as_ref().is_some_and(|run| run.step == RunStep::Frozen)
        };
        torn.await_status("frozen", is_frozen).await?;
        let next = Backup::write(ns, "next", &hooked(&log("next"), &hook("true"))).await?;
        let is_behind = |status: &StatefulSetBackupStatus| {
            status.conditions.iter().any(|condition| condition.message.contains("torn"))
        };
        next.await_status("behind the other", is_behind).await?;

        // Nothing of it is left that an agent could look at.
        let unheld = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
        torn.api().patch(torn.name(), &PatchParams::default(), &unheld).await?;
        torn.delete().await?;
        let record = next.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        let mut log = lines(app, 0, "log").await?;
        // A thaw of which it is not known that it was done is done again.
        log.dedup();
        ensure!(log == ["frozen", "thawed", "next"], "{log:?}");
        // The snapshot of the torn one, which nobody waits for, is to be gone or whole before its namespace goes.
        let is_under_way = |snapshot: &VolumeSnapshot| !snapshot_ready(snapshot);
        await_none(&ns.api(), "unready snapshots", SNAPSHOTS_TIMEOUT, is_under_way).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_post_hook_that_may_fail_is_told_of_and_not_repeated() -> Result<()> {
    with_app(1, async |ns, app| {
        let mut post = noting("post; exit 7");
        post["onError"] = json!("Continue");
        let backup = Backup::write(ns, "nightly", &hooked(&noting("pre"), &post)).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        let told = backup.await_event("ThawFailed").await?;
        ensure!(told.contains("pod app-0: exit code 7"), "{told}");
        ensure!(lines(app, 0, "post").await? == ["main"], "it was repeated");
        Ok(())
    })
    .await
}

/// Neither its command nor its output: both may hold a password.
#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn nothing_of_a_hook_gets_into_the_agent_s_log_or_the_messages() -> Result<()> {
    with_app(1, async |ns, _app| {
        // What is printed is not what is written.
        let says = "echo printed-$((40 + 2)); echo printed-$((40 + 2)) >&2; : written-42;";
        let pre = hook(&format!("{says} exit 1"));
        let mut missing = pre.clone();
        missing["command"] = json!(["no-such-program", "written-42"]);
        let backup = Backup::write(ns, "fails", &hooked(&pre, &hook(says))).await?;
        let other = Backup::write(ns, "misses", &hooked(&missing, &hook(says))).await?;
        for backup in [&backup, &other] {
            let record = backup.await_runs(1).await?;
            ensure!(record.result == RunResult::Failed, "{record:?}");
            let mut object = backup.api().get(backup.name()).await?;
            object.metadata.managed_fields = None;
            let said = serde_json::to_string(&object.status)?;
            ensure!(!said.contains("printed-42") && !said.contains("written-42"), "{said}");
            for event in ["PreBackupHookFailed", "BackupFailed"] {
                let said = backup.await_event(event).await?;
                ensure!(!said.contains("printed-42") && !said.contains("written-42"), "{said}");
            }
        }
        let logs = Agent::shared(ns.cluster()).logs().await?;
        ensure!(logs.contains(ns.name()), "the agent says nothing of the run");
        let told = logs.lines().find(|line| line.contains("printed-42") || line.contains("written-42"));
        ensure!(told.is_none(), "{}", told.context("a line")?);
        Ok(())
    })
    .await
}

fn hook(script: &str) -> Value {
    json!({ "command": ["sh", "-c", script] })
}

/// A hook that leaves a line in the file of that name, and then goes on with what follows the name.
fn noting(script: &str) -> Value {
    let (file, rest) = script.split_once(';').unwrap_or((script, "true"));
    hook(&format!("echo $CONTAINER >>/dev/shm/{file}; {rest}"))
}

fn hooked(pre: &Value, post: &Value) -> Value {
    json!({ "statefulSetRef": { "name": "app" }, "preBackupHook": pre, "postBackupHook": post })
}

/// What hooks left in a file of a pod.
async fn lines(app: &App, ordinal: i32, file: &str) -> Result<Vec<String>> {
    let text = app.sh(ordinal, &format!("touch /dev/shm/{file}; cat /dev/shm/{file}")).await?;
    Ok(text.lines().map(ToOwned::to_owned).collect())
}

async fn with_app(replicas: i32, test: impl AsyncFnOnce(&Namespace, &App) -> Result<()>) -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "hooks", async |ns| {
        let app = App::new(ns, "app").replicas(replicas);
        app.deploy().await?;
        test(ns, &app).await
    })
    .await
}
