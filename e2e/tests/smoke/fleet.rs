//! A hub and an agent, both installed by helm: policies go down, status comes up, and the cluster needs no hub for its
//! backups.

use std::time::Duration;

use anyhow::{Result, ensure};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::names::{FROM_HUB_LABEL, policy_backup_name};
use sts_backup_api::policy::StatefulSetBackupPolicy;
use sts_backup_e2e::condition::{await_condition, await_deleted};
use sts_backup_e2e::kit::agent::{Agent, alone};
use sts_backup_e2e::kit::crds::apply_crds;
use sts_backup_e2e::kit::hub::{Hub, fleet_policy};
use sts_backup_e2e::kit::policy::NEVER;
use sts_backup_e2e::kit::{App, Backup, Cluster, Namespace, Policy, with_temp_namespace};

const TIMEOUT: Duration = Duration::from_mins(1);

/// A port of nodes that nothing else of the tests takes.
const NODE_PORT: u16 = 30_943;

/// Waits for a policy of the hub.
async fn await_policy(
    ns: &Namespace,
    name: &str,
    what: &str,
    wanted: impl Fn(&StatefulSetBackupPolicy) -> bool,
) -> Result<StatefulSetBackupPolicy> {
    let policies: Api<StatefulSetBackupPolicy> = Api::all(ns.cluster().client());
    await_condition(&policies, name, what, TIMEOUT, wanted).await
}

/// Protects an application by a policy, and lets a run of it complete.
async fn back_up(ns: &Namespace, policy: &str, app: &str) -> Result<String> {
    App::new(ns, app).deploy().await?;
    let backup = Backup::existing(ns, &policy_backup_name(policy, app));
    await_condition(&backup.api(), backup.name(), "there", TIMEOUT, |_| true).await?;
    backup.request("now").await?;
    Ok(backup.await_runs(1).await?.id.to_string())
}

fn runs(answer: &Value) -> Vec<&str> {
    let mut runs: Vec<_> =
        answer.as_array().into_iter().flatten().filter_map(|run| run["id"].as_str()).collect();
    runs.sort_unstable();
    runs
}

/// The names of the `StatefulSets` of a namespace that nothing protects, of the only cluster; none: that is not told, or
/// others fill the list.
fn unprotected<'a>(answer: &'a Value, ns: &Namespace) -> Option<Vec<&'a str>> {
    let coverage = &answer["clusters"][0]["coverage"];
    let first = coverage["firstUnprotected"].as_array()?;
    let is_whole = coverage["unprotected"].as_u64() == u64::try_from(first.len()).ok();
    let names = first.iter().filter_map(|set| set.as_str()?.strip_prefix(ns.name())?.strip_prefix('/'));
    is_whole.then(|| names.collect())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_fleet_policy_protects_a_cluster_that_works_alone_while_its_hub_is_away() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    with_temp_namespace(&cluster, "fleet", async |ns| {
        let name = |suffix: &str| format!("{}-{suffix}", ns.name());
        let (gold, hostile, taken) = (name("gold"), name("hostile"), name("taken"));
        let quiet = |extra: Value| {
            let mut policy = json!({ "rpo": "26h", "template": { "spec": { "schedule": NEVER } } });
            if let (Some(spec), Some(extra)) = (policy["template"]["spec"].as_object_mut(), extra.as_object())
            {
                spec.extend(extra.clone());
            }
            json!({ "clusterSelector": { "matchLabels": { "env": "test" } }, "policy": policy })
        };
        let hook = json!({ "preBackupHook": { "command": ["rm", "-rf", "/volumes"] } });
        let mut policies = json!({
            "gold.yaml": fleet_policy(&gold, &quiet(json!({}))),
            "hostile.yaml": fleet_policy(&hostile, &quiet(hook)),
            "taken.yaml": fleet_policy(&taken, &quiet(json!({}))),
        });
        apply_crds(&cluster).await?;
        // What a test that failed has left would be this agent's to keep.
        let all: Api<StatefulSetBackupPolicy> = Api::all(cluster.client());
        let of_hubs = ListParams::default().labels(FROM_HUB_LABEL);
        all.delete_collection(&DeleteParams::default(), &of_hubs).await?;
        let hub = Hub::install(ns, NODE_PORT, &policies).await?;
        hub.let_in("one", &["env=test"], &cluster, ns.name()).await?;
        let none =
            json!({ "statefulSetSelector": { "matchLabels": { "none": "x" } }, "template": { "spec": {} } });
        let local = Policy::write(ns, "taken", &none).await?;

        // No namespaceSelector in the hub's policies: the cluster's own guardrail keeps them here.
        let guardrails = json!({ "allowed_namespaces": [ns.name()] });
        Agent::install(ns, &json!({ "link": { "hub": hub.link(), "guardrails": guardrails } })).await?;
        await_policy(ns, &gold, "there", |policy| policy.labels().contains_key(FROM_HUB_LABEL)).await?;
        let first = back_up(ns, &gold, "a").await?;

        let is_told = |answer: &Value| runs(answer) == [first.as_str()];
        hub.await_answer(&["fleet", "runs", "--cluster", "one"], is_told).await?;
        // The hub itself is a StatefulSet of this namespace, and protected as well.
        let are_protected = |answer: &Value| unprotected(answer, ns) == Some(vec![]);
        let status = hub.await_answer(&["fleet", "status"], are_protected).await?;
        let one = &status["clusters"][0];
        ensure!(one["state"] == "Connected" && one["overdue"] == 0, "{status:#}");
        let rejected = &one["applied"]["rejected"];
        ensure!(rejected[&hostile]["code"] == "CommandsNotAllowed", "{rejected:#}");
        ensure!(rejected[&taken]["code"] == "NameTaken", "{rejected:#}");
        let kept = local.api().get(local.name()).await?;
        ensure!(!kept.labels().contains_key(FROM_HUB_LABEL), "{:?}", kept.metadata);

        // Somebody changes it, and it is put back.
        let other = Patch::Merge(json!({ "spec": { "rpo": "1h" } }));
        let changed = all.patch(&gold, &PatchParams::default(), &other).await?;
        let is_back =
            |policy: &StatefulSetBackupPolicy| policy.metadata.generation > changed.metadata.generation;
        let back = await_policy(ns, &gold, "put back", is_back).await?;
        ensure!(serde_json::to_value(back.spec.rpo)? == "93600s", "{:?}", back.spec.rpo);

        // Without its hub the cluster goes on by itself.
        hub.stop().await?;
        let second = back_up(ns, &gold, "b").await?;
        hub.start().await?;
        let mut both = [first.as_str(), second.as_str()];
        both.sort_unstable();
        hub.await_answer(&["fleet", "runs"], |answer| runs(answer) == both).await?;
        hub.await_answer(&["clusters", "show", "one"], |answer| answer["state"] == "Connected").await?;

        // A file that cannot be used changes nothing; without its file the policy goes.
        policies["bad.yaml"] = json!("kind: FleetPolicy");
        hub.upgrade(&policies).await?;
        let is_bad =
            |answer: &Value| answer["policiesError"].as_str().is_some_and(|said| said.contains("bad.yaml"));
        let bad = hub.await_answer(&["fleet", "status"], is_bad).await?;
        ensure!(bad["policies"] == 3, "{bad:#}");
        let there = all.get(&gold).await?;
        for file in ["bad.yaml", "gold.yaml"] {
            policies.as_object_mut().and_then(|policies| policies.remove(file));
        }
        hub.upgrade(&policies).await?;
        await_deleted(&all, &there, TIMEOUT).await?;
        // And nothing protects what it protected.
        let are_bare =
            |answer: &Value| unprotected(answer, ns).is_some_and(|bare| bare.starts_with(&["a", "b"]));
        hub.await_answer(&["fleet", "status"], are_bare).await?;
        Ok(())
    })
    .await
}
