//! How long a restore takes an application down.
//!
//! The control is what no restore can do without: the same `StatefulSet`, scaled down and up by hand. Both are measured
//! in turns and in the same way, by watching the `StatefulSet`, and the medians compared: with volumes of 10 MiB that are
//! there at once, and with volumes that the storage takes 30 s to make, which must make no difference.

use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use futures::future::try_join_all;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1;
use kube::Api;
use kube::api::DeleteParams;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::watch_object;
use serde::Serialize;
use tokio::time::Instant;

use super::usage::{load_average, rounded};
use crate::condition::{snapshot_ready, statefulset_ready};
use crate::harness::clusters::cluster_name;
use crate::kit::class::{Binding, create_storage_class};
use crate::kit::snapshot::{await_snapshot, take_snapshot};
use crate::kit::{App, Cluster, Namespace, Restore};

/// How many pods, each with one claim.
const REPLICAS: [i32; 3] = [1, 3, 10];

/// Rounds of each kind; the median counts.
const ROUNDS: usize = 3;

const SIZE: &str = "10Mi";

/// How long the storage takes to make a volume: none, and long.
const PROVISION_SECONDS: [u32; 2] = [0, 30];

/// Pods that are to come back do so in seconds; a restore makes its volumes before.
const ROUND_TIMEOUT: Duration = Duration::from_mins(4);

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Figures {
    bench: &'static str,
    cases: Vec<Case>,
    /// The largest difference of a case.
    max_difference_s: f64,
    /// The machine's load average over the last minute, before the bench.
    load: f64,
}

/// Times are medians.
#[derive(Debug, Serialize)]
struct Case {
    /// Pods that start at once, each with one claim.
    replicas: i32,
    /// How long the storage takes to make a volume.
    provision_s: u32,
    /// From the order to scale down until all pods were ready again, during a restore.
    downtime_s: f64,
    /// The same, scaled down and up by hand.
    control_s: f64,
    difference_s: f64,
    /// The whole restore, from its creation until it had completed; the application runs in most of it.
    restore_s: f64,
}

/// Runs the bench in the first cluster.
///
/// # Errors
/// When the cluster or the agent in it does not do its part.
pub async fn run() -> Result<Figures> {
    let load = load_average()?;
    let cluster = Cluster::connect(&cluster_name(1)).await?;
    let mut cases = Vec::new();
    for provision_s in PROVISION_SECONDS {
        for replicas in REPLICAS {
            eprintln!(
                "  · {ROUNDS} rounds with {replicas} pods whose volumes take {provision_s} s to be made"
            );
            cases.push(Box::pin(case(&cluster, replicas, provision_s)).await?);
        }
    }
    let max_difference_s = cases.iter().map(|case| case.difference_s).fold(f64::MIN, f64::max);
    Ok(Figures { bench: "restore", cases, max_difference_s, load })
}

async fn case(cluster: &Cluster, replicas: i32, provision_s: u32) -> Result<Case> {
    let ns = Namespace::fresh(cluster, &format!("bench-restore-{replicas}-{provision_s}")).await?;
    let delay = format!("{provision_s}s");
    let class = create_storage_class(&ns, Binding::Immediate, &[("provisionDelay", &delay)]).await?;
    let app = App::new(&ns, "app").replicas(replicas).size(SIZE).storage_class(&class);
    app.deploy().await?;
    app.write_all("the point").await?;
    let snapshots = take_point(&ns, &app).await?;

    let (mut whole, mut down, mut by_hand) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        let scaling = async {
            app.scale(0).await?;
            app.await_ready(0).await?;
            app.scale(replicas).await
        };
        by_hand.push(Box::pin(downtime(&ns, replicas, scaling)).await?);

        app.write_all("later").await?;
        let began = Instant::now();
        let names = snapshots.clone();
        let restoring = async {
            let name = format!("round-{round}");
            let restore = Restore::create(&ns, &name, app.name(), |spec| {
                spec.snapshot_names = names;
                spec.rollback_window = Duration::from_secs(1).into();
            });
            restore.await?.await_completed().await?;
            Ok(())
        };
        down.push(Box::pin(downtime(&ns, replicas, restoring)).await?);
        whole.push(began.elapsed());
        app.ensure_texts("the point").await?;
    }
    let namespaces: Api<v1::Namespace> = Api::all(cluster.client());
    namespaces.delete(ns.name(), &DeleteParams::default()).await?;

    let (downtime_s, control_s) = (median(down), median(by_hand));
    let difference_s = rounded(downtime_s - control_s);
    Ok(Case { replicas, provision_s, downtime_s, control_s, difference_s, restore_s: median(whole) })
}

/// A snapshot of each claim.
async fn take_point(ns: &Namespace, app: &App) -> Result<Vec<String>> {
    let claims = app.claims();
    let snapshots = try_join_all(claims.iter().map(async |claim| {
        let name = format!("point-{claim}");
        take_snapshot(ns, &name, claim, "stsb-e2e").await?;
        await_snapshot(ns, &name, "ready", snapshot_ready).await?;
        anyhow::Ok(name)
    }));
    snapshots.await
}

/// How long pods are down while `work` is under way: from the first state of the `StatefulSet` in which fewer are
/// wanted until all are ready again, as a watch tells.
async fn downtime(ns: &Namespace, replicas: i32, work: impl Future<Output = Result<()>>) -> Result<Duration> {
    let sets: Api<StatefulSet> = ns.api();
    let mut states = pin!(watch_object(sets, "app").default_backoff());
    // The watch runs before the work begins.
    let first = states.next().await.context("a watch does not end")??;
    first.filter(statefulset_ready(replicas)).context("the application is not ready before it begins")?;
    let is_ready = statefulset_ready(replicas);
    let watching = async {
        let mut down: Option<Instant> = None;
        while let Some(state) = states.next().await {
            let Some(set) = state? else { bail!("the StatefulSet is gone") };
            let wanted = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
            if wanted < replicas {
                // For a moment the pods that are to go count as ready.
                down.get_or_insert_with(Instant::now);
            } else if let Some(since) = down
                && is_ready(&set)
            {
                return Ok(since.elapsed());
            }
        }
        bail!("a watch does not end")
    };
    let both = async { tokio::try_join!(watching, work) };
    let (took, ()) = tokio::time::timeout(ROUND_TIMEOUT, both).await.context("a round takes too long")??;
    Ok(took)
}

/// In seconds.
fn median(mut values: Vec<Duration>) -> f64 {
    values.sort_unstable();
    rounded(values.get(values.len() / 2).copied().unwrap_or_default().as_secs_f64())
}
