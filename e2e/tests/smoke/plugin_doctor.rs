//! The plugin's `doctor`, which names what would fail before it does.
//!
//! It checks the whole cluster, where other tests break other things: these look at what it says of their own objects.

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde::Deserialize;
use serde_json::{Value, json};
use sts_backup_api::conditions::{self, NAMESPACE_NOT_GRANTED, READY};
use sts_backup_api::names::ALLOW_BACKUP_FROM_ANNOTATION;
use sts_backup_e2e::kit::agent::{NAMESPACE, RELEASE};
use sts_backup_e2e::kit::policy::NEVER;
use sts_backup_e2e::kit::{App, Backup, Cluster, Namespace, User, with_temp_namespace, with_temp_namespaces};

use crate::plugin::plugin;

#[derive(Debug, Deserialize)]
struct Finding {
    level: String,
    object: String,
    reason: String,
    remedy: Option<String>,
}

/// What `doctor` says, and whether it ended as what it says demands.
async fn findings(ns: &Namespace) -> Result<Vec<Finding>> {
    let said = plugin(ns, &["doctor", "-o", "json"]).await?;
    let findings: Vec<Finding> = said.list("findings")?;
    let broken = findings.iter().any(|finding| finding.level == "FAIL");
    said.ended_with(i32::from(broken))?;
    Ok(findings)
}

/// The one finding about an object.
fn about<'f>(findings: &'f [Finding], object: &str) -> Result<&'f Finding> {
    let found: Vec<_> = findings.iter().filter(|finding| finding.object == object).collect();
    match found[..] {
        [one] => Ok(one),
        _ => bail!("{object}: {found:?} of {findings:?}"),
    }
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn doctor_names_what_the_next_run_would_fail_at_until_it_would_not() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespaces(&[&cluster, &cluster], "plugin", async |namespaces| {
        let [ns, home] = namespaces else { bail!("two namespaces") };
        App::new(home, "app").deploy().await?;
        let class = format!("{}-none", ns.name());
        let spec = json!({
            "statefulSetRef": { "name": "app", "namespace": home.name() },
            "schedule": NEVER,
            "volumeSnapshotClassName": class,
        });
        let backup = Backup::write(ns, "nightly", &spec).await?;
        backup.await_condition(READY, "False", NAMESPACE_NOT_GRANTED).await?;
        let set = format!("StatefulSet {}/app", home.name());
        let said = findings(ns).await?;
        let found = about(&said, &set)?;
        ensure!(found.level == "FAIL" && found.reason.starts_with("NamespaceNotGranted: "), "{found:?}");
        let grant =
            format!("annotate namespace {} {ALLOW_BACKUP_FROM_ANNOTATION}={};", home.name(), ns.name());
        ensure!(found.remedy.as_ref().is_some_and(|remedy| remedy.contains(&grant)), "{found:?}");
        // That the agent knows the same is not said a second time.
        let ours = format!("StatefulSetBackup {}/nightly", ns.name());
        let times = about(&said, &ours)?;
        ensure!(times.level == "OK" && times.reason.starts_with("the next run begins at "), "{times:?}");

        home.annotate(ALLOW_BACKUP_FROM_ANNOTATION, Some(ns.name())).await?;
        let looked = |found: &Condition| found.reason != NAMESPACE_NOT_GRANTED;
        backup
            .await_status("looked at again", |status| {
                conditions::find(&status.conditions, READY).is_some_and(looked)
            })
            .await?;
        // No run has met this yet.
        let said = findings(ns).await?;
        let found = about(&said, &set)?;
        let missing = format!("NoSnapshotClass: VolumeSnapshotClass {class} does not exist");
        ensure!(found.level == "FAIL" && found.reason.starts_with(&missing), "{found:?}");

        backup.change(&json!({ "volumeSnapshotClassName": null })).await?;
        let changed = backup.api().get(backup.name()).await?.metadata.generation;
        backup.await_status("looked at", |status| status.observed_generation >= changed).await?;
        backup.await_condition(READY, "True", "Usable").await?;
        let said = findings(ns).await?;
        let found = about(&said, &set)?;
        ensure!(found.level == "OK" && found.reason == "1 claim can be snapshotted", "{found:?}");
        let mut of_backup = said.iter().filter(|finding| finding.object == ours);
        ensure!(of_backup.all(|finding| finding.level == "OK"), "{said:?}");
        Ok(())
    })
    .await
}

/// Nothing runs by it.
async fn create_idle_deployment(ns: &Namespace, name: &str, labels: &Value, container: &str) -> Result<()> {
    let deployment = json!({
        "metadata": { "name": name, "labels": labels },
        "spec": {
            "replicas": 0,
            "selector": { "matchLabels": { "app": name } },
            "template": {
                "metadata": { "labels": { "app": name } },
                "spec": { "containers": [{ "name": container, "image": ns.cluster().images().shell }] },
            },
        },
    });
    let deployments: Api<Deployment> = ns.api();
    let created = deployments.create(&PostParams::default(), &serde_json::from_value(deployment)?).await;
    created.with_context(|| format!("create the Deployment {name}"))?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn doctor_names_the_rights_that_an_agent_lacks_and_a_sidecar_at_the_default_rate() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "plugin", async |ns| {
        let agent = json!({ "app.kubernetes.io/name": RELEASE });
        create_idle_deployment(ns, "agent", &agent, "agent").await?;
        create_idle_deployment(ns, "storage", &json!({}), "csi-snapshotter").await?;
        let account = User::new(&cluster, &format!("system:serviceaccount:{}:default", ns.name())).await?;
        let snapshots = "volumesnapshots";
        account.grant_everywhere(ns, "snapshot.storage.k8s.io", snapshots, &["get", "list", "watch"]).await?;

        let said = findings(ns).await?;
        let found = about(&said, &format!("ServiceAccount {NAMESPACE}/{RELEASE}"))?;
        ensure!(found.level == "OK", "{found:?}");
        let found = about(&said, &format!("ServiceAccount {}/default", ns.name()))?;
        let lacks =
            |verb: &str| found.reason.contains(&format!("{verb} {snapshots}.snapshot.storage.k8s.io"));
        ensure!(
            found.level == "FAIL" && found.reason.starts_with("may not, in all namespaces: "),
            "{found:?}"
        );
        ensure!(["create", "delete"].into_iter().all(lacks), "{found:?}");
        ensure!(!["get", "list", "watch"].into_iter().any(lacks), "{found:?}");
        ensure!(found.remedy.as_ref().is_some_and(|remedy| remedy.contains("sts-backup-agent")), "{found:?}");

        let storage = format!("Deployment {}/storage", ns.name());
        let found = about(&said, &storage)?;
        let trap = "container csi-snapshotter does not set --kube-api-qps";
        ensure!(found.level == "WARN" && found.reason.starts_with(trap), "{found:?}");
        let remedy = found.remedy.as_ref().context("a warning has a remedy")?;
        let arguments: Vec<_> = remedy.split_whitespace().filter(|word| word.starts_with("--")).collect();
        let container = json!({ "name": "csi-snapshotter", "args": arguments });
        let args = json!({ "spec": { "template": { "spec": { "containers": [container] } } } });
        let deployments: Api<Deployment> = ns.api();
        deployments.patch("storage", &PatchParams::default(), &Patch::Strategic(args)).await?;
        let said = findings(ns).await?;
        ensure!(!said.iter().any(|finding| finding.object == storage), "{said:?}");
        Ok(())
    })
    .await
}
