//! A pod that runs to its end.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{LogParams, PostParams};
use kube::{Api, ResourceExt};

use super::Namespace;
use crate::condition::{await_condition, pod_finished};

/// Makes a pod, waits for its end and returns the log of its first container.
///
/// # Errors
/// When the pod cannot be made, does not end within `timeout`, or fails; the text has the log.
pub async fn run_pod(ns: &Namespace, pod: &Pod, timeout: Duration) -> Result<String> {
    let name = pod.name_any();
    let pods: Api<Pod> = ns.api();
    pods.create(&PostParams::default(), pod).await.with_context(|| format!("create the pod {name}"))?;
    let ended = await_condition(&pods, &name, "finished", timeout, pod_finished).await?;
    let container = pod.spec.as_ref().and_then(|spec| spec.containers.first());
    let of_the_first =
        LogParams { container: container.map(|first| first.name.clone()), ..LogParams::default() };
    let log = pods.logs(&name, &of_the_first).await.with_context(|| format!("read the log of {name}"))?;
    if ended.status.and_then(|status| status.phase).as_deref() != Some("Succeeded") {
        bail!("the pod {name} failed: {}", log.trim_end());
    }
    Ok(log)
}
