//! The harness: makes real Kubernetes clusters, also where no container image can be pulled, and takes them
//! away again without a trace.
//!
//! [`up`](clusters::up) reads from top to bottom: [`machine`] checks, [`engine`] finds or starts Docker,
//! [`node_image`] finds or builds what a node runs, [`images`] makes the images for tests, [`clusters`] makes
//! the clusters and puts the snapshot machinery into them. [`traces`] knows what all that leaves on the
//! machine and removes it. What it needs of others is built from pinned sources by [`programs`] and
//! [`debian`], packed by [`archive`] and kept by [`cache`].
//!
//! It builds the agent's image, so that every node has it, and knows nothing else of sts-backup.

use std::fs::File;

use anyhow::{Context, Result};

pub mod archive;
pub mod cache;
pub mod clusters;
pub mod debian;
pub mod engine;
pub mod firewall;
pub mod images;
pub mod machine;
pub mod node_image;
pub mod paths;
pub mod programs;
pub mod step;
pub mod traces;

use paths::Paths;
use step::Steps;

/// What every part of the harness needs: where things are, and how work is shown.
#[derive(Clone, Debug)]
pub struct Harness {
    /// The harness's folders.
    pub paths: Paths,
    /// How work is shown.
    pub steps: Steps,
    /// Whether the agent in the clusters is built for speed, as benches want it, or to be built fast.
    pub release: bool,
}

impl Harness {
    /// Opens the harness's folders.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn open() -> Result<Self> {
        let paths = Paths::create()?;
        let steps = Steps::new(paths.logs());
        Ok(Self { paths, steps, release: false })
    }

    /// Keeps other runs of the harness out until the returned file is dropped. The kernel frees the lock of a
    /// killed run.
    ///
    /// # Errors
    /// When the lock file cannot be opened.
    pub fn lock(&self) -> Result<File> {
        let path = self.paths.state().join("lock");
        let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        if file.try_lock().is_err() {
            eprintln!("  … waiting for another run of the harness ({})", path.display());
            file.lock().with_context(|| format!("lock {}", path.display()))?;
        }
        Ok(file)
    }
}
