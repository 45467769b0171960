//! Policies of many `StatefulSets`, and agents that die between two of their writes.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use axum::http::{Method, Uri};
use futures::future::{join_all, try_join_all};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::policy::StatefulSetBackupPolicyStatus;
use sts_backup_e2e::condition::{await_condition, await_none};
use sts_backup_e2e::kit::agent::alone;
use sts_backup_e2e::kit::crds::apply_crds;
use sts_backup_e2e::kit::local_agent::{LocalAgent, LocalAgentConfig};
use sts_backup_e2e::kit::policy::{NEVER, change_set, create_idle_set};
use sts_backup_e2e::kit::proxy::ApiProxy;
use sts_backup_e2e::kit::{Cluster, Namespace, Policy, with_temp_namespaces};

use crate::alone_in_namespace;

const NAMESPACES: usize = 50;
const SETS_IN_EACH: usize = 20;
const SETS: i64 = 1000;

/// A thousand writes on a busy machine.
const CONVERGED: Duration = Duration::from_mins(5);

fn template() -> Value {
    json!({ "spec": { "schedule": NEVER } })
}

fn is_backup_write(method: &Method, uri: &Uri) -> bool {
    let is_backup = uri.path().contains("/statefulsetbackups/") && !uri.path().ends_with("/status");
    is_backup && (method == Method::PATCH || method == Method::DELETE)
}

/// Reads all objects of a kind that policies depend on. A watch that begins is none.
fn is_list(method: &Method, uri: &Uri) -> bool {
    let kinds = ["/statefulsetbackups", "/statefulsetbackuppolicies", "/statefulsets", "/namespaces"];
    let is_watch = uri.query().is_some_and(|query| query.contains("watch=true"));
    method == Method::GET && kinds.iter().any(|kind| uri.path().ends_with(kind)) && !is_watch
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_thousand_stateful_sets_in_fifty_namespaces_get_their_backups_by_one_write_each() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    with_temp_namespaces(&[&cluster; NAMESPACES], "policies", async |namespaces| {
        apply_crds(&cluster).await?;
        let names: Vec<&str> = namespaces.iter().map(Namespace::name).collect();
        let create = namespaces.iter().flat_map(|ns| (0..SETS_IN_EACH).map(move |at| (ns, at)));
        let create = create.map(async |(ns, at)| create_idle_set(ns, &format!("db-{at}"), &json!({})).await);
        stream::iter(create).buffer_unordered(20).try_collect::<Vec<()>>().await?;

        let proxy = ApiProxy::start(&cluster).await?;
        let home = &namespaces[0];
        let config = LocalAgentConfig::new(home, "one").kubeconfig(proxy.kubeconfig());
        let agent = LocalAgent::start(&config).await?;
        agent.await_leads().await?;
        let writes = proxy.count(is_backup_write);
        let names = json!({ "key": "kubernetes.io/metadata.name", "operator": "In", "values": names });
        let spec = json!({ "namespaceSelector": { "matchExpressions": [names] }, "template": template() });
        let policy = Policy::write(home, "all", &spec).await?;
        let is_protected =
            |status: &StatefulSetBackupPolicyStatus| (status.matched, status.protected) == (SETS, SETS);
        await_status(&policy, "protecting all", is_protected).await?;
        // No run is due, so nobody else writes them.
        ensure!(writes.hits() == SETS.unsigned_abs(), "{} writes of backups", writes.hits());
        drop(writes);

        // One StatefulSet changes: its backup is removed, and nothing else is written, or read anew.
        let (writes, lists) = (proxy.count(is_backup_write), proxy.count(is_list));
        let left = &namespaces[7];
        change_set(left, "db-3", &json!({ "annotations": { "backup.sts-backup.io/exclude": "true" } }))
            .await?;
        let is_one_less = |status: &StatefulSetBackupPolicyStatus| status.matched == SETS - 1;
        await_status(&policy, "protecting all but one", is_one_less).await?;
        ensure!(writes.hits() == 1, "{} writes of backups for one change", writes.hits());
        ensure!(lists.hits() == 0, "{} lists for one change", lists.hits());
        drop((writes, lists));

        policy.change(&json!({ "template": { "spec": { "schedule": "0 0 1 1 *" } } })).await?;
        try_join_all(namespaces.iter().map(async |ns| {
            let is_old = |backup: &StatefulSetBackup| backup.spec.schedule.as_deref() != Some("0 0 1 1 *");
            await_none(&ns.api(), "backups of the old template", CONVERGED, is_old).await
        }))
        .await?;

        policy.remove().await?;
        let gone = namespaces.iter().map(async |ns| {
            await_none(&ns.api(), "backups", CONVERGED, |_: &StatefulSetBackup| true).await?;
            let sets: Api<StatefulSet> = ns.api();
            sets.delete_collection(&DeleteParams::background(), &ListParams::default()).await?;
            anyhow::Ok(())
        });
        join_all(gone).await.into_iter().collect()
    })
    .await
}

async fn await_status(
    policy: &Policy,
    what: &str,
    wanted: impl Fn(&StatefulSetBackupPolicyStatus) -> bool,
) -> Result<()> {
    await_condition(&policy.api(), policy.name(), what, CONVERGED, |policy| {
        policy.status.as_ref().is_some_and(&wanted)
    })
    .await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_agent_that_dies_between_two_writes_is_followed_by_one_that_completes_them() -> Result<()> {
    alone_in_namespace("policies", async |ns| {
        apply_crds(ns.cluster()).await?;
        for at in 0..6 {
            create_idle_set(ns, &format!("db-{at}"), &json!({})).await?;
        }
        let policy = Policy::write(ns, "all", &json!({ "template": template() })).await?;
        for (at, point) in ["before-policy-write", "after-policy-write"].into_iter().enumerate() {
            // It is created, changed and removed: a write of each kind is due when an agent dies.
            let spec = json!({ "schedule": format!("0 0 {} 1 *", at + 1), "startingDeadlineSeconds": 60 });
            policy.change(&json!({ "template": { "spec": spec } })).await?;
            let exclude = json!({ "annotations": { "backup.sts-backup.io/exclude": "true" } });
            change_set(ns, &format!("db-{at}"), &exclude).await?;
            let config =
                LocalAgentConfig::new(ns, point).short_lease().failpoints(&format!("{point}=return"));
            let mut agent = LocalAgent::start(&config).await?;
            let status = agent.wait_exit().await?;
            ensure!(!status.success(), "it survived {point}");

            let next = LocalAgent::start(&LocalAgentConfig::new(ns, &format!("{point}-next"))).await?;
            let expected = 5 - i64::try_from(at)?;
            policy.await_counts(expected, expected).await?;
            let backups: Api<StatefulSetBackup> = ns.api();
            let backups = backups.list(&ListParams::default()).await?;
            let names: BTreeSet<String> = backups.iter().map(ResourceExt::name_any).collect();
            let wanted: BTreeSet<String> =
                (at + 1..6).map(|at| policy.backup_name(&format!("db-{at}"))).collect();
            ensure!(names == wanted, "{names:?}");
            for backup in &backups {
                let schedule = backup.spec.schedule.as_deref().context("no schedule")?;
                ensure!(schedule == format!("0 0 {} 1 *", at + 1), "{schedule}");
            }
            next.kill().await?;
        }
        policy.remove().await
    })
    .await
}
