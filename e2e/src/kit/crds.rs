//! The project's own kinds, for agents that helm did not install.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};

use super::Cluster;
use super::helm::agent_chart;
use crate::condition::await_condition;

/// Takes over what helm or an earlier run applied.
const FIELD_MANAGER: &str = "sts-backup-e2e";

/// Until the API server serves a new kind.
const ESTABLISHED_TIMEOUT: Duration = Duration::from_secs(30);

/// Applies the CRDs of the checkout's chart and waits until the API server serves their kinds.
///
/// # Errors
/// When one is no CRD, or the API server refuses it.
pub async fn apply_crds(cluster: &Cluster) -> Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(cluster.client());
    let how = PatchParams::apply(FIELD_MANAGER).force();
    for file in crd_files()? {
        let text = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let crd: CustomResourceDefinition =
            serde_saphyr::from_str(&text).with_context(|| format!("parse {}", file.display()))?;
        let name = crd.name_any();
        let applied = crds.patch(&name, &how, &Patch::Apply(&crd)).await;
        applied.with_context(|| format!("apply {} in {}", file.display(), cluster.name()))?;
        await_condition(&crds, &name, "established", ESTABLISHED_TIMEOUT, established).await?;
    }
    Ok(())
}

/// The chart's CRDs, in order of name; there may be none yet.
fn crd_files() -> Result<Vec<PathBuf>> {
    let dir = agent_chart().join("files/crds");
    let entries = match std::fs::read_dir(&dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("read {}", dir.display()))?,
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|file| file.extension().is_some_and(|extension| extension == "yaml"))
        .collect();
    files.sort();
    Ok(files)
}

fn established(crd: &CustomResourceDefinition) -> bool {
    let conditions = crd.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Established" && condition.status == "True")
}
