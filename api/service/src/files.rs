//! Changes of directories: policies and certificates are used as they come, also where a `ConfigMap` or Secret is mounted,
//! whose files are links that change all at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::warn;

/// How long a directory must be quiet before it is read: files come one by one.
const QUIET: Duration = Duration::from_millis(200);

/// How often it is looked at in any case: some file systems tell nothing.
const AT_LEAST: Duration = Duration::from_mins(1);

/// Watches a directory.
#[derive(Debug)]
pub struct Watch {
    changed: Arc<Notify>,
    /// It ends with this.
    _watcher: Option<RecommendedWatcher>,
}

impl Watch {
    /// From now on. Where the directory cannot be watched it is looked at once a minute.
    #[must_use]
    pub fn of(directory: &Path) -> Self {
        let changed = Arc::new(Notify::new());
        let tell = Arc::clone(&changed);
        let told = move |event: notify::Result<notify::Event>| {
            // Reading is an event, too.
            if event.is_ok_and(|event| !event.kind.is_access()) {
                tell.notify_one();
            }
        };
        let watcher = notify::recommended_watcher(told).and_then(|mut watcher| {
            watcher.watch(directory, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        let watcher = watcher.map_err(|error| {
            let directory: PathBuf = directory.into();
            warn!(?directory, %error, "changes are not noticed at once: it is looked at once a minute");
        });
        Self { changed, _watcher: watcher.ok() }
    }

    /// Returns when something may have changed, and all is quiet again.
    pub async fn changed(&self) {
        if timeout(AT_LEAST, self.changed.notified()).await.is_err() {
            return;
        }
        while timeout(QUIET, self.changed.notified()).await.is_ok() {}
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[tokio::test]
    async fn a_swap_of_links_as_kubelet_does_it_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for (folder, text) in [("..1", "old"), ("..2", "new")] {
            std::fs::create_dir(at(folder)).unwrap();
            std::fs::write(at(folder).join("gold.yaml"), text).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/gold.yaml", at("gold.yaml")).unwrap();
        let watch = Watch::of(directory.path());
        symlink("..2", at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
        watch.changed().await;
        assert_eq!(std::fs::read_to_string(at("gold.yaml")).unwrap(), "new");
    }
}
