//! `FleetPolicy`: what the hub's files say of which clusters get which policy. It is no object of any cluster: what the
//! clusters get is its `StatefulSetBackupPolicy`.

#![allow(clippy::doc_markdown, reason = "these texts are the schema's, and backticks are shown as they are")]
#![allow(unreachable_pub, reason = "KubeSchema repeats the struct inside a function")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::policy::StatefulSetBackupPolicySpec;

/// Gives a policy to all clusters that it selects, under its own name.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "hub.sts-backup.io",
    version = "v1alpha1",
    kind = "FleetPolicy",
    plural = "fleetpolicies",
    doc = "Gives a policy to all clusters that it selects, under its own name."
)]
#[serde(rename_all = "camelCase")]
pub struct FleetPolicySpec {
    /// The clusters, by their labels; absent or empty: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_selector: Option<LabelSelector>,

    /// The spec of the StatefulSetBackupPolicy that these clusters get.
    pub policy: StatefulSetBackupPolicySpec,
}
