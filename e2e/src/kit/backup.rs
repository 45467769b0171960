//! A `StatefulSetBackup` under test: made, asked for runs, watched until they end.

use std::time::Duration;

use anyhow::{Context, Result};
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;
use sts_backup_api::backup::{StatefulSetBackup, StatefulSetBackupSpec, StatefulSetBackupStatus};
use sts_backup_api::names::{BACKUP_LABEL, REQUESTED_AT_ANNOTATION, RUN_LABEL};
use sts_backup_api::run::{RunId, RunRecord};
use sts_backup_api::snapshot::VolumeSnapshot;

use super::Namespace;
use crate::condition::await_condition;

/// Covers a run on a busy machine, two interruptions with their second thaws included.
const RUN_TIMEOUT: Duration = Duration::from_mins(6);

/// One object.
#[derive(Clone)]
pub struct Backup {
    ns: Namespace,
    name: String,
}

impl Backup {
    /// Creates it; the agent's run at creation begins.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn create(ns: &Namespace, name: &str, spec: StatefulSetBackupSpec) -> Result<Self> {
        let backup = Self { ns: ns.clone(), name: name.to_owned() };
        let object = StatefulSetBackup::new(name, spec);
        let created = backup.api().create(&PostParams::default(), &object).await;
        created.with_context(|| format!("create the StatefulSetBackup {name}"))?;
        Ok(backup)
    }

    /// The API of its kind in its namespace.
    #[must_use]
    pub fn api(&self) -> Api<StatefulSetBackup> {
        self.ns.api()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its status as it is now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn status(&self) -> Result<StatefulSetBackupStatus> {
        Ok(self.api().get(&self.name).await?.status.unwrap_or_default())
    }

    /// Asks for a run.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn request(&self, value: &str) -> Result<()> {
        let patch = json!({ "metadata": { "annotations": { REQUESTED_AT_ANNOTATION: value } } });
        self.api().patch(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    /// Asks for its deletion, and does not wait.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn delete(&self) -> Result<()> {
        self.api().delete(&self.name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Waits until its status is as wanted.
    ///
    /// # Errors
    /// When it is not in time; the text has the state at the end.
    pub async fn await_status(
        &self,
        what: &str,
        wanted: impl Fn(&StatefulSetBackupStatus) -> bool,
    ) -> Result<StatefulSetBackupStatus> {
        let is_wanted = |backup: &StatefulSetBackup| backup.status.as_ref().is_some_and(&wanted);
        let found = await_condition(&self.api(), &self.name, what, RUN_TIMEOUT, is_wanted).await?;
        Ok(found.status.unwrap_or_default())
    }

    /// Waits until so many runs have ended and none is under way; returns the newest.
    ///
    /// # Errors
    /// When they have not in time.
    pub async fn await_runs(&self, runs: usize) -> Result<RunRecord> {
        let status = self
            .await_status(&format!("{runs} runs ended"), |status| {
                status.history.len() >= runs && status.current_run.is_none()
            })
            .await?;
        status.history.into_iter().next().context("a run ended")
    }

    /// The snapshots of all its runs that are not being deleted.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn snapshots(&self) -> Result<Vec<VolumeSnapshot>> {
        self.list_snapshots(&format!("{BACKUP_LABEL}={},{RUN_LABEL}", self.name)).await
    }

    /// The snapshots of one of its runs that are not being deleted.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn snapshots_of(&self, run: &RunId) -> Result<Vec<VolumeSnapshot>> {
        self.list_snapshots(&format!("{BACKUP_LABEL}={},{RUN_LABEL}={run}", self.name)).await
    }

    async fn list_snapshots(&self, selector: &str) -> Result<Vec<VolumeSnapshot>> {
        let snapshots: Api<VolumeSnapshot> = self.ns.api();
        let listed = snapshots.list(&ListParams::default().labels(selector)).await?;
        Ok(listed.into_iter().filter(|snapshot| snapshot.metadata.deletion_timestamp.is_none()).collect())
    }
}
