//! What the controllers of objects have in common: how they watch their objects, find what an earlier leader began, and
//! wait after failures. It knows nothing of any kind of object.

use std::fmt::Debug;
use std::time::Duration;

use dashmap::DashMap;
use kube::api::ListParams;
use kube::runtime::controller::{Action, Controller, Error as ControllerError};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::Config as WatcherConfig;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Resource, ResourceExt};
use rand::Rng;
use serde::de::DeserializeOwned;
use sts_backup_service::telemetry;
use tracing::{error, warn};

use crate::error::{Error, Result};

/// How soon an object that waits for nothing is looked at again: a watch that had to begin anew does not tell what was
/// deleted meanwhile.
pub(crate) const RESYNC: Duration = Duration::from_hours(1);

/// A controller of all objects of a kind, and its store, which has of them what `keep` leaves.
pub(crate) fn watched<K>(objects: Api<K>, keep: fn(&mut K)) -> (Controller<K>, Store<K>)
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let changes = watcher(objects, WatcherConfig::default())
        .default_backoff()
        .modify(keep)
        .reflect(writer)
        // Also of those that are gone: what this process has of them goes, too.
        .touched_objects();
    (Controller::for_stream(changes, store.clone()), store)
}

/// The object that a controller was to look at, and that is gone. Its reconciliations have ended by then.
pub(crate) fn gone_object<K>(
    reconciled: std::result::Result<(ObjectRef<K>, Action), ControllerError<Error, watcher::Error>>,
) -> Option<ObjectRef<K>>
where
    K: Resource<DynamicType = ()>,
{
    match reconciled {
        Err(ControllerError::ObjectNotFound(gone)) => Some(gone.into_kind_unchecked(())),
        Err(ControllerError::QueueError(err)) => {
            warn!(error = %telemetry::chain(&err), kind = %K::kind(&()), "objects cannot be watched");
            None
        }
        // The error policy has told of the others.
        Ok(_) | Err(_) => None,
    }
}

/// All objects of a kind, however long the API server takes to tell them.
pub(crate) async fn list_all<K>(objects: &Api<K>, operation: &'static str) -> Vec<K>
where
    K: Clone + Debug + DeserializeOwned,
{
    let mut failures = 0;
    loop {
        let listed = objects.list(&ListParams::default()).await;
        match listed.map_err(Error::request(operation)) {
            Ok(found) => return found.items,
            Err(err) => {
                warn!(error = %telemetry::chain(&err), "what an earlier leader began is not found yet");
                tokio::time::sleep(err.backoff(failures)).await;
                failures += 1;
            }
        }
    }
}

/// Objects that wait together must not come back together.
pub(crate) fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.75..1.25))
}

/// Failed reconciliations in a row, by the uid of their object.
#[derive(Debug, Default)]
pub(crate) struct Failures(DashMap<String, u32>);

impl Failures {
    /// What a reconciliation came to: a success ends the row.
    pub(crate) fn note<K: Resource>(&self, object: &K, result: Result<Action>) -> Result<Action> {
        if result.is_ok() {
            self.0.remove(&object.uid().unwrap_or_default());
        }
        result
    }

    /// Forgets an object that is gone.
    pub(crate) fn forget<K: Resource>(&self, gone: &ObjectRef<K>) {
        if let Some(uid) = &gone.extra.uid {
            self.0.remove(uid);
        }
    }

    /// Says that one failed; when to try again, after `longest` at the latest.
    pub(crate) fn action<K>(&self, object: &K, err: &Error, longest: Duration) -> Action
    where
        K: Resource<DynamicType = ()>,
    {
        let mut failures = self.0.entry(object.uid().unwrap_or_default()).or_insert(0);
        let pause = err.backoff(*failures).min(longest);
        *failures = failures.saturating_add(1);
        if !err.is_conflict() {
            let (kind, namespace, name) =
                (K::kind(&()), object.namespace().unwrap_or_default(), object.name_any());
            if err.is_transient() {
                warn!(error = %telemetry::chain(err), %kind, namespace, name, "not reconciled yet");
            } else {
                error!(error = %telemetry::chain(err), %kind, namespace, name, "cannot be reconciled");
            }
        }
        Action::requeue(jittered(pause))
    }
}
