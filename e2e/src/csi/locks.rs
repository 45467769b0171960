//! One lock per object, so that parallel repeated calls for it take turns. Decides no order between
//! different objects: nobody may hold two.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

/// Locks by id.
#[derive(Debug, Default)]
pub(super) struct Locks {
    by_id: Mutex<HashMap<String, Arc<AsyncMutex<()>>>>,
}

impl Locks {
    /// Waits for the object's lock. The guard may outlive the call that took it.
    pub(super) async fn lock(&self, id: &impl AsRef<str>) -> OwnedMutexGuard<()> {
        let lock = {
            let mut by_id = self.by_id.lock().unwrap_or_else(PoisonError::into_inner);
            // A lock of which only the map knows is neither held nor waited for.
            by_id.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(by_id.entry(id.as_ref().to_owned()).or_default())
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_held_lock_is_not_given_to_a_second_call_and_another_objects_lock_is() {
        let locks = Locks::default();
        let held = locks.lock(&"a").await;
        let _other = locks.lock(&"b").await;
        let lock = Arc::clone(&locks.by_id.lock().unwrap()["a"]);
        assert!(lock.try_lock().is_err());
        drop(held);
        assert!(lock.try_lock().is_ok());
    }
}
