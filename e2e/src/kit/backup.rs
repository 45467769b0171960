//! A `StatefulSetBackup` under test: made, asked for runs, watched until they end.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::backup::{StatefulSetBackup, StatefulSetBackupSpec, StatefulSetBackupStatus};
use sts_backup_api::conditions;
use sts_backup_api::names::{BACKUP_LABEL, REQUESTED_AT_ANNOTATION, RUN_LABEL};
use sts_backup_api::run::{RunId, RunRecord};
use sts_backup_api::snapshot::VolumeSnapshot;

use super::columns::columns;
use super::{Namespace, manifest};
use crate::condition::{await_condition, await_deleted, await_event, await_none};

/// Covers a run on a busy machine, two interruptions with their second thaws included.
const RUN_TIMEOUT: Duration = Duration::from_mins(6);

/// Events are published beside the work.
const EVENT_TIMEOUT: Duration = Duration::from_secs(30);

/// A snapshot that is being cut is deleted after its cut only.
const SNAPSHOTS_TIMEOUT: Duration = Duration::from_mins(2);

/// One object.
#[derive(Clone)]
pub struct Backup {
    ns: Namespace,
    /// Where its `StatefulSet` is, and so its snapshots.
    home: Namespace,
    name: String,
}

impl Backup {
    /// Creates it; the agent's run at creation begins.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn create(ns: &Namespace, name: &str, spec: StatefulSetBackupSpec) -> Result<Self> {
        let backup = Self { ns: ns.clone(), home: ns.clone(), name: name.to_owned() };
        let object = StatefulSetBackup::new(name, spec);
        let created = backup.api().create(&PostParams::default(), &object).await;
        created.with_context(|| format!("create the StatefulSetBackup {name}"))?;
        Ok(backup)
    }

    /// Creates it with the spec of a manifest, as a user would; the agent's run at creation begins.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn write(ns: &Namespace, name: &str, spec: &Value) -> Result<Self> {
        let created = manifest::create(ns, &manifest::manifest(name, spec)).await;
        created.with_context(|| format!("create the StatefulSetBackup {name}"))?;
        Ok(Self { ns: ns.clone(), home: ns.clone(), name: name.to_owned() })
    }

    /// Its `StatefulSet`, as the spec says, is in another namespace.
    #[must_use]
    pub fn of_namespace(self, home: &Namespace) -> Self {
        Self { home: home.clone(), ..self }
    }

    /// One that a policy made.
    #[must_use]
    pub fn existing(ns: &Namespace, name: &str) -> Self {
        Self { ns: ns.clone(), home: ns.clone(), name: name.to_owned() }
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

    /// Changes fields of its spec; null removes one.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn change(&self, spec: &Value) -> Result<()> {
        let patch = Patch::Merge(json!({ "spec": spec }));
        self.api().patch(&self.name, &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// What `kubectl get` prints of it, by column.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn columns(&self) -> Result<BTreeMap<String, Value>> {
        columns(&self.ns.cluster().client(), &self.api(), &self.name).await
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

    /// Waits until one of its conditions has that status and reason.
    ///
    /// # Errors
    /// When it has not in time.
    pub async fn await_condition(&self, type_: &str, status: &str, reason: &str) -> Result<Condition> {
        let is_so = |condition: &Condition| condition.status == status && condition.reason == reason;
        let found = |found: &StatefulSetBackupStatus| {
            conditions::find(&found.conditions, type_).filter(|condition| is_so(condition)).cloned()
        };
        let what = format!("{type_}={status} ({reason})");
        let status = self.await_status(&what, |status| found(status).is_some()).await?;
        found(&status).context("the condition was there")
    }

    /// Waits until an Event of that reason was published about it, and returns its text.
    ///
    /// # Errors
    /// When none is in time.
    pub async fn await_event(&self, reason: &str) -> Result<String> {
        let event = await_event(&self.ns.api(), &self.name, reason, EVENT_TIMEOUT).await?;
        event.message.context("an Event has a message")
    }

    /// Waits until its recovery points are those of these runs, the newest first, and their snapshots all that there are.
    ///
    /// # Errors
    /// When they are not in time, or one of them is not whole.
    pub async fn await_points(&self, runs: &[RunId]) -> Result<()> {
        let what = format!("left with the points {runs:?}");
        let status = self
            .await_status(&what, |status| status.recovery_points.iter().map(|point| &point.id).eq(runs))
            .await?;
        let whole = status.recovery_points.iter().all(|point| point.complete);
        ensure!(whole && usize::try_from(status.recovery_point_count) == Ok(runs.len()), "{status:?}");
        let expected: i32 = status.recovery_points.iter().map(|point| point.expected_volumes).sum();
        let snapshots = self.snapshots().await?;
        ensure!(usize::try_from(expected) == Ok(snapshots.len()), "{expected} snapshots: {snapshots:?}");
        Ok(())
    }

    /// Asks for its deletion, and waits until it is gone.
    ///
    /// # Errors
    /// When it is not in time.
    pub async fn remove(&self) -> Result<()> {
        let object = self.api().get(&self.name).await?;
        self.delete().await?;
        await_deleted(&self.api(), &object, RUN_TIMEOUT).await
    }

    /// Waits until no snapshot of its runs is left, not even one that is being deleted.
    ///
    /// # Errors
    /// When some are left.
    pub async fn await_no_snapshots(&self) -> Result<()> {
        let is_ours = |snapshot: &VolumeSnapshot| snapshot.labels().get(BACKUP_LABEL) == Some(&self.name);
        await_none(&self.home.api(), "snapshots", SNAPSHOTS_TIMEOUT, is_ours).await
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
        let snapshots: Api<VolumeSnapshot> = self.home.api();
        let listed = snapshots.list(&ListParams::default().labels(selector)).await?;
        Ok(listed.into_iter().filter(|snapshot| snapshot.metadata.deletion_timestamp.is_none()).collect())
    }
}
