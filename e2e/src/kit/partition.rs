//! A network between two clusters that carries nothing for a while.

use std::process::Output;

use anyhow::{Context, Result, ensure};

use super::Cluster;
use crate::harness::Harness;
use crate::harness::clusters::control_plane;
use crate::harness::engine::Engine;

/// Does something while nothing gets from the pods of a cluster to an address, and nobody is told: packets vanish.
///
/// # Errors
/// When the node's routes cannot be changed, or what is done fails.
pub async fn cut_off(
    cluster: &Cluster,
    address: &str,
    meanwhile: impl AsyncFnOnce() -> Result<()>,
) -> Result<()> {
    let engine = Engine::find(&Harness::open()?).await.context("no Docker engine answers")?;
    let node = control_plane(cluster.name());
    let route = async |verb: &str| -> Result<()> {
        let mut command = engine.docker();
        command.args(["exec", &node, "ip", "route", verb, "blackhole", address]);
        let Output { status, stderr, .. } = command.output().await?;
        ensure!(status.success(), "ip route {verb} in {node}: {}", String::from_utf8_lossy(&stderr));
        Ok(())
    };
    route("add").await?;
    let done = meanwhile().await;
    route("del").await?;
    done
}
