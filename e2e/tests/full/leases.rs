//! A leader that loses its lease starts nothing more, and the next one thaws.

use anyhow::{Result, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use sts_backup_e2e::kit::Namespace;
use sts_backup_e2e::kit::agent::RELEASE;
use sts_backup_e2e::kit::drill::Drill;
use sts_backup_e2e::kit::local_agent::LocalAgent;
use sts_backup_e2e::kit::proxy::{ApiProxy, is_create_of_snapshot, is_pre_hook};

use crate::alone_in_namespace;

/// What an agent ends with that lost its lease.
const LEADERSHIP_LOST: Option<i32> = Some(3);

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_leader_whose_lease_another_one_takes_in_mid_freeze_ends_and_the_next_agent_thaws() -> Result<()> {
    alone_in_namespace("lease", async |ns| {
        let proxy = ApiProxy::start(ns.cluster()).await?;
        let mut drill = Drill::deploy(ns, &[("cutDelay", "5s")], |_| ()).await?;
        let mut first = LocalAgent::start(&drill.agent("first").kubeconfig(proxy.kubeconfig())).await?;
        drill.await_frozen(1).await?;
        let (freezes, creates) = (proxy.count(is_pre_hook), proxy.count(is_create_of_snapshot));
        steal_lease(ns).await?;
        let status = first.wait_exit().await?;
        ensure!(status.code() == LEADERSHIP_LOST, "it ended with {status}");
        ensure!(freezes.hits() + creates.hits() == 0, "it began something without its lease");

        let _second = LocalAgent::start(&drill.steady_agent("second")).await?;
        let attempts = drill.ensure_completed().await?;
        ensure!(attempts.len() == 2, "it took {attempts:#?}");
        Ok(())
    })
    .await
}

/// Gives the lease to somebody who does nothing with it, and lets it expire soon.
async fn steal_lease(ns: &Namespace) -> Result<()> {
    let leases: Api<Lease> = ns.api();
    let spec = json!({ "holderIdentity": "somebody_else", "leaseDurationSeconds": 3 });
    let patch = json!({ "spec": spec });
    leases.patch(RELEASE, &PatchParams::default(), &Patch::Merge(patch)).await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_leader_that_hangs_in_mid_freeze_and_comes_back_in_the_next_freeze_does_not_break_it() -> Result<()>
{
    alone_in_namespace("lease", async |ns| {
        let proxy = ApiProxy::start(ns.cluster()).await?;
        let mut drill = Drill::deploy(ns, &[("cutDelay", "5s")], |_| ()).await?;
        let mut first = LocalAgent::start(&drill.agent("first").kubeconfig(proxy.kubeconfig())).await?;
        first.await_leads().await?;
        let _second = LocalAgent::start(&drill.steady_agent("second")).await?;
        drill.await_frozen(1).await?;
        first.pause()?;
        drill.await_frozen(2).await?;

        let (freezes, creates) = (proxy.count(is_pre_hook), proxy.count(is_create_of_snapshot));
        first.resume()?;
        let status = first.wait_exit().await?;
        ensure!(status.code() == LEADERSHIP_LOST, "it ended with {status}");
        ensure!(freezes.hits() + creates.hits() == 0, "it began something without its lease");
        let attempts = drill.ensure_completed().await?;
        ensure!(attempts.len() == 2, "it took {attempts:#?}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_leader_that_hangs_before_its_snapshots_are_created_creates_none_when_it_comes_back() -> Result<()>
{
    alone_in_namespace("lease", async |ns| {
        let proxy = ApiProxy::start(ns.cluster()).await?;
        let mut drill = Drill::deploy(ns, &[], |_| ()).await?;
        let refused = proxy.fail(|method, uri| is_create_of_snapshot(method, uri).then_some(500));
        let mut first = LocalAgent::start(&drill.agent("first").kubeconfig(proxy.kubeconfig())).await?;
        first.await_leads().await?;
        let _second = LocalAgent::start(&drill.steady_agent("second")).await?;
        // It tries each of three again and again.
        refused.await_hits(6).await;
        first.pause()?;
        let attempts = drill.ensure_completed().await?;
        ensure!(attempts.len() == 2, "it took {attempts:#?}");

        drop(refused);
        let creates = proxy.count(is_create_of_snapshot);
        first.resume()?;
        let status = first.wait_exit().await?;
        ensure!(status.code() == LEADERSHIP_LOST, "it ended with {status}");
        ensure!(creates.hits() == 0, "it ordered {} snapshots without its lease", creates.hits());
        drill.ensure_sound().await
    })
    .await
}
