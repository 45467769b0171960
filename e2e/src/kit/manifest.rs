//! Backups, restores and policies as users write them, sent as kubectl sends them: an unknown field is refused, not dropped.

use anyhow::{Result, bail};
use kube::{Client, Resource};
use serde_json::{Value, json};
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::policy::StatefulSetBackupPolicy;
use sts_backup_api::restore::StatefulSetRestore;

use super::{Namespace, User};

const DRY_RUN: &str = "&dryRun=All";

/// The manifest of a backup with that spec.
#[must_use]
pub fn manifest(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": StatefulSetBackup::api_version(&()),
        "kind": StatefulSetBackup::kind(&()),
        "metadata": { "name": name },
        "spec": spec,
    })
}

/// The manifest of a restore with that spec.
#[must_use]
pub fn restore_manifest(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": StatefulSetRestore::api_version(&()),
        "kind": StatefulSetRestore::kind(&()),
        "metadata": { "name": name },
        "spec": spec,
    })
}

/// Creates what a manifest describes.
///
/// # Errors
/// When the API server refuses it.
pub async fn create(ns: &Namespace, manifest: &Value) -> Result<()> {
    send(&ns.cluster().client(), ns, manifest, "").await?;
    Ok(())
}

/// What the API server has to say against a manifest; nothing when it would admit it. Nothing is created.
///
/// # Errors
/// When it is not judged by its content.
pub async fn refusal(ns: &Namespace, manifest: &Value) -> Result<Option<String>> {
    match send(&ns.cluster().client(), ns, manifest, DRY_RUN).await {
        Ok(()) => Ok(None),
        Err(kube::Error::Api(status)) if matches!(status.code, 400 | 422) => Ok(Some(status.message)),
        Err(err) => bail!(err),
    }
}

/// What the API server has to say against a user who would create what a manifest describes. Nothing is created.
///
/// # Errors
/// When the user is not what it judges.
pub async fn refusal_of(user: &User, ns: &Namespace, manifest: &Value) -> Result<Option<String>> {
    match send(&user.client(), ns, manifest, DRY_RUN).await {
        Ok(()) => Ok(None),
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(Some(status.message)),
        Err(err) => bail!(err),
    }
}

async fn send(client: &Client, ns: &Namespace, manifest: &Value, parameters: &str) -> kube::Result<()> {
    let path = if manifest["kind"] == *StatefulSetBackupPolicy::kind(&()) {
        StatefulSetBackupPolicy::url_path(&(), None)
    } else if manifest["kind"] == *StatefulSetRestore::kind(&()) {
        StatefulSetRestore::url_path(&(), Some(ns.name()))
    } else {
        StatefulSetBackup::url_path(&(), Some(ns.name()))
    };
    let request = hyper::Request::post(format!("{path}?fieldValidation=Strict{parameters}"))
        .header(hyper::header::CONTENT_TYPE, "application/json")
        .body(manifest.to_string().into_bytes())
        .map_err(kube::Error::HttpError)?;
    client.request::<Value>(request).await.map(drop)
}
