//! Backups of another namespace's `StatefulSet`: only as that namespace says.

use anyhow::{Result, ensure};
use kube::ResourceExt;
use kube::api::ListParams;
use serde_json::json;
use sts_backup_api::conditions::{NAMESPACE_NOT_GRANTED, READY};
use sts_backup_api::names::{ALLOW_BACKUP_FROM_ANNOTATION, BACKUP_NAMESPACE_LABEL};
use sts_backup_api::run::RunResult;
use sts_backup_api::snapshot::VolumeSnapshot;
use sts_backup_e2e::kit::{App, Backup, Cluster, with_temp_namespaces};

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_namespace_lets_a_backup_of_another_one_in_as_long_as_its_annotation_says_so() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespaces(&[&cluster, &cluster], "grants", async |namespaces| {
        let [ns, home] = namespaces else { anyhow::bail!("two namespaces") };
        let (near, far) = (App::new(ns, "near"), App::new(home, "app"));
        tokio::try_join!(near.deploy(), far.deploy())?;
        let spec = json!({ "statefulSetRef": { "name": "app", "namespace": home.name() } });
        let backup = Backup::write(ns, "nightly", &spec).await?.of_namespace(home);
        let ready = backup.await_condition(READY, "False", NAMESPACE_NOT_GRANTED).await?;
        let remedy = format!(
            "kubectl annotate namespace {} {ALLOW_BACKUP_FROM_ANNOTATION}={}",
            home.name(),
            ns.name()
        );
        ensure!(ready.message.ends_with(&remedy), "{ready:?}");

        // The agent looks by itself within an hour: what is seen at once, it was told.
        home.annotate(ALLOW_BACKUP_FROM_ANNOTATION, Some(ns.name())).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "{record:?}");
        backup.await_points(&[record.id]).await?;
        backup.await_condition(READY, "True", "Usable").await?;
        let own = ns.api::<VolumeSnapshot>().list(&ListParams::default()).await?;
        ensure!(own.items.is_empty(), "{own:?}");
        for snapshot in backup.snapshots().await? {
            let label = snapshot.labels().get(BACKUP_NAMESPACE_LABEL).map(String::as_str);
            ensure!(label == Some(ns.name()), "{snapshot:?}");
        }

        home.annotate(ALLOW_BACKUP_FROM_ANNOTATION, None).await?;
        backup.await_condition(READY, "False", NAMESPACE_NOT_GRANTED).await?;
        backup.request("please").await?;
        // A later object's run shows that the agent has seen the request.
        let own = Backup::write(ns, "own", &json!({ "statefulSetRef": { "name": "near" } })).await?;
        own.await_runs(1).await?;
        let status = backup.status().await?;
        ensure!(status.current_run.is_none() && status.history.len() == 1, "{status:?}");

        // One of several that are let in.
        let several = format!("elsewhere, {}", ns.name());
        home.annotate(ALLOW_BACKUP_FROM_ANNOTATION, Some(&several)).await?;
        let record = backup.await_runs(2).await?;
        ensure!(record.result == RunResult::Completed && record.slot.value == "please", "{record:?}");
        backup.remove().await
    })
    .await
}
