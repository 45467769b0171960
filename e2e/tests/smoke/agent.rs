//! The agent runs where the harness puts it, with no more rights than it needs, and tests can do to it what the
//! world does.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::rbac::v1::ClusterRole;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::json;
use sts_backup_e2e::condition::await_condition;
use sts_backup_e2e::kit::agent::{self, Agent, alone};
use sts_backup_e2e::kit::local_agent::{LocalAgent, LocalAgentConfig};
use sts_backup_e2e::kit::proxy::ApiProxy;
use sts_backup_e2e::kit::{Cluster, with_temp_namespace};

const TIMEOUT: Duration = Duration::from_mins(1);

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_shared_agent_answers_and_has_a_leader() -> Result<()> {
    let agent = Agent::shared(&Cluster::connect("stsb-e2e-1").await?);
    let leader = agent.await_leader(None).await?;
    let pods = agent.pods().await?;
    ensure!(pods.contains(&leader), "the leader {leader} is none of {pods:?}");
    agent.get(&leader, "/metrics").await?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn the_installed_agent_may_not_read_secrets_or_delete_volumes() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    for (group, resource, verb, expected) in [
        ("", "secrets", "get", false),
        ("", "configmaps", "list", false),
        ("", "persistentvolumes", "delete", false),
        ("", "persistentvolumeclaims", "patch", false),
        ("apps", "statefulsets", "patch", false),
        ("backup.sts-backup.io", "statefulsetbackuppolicies", "patch", false),
        ("", "namespaces", "patch", false),
        ("", "pods", "list", true),
        ("snapshot.storage.k8s.io", "volumesnapshots", "create", true),
    ] {
        let may = agent_may(&cluster, group, resource, verb).await?;
        ensure!(may == expected, "the agent's right to {verb} {resource} is {may}");
    }
    Ok(())
}

async fn agent_may(cluster: &Cluster, group: &str, resource: &str, verb: &str) -> Result<bool> {
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(format!("system:serviceaccount:{}:{}", agent::NAMESPACE, agent::RELEASE)),
            resource_attributes: Some(ResourceAttributes {
                group: Some(group.to_owned()),
                resource: Some(resource.to_owned()),
                verb: Some(verb.to_owned()),
                namespace: Some("default".to_owned()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    let reviews: Api<SubjectAccessReview> = Api::all(cluster.client());
    let review = reviews.create(&PostParams::default(), &review).await?;
    Ok(review.status.context("the API server answers")?.allowed)
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn whoever_may_view_or_edit_in_a_namespace_may_do_so_with_backups() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    let roles: Api<ClusterRole> = Api::all(cluster.client());
    for (role, verb) in [("view", "watch"), ("edit", "create"), ("admin", "create")] {
        await_condition(&roles, role, "extended to backups", TIMEOUT, |role: &ClusterRole| {
            role.rules.iter().flatten().any(|rule| {
                let has =
                    |list: &Option<Vec<String>>, word: &str| list.iter().flatten().any(|one| one == word);
                has(&rule.resources, "statefulsetbackups") && rule.verbs.iter().any(|one| one == verb)
            })
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn in_a_restricted_namespace_another_pod_leads_when_the_leader_is_deleted() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    with_temp_namespace(&cluster, "agent", async |ns| {
        let namespaces: Api<Namespace> = Api::all(cluster.client());
        let restricted = json!({ "pod-security.kubernetes.io/enforce": "restricted" });
        let restricted = Patch::Merge(json!({ "metadata": { "labels": restricted } }));
        namespaces.patch(ns.name(), &PatchParams::default(), &restricted).await?;

        let lease = json!({ "duration_seconds": 3, "renew_deadline_seconds": 2, "retry_seconds": 1 });
        let agent = Agent::install(ns, &json!({ "config": { "lease": lease } })).await?;
        let first = agent.await_leader(None).await?;
        agent.delete_pod(&first).await?;
        agent.await_leader(Some(&first)).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_local_agent_can_be_paused_resumed_ended_and_killed() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    with_temp_namespace(&cluster, "agent", async |ns| {
        let mut agent = LocalAgent::start(&LocalAgentConfig::new(ns, "one")).await?;
        agent.get("/metrics").await?;
        agent.pause()?;
        let answer = tokio::time::timeout(Duration::from_millis(200), agent.get("/healthz")).await;
        ensure!(answer.is_err(), "a paused agent answers: {answer:?}");
        agent.resume()?;
        agent.get("/healthz").await?;
        agent.terminate()?;
        let status = agent.wait_exit().await?;
        ensure!(status.success(), "after SIGTERM it ended with {status}");

        let agent = LocalAgent::start(&LocalAgentConfig::new(ns, "two")).await?;
        let status = agent.kill().await?;
        ensure!(status.signal() == Some(9), "it ended with {status}");
        Ok(())
    })
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test"]
async fn a_local_agent_leads_once_its_proxy_lets_it_reach_the_api_server() -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-2").await?;
    let _alone = alone(&cluster).await?;
    with_temp_namespace(&cluster, "agent", async |ns| {
        let proxy = ApiProxy::start(&cluster).await?;
        let fault = proxy.fail(|_, _| Some(500));
        let config = LocalAgentConfig::new(ns, "one").kubeconfig(proxy.kubeconfig());
        let _agent = LocalAgent::start(&config).await?;
        fault.await_hits(2).await;
        let leases: Api<Lease> = ns.api();
        ensure!(leases.get_opt(agent::RELEASE).await?.is_none(), "it reached the API server all the same");
        drop(fault);
        await_condition(&leases, agent::RELEASE, "there", TIMEOUT, |_| true).await?;
        Ok(())
    })
    .await
}
