//! What `kubectl get` prints of an object.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use kube::{Api, Client, Resource};
use serde_json::Value;

/// The cells of one object, by column.
///
/// # Errors
/// When it cannot be read.
pub(super) async fn columns<K: Resource>(
    client: &Client,
    objects: &Api<K>,
    name: &str,
) -> Result<BTreeMap<String, Value>> {
    let table = hyper::Request::get(format!("{}/{name}", objects.resource_url()))
        .header(hyper::header::ACCEPT, "application/json;as=Table;g=meta.k8s.io;v=v1")
        .body(Vec::new())?;
    let table: Value = client.request(table).await?;
    let names = table["columnDefinitions"].as_array().context("a table has columns")?;
    let names = names.iter().filter_map(|column| column["name"].as_str().map(str::to_owned));
    let cells = table["rows"][0]["cells"].as_array().context("a table of one object has a row")?;
    Ok(names.zip(cells.iter().cloned()).collect())
}
