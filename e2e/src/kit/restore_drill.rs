//! An application with a recovery point, whose volumes say whether they have the data of the point or what was written
//! later: and what must hold of it after a restore, whatever happened.

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::names::RESTORE_LABEL;
use sts_backup_api::restore::StatefulSetRestoreSpec;
use sts_backup_api::run::RunResult;

use super::poll::until;
use super::{App, Backup, Namespace, Restore, Volumes};

/// What the volumes say in the recovery point.
pub const POINT: &str = "the point";

/// What they say when the restore begins.
pub const LATER: &str = "later";

/// The name of the backup.
pub const BACKUP: &str = "nightly";

/// The application, its backup and its volumes.
pub struct RestoreDrill {
    ns: Namespace,
    app: App,
    backup: Backup,
    volumes: Volumes,
}

impl RestoreDrill {
    /// Deploys the application, has an agent that runs make the recovery point, and then writes on.
    ///
    /// # Errors
    /// When anything cannot be made.
    pub async fn deploy(ns: &Namespace, app: App) -> Result<Self> {
        app.deploy().await?;
        let volumes = Volumes::watch(ns).await?;
        app.write_all(POINT).await?;
        let spec = json!({ "statefulSetRef": { "name": app.name() } });
        let backup = Backup::write(ns, BACKUP, &spec).await?;
        let record = backup.await_runs(1).await?;
        ensure!(record.result == RunResult::Completed, "no recovery point: {record:?}");
        app.write_all(LATER).await?;
        Ok(Self { ns: ns.clone(), app, backup, volumes })
    }

    /// The application.
    #[must_use]
    pub fn app(&self) -> &App {
        &self.app
    }

    /// The backup.
    #[must_use]
    pub fn backup(&self) -> &Backup {
        &self.backup
    }

    /// The volumes.
    #[must_use]
    pub fn volumes(&self) -> &Volumes {
        &self.volumes
    }

    /// Creates a restore of the newest complete recovery point of the backup.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn restore(
        &self,
        name: &str,
        adjust: impl FnOnce(&mut StatefulSetRestoreSpec),
    ) -> Result<Restore> {
        let of_the_backup = |spec: &mut StatefulSetRestoreSpec| {
            spec.backup_name = Some(BACKUP.to_owned());
            adjust(spec);
        };
        Restore::create(&self.ns, name, self.app.name(), of_the_backup).await
    }

    /// All pods are ready, each volume says `text`, and no claim has ever had an empty volume.
    ///
    /// # Errors
    /// When anything is otherwise.
    pub async fn ensure_serves(&self, text: &str) -> Result<()> {
        self.app.await_ready(i32::try_from(self.app.ordinals().len())?).await?;
        self.app.ensure_texts(text).await?;
        self.ensure_none_was_empty()
    }

    /// [`Self::ensure_serves`] of the point, or of what was written later, but the same of all volumes; returns which.
    ///
    /// # Errors
    /// When anything is otherwise.
    pub async fn ensure_serves_either(&self) -> Result<&'static str> {
        self.app.await_ready(i32::try_from(self.app.ordinals().len())?).await?;
        let text = if self.app.ensure_texts(POINT).await.is_ok() { POINT } else { LATER };
        self.ensure_serves(text).await?;
        Ok(text)
    }

    /// No claim has ever had an empty volume.
    ///
    /// # Errors
    /// When one had.
    pub fn ensure_none_was_empty(&self) -> Result<()> {
        self.volumes.ensure_none_was_empty(&self.app.claims())
    }

    /// Has a restore refused, with all of these words; checks that nothing was touched.
    ///
    /// # Errors
    /// When it was not, or something was.
    pub async fn ensure_refuses(
        &self,
        name: &str,
        words: &[&str],
        adjust: impl FnOnce(&mut StatefulSetRestoreSpec),
    ) -> Result<()> {
        let before = footprint(&self.ns).await?;
        let restore = self.restore(name, adjust).await?;
        restore.await_refused(words).await?;
        ensure_untouched(&self.ns, &before).await?;
        restore.remove().await
    }

    /// Writes [`LATER`] again, for another restore of the same point.
    ///
    /// # Errors
    /// When a pod takes no command.
    pub async fn write_later(&self) -> Result<()> {
        self.app.write_all(LATER).await
    }
}

/// All that a restore may change, in a form to compare.
///
/// # Errors
/// When something cannot be listed.
pub async fn footprint(ns: &Namespace) -> Result<Value> {
    let all = ListParams::default();
    let (sets, pods) = (ns.api::<StatefulSet>(), ns.api::<Pod>());
    let claims = ns.api::<PersistentVolumeClaim>();
    let volumes: Api<PersistentVolume> = Api::all(ns.cluster().client());
    let (sets, pods) = tokio::try_join!(sets.list(&all), pods.list(&all))?;
    let (claims, volumes) = tokio::try_join!(claims.list(&all), volumes.list(&all))?;
    let sets = sets.iter().map(|set| {
        let replicas = set.spec.as_ref().and_then(|spec| spec.replicas);
        (set.name_any(), json!([set.uid(), set.metadata.generation, replicas]))
    });
    let pods = pods.iter().map(|pod| (pod.name_any(), json!([pod.uid(), pod.metadata.deletion_timestamp])));
    let claims = claims.iter().map(|claim| {
        let metadata = &claim.metadata;
        let labels = json!([metadata.labels, metadata.annotations, metadata.deletion_timestamp]);
        (claim.name_any(), json!([claim.uid(), labels, claim.spec]))
    });
    let is_ours = |volume: &&PersistentVolume| {
        let claim = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
        claim.and_then(|claim| claim.namespace.as_deref()) == Some(ns.name())
    };
    let volumes = volumes.iter().filter(is_ours).map(|volume| {
        let spec = volume.spec.as_ref();
        let policy = spec.and_then(|spec| spec.persistent_volume_reclaim_policy.clone());
        let claim = spec.and_then(|spec| spec.claim_ref.clone()).and_then(|claim| claim.uid);
        let labels = json!([volume.metadata.labels, volume.metadata.annotations]);
        (volume.name_any(), json!([volume.uid(), labels, policy, claim]))
    });
    Ok(json!({
        "statefulsets": sets.collect::<serde_json::Map<_, _>>(),
        "pods": pods.collect::<serde_json::Map<_, _>>(),
        "claims": claims.collect::<serde_json::Map<_, _>>(),
        "volumes": volumes.collect::<serde_json::Map<_, _>>(),
    }))
}

/// Waits until all is again as in that footprint.
///
/// # Errors
/// When it is not within half a minute; the text has both states of the kind of objects that differs.
pub async fn await_untouched(ns: &Namespace, before: &Value) -> Result<()> {
    let same = until("all is as before", async || Ok(footprint(ns).await? == *before)).await;
    if same.is_err() { ensure_untouched(ns, before).await } else { Ok(()) }
}

/// Checks that nothing has changed since that footprint.
///
/// # Errors
/// When something has; the text has both states of the kind of objects that differs.
pub async fn ensure_untouched(ns: &Namespace, before: &Value) -> Result<()> {
    let now = footprint(ns).await?;
    for kind in ["statefulsets", "pods", "claims", "volumes"] {
        ensure!(before[kind] == now[kind], "{kind} were {:#}, and are {:#}", before[kind], now[kind]);
    }
    Ok(())
}

/// Checks that the volumes of claims are what they were before a restore took them in hand: they go with their claims,
/// and nothing is noted at them.
///
/// # Errors
/// When one is not.
pub async fn ensure_released(ns: &Namespace, volumes: &Volumes) -> Result<()> {
    let api: Api<PersistentVolume> = Api::all(ns.cluster().client());
    let names: Vec<String> = volumes.by_claim().await?.into_values().collect();
    for volume in try_join_all(names.iter().map(|name| api.get(name))).await? {
        let policy = volume.spec.as_ref().and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref());
        ensure!(policy == Some("Delete"), "{} has the policy {policy:?}", volume.name_any());
        let label = volume.labels().get(RESTORE_LABEL);
        ensure!(label.is_none(), "{} is still of the restore {label:?}", volume.name_any());
    }
    Ok(())
}
