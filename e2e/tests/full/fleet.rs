//! What a cluster does that has no hub for a while, or one that is not what it was: all as before.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::names::{ACCEPT_ANNOTATION, FROM_HUB_LABEL, policy_backup_name};
use sts_backup_api::policy::StatefulSetBackupPolicy;
use sts_backup_e2e::condition::{await_condition, await_none};
use sts_backup_e2e::kit::agent::{Agent, alone};
use sts_backup_e2e::kit::crds::apply_crds;
use sts_backup_e2e::kit::hub::{Hub, fleet_policy};
use sts_backup_e2e::kit::partition::cut_off;
use sts_backup_e2e::kit::policy::NEVER;
use sts_backup_e2e::kit::poll::until_within;
use sts_backup_e2e::kit::{App, Backup, Cluster, with_temp_namespace, with_temp_namespaces};

const TIMEOUT: Duration = Duration::from_mins(1);
const NODE_PORT: u16 = 30_945;

/// A connection that is gone without a word is found within 90 s, and made again within two minutes.
const FOUND: Duration = Duration::from_mins(4);

/// The `ConfigMap` in which the cluster remembers its hub.
const LINK: &str = "sts-backup-hub-link";

fn outcome(answer: &Value) -> Option<&str> {
    answer["applied"]["outcome"].as_str()
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_hub_that_has_lost_its_database_changes_nothing_until_somebody_accepts_it() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    with_temp_namespace(&cluster, "fleet", async |ns| {
        apply_crds(&cluster).await?;
        let all: Api<StatefulSetBackupPolicy> = Api::all(cluster.client());
        let of_hubs = ListParams::default().labels(FROM_HUB_LABEL);
        all.delete_collection(&DeleteParams::default(), &of_hubs).await?;
        let name = |suffix: &str| format!("{}-{suffix}", ns.name());
        let policy = json!({ "policy": { "template": { "spec": { "schedule": NEVER } } } });
        let files = |names: &[&str]| {
            let file =
                |suffix: &&str| (format!("{suffix}.yaml"), json!(fleet_policy(&name(suffix), &policy)));
            Value::Object(names.iter().map(file).collect())
        };
        let six = ["a", "b", "c", "d", "e", "f"];
        let hub = Hub::install(ns, NODE_PORT, &files(&six)).await?;
        let id = hub.let_in("one", &[], &cluster, ns.name()).await?;
        let guardrails = json!({ "allowed_namespaces": [ns.name()] });
        Agent::install(ns, &json!({ "link": { "hub": hub.link(), "guardrails": guardrails } })).await?;
        let show = ["clusters", "show", "one"];
        hub.await_answer(&show, |answer| outcome(answer) == Some("Active")).await?;
        let there = async || {
            anyhow::Ok(all.list(&of_hubs).await?.iter().map(ResourceExt::name_any).collect::<Vec<_>>())
        };
        let before = there().await?;
        ensure!(before.len() == 6, "{before:?}");

        // All but one at once: held back, and confirmed at the hub.
        hub.upgrade(&files(&["a"])).await?;
        let held = hub.await_answer(&show, |answer| outcome(answer) == Some("Held")).await?;
        ensure!(held["applied"]["detail"].as_str().is_some_and(|why| why.contains("5 of 6")), "{held:#}");
        ensure!(there().await? == before, "{:?}", there().await?);
        hub.run(&["clusters", "confirm", "one"]).await?;
        hub.await_answer(&show, |answer| outcome(answer) == Some("Active")).await?;
        ensure!(there().await? == [name("a")], "{:?}", there().await?);

        // A new database, and other files: the cluster keeps what it has, until somebody there accepts the new hub.
        hub.lose_database().await?;
        hub.upgrade(&files(&["b"])).await?;
        // Or it would place the old files on the cluster first, and know of them.
        let has_b = |answer: &Value| answer[0]["name"].as_str() == Some(&name("b"));
        hub.await_answer(&["policies", "list"], has_b).await?;
        hub.run(&["clusters", "add", "one", "--id", &id]).await?;
        let held = hub.await_answer(&show, |answer| outcome(answer) == Some("Held")).await?;
        let why = held["applied"]["detail"].as_str().context("it says why")?;
        ensure!(why.contains("the hub's store is another one"), "{why}");
        ensure!(there().await? == [name("a")], "{:?}", there().await?);
        let (_, accept) =
            why.split_once(&format!("{ACCEPT_ANNOTATION}=")).context("it says what to write")?;
        let accept = accept.split(',').next().unwrap_or_default();
        let patch = Patch::Merge(json!({ "metadata": { "annotations": { ACCEPT_ANNOTATION: accept } } }));
        ns.api::<ConfigMap>().patch(LINK, &PatchParams::default(), &patch).await?;
        hub.await_answer(&show, |answer| outcome(answer) == Some("Active")).await?;
        await_condition(&all, &name("b"), "there", TIMEOUT, |_| true).await?;
        // Absence deletes nothing: the new hub knows nothing of the other one.
        ensure!(there().await? == [name("a"), name("b")], "{:?}", there().await?);

        // An agent without a link puts nothing back.
        Agent::install(ns, &json!({})).await?;
        all.delete_collection(&DeleteParams::default(), &of_hubs).await?;
        await_none(&all, "policies of hubs", TIMEOUT, |policy: &StatefulSetBackupPolicy| {
            policy.labels().contains_key(FROM_HUB_LABEL)
        })
        .await
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_cluster_that_is_cut_off_from_its_hub_goes_on_and_tells_it_all_afterwards() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    let of_hub = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespaces(&[&of_hub, &cluster], "cut-off", async |namespaces| {
        let [at_hub, ns] = namespaces else { bail!("one namespace in each cluster") };
        apply_crds(&cluster).await?;
        let all: Api<StatefulSetBackupPolicy> = Api::all(cluster.client());
        let of_hubs = ListParams::default().labels(FROM_HUB_LABEL);
        all.delete_collection(&DeleteParams::default(), &of_hubs).await?;
        let gold = format!("{}-gold", ns.name());
        let policy = json!({ "policy": { "template": { "spec": { "schedule": "* * * * *" } } } });
        let files = json!({ "gold.yaml": fleet_policy(&gold, &policy) });
        let hub = Hub::install(at_hub, NODE_PORT + 1, &files).await?;
        hub.let_in("one", &[], &cluster, ns.name()).await?;
        let guardrails = json!({ "allowed_namespaces": [ns.name()] });
        Agent::install(ns, &json!({ "link": { "hub": hub.link(), "guardrails": guardrails } })).await?;
        App::new(ns, "app").deploy().await?;
        let show = ["clusters", "show", "one"];
        hub.await_answer(&show, |answer| outcome(answer) == Some("Active")).await?;
        let backup = Backup::existing(ns, &policy_backup_name(&gold, "app"));
        await_condition(&backup.api(), backup.name(), "there", TIMEOUT, |_| true).await?;
        backup.await_runs(1).await?;

        cut_off(&cluster, hub.address(), async || {
            until_within(FOUND, "the hub notices", async || Ok(hub.ask(&show).await?["state"] == "Unknown"))
                .await?;
            let before = backup.status().await?.history.len();
            backup.await_runs(before + 2).await.map(drop)
        })
        .await?;

        let is_back = async || Ok(hub.ask(&show).await?["state"] == "Connected");
        until_within(FOUND, "the agent comes back", is_back).await?;
        let history = backup.status().await?.history;
        let known = async || {
            let runs = hub.ask(&["fleet", "runs", "--cluster", "one"]).await?;
            let count =
                |id: &str| runs.as_array().into_iter().flatten().filter(|run| run["id"] == id).count();
            Ok(history.iter().all(|run| count(&run.id.to_string()) == 1))
        };
        until_within(FOUND, "the hub knows each run once", known).await?;
        Agent::install(ns, &json!({})).await?;
        all.delete_collection(&DeleteParams::default(), &of_hubs).await.map(drop).map_err(Into::into)
    })
    .await
}
