//! What a restore under way remembers: enough to go on with it, or to take it back, from any line.

#![allow(clippy::doc_markdown, reason = "kubectl explain shows these texts, and backticks as they are")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::run::Failure;

/// Exchanges the volumes below the claims of a `StatefulSet`, one way or the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Swap {
    /// What is done now.
    pub step: SwapStep,
    /// Since when.
    pub step_since: MicroTime,
    /// Which volumes the claims are to have at the end.
    pub toward: Toward,
    /// The StatefulSet was this object; one that was created again serves as well.
    pub stateful_set_uid: String,
    /// The replicas at the end.
    pub replicas: i32,
    /// The replicas while claims are swapped: those below the lowest ordinal that is restored.
    pub replicas_meanwhile: i32,
    /// The generation of the StatefulSet after it was scaled down: another one means that somebody else changed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
    /// When the order to scale down was given; absent until then, and where no pod had to go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub down_since: Option<MicroTime>,
    /// How often somebody else has scaled the StatefulSet up in the middle.
    #[serde(default)]
    pub contests: i32,
    /// Why the restore is given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// Every claim of every ordinal that goes down, restored or not.
    pub volumes: Vec<SwapVolume>,
}

/// The steps of a swap, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum SwapStep {
    /// The volumes that claims have now are kept from being deleted with their claims.
    Protecting,
    /// New volumes are made from the snapshots, beside the running application.
    Staging,
    /// The pods are going; the wanted volumes are reserved for the claims' names.
    ScalingDown,
    /// Claims are deleted and made again, each with its wanted volume.
    Swapping,
    /// The pods are coming back.
    ScalingUp,
    /// The volumes get their own reclaim policies back, and those that are left over their end.
    Releasing,
    /// Nothing was swapped: the new volumes go, and the old ones are as they were.
    Abandoning,
}

/// Which volumes a swap gives the claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Toward {
    /// Those made from the snapshots.
    Restored,
    /// Those that they had before the restore.
    Previous,
}

/// A claim of an ordinal that goes down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SwapVolume {
    /// The claim.
    pub claim: String,
    /// Its template in the StatefulSet.
    pub template: String,
    /// The ordinal of its replica.
    pub ordinal: i32,
    /// The snapshot that it is restored from; none: it keeps its volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// The uid of that snapshot: another one by its name is other data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_uid: Option<String>,
    /// The size that a new volume is asked for, bytes.
    #[serde(default)]
    pub size_bytes: i64,
    /// The node that a new volume must be reachable from; none: its storage class does not wait for a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The claim as JSON, as it is made again: the user's labels and annotations, and its spec without a volume.
    pub manifest: String,
    /// The volume that it had before the restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<SwapPv>,
    /// The volume made from the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored: Option<SwapPv>,
    /// How often a new volume was made: pods that somebody else started may have written to an earlier one.
    #[serde(default)]
    pub stagings: i32,
}

impl SwapVolume {
    /// The volume that the claim is to have, as far as it exists. A claim without one before keeps the restored one.
    #[must_use]
    pub fn wanted(&self, toward: Toward) -> Option<&SwapPv> {
        match toward {
            Toward::Restored if self.snapshot.is_some() => self.restored.as_ref(),
            Toward::Restored => self.previous.as_ref(),
            Toward::Previous => self.previous.as_ref().or(self.restored.as_ref()),
        }
    }
}

/// A PersistentVolume that a swap has in hand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SwapPv {
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// The reclaim policy that it is to have in the end: Delete or Retain.
    pub reclaim_policy: String,
    /// The uid of the claim that was bound to it when this was written down.
    pub claim_uid: String,
    /// Its manifest as JSON, for a person who must make it again; only of a volume from before the restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<String>,
}
