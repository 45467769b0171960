//! Policies: which `StatefulSets` they back up, how, and what they leave to others.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::conditions::{APPLIED, HOOK_PROFILE_NOT_FOUND, INVALID_SCHEDULE, NAME_TAKEN, READY};
use sts_backup_api::names::{EXCLUDE_ANNOTATION, FROM_POLICY_LABEL};
use sts_backup_api::run::RunResult;
use sts_backup_e2e::condition::{await_deleted, await_none};
use sts_backup_e2e::kit::agent::{Agent, alone};
use sts_backup_e2e::kit::manifest::refusal;
use sts_backup_e2e::kit::policy::{self, NEVER, change_set, create_idle_set};
use sts_backup_e2e::kit::{App, Backup, Cluster, Namespace, Policy, with_temp_namespace};

const TIMEOUT: Duration = Duration::from_mins(1);

async fn with_namespace(test: impl AsyncFnOnce(&Namespace) -> Result<()>) -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "policies", test).await
}

/// A policy of all `StatefulSets`, whose backups begin no run by themselves.
fn quiet() -> Value {
    json!({ "template": { "spec": { "schedule": NEVER } } })
}

fn schedule(backup: &StatefulSetBackup) -> Option<&str> {
    backup.spec.schedule.as_deref()
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_policy_backs_up_what_it_selects_and_follows_the_labels() -> Result<()> {
    with_namespace(async |ns| {
        for (name, tier) in [("a", "gold"), ("b", "tin"), ("c", "gold")] {
            create_idle_set(ns, name, &json!({ "tier": tier })).await?;
        }
        let mut spec = quiet();
        spec["statefulSetSelector"] = json!({ "matchLabels": { "tier": "gold" } });
        spec["exclude"] = json!([format!("{}/c", ns.name())]);
        let policy = Policy::write(ns, "gold", &spec).await?;
        let status = policy.await_counts(1, 1).await?;
        ensure!(status.first_unprotected.is_empty() && status.conflicts.is_empty(), "{status:?}");
        policy.await_condition(READY, "True", "Usable").await?;
        policy.await_condition(APPLIED, "True", "Applied").await?;

        let (_, backup) = policy.await_backup("a", "there", |_| true).await?;
        ensure!(backup.labels()[FROM_POLICY_LABEL] == policy.name(), "{:?}", backup.labels());
        ensure!(backup.spec.stateful_set_ref.name == "a" && schedule(&backup) == Some(NEVER), "{backup:?}");
        ensure!(backup.spec.spread.map(Duration::from) == Some(Duration::from_mins(10)), "{backup:?}");
        let owner = &backup.owner_references()[0];
        ensure!(owner.name == policy.name() && owner.kind == "StatefulSetBackupPolicy", "{owner:?}");
        let created = policy.await_event("BackupsCreated").await?;
        ensure!(created.contains(&backup.name_any()), "{created}");

        change_set(ns, "b", &json!({ "labels": { "tier": "gold" } })).await?;
        policy.await_backup("b", "there", |_| true).await?;
        change_set(ns, "a", &json!({ "labels": { "tier": null } })).await?;
        policy.await_backup_gone(&backup).await?;
        policy.await_counts(1, 1).await?;
        policy.await_event("BackupsRemoved").await?;

        policy.remove().await?;
        await_none(&ns.api(), "backups", TIMEOUT, |_: &StatefulSetBackup| true).await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_change_of_the_template_reaches_the_backups_and_what_left_it_leaves_them() -> Result<()> {
    with_namespace(async |ns| {
        for name in ["a", "b"] {
            create_idle_set(ns, name, &json!({})).await?;
        }
        let template = json!({
            "labels": { "team": "dba", "step": "one" },
            "spec": { "schedule": NEVER, "startingDeadlineSeconds": 60, "retentionPolicy": { "keepLast": 3 } },
        });
        let policy = Policy::write(ns, "gold", &json!({ "template": template })).await?;
        policy.await_counts(2, 2).await?;
        let (_, before) = policy.await_backup("a", "there", |_| true).await?;
        ensure!(before.labels()["step"] == "one", "{:?}", before.labels());

        // What the template leaves open others may set, and they keep it.
        let patch = Patch::Merge(json!({ "spec": { "suspend": true } }));
        let backups: Api<StatefulSetBackup> = ns.api();
        backups.patch(&policy.backup_name("b"), &PatchParams::default(), &patch).await?;
        policy.await_counts(2, 1).await?;

        let spec = json!({ "schedule": "0 0 1 1 *", "startingDeadlineSeconds": null });
        policy.change(&json!({ "template": { "labels": { "step": null }, "spec": spec } })).await?;
        for set in ["a", "b"] {
            let is_new = |backup: &StatefulSetBackup| {
                schedule(backup) == Some("0 0 1 1 *")
                    && backup.spec.starting_deadline_seconds.is_none()
                    && backup.spec.retention_policy.is_some_and(|retention| retention.keep_last == Some(3))
                    && backup.spec.suspend == (set == "b")
                    && !backup.labels().contains_key("step")
                    && backup.labels().contains_key("team")
            };
            let (_, after) = policy.await_backup(set, "as the new template says", is_new).await?;
            ensure!(set == "b" || after.uid() == before.uid(), "it is another object");
        }

        // What the template says is not others' to change.
        let patch = Patch::Merge(json!({ "spec": { "schedule": "@hourly" } }));
        backups.patch(&policy.backup_name("a"), &PatchParams::default(), &patch).await?;
        policy.await_backup("a", "put right", |backup| schedule(backup) == Some("0 0 1 1 *")).await?;
        policy.await_event("BackupsUpdated").await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_stateful_set_that_comes_back_finds_its_recovery_points() -> Result<()> {
    with_namespace(async |ns| {
        let app = App::new(ns, "app");
        app.deploy().await?;
        // Without a schedule: one run at creation.
        let policy = Policy::write(ns, "gold", &json!({ "template": { "spec": {} } })).await?;
        let (backup, object) = policy.await_backup("app", "there", |_| true).await?;
        let run = backup.await_runs(1).await?;
        ensure!(run.result == RunResult::Completed, "{run:?}");

        let sets: Api<StatefulSet> = ns.api();
        let set = sets.get("app").await?;
        sets.delete("app", &DeleteParams::background()).await?;
        await_deleted(&sets, &set, TIMEOUT).await?;
        policy.await_backup_gone(&object).await?;
        ensure!(backup.snapshots().await?.len() == 1, "the recovery point went with the backup");

        app.deploy().await?;
        let has_old = |status: &sts_backup_api::backup::StatefulSetBackupStatus| {
            status.recovery_points.iter().any(|point| point.id == run.id && point.complete)
        };
        policy.await_backup("app", "another object", |found| found.uid() != object.uid()).await?;
        backup.await_status("listing the old recovery point", has_old).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_stateful_set_or_a_namespace_can_opt_out() -> Result<()> {
    with_namespace(async |ns| {
        for name in ["a", "b"] {
            create_idle_set(ns, name, &json!({})).await?;
        }
        let policy = Policy::write(ns, "gold", &quiet()).await?;
        policy.await_counts(2, 2).await?;
        let (_, of_a) = policy.await_backup("a", "there", |_| true).await?;
        change_set(ns, "a", &json!({ "annotations": { EXCLUDE_ANNOTATION: "true" } })).await?;
        policy.await_backup_gone(&of_a).await?;
        policy.await_counts(1, 1).await?;

        let opt = async |value: Value| -> Result<()> {
            let namespaces: Api<v1::Namespace> = Api::all(ns.cluster().client());
            let patch = json!({ "metadata": { "annotations": { EXCLUDE_ANNOTATION: value } } });
            namespaces.patch(ns.name(), &PatchParams::default(), &Patch::Merge(patch)).await?;
            Ok(())
        };
        opt(json!("true")).await?;
        policy.await_counts(0, 0).await?;
        await_none(&ns.api(), "backups", TIMEOUT, |_: &StatefulSetBackup| true).await?;
        opt(Value::Null).await?;
        policy.await_counts(1, 1).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn of_two_policies_the_one_with_the_higher_priority_backs_up_and_both_say_so() -> Result<()> {
    with_namespace(async |ns| {
        create_idle_set(ns, "db", &json!({})).await?;
        let low = Policy::write(ns, "a-low", &quiet()).await?;
        let (_, of_low) = low.await_backup("db", "there", |_| true).await?;
        let mut spec = quiet();
        spec["priority"] = json!(7);
        let high = Policy::write(ns, "b-high", &spec).await?;
        high.await_backup("db", "there", |_| true).await?;
        low.await_backup_gone(&of_low).await?;

        for (policy, other, prevails) in [(&low, &high, true), (&high, &low, false)] {
            let what = format!("in conflict with {}", other.name());
            let status = policy.await_status(&what, |status| !status.conflicts.is_empty()).await?;
            let conflict = &status.conflicts[0];
            ensure!(conflict.policy == other.name() && conflict.prevails == prevails, "{conflict:?}");
            ensure!(conflict.stateful_sets == 1, "{conflict:?}");
            ensure!(conflict.example == format!("{}/db", ns.name()), "{conflict:?}");
            let said = policy.await_event("Overlap").await?;
            ensure!(said.contains(other.name()), "{said}");
        }
        high.remove().await?;
        low.await_backup("db", "there again", |found| found.uid() != of_low.uid()).await?;
        let status = low.await_status("without conflicts", |status| status.conflicts.is_empty()).await?;
        ensure!(status.protected == 1, "{status:?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_backup_written_by_hand_is_left_alone_and_protects_while_it_meets_the_rpo() -> Result<()> {
    with_namespace(async |ns| {
        App::new(ns, "app").deploy().await?;
        let mut spec = quiet();
        spec["rpo"] = json!("1h");
        let policy = Policy::write(ns, "gold", &spec).await?;
        let (_, own) = policy.await_backup("app", "there", |_| true).await?;

        let mine = Backup::write(ns, "mine", &json!({ "statefulSetRef": { "name": "app" } })).await?;
        policy.await_backup_gone(&own).await?;
        let run = mine.await_runs(1).await?;
        ensure!(run.result == RunResult::Completed, "{run:?}");
        let status = policy.await_counts(1, 1).await?;
        ensure!(status.overdue == 0, "{status:?}");

        // The point that it has is older than that.
        policy.change(&json!({ "rpo": "1s" })).await?;
        let status = policy.await_counts(1, 0).await?;
        let name = format!("{}/app", ns.name());
        ensure!(status.first_unprotected == [name.as_str()], "{status:?}");
        ensure!(status.overdue == 1 && status.first_overdue == [name], "{status:?}");

        let is_ours = |backup: &StatefulSetBackup| backup.name_any() != "mine";
        await_none(&ns.api(), "backups of the policy", TIMEOUT, is_ours).await?;
        mine.remove().await?;
        policy.await_backup("app", "there again", |found| found.uid() != own.uid()).await?;
        policy.await_counts(1, 1).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_stateful_set_without_a_recovery_point_becomes_overdue_by_time_alone() -> Result<()> {
    with_namespace(async |ns| {
        let mut spec = quiet();
        spec["rpo"] = json!("20s");
        let policy = Policy::write(ns, "gold", &spec).await?;
        create_idle_set(ns, "db", &json!({})).await?;
        let status = policy.await_counts(1, 1).await?;
        ensure!(status.overdue == 0, "{status:?}");
        policy.await_status("overdue", |status| status.overdue == 1 && status.protected == 1).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn an_object_that_has_the_name_of_a_backup_is_not_touched() -> Result<()> {
    with_namespace(async |ns| {
        create_idle_set(ns, "db", &json!({})).await?;
        let name = sts_backup_api::names::policy_backup_name(&format!("{}-gold", ns.name()), "db");
        let spec = json!({ "statefulSetRef": { "name": "other" }, "schedule": NEVER, "suspend": true });
        let mine = Backup::write(ns, &name, &spec).await?;
        let before = mine.api().get(&name).await?;

        let policy = Policy::write(ns, "gold", &quiet()).await?;
        let said = policy.await_condition(APPLIED, "False", NAME_TAKEN).await?;
        ensure!(said.message.contains(&name) && said.message.contains("rename or delete it"), "{said:?}");
        let status = policy.await_counts(1, 0).await?;
        ensure!(status.first_unprotected == [format!("{}/db", ns.name())], "{status:?}");
        policy.await_event(NAME_TAKEN).await?;
        let after = mine.api().get(&name).await?;
        ensure!(after.spec == before.spec && after.owner_references().is_empty(), "{after:?}");
        ensure!(after.labels().is_empty(), "{:?}", after.labels());

        mine.remove().await?;
        policy.await_condition(APPLIED, "True", "Applied").await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn hooks_come_from_the_profile_that_the_agent_is_configured_with() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    with_temp_namespace(&cluster, "policies", async |ns| {
        let values = |command: &str| {
            let profile = json!({
                "pre": [command, "it's <\"frozen\">"], "post": ["/thaw"], "container": "main", "timeout_seconds": 7,
            });
            json!({ "config": { "hook_profiles": { "drill": profile } } })
        };
        let agent = Agent::install(ns, &values("/freeze")).await?;
        create_idle_set(ns, "db", &json!({})).await?;
        let mut spec = quiet();
        spec["template"]["hookProfile"] = json!("drill");
        let policy = Policy::write(ns, "gold", &spec).await?;
        let has_hook = |command: &'static str| {
            move |backup: &StatefulSetBackup| {
                backup.spec.pre_backup_hook.as_ref().is_some_and(|hook| {
                    hook.command == [command, "it's <\"frozen\">"]
                        && hook.container_name.as_deref() == Some("main")
                        && hook.timeout_seconds == 7
                }) && backup.spec.post_backup_hook.as_ref().is_some_and(|hook| hook.command == ["/thaw"])
            }
        };
        let (_, before) = policy.await_backup("db", "with the hooks", has_hook("/freeze")).await?;

        policy.change(&json!({ "template": { "hookProfile": "nowhere" } })).await?;
        let said = policy.await_condition(READY, "False", HOOK_PROFILE_NOT_FOUND).await?;
        ensure!(said.message.contains("hook_profiles.nowhere"), "{said:?}");
        create_idle_set(ns, "new", &json!({})).await?;
        policy.await_counts(2, 1).await?;
        let kept = ns.api::<StatefulSetBackup>().get(&policy.backup_name("db")).await?;
        ensure!(kept.metadata.generation == before.metadata.generation, "{kept:?}");

        policy.change(&json!({ "template": { "hookProfile": "drill" } })).await?;
        policy.await_condition(READY, "True", "Usable").await?;
        policy.await_counts(2, 2).await?;
        agent.upgrade_to(&values("/freeze2")).await?;
        policy.await_backup("db", "with the new hooks", has_hook("/freeze2")).await?;
        policy.remove().await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_schedule_that_cannot_be_used_is_said_and_leaves_the_backups_as_they_are() -> Result<()> {
    with_namespace(async |ns| {
        create_idle_set(ns, "db", &json!({})).await?;
        let policy = Policy::write(ns, "gold", &quiet()).await?;
        let (_, before) = policy.await_backup("db", "there", |_| true).await?;
        policy.change(&json!({ "template": { "spec": { "schedule": "61 * * * *" } } })).await?;
        let said = policy.await_condition(READY, "False", INVALID_SCHEDULE).await?;
        ensure!(said.message.contains("61 * * * *"), "{said:?}");
        policy.await_event(INVALID_SCHEDULE).await?;
        let kept = ns.api::<StatefulSetBackup>().get(&before.name_any()).await?;
        ensure!(kept.spec == before.spec, "{kept:?}");
        policy.await_counts(1, 1).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_metrics_show_what_is_unprotected_and_what_policies_do_about_it() -> Result<()> {
    with_namespace(async |ns| {
        let agent = Agent::shared(ns.cluster());
        for name in ["a", "b"] {
            create_idle_set(ns, name, &json!({})).await?;
        }
        let unprotected = |count: usize| {
            format!("sts_backup_unprotected_statefulsets{{namespace=\"{}\"}} {count}\n", ns.name())
        };
        agent.await_metrics("two are unprotected", |text| text.contains(&unprotected(2))).await?;
        let mut spec = quiet();
        spec["rpo"] = json!("1s");
        let policy = Policy::write(ns, "gold", &spec).await?;
        policy.await_status("overdue", |status| status.overdue == 2).await?;
        agent
            .await_metrics("all are protected, and overdue", |text| {
                let has = |name: &str| {
                    let line = format!("sts_backup_policy_{name}{{policy=\"{}\"}} 2\n", policy.name());
                    text.contains(&line)
                };
                text.contains(&unprotected(0)) && has("matched") && has("protected") && has("overdue")
            })
            .await?;
        policy.remove().await?;
        agent
            .await_metrics("the policy has no series", |text| {
                text.contains(&unprotected(2)) && !text.contains(policy.name())
            })
            .await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn what_is_no_sound_policy_is_refused_with_the_reason() -> Result<()> {
    with_namespace(async |ns| {
        let hook = json!({ "command": ["true"] });
        for (case, words) in [
            (json!({}), "spec.template: Required value"),
            (json!({ "template": {} }), "spec.template.spec: Required value"),
            (
                json!({ "template": { "hookProfile": "p", "spec": { "preBackupHook": hook } } }),
                "hookProfile stands for both hooks: write hookProfile, or spec.preBackupHook and spec.postBackupHook",
            ),
            (
                json!({ "template": { "spec": { "volumeSnapshotClass": "a", "volumeSnapshotClassName": "b" } } }),
                "volumeSnapshotClass is the older spelling of volumeSnapshotClassName",
            ),
            (json!({ "template": { "spec": { "schedule": "@every 5m" } } }), "@every has no fixed times"),
            (
                json!({ "template": { "spec": { "statefulSetRef": { "name": "db" } } } }),
                "unknown field \"spec.template.spec.statefulSetRef\"",
            ),
            (json!({ "rpo": "1 day", "template": { "spec": {} } }), "spec.rpo"),
            (json!({ "exclude": ["a/b/c"], "template": { "spec": {} } }), "spec.exclude[0]"),
            (json!({ "exclude": ["a", "a"], "template": { "spec": {} } }), "spec.exclude[1]: Duplicate value"),
            (json!({ "priority": 1_000_001, "template": { "spec": {} } }), "spec.priority"),
        ] {
            let name = format!("{}-gold", ns.name());
            let said = refusal(ns, &policy::manifest(ns, &name, &case)).await?;
            let said = said.with_context(|| format!("admitted: {case}"))?;
            ensure!(said.contains(words), "{case}: {said}");
        }
        let said = refusal(ns, &policy::manifest(ns, &"x".repeat(64), &quiet())).await?;
        let said = said.context("a name of 64 characters was admitted")?;
        ensure!(said.contains("the name is a label value of every backup: use at most 63"), "{said}");
        ensure!(refusal(ns, &policy::manifest(ns, &"x".repeat(63), &quiet())).await?.is_none());
        Ok(())
    })
    .await
}
