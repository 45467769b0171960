//! Writes the hub's policies down as objects of the cluster, and puts them back when somebody changes them.
//!
//! It owns what it applied, and touches nothing else: an object of the same name that the hub did not place stays, and
//! [`guard`](super::guard) has judged before what is written.

use std::collections::BTreeMap;
use std::time::Duration;

use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::{Value, json};
use sts_backup_api::link::{Applied, Desired, Have, Rejected, applied::Outcome, body_hash};
use sts_backup_api::names::{
    FROM_HUB_LABEL, HUB_FIELD_MANAGER, HUB_HASH_ANNOTATION, HUB_PAUSED_ANNOTATION, HUB_SPEC_ANNOTATION,
};
use sts_backup_api::policy::StatefulSetBackupPolicy;
use sts_backup_service::telemetry::chain;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tracing::{info, warn};

use super::guard::{Rejection, admit, hold};
use super::state::State;
use crate::app;
use crate::config::Guardrails;
use crate::error::{Error, Result};
use crate::lease::Leadership;

/// How long a request may take.
const REQUEST: Duration = Duration::from_secs(30);

/// What the agent knows of the policies of the hub, as it last saw or wrote them.
#[derive(Debug, Default)]
struct Placed {
    /// By name: what the hub sent, and the generation that it was written as.
    policies: BTreeMap<String, (String, Option<i64>)>,
}

/// Writes policies, one after the other.
pub(super) struct Applier {
    policies: Api<StatefulSetBackupPolicy>,
    pub(super) state: State,
    rails: Guardrails,
    leadership: Leadership,
    placed: Mutex<Placed>,
}

/// Whether the hub placed it.
pub(super) fn is_from_hub(policy: &StatefulSetBackupPolicy) -> bool {
    policy.labels().get(FROM_HUB_LABEL).is_some_and(|value| value == "true")
}

fn is_paused(policy: &StatefulSetBackupPolicy) -> bool {
    policy.annotations().get(HUB_PAUSED_ANNOTATION).is_some_and(|value| value == "true")
}

async fn in_time<T>(operation: &'static str, request: impl Future<Output = kube::Result<T>>) -> Result<T> {
    let answered = timeout(REQUEST, request).await;
    answered.map_err(|_| Error::NoAnswer { operation })?.map_err(Error::request(operation))
}

impl Applier {
    pub(super) fn new(cx: &app::Context, rails: Guardrails) -> Self {
        // Each request once: who waits for it judges its failure.
        let client: Client = cx.exec_client.clone();
        Self {
            policies: Api::all(client.clone()),
            state: State::new(client, &cx.config.namespace),
            rails,
            leadership: cx.leadership.clone(),
            placed: Mutex::default(),
        }
    }

    /// The policies of the hub that the cluster has.
    pub(super) async fn have(&self) -> Result<Vec<Have>> {
        let labelled = kube::api::ListParams::default().labels(&format!("{FROM_HUB_LABEL}=true"));
        let found =
            in_time("list the StatefulSetBackupPolicies", self.policies.list_metadata(&labelled)).await?;
        let have = found.iter().map(|policy| {
            let hash = policy.annotations().get(HUB_HASH_ANNOTATION).and_then(|hash| hex::decode(hash).ok());
            Have { name: policy.name_any(), hash: hash.unwrap_or_default() }
        });
        Ok(have.collect())
    }

    /// Does what the hub wants, as far as it may; what has come of it.
    ///
    /// # Errors
    /// If a request fails in passing: all of it can be done again.
    pub(super) async fn apply(&self, desired: &Desired, store: &str) -> Result<Applied> {
        let mut placed = self.placed.lock().await;
        let mut obeyed = self.state.read().await?;
        let have = self.have().await?;
        let answer = |outcome: Outcome, detail: String, items| Applied {
            revision: desired.revision,
            set_hash: desired.set_hash.clone(),
            outcome: outcome.into(),
            detail,
            items,
        };
        if let Some(why) = hold(desired, store, &obeyed, have.len()) {
            let accept = super::guard::acceptance(store, desired.revision);
            let remedy = format!(
                "to accept it, annotate the ConfigMap {} with {}={accept}, or confirm it at the hub with `clusters confirm`",
                super::state::NAME,
                sts_backup_api::names::ACCEPT_ANNOTATION,
            );
            warn!(revision = desired.revision, why, "what the hub sends is held back");
            let detail = format!("{why}; {remedy}");
            self.state.write(&obeyed, "Held", &detail).await?;
            return Ok(answer(Outcome::Held, detail, Vec::new()));
        }
        for name in &desired.removes {
            self.remove(name).await?;
            placed.policies.remove(name);
        }
        let names: std::collections::BTreeSet<_> = have.iter().map(|have| have.name.clone()).collect();
        let mut room = self.rails.max_policies.saturating_sub(names.len());
        let mut items = Vec::new();
        for upsert in &desired.upserts {
            let body = String::from_utf8_lossy(&upsert.body).into_owned();
            let is_new = !names.contains(&upsert.name);
            let done = if upsert.hash != body_hash(&upsert.body) {
                Err(Rejection::new("Invalid", "its hash is not that of its body"))
            } else if is_new && room == 0 {
                Err(Rejection::new(
                    "TooManyPolicies",
                    format!(
                        "the hub has {} policies here already: raise guardrails.max_policies of the agent's configuration",
                        self.rails.max_policies
                    ),
                ))
            } else {
                self.place(&upsert.name, &body).await?
            };
            match done {
                Ok(generation) => {
                    info!(policy = upsert.name, "a policy of the hub is active");
                    room = room.saturating_sub(usize::from(is_new));
                    placed.policies.insert(upsert.name.clone(), (body, generation));
                }
                Err(Rejection { code, detail }) => {
                    warn!(policy = upsert.name, code, detail, "a policy of the hub is not taken");
                    let (name, hash) = (upsert.name.clone(), upsert.hash.clone());
                    items.push(Rejected { name, hash, code: code.to_owned(), detail });
                }
            }
        }
        store.clone_into(&mut obeyed.store);
        obeyed.revision = desired.revision;
        let detail =
            items.iter().map(|item| format!("{}: {}", item.name, item.code)).collect::<Vec<_>>().join(", ");
        self.state.write(&obeyed, "Active", &detail).await?;
        Ok(answer(Outcome::Active, String::new(), items))
    }

    /// Applies a policy; its generation then, or why it is not taken.
    async fn place(&self, name: &str, body: &str) -> Result<std::result::Result<Option<i64>, Rejection>> {
        let spec = match admit(body.as_bytes(), &self.rails) {
            Ok(spec) => spec,
            Err(rejection) => return Ok(Err(rejection)),
        };
        let found = in_time("get the StatefulSetBackupPolicy", self.policies.get_opt(name)).await?;
        match &found {
            Some(found) if !is_from_hub(found) => {
                let detail = format!(
                    "the cluster has a policy of this name that no hub placed: rename one of them, or label it \
                     {FROM_HUB_LABEL}=true to give it to the hub"
                );
                return Ok(Err(Rejection::new("NameTaken", detail)));
            }
            Some(found) if is_paused(found) => {
                let detail =
                    format!("somebody in the cluster has paused it with {HUB_PAUSED_ANNOTATION}=true");
                return Ok(Err(Rejection::new("Paused", detail)));
            }
            Some(_) | None => {}
        }
        let uid = found.as_ref().and_then(ResourceExt::uid);
        let params = PatchParams::apply(HUB_FIELD_MANAGER).force().validation_strict();
        let manifest = Patch::Apply(manifest(name, body, &spec, uid.as_deref()));
        let applied = self.policies.patch(name, &params, &manifest);
        match in_time("apply the StatefulSetBackupPolicy", applied).await {
            Ok(policy) => Ok(Ok(policy.metadata.generation)),
            Err(error) if error.is_transient() || error.is_conflict() => Err(error),
            Err(error) => Ok(Err(Rejection::new("Refused", chain(&error)))),
        }
    }

    /// Removes a policy that the hub placed.
    async fn remove(&self, name: &str) -> Result<()> {
        let found = in_time("get the StatefulSetBackupPolicy", self.policies.get_opt(name)).await?;
        let Some(found) = found.filter(is_from_hub) else { return Ok(()) };
        let this = Preconditions { uid: found.uid(), resource_version: found.resource_version() };
        let params = DeleteParams::background().preconditions(this);
        match in_time("delete the StatefulSetBackupPolicy", self.policies.delete(name, &params)).await {
            Err(error) if !error.is_not_found() => Err(error),
            Ok(_) | Err(_) => {
                info!(policy = name, "a policy of the hub is removed; its snapshots stay");
                Ok(())
            }
        }
    }

    /// A policy is seen as it is now: what the hub placed, and somebody changed, is put back.
    pub(super) async fn saw(&self, policy: &StatefulSetBackupPolicy) {
        if !is_from_hub(policy) || is_paused(policy) || policy.metadata.deletion_timestamp.is_some() {
            return;
        }
        let Some(body) = policy.annotations().get(HUB_SPEC_ANNOTATION) else { return };
        let name = policy.name_any();
        let mut placed = self.placed.lock().await;
        let known = placed.policies.get(&name).and_then(|(_, generation)| *generation);
        // What is older than our own write is on its way here.
        if known >= policy.metadata.generation {
            return;
        }
        self.put_back(&mut placed, &name, body).await;
    }

    /// A policy is gone: what the hub placed is put back.
    pub(super) async fn lost(&self, policy: &StatefulSetBackupPolicy) {
        let name = policy.name_any();
        let mut placed = self.placed.lock().await;
        // What the hub removed is not known any more.
        let Some((body, _)) = placed.policies.get(&name).cloned() else { return };
        self.put_back(&mut placed, &name, &body).await;
    }

    async fn put_back(&self, placed: &mut Placed, name: &str, body: &str) {
        if !self.leadership.is_held() {
            return;
        }
        match self.place(name, body).await {
            Ok(Ok(generation)) => {
                placed.policies.insert(name.to_owned(), (body.to_owned(), generation));
            }
            Ok(Err(Rejection { code, detail })) => {
                warn!(policy = name, code, detail, "a policy of the hub is not put back");
            }
            // The next change or the hub brings it again.
            Err(error) => warn!(policy = name, error = chain(&error), "a policy of the hub is not put back"),
        }
    }
}

/// A policy as it is applied. With a uid: only to that object.
fn manifest(name: &str, body: &str, spec: &Value, uid: Option<&str>) -> Value {
    let mut metadata = json!({
        "name": name,
        "labels": { FROM_HUB_LABEL: "true" },
        "annotations": { HUB_HASH_ANNOTATION: hex::encode(body_hash(body.as_bytes())), HUB_SPEC_ANNOTATION: body },
    });
    if let Some(uid) = uid {
        metadata["uid"] = json!(uid);
    }
    json!({
        "apiVersion": StatefulSetBackupPolicy::api_version(&()),
        "kind": StatefulSetBackupPolicy::kind(&()),
        "metadata": metadata,
        "spec": spec,
    })
}
