//! `cargo e2e dev agent`: the agent of the working tree on this machine, in place of the one in a cluster.

use std::process::ExitStatus;

use anyhow::{Context, Result};
use tokio::process::Command;

use crate::harness::paths::e2e_dir;
use crate::kit::Cluster;
use crate::kit::agent::{Agent, NAMESPACE, RELEASE, ensure_namespace};
use crate::kit::crds::apply_crds;

/// Builds and runs the agent with `arguments` until it ends; an interrupt at the keyboard ends it. An agent installed
/// in the cluster has no pods meanwhile: it would hold the lease.
///
/// # Errors
/// When the cluster does not take the CRDs, or the agent cannot be started.
pub async fn run_agent(cluster: &str, arguments: &[String]) -> Result<ExitStatus> {
    let cluster = Cluster::connect(cluster).await?;
    ensure_namespace(&cluster).await?;
    apply_crds(&cluster).await?;

    let installed = Agent::shared(&cluster);
    let deployment = installed.deployments().get_opt(RELEASE).await.context("look for an installed agent")?;
    let replicas =
        deployment.and_then(|deployment| deployment.spec?.replicas).filter(|replicas| *replicas > 0);
    if let Some(replicas) = replicas {
        eprintln!("  · the {replicas} installed agents rest until this one ends");
        installed.scale(0).await?;
    }

    // Heard here so that the interrupt, which the agent gets too, does not end us before it.
    let mut interrupts = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut agent = Command::new(cargo);
    agent.args(["run", "--quiet", "--package", "sts-backup-agent", "--bin", "sts-backup-agent", "--", "run"]);
    agent.args(arguments).current_dir(e2e_dir()).env("KUBECONFIG", cluster.kubeconfig());
    agent.env("STSB_NAMESPACE", NAMESPACE).env("STSB_IDENTITY", "dev").env("STSB_LEASE__NAME", RELEASE);
    let ended = async {
        let mut child = agent.spawn().context("start cargo")?;
        loop {
            tokio::select! {
                status = child.wait() => return anyhow::Ok(status?),
                _ = interrupts.recv() => {}
            }
        }
    };
    let status = ended.await;
    if let Some(replicas) = replicas {
        let restored = installed.scale(replicas).await;
        restored.context("the installed agent still rests: cargo e2e up brings it back as well")?;
    }
    status
}
