//! Where the harness keeps things: one folder below the user's cache directory, nothing elsewhere.
//!
//! `cache/` holds what is expensive and named by its content, `logs/` one file per step of the last run,
//! `state/` what belongs to the clusters that exist now.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// What the names of folders in `cache/` begin with that are not whole yet.
pub const MAKING: &str = ".making-";

/// The harness's folders. They exist once [`Paths::create`] has returned.
#[derive(Clone, Debug)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// Finds the folders: `$XDG_CACHE_HOME/sts-backup-e2e`, or `~/.cache/sts-backup-e2e`.
    ///
    /// # Errors
    /// When neither `XDG_CACHE_HOME` nor `HOME` is set.
    pub fn find() -> Result<Self> {
        let cache = std::env::var_os("XDG_CACHE_HOME")
            .filter(|dir| !dir.is_empty())
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
            .context(
                "neither XDG_CACHE_HOME nor HOME is set: set one, the harness caches what it builds there",
            )?;
        Ok(Self { root: cache.join("sts-backup-e2e") })
    }

    /// Finds the folders and makes those that are missing.
    ///
    /// # Errors
    /// As [`Paths::find`], and when a folder cannot be made.
    pub fn create() -> Result<Self> {
        let paths = Self::find()?;
        for dir in [paths.cache(), paths.logs(), paths.state().join("bin"), paths.state().join("clusters")] {
            std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        }
        Ok(paths)
    }

    /// The folder of all others.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What is expensive to make, named by its content.
    #[must_use]
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Where the entry `name` of the cache is made, to be renamed when it is whole.
    #[must_use]
    pub fn making(&self, name: &str) -> PathBuf {
        self.cache().join(format!("{MAKING}{name}"))
    }

    /// One file per step of the last run.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// What belongs to the clusters that exist now.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// A program that the tests run on this machine, as the last `up` built it.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.state().join("bin").join(name)
    }

    /// What belongs to one cluster.
    #[must_use]
    pub fn cluster(&self, name: &str) -> PathBuf {
        self.state().join("clusters").join(name)
    }

    /// The kubeconfig of one cluster.
    #[must_use]
    pub fn kubeconfig(&self, name: &str) -> PathBuf {
        self.cluster(name).join("kubeconfig")
    }
}

/// The checkout's `e2e` folder, for the files that the harness reads from it.
#[must_use]
pub fn e2e_dir() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
