//! A `StatefulSetRestore` under test: made, watched until it ends, rolled back.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::PersistentVolume;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::conditions;
use sts_backup_api::names::{APPROVED_PLAN_ANNOTATION, RESTORE_LABEL, ROLLBACK_REQUESTED_AT_ANNOTATION};
use sts_backup_api::restore::{
    RestorePhase, RestorePlan, StatefulSetRestore, StatefulSetRestoreSpec, StatefulSetRestoreStatus,
};

use super::columns::columns;
use super::{Namespace, manifest};
use crate::condition::{await_condition, await_deleted, await_event};

/// Covers a restore on a busy machine, and agents that follow each other.
const TIMEOUT: Duration = Duration::from_mins(4);

/// Events are published beside the work.
const EVENT_TIMEOUT: Duration = Duration::from_secs(30);

/// The condition that tells how it ended.
pub const SUCCEEDED: &str = "Succeeded";

/// One object.
#[derive(Clone)]
pub struct Restore {
    ns: Namespace,
    name: String,
}

impl Restore {
    /// Creates one of the `StatefulSet` `set`.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn create(
        ns: &Namespace,
        name: &str,
        set: &str,
        adjust: impl FnOnce(&mut StatefulSetRestoreSpec),
    ) -> Result<Self> {
        let mut spec = StatefulSetRestoreSpec::new(set);
        adjust(&mut spec);
        let restore = Self { ns: ns.clone(), name: name.to_owned() };
        let created =
            restore.api().create(&PostParams::default(), &StatefulSetRestore::new(name, spec)).await;
        created.with_context(|| format!("create the StatefulSetRestore {name}"))?;
        Ok(restore)
    }

    /// Creates it with the spec of a manifest, as a user would.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn write(ns: &Namespace, name: &str, spec: &Value) -> Result<Self> {
        let created = manifest::create(ns, &manifest::restore_manifest(name, spec)).await;
        created.with_context(|| format!("create the StatefulSetRestore {name}"))?;
        Ok(Self { ns: ns.clone(), name: name.to_owned() })
    }

    /// The API of its kind in its namespace.
    #[must_use]
    pub fn api(&self) -> Api<StatefulSetRestore> {
        self.ns.api()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The object as it is now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn get(&self) -> Result<StatefulSetRestore> {
        self.api().get(&self.name).await.with_context(|| format!("read the StatefulSetRestore {}", self.name))
    }

    /// Its status as it is now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn status(&self) -> Result<StatefulSetRestoreStatus> {
        Ok(self.get().await?.status.unwrap_or_default())
    }

    /// What `kubectl get` prints of it, by column.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn columns(&self) -> Result<BTreeMap<String, Value>> {
        columns(&self.ns.cluster().client(), &self.api(), &self.name).await
    }

    /// Sets an annotation of it.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn annotate(&self, annotation: &str, value: &str) -> Result<()> {
        let patch = json!({ "metadata": { "annotations": { annotation: value } } });
        self.api().patch(&self.name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        Ok(())
    }

    /// Asks for the old volumes.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn request_rollback(&self) -> Result<()> {
        self.annotate(ROLLBACK_REQUESTED_AT_ANNOTATION, "now").await
    }

    /// Lets the plan of that hash run.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn approve(&self, hash: &str) -> Result<()> {
        self.annotate(APPROVED_PLAN_ANNOTATION, hash).await
    }

    /// Waits until its status is as wanted.
    ///
    /// # Errors
    /// When it is not in time; the text has the state at the end.
    pub async fn await_status(
        &self,
        what: &str,
        wanted: impl Fn(&StatefulSetRestoreStatus) -> bool,
    ) -> Result<StatefulSetRestoreStatus> {
        let is_wanted = |restore: &StatefulSetRestore| restore.status.as_ref().is_some_and(&wanted);
        let found = await_condition(&self.api(), &self.name, what, TIMEOUT, is_wanted).await?;
        Ok(found.status.unwrap_or_default())
    }

    /// Waits until it is in this phase.
    ///
    /// # Errors
    /// When it is not in time, or ends in another way before; the text has the state at the end.
    pub async fn await_phase(&self, wanted: RestorePhase) -> Result<StatefulSetRestoreStatus> {
        let what = format!("in the phase {wanted:?}");
        let is_there = |phase: RestorePhase| phase == wanted || has_ended_without(wanted, phase);
        let status = self.await_status(&what, |status| status.phase.is_some_and(is_there)).await?;
        ensure!(status.phase == Some(wanted), "it is not {what}, and never will be: {}", told(&status));
        Ok(status)
    }

    /// Waits until the application serves the restored data, by its own word.
    ///
    /// # Errors
    /// When it does not in time, or the restore ends in another way.
    pub async fn await_completed(&self) -> Result<StatefulSetRestoreStatus> {
        let status = self.await_phase(RestorePhase::Completed).await?;
        let succeeded = conditions::find(&status.conditions, SUCCEEDED);
        ensure!(succeeded.is_some_and(|succeeded| succeeded.status == "True"), "{}", told(&status));
        Ok(status)
    }

    /// Waits until the old volumes are back.
    ///
    /// # Errors
    /// When they are not in time.
    pub async fn await_rolled_back(&self) -> Result<StatefulSetRestoreStatus> {
        self.await_phase(RestorePhase::RolledBack).await
    }

    /// Waits until it has failed, with all of these words.
    ///
    /// # Errors
    /// When it has not in time, ends in another way, or says something else.
    pub async fn await_failed(&self, words: &[&str]) -> Result<StatefulSetRestoreStatus> {
        let status = self.await_phase(RestorePhase::Failed).await?;
        let failed = conditions::find(&status.conditions, SUCCEEDED);
        let failed = failed.filter(|failed| failed.status == "False");
        let Some(failed) = failed else { bail!("{SUCCEEDED} is not False: {}", told(&status)) };
        for word in words {
            ensure!(failed.message.contains(word), "it does not say {word:?}: {failed:?}");
        }
        Ok(status)
    }

    /// Waits until it was refused, with all of these words, and has nothing in hand.
    ///
    /// # Errors
    /// When it was not in time, ends in another way, or says something else.
    pub async fn await_refused(&self, words: &[&str]) -> Result<StatefulSetRestoreStatus> {
        let status = self.await_failed(words).await?;
        ensure!(
            status.swap.is_none() && status.downtime_seconds.is_none(),
            "it was begun: {}",
            told(&status)
        );
        Ok(status)
    }

    /// Waits until one of its conditions says all of these words.
    ///
    /// # Errors
    /// When none does in time.
    pub async fn await_saying(&self, words: &[&str]) -> Result<StatefulSetRestoreStatus> {
        let says = |condition: &Condition| words.iter().all(|word| condition.message.contains(word));
        self.await_status(&format!("saying {words:?}"), |status| status.conditions.iter().any(says)).await
    }

    /// Waits until one of its conditions says all of these words while nothing is in hand yet.
    ///
    /// # Errors
    /// When none does in time, or the restore is begun by then.
    pub async fn await_waiting(&self, words: &[&str]) -> Result<StatefulSetRestoreStatus> {
        let status = self.await_saying(words).await?;
        ensure!(status.phase == Some(RestorePhase::New) && status.swap.is_none(), "{}", told(&status));
        Ok(status)
    }

    /// Waits until its plan is made and nothing more is done.
    ///
    /// # Errors
    /// When it is not in time.
    pub async fn await_planned(&self) -> Result<RestorePlan> {
        let status = self.await_phase(RestorePhase::Planned).await?;
        status.plan.context("one that is planned has a plan")
    }

    /// Waits until one of its conditions has that status.
    ///
    /// # Errors
    /// When it has not in time.
    pub async fn await_condition(&self, type_: &str, wanted: &str) -> Result<Condition> {
        let find = |status: &StatefulSetRestoreStatus| {
            let found = conditions::find(&status.conditions, type_).filter(|found| found.status == wanted);
            found.cloned()
        };
        let status = self.await_status(&format!("{type_}={wanted}"), |status| find(status).is_some()).await?;
        find(&status).context("the condition was there")
    }

    /// Waits until an Event of that reason was published about it, and returns its text.
    ///
    /// # Errors
    /// When none is in time.
    pub async fn await_event(&self, reason: &str) -> Result<String> {
        let event = await_event(&self.ns.api(), &self.name, reason, EVENT_TIMEOUT).await?;
        event.message.context("an Event has a message")
    }

    /// The volumes that it has in hand, or has left over.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn volumes(&self) -> Result<Vec<PersistentVolume>> {
        let uid = self.get().await?.uid().context("an object of the API server has a uid")?;
        let volumes: Api<PersistentVolume> = Api::all(self.ns.cluster().client());
        Ok(volumes.list(&ListParams::default().labels(&format!("{RESTORE_LABEL}={uid}"))).await?.items)
    }

    /// Asks for its deletion, and does not wait.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn delete(&self) -> Result<()> {
        self.api().delete(&self.name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Asks for its deletion, and waits until it is gone.
    ///
    /// # Errors
    /// When it is not in time.
    pub async fn remove(&self) -> Result<()> {
        let object = self.get().await?;
        self.delete().await?;
        await_deleted(&self.api(), &object, TIMEOUT).await
    }
}

/// Whether a restore in this phase never comes to the wanted one.
fn has_ended_without(wanted: RestorePhase, phase: RestorePhase) -> bool {
    match phase {
        RestorePhase::Failed | RestorePhase::RolledBack => true,
        // It may be rolled back yet.
        RestorePhase::Completed => !matches!(wanted, RestorePhase::RollingBack | RestorePhase::RolledBack),
        RestorePhase::New
        | RestorePhase::Planned
        | RestorePhase::Preparing
        | RestorePhase::ScalingDown
        | RestorePhase::Restoring
        | RestorePhase::ScalingUp
        | RestorePhase::RollingBack => false,
    }
}

/// A status for a person.
#[must_use]
pub fn told(status: &StatefulSetRestoreStatus) -> String {
    serde_json::to_string_pretty(status).unwrap_or_default()
}
