//! Tests of the ground that all other end-to-end tests stand on: the clusters, the storage and the kit.
//!
//! They are fast, and `cargo e2e test` makes the clusters and runs them. Of the agent they only ask that it runs.

mod admission;
mod agent;
mod backup_api;
mod backups;
mod backups_faults;
mod backups_hooks;
mod backups_preflight;
mod backups_runs;
mod chart;
mod clusters;
mod conformance;
mod crashes;
mod faults;
mod fleet;
mod grants;
mod hooks;
mod hub;
mod lifecycle;
mod plugin;
mod plugin_doctor;
mod plugin_points;
mod policies;
mod proxy;
mod restores;
mod restores_guards;
mod restores_refused;
mod retention;
mod schedules;
mod snapshots;
mod topology;

use anyhow::Result;
use sts_backup_e2e::kit::class::create_snapshot_class;
use sts_backup_e2e::kit::{App, Cluster, Namespace, RestoreDrill, with_temp_namespace};

/// An application `app` of one pod, and a snapshot class of the test driver with faults.
async fn with_app(
    prefix: &str,
    faults: &[(&str, &str)],
    test: impl AsyncFnOnce(&Namespace, &App, &str) -> Result<()>,
) -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, prefix, async |ns| {
        let class = create_snapshot_class(ns, faults).await?;
        let app = App::new(ns, "app");
        app.deploy().await?;
        test(ns, &app, &class).await
    })
    .await
}

/// An application `app` with a recovery point, which has written on since.
async fn with_restore_drill(
    app: impl FnOnce(App) -> App,
    test: impl AsyncFnOnce(&Namespace, &RestoreDrill) -> Result<()>,
) -> Result<()> {
    let cluster = Cluster::connect("stsb-e2e-1").await?;
    with_temp_namespace(&cluster, "restores", async |ns| {
        let drill = RestoreDrill::deploy(ns, app(App::new(ns, "app"))).await?;
        test(ns, &drill).await
    })
    .await
}
