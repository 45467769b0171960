//! Every volume that claims of a namespace have ever had: which of them were made empty, and which the storage still has.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::api::ListParams;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, ResourceExt};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::Namespace;
use super::backend::backend_handles;
use super::poll::until;

/// What was seen of a volume.
#[derive(Clone, Debug)]
struct Seen {
    /// Its handle on the storage.
    handle: String,
    /// The claim that it was made for.
    made_for: String,
}

type SeenVolumes = Arc<Mutex<BTreeMap<String, Seen>>>;

/// The volumes of a namespace, from when it began to watch.
pub struct Volumes {
    ns: Namespace,
    seen: SeenVolumes,
    task: JoinHandle<()>,
}

impl Volumes {
    /// Begins to watch; all volumes that are there are known when it returns.
    ///
    /// # Errors
    /// When the watch ends before.
    pub async fn watch(ns: &Namespace) -> Result<Self> {
        let seen = SeenVolumes::default();
        let (listed, is_listed) = oneshot::channel();
        let task = tokio::spawn(write_down(ns.clone(), Arc::clone(&seen), listed));
        is_listed.await.context("the watch of the volumes ended")?;
        Ok(Self { ns: ns.clone(), seen, task })
    }

    /// The volumes that were made for a claim of that name itself, and not taken over by it. The first one of an
    /// application's claim is its own; any other one came to it empty.
    #[must_use]
    pub fn made_for(&self, claim: &str) -> Vec<String> {
        let seen = lock(&self.seen);
        let made = seen.iter().filter(|(_, seen)| seen.made_for == claim);
        made.map(|(name, _)| name.clone()).collect()
    }

    /// Checks that each of these claims had one volume made for itself, its first, and never an empty one after it.
    ///
    /// # Errors
    /// When one had another.
    pub fn ensure_none_was_empty(&self, claims: &[String]) -> Result<()> {
        for claim in claims {
            let made = self.made_for(claim);
            ensure!(made.len() <= 1, "the claim {claim} was given an empty volume, one of {made:?}");
        }
        Ok(())
    }

    /// The volumes of all claims of the namespace, by claim.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn by_claim(&self) -> Result<BTreeMap<String, String>> {
        let claims = self.ns.api::<PersistentVolumeClaim>().list(&ListParams::default()).await?;
        let volume = |claim: PersistentVolumeClaim| Some((claim.name_any(), claim.spec?.volume_name?));
        Ok(claims.into_iter().filter_map(volume).collect())
    }

    /// Waits until of all volumes that were ever seen the storage has just these.
    ///
    /// # Errors
    /// When it is not so within half a minute; the text names those that are too many or missing.
    pub async fn await_left(&self, names: &BTreeSet<String>) -> Result<()> {
        let left = until("the storage has the volumes that stay and no other", async || {
            Ok(self.on_the_storage().await? == *names)
        });
        let Err(err) = left.await else { return Ok(()) };
        let held = self.on_the_storage().await?;
        let (more, fewer): (Vec<_>, Vec<_>) =
            (held.difference(names).collect(), names.difference(&held).collect());
        Err(err.context(format!("the storage still has {more:?} and lost {fewer:?}")))
    }

    /// Waits until the storage has the volumes of the namespace's claims, and none that was theirs.
    ///
    /// # Errors
    /// As [`Self::await_left`].
    pub async fn await_only_those_of_claims(&self) -> Result<()> {
        self.await_left(&self.by_claim().await?.into_values().collect()).await
    }

    /// Those seen that the storage has.
    async fn on_the_storage(&self) -> Result<BTreeSet<String>> {
        let held = backend_handles(self.ns.cluster()).await?;
        let seen = lock(&self.seen);
        let held = seen.iter().filter(|(_, seen)| held.contains(&seen.handle));
        Ok(held.map(|(name, _)| name.clone()).collect())
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock(seen: &SeenVolumes) -> MutexGuard<'_, BTreeMap<String, Seen>> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn write_down(ns: Namespace, seen: SeenVolumes, listed: oneshot::Sender<()>) {
    let volumes: Api<PersistentVolume> = Api::all(ns.cluster().client());
    let mut listed = Some(listed);
    let mut watch = pin!(watcher(volumes, watcher::Config::default()).default_backoff());
    while let Some(event) = watch.next().await {
        match event {
            Ok(watcher::Event::InitApply(volume) | watcher::Event::Apply(volume)) => note(&ns, &seen, volume),
            Ok(watcher::Event::InitDone) => {
                // Later lists repeat what is known.
                if let Some(listed) = listed.take() {
                    let _ = listed.send(());
                }
            }
            // A test may restart the API server. What came and went meanwhile is not seen.
            Ok(watcher::Event::Init | watcher::Event::Delete(_)) | Err(_) => {}
        }
    }
}

fn note(ns: &Namespace, seen: &SeenVolumes, volume: PersistentVolume) {
    let name = volume.name_any();
    let Some(spec) = volume.spec else { return };
    let Some((csi, claim)) = spec.csi.zip(spec.claim_ref) else { return };
    if claim.namespace.as_deref() == Some(ns.name()) {
        let made_for = claim.name.unwrap_or_default();
        lock(seen).entry(name).or_insert(Seen { handle: csi.volume_handle, made_for });
    }
}
