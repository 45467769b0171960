//! A model of a cluster for tests: the controllers of `StatefulSets`, claims and volumes, a provisioner, the storage, and
//! the agent's writes one by one. What a rule here says is what the real controllers were seen to do.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use kube::ResourceExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sts_backup_api::names::{RESTORE_FINALIZER, RESTORE_LABEL};
use sts_backup_api::restore::{
    OnFailure, RestorePhase, RestorePlan, StatefulSetRestore, StatefulSetRestoreSpec,
};
use sts_backup_api::swap::{Swap, SwapPv, SwapStep, SwapVolume, Toward};

use super::decide::{RestoreStep, Work, Write, after_refusal, next_restore_step};
use super::expire::{Expiry, expiry};
use super::facts::{Objects, RestoreFacts, VolumeFacts, World};
use super::perform::{scale_patch, volume_patch};
use super::plan::{Planned, Verdict};
use super::status::next_status;

pub(super) const REPLICAS: i32 = 3;
const BYTES: i64 = 1 << 30;
const DRIVER: &str = "csi";
const UID: &str = "restore-uid";
const NAMESPACE: &str = "shop";

/// What a restore is of, and in what cluster.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are independent of each other")]
pub(super) struct Setting {
    pub(super) parallel: bool,
    /// `persistentVolumeClaimRetentionPolicy.whenScaled: Delete`.
    pub(super) deletes_claims: bool,
    /// The lowest ordinal that is restored.
    pub(super) from: i32,
    /// A second template, which is not restored.
    pub(super) keeps_logs: bool,
    /// The claim of the highest ordinal does not exist, and neither does its pod.
    pub(super) lacks_last: bool,
    /// The volumes' own policy.
    pub(super) retain: bool,
    pub(super) on_failure: OnFailure,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            parallel: false,
            deletes_claims: false,
            from: 0,
            keeps_logs: false,
            lacks_last: false,
            retain: false,
            on_failure: OnFailure::Hold,
        }
    }
}

/// What is on a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Data {
    Old(String),
    New(String),
    Fresh(String),
}

/// The cluster and the agent in it.
pub(super) struct Cluster {
    pub(super) setting: Setting,
    pub(super) now: Timestamp,
    next: u64,
    /// None: deleted, and let go.
    pub(super) restore: Option<StatefulSetRestore>,
    verdict: Swap,
    pub(super) set: Option<StatefulSet>,
    pub(super) pods: BTreeMap<String, Pod>,
    pub(super) claims: BTreeMap<String, PersistentVolumeClaim>,
    pub(super) volumes: BTreeMap<String, PersistentVolume>,
    pub(super) snapshots: BTreeSet<String>,
    /// The storage's volumes by handle.
    pub(super) storage: BTreeMap<String, Data>,
    /// The provisioner makes nothing.
    pub(super) is_storage_down: bool,
    /// How many claims may be created from now on.
    pub(super) quota: usize,
    /// Pods on restored data do not become ready.
    pub(super) is_new_broken: bool,
    /// No pod becomes ready.
    pub(super) is_all_broken: bool,
    /// What the agent is about to write.
    pending: Vec<Write>,
    work: Option<Work>,
    /// Writes of an agent that has died, still on their way.
    late: Vec<Write>,
    /// Storage volumes that pods wrote to while others had older or newer data.
    tainted: BTreeSet<String>,
    /// Claims that their user deleted: the next pod finds them empty.
    emptied: BTreeSet<String>,
    /// Volumes that were wanted once.
    wanted: BTreeSet<String>,
    /// How it ended.
    pub(super) ended: Option<RestorePhase>,
    /// How many writes the agent has done.
    pub(super) writes: usize,
    pub(super) log: Vec<String>,
}

fn changed<T: Serialize + DeserializeOwned>(object: &T, patch: &Value) -> T {
    let mut value = serde_json::to_value(object).unwrap();
    merge(&mut value, patch);
    serde_json::from_value(value).unwrap()
}

/// RFC 7386.
fn merge(value: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *value = patch.clone();
        return;
    };
    if !value.is_object() {
        *value = json!({});
    }
    for (key, patch) in patch {
        if patch.is_null() {
            value.as_object_mut().unwrap().remove(key);
        } else {
            merge(value.as_object_mut().unwrap().entry(key).or_insert(Value::Null), patch);
        }
    }
}

impl Cluster {
    pub(super) fn new(setting: &Setting) -> Self {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let mut spec = StatefulSetRestoreSpec::new("db");
        spec.use_latest_backup = Some(true);
        spec.on_failure = setting.on_failure;
        spec.rollback_window = Duration::from_hours(1).into();
        let mut restore = StatefulSetRestore::new("r", spec);
        restore.metadata.namespace = Some(NAMESPACE.to_owned());
        restore.metadata.uid = Some(UID.to_owned());
        let policy = if setting.deletes_claims { "Delete" } else { "Retain" };
        let mut templates = vec![json!({ "metadata": { "name": "data" } })];
        if setting.keeps_logs {
            templates.push(json!({ "metadata": { "name": "logs" } }));
        }
        let set = serde_json::from_value(json!({
            "metadata": { "name": "db", "namespace": NAMESPACE, "uid": "set-1", "resourceVersion": "1", "generation": 1 },
            "spec": {
                "replicas": if setting.lacks_last { REPLICAS - 1 } else { REPLICAS },
                "selector": {}, "serviceName": "db",
                "template": {}, "volumeClaimTemplates": templates,
                "persistentVolumeClaimRetentionPolicy": { "whenScaled": policy, "whenDeleted": "Retain" },
            },
        }))
        .unwrap();
        let mut cluster = Self {
            setting: setting.clone(),
            now,
            next: 10,
            restore: Some(restore),
            verdict: serde_json::from_value(json!({
                "step": "Protecting", "stepSince": MicroTime(now), "toward": "Restored", "statefulSetUid": "set-1",
                "replicas": REPLICAS, "replicasMeanwhile": setting.from, "volumes": [],
            }))
            .unwrap(),
            set: Some(set),
            pods: BTreeMap::new(),
            claims: BTreeMap::new(),
            volumes: BTreeMap::new(),
            snapshots: BTreeSet::new(),
            storage: BTreeMap::new(),
            is_storage_down: false,
            quota: usize::MAX,
            is_new_broken: false,
            is_all_broken: false,
            pending: Vec::new(),
            work: None,
            late: Vec::new(),
            tainted: BTreeSet::new(),
            emptied: BTreeSet::new(),
            wanted: BTreeSet::new(),
            ended: None,
            writes: 0,
            log: Vec::new(),
        };
        cluster.settle();
        for data in cluster.storage.values_mut() {
            if let Data::Fresh(claim) = data {
                *data = Data::Old(claim.clone());
            }
        }
        if setting.retain {
            for volume in cluster.volumes.values_mut() {
                *volume = changed(volume, &json!({ "spec": { "persistentVolumeReclaimPolicy": "Retain" } }));
            }
        }
        cluster.verdict.volumes = cluster.swap_volumes();
        cluster.verdict.replicas = cluster.replicas();
        cluster
    }

    fn swap_volumes(&mut self) -> Vec<SwapVolume> {
        let mut volumes = Vec::new();
        let templates: &[&str] = if self.setting.keeps_logs { &["data", "logs"] } else { &["data"] };
        for ordinal in self.setting.from..REPLICAS {
            for template in templates {
                let name = format!("{template}-db-{ordinal}");
                let claim = self.claims.get(&name);
                if claim.is_none() && *template == "logs" {
                    continue;
                }
                let snapshot = (*template == "data").then(|| format!("snap-{name}"));
                self.snapshots.extend(snapshot.clone());
                let previous = claim.map(|claim| {
                    let pv = &self.volumes[claim.spec.as_ref().unwrap().volume_name.as_ref().unwrap()];
                    SwapPv {
                        name: pv.name_any(),
                        uid: pv.uid().unwrap(),
                        reclaim_policy: VolumeFacts::of(pv).policy,
                        claim_uid: claim.uid().unwrap(),
                        manifest: None,
                    }
                });
                self.wanted.extend(previous.iter().map(|pv| pv.uid.clone()));
                volumes.push(SwapVolume {
                    claim: name.clone(),
                    template: (*template).to_owned(),
                    ordinal,
                    snapshot,
                    snapshot_uid: None,
                    size_bytes: BYTES,
                    node: None,
                    manifest: json!({
                        "apiVersion": "v1", "kind": "PersistentVolumeClaim",
                        "metadata": { "name": name },
                        "spec": {
                            "accessModes": ["ReadWriteOnce"], "storageClassName": "fast",
                            "resources": { "requests": { "storage": BYTES.to_string() } },
                        },
                    })
                    .to_string(),
                    previous,
                    restored: None,
                    stagings: 0,
                });
            }
        }
        volumes
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn say(&mut self, what: String) {
        self.log.push(what);
    }

    pub(super) fn replicas(&self) -> i32 {
        self.set.as_ref().and_then(|set| set.spec.as_ref()?.replicas).unwrap_or_default()
    }

    // The agent.

    pub(super) fn facts(&self) -> Option<RestoreFacts> {
        let restore = self.restore.as_ref()?;
        let mut facts = RestoreFacts::of(restore, None);
        if let Some(swap) = &facts.status.swap {
            let objects = Objects {
                namespace_ending: false,
                set: self.set.clone(),
                pods: self.pods.values().cloned().collect(),
                claims: self.claims.values().cloned().collect(),
                volumes: self.volumes.values().cloned().collect(),
                snapshots: Some(self.snapshots.clone()),
            };
            facts.world = Some(World::of(&objects, UID, swap));
        } else {
            let mut swap = self.verdict.clone();
            swap.step_since = MicroTime(self.now);
            let plan = RestorePlan {
                hash: "hash".to_owned(),
                backup: None,
                point: "point".to_owned(),
                time: MicroTime(self.now),
                consistency: None,
                replicas: swap.replicas,
                replicas_meanwhile: swap.replicas_meanwhile,
                volumes: Vec::new(),
                expected_downtime_seconds: 1,
                warnings: Vec::new(),
            };
            facts.verdict = Some(Verdict::Go(Box::new(Planned { plan, swap })));
        }
        Some(facts)
    }

    fn write_status(&mut self, facts: &RestoreFacts, step: &RestoreStep) {
        let status = next_status(facts, step, self.now);
        if let Some(swap) = &status.swap {
            let restored = swap.volumes.iter().filter_map(|volume| volume.restored.as_ref());
            self.wanted.extend(restored.map(|pv| pv.uid.clone()));
        }
        self.ended = status.phase.filter(|_| status.completion_time.is_some());
        self.restore.as_mut().unwrap().status = Some(status);
    }

    /// One write of the agent, or one decision; false: it waits. In the second case until then.
    pub(super) fn agent(&mut self) -> (bool, Option<Timestamp>) {
        if let Some(write) = self.pending.pop() {
            if let Err(words) = self.write(&write, false) {
                let work = self.work.unwrap();
                self.pending.clear();
                let Some(facts) = self.facts() else { return (false, None) };
                let step = after_refusal(&facts, work, &words, self.now);
                self.write_status(&facts, &step);
                if let RestoreStep::Wait { until, .. } = step {
                    return (false, until);
                }
                return (true, None);
            }
            return (true, None);
        }
        let Some(facts) = self.facts() else { return (false, None) };
        let step = next_restore_step(&facts, self.now);
        let said = if let RestoreStep::Record(swap) | RestoreStep::RollBack(swap) = &step {
            format!("{:?} {:?} {:?}", swap.step, swap.toward, swap.failure)
        } else if let RestoreStep::Begin { .. } = &step {
            "Begin".to_owned()
        } else if let RestoreStep::Wait { why, .. } = &step {
            format!("waits: {} {}", why.reason, why.message)
        } else {
            format!("{step:?}")
        };
        if !matches!(step, RestoreStep::Idle) && self.log.last() != Some(&said) {
            self.say(said);
        }
        match step {
            RestoreStep::AddFinalizer => {
                self.writes += 1;
                let restore = self.restore.as_mut().unwrap();
                restore.metadata.finalizers = Some(vec![RESTORE_FINALIZER.to_owned()]);
            }
            RestoreStep::RemoveFinalizer => {
                self.writes += 1;
                self.restore.as_mut().unwrap().metadata.finalizers = None;
                self.collect_restore();
            }
            RestoreStep::Do { work, writes } => {
                if work == Work::Stage && writes.len() > self.quota {
                    let step = after_refusal(&facts, work, "exceeded quota", self.now);
                    self.write_status(&facts, &step);
                    return (true, None);
                }
                (self.work, self.pending) = (Some(work), writes);
                self.pending.reverse();
            }
            RestoreStep::Plan(_)
            | RestoreStep::Refuse(_)
            | RestoreStep::Begin { .. }
            | RestoreStep::Record(_)
            | RestoreStep::RollBack(_)
            | RestoreStep::RefuseRollback(_)
            | RestoreStep::Finish { .. } => {
                self.writes += 1;
                self.write_status(&facts, &step);
            }
            RestoreStep::Wait { until, .. } => {
                self.write_status(&facts, &step);
                return (false, until);
            }
            RestoreStep::Idle => return (false, None),
        }
        (true, None)
    }

    /// The agent dies, and another one begins; some of its writes may still be on their way.
    pub(super) fn crash(&mut self, are_late: bool) {
        let pending = std::mem::take(&mut self.pending);
        self.say(format!("crash, {} writes lost", pending.len()));
        // What asks for volumes, keeps them or lets them go at the end is not: as each carries the resource version that it
        // was decided on, it can only harm volumes that nobody has touched since.
        if are_late && !matches!(self.work, Some(Work::Stage | Work::Keep | Work::Release)) {
            self.late.extend(pending);
        }
    }

    /// A write of an agent that has died arrives; false: there is none.
    pub(super) fn arrive(&mut self) -> bool {
        let Some(write) = self.late.pop() else { return false };
        let _ = self.write(&write, true);
        true
    }

    pub(super) fn collect_restore(&mut self) {
        let is_gone = self.restore.as_ref().is_some_and(|restore| {
            restore.metadata.deletion_timestamp.is_some() && restore.finalizers().is_empty()
        });
        if is_gone {
            self.restore = None;
        }
    }

    /// What the API server does with a write; in its words if it refuses it for good.
    fn write(&mut self, write: &Write, is_late: bool) -> Result<(), String> {
        self.writes += 1;
        match write {
            Write::Volume { name, uid, resource_version, change } => {
                let version = self.fresh();
                let Some(volume) = self.volumes.get_mut(name) else { return Ok(()) };
                if volume.uid().as_ref() == Some(uid) && &volume.resource_version() == resource_version {
                    let mut patch = volume_patch(uid, resource_version.as_deref(), change);
                    patch["metadata"]["resourceVersion"] = json!(version.to_string());
                    *volume = changed(volume, &patch);
                    self.say(format!("{name}: {change:?}"));
                } else {
                    self.say(format!("{name}: conflict"));
                }
            }
            Write::CreateClaim(claim) => {
                if self.claims.contains_key(&claim.name_any()) {
                    return Ok(());
                }
                if self.quota == 0 {
                    return Err("exceeded quota".to_owned());
                }
                self.quota -= 1;
                let mut claim = (**claim).clone();
                claim.metadata.uid = Some(format!("claim-{}", self.fresh()));
                claim.status = serde_json::from_value(json!({ "phase": "Pending" })).unwrap();
                self.say(format!("create claim {}", claim.name_any()));
                self.claims.insert(claim.name_any(), claim);
            }
            Write::DeleteClaim { name, uid } => {
                let Some(claim) = self.claims.get(name).filter(|claim| claim.uid().as_ref() == Some(uid))
                else {
                    return Ok(());
                };
                let is_staged = claim.labels().contains_key(RESTORE_LABEL);
                if !is_staged {
                    self.check_deletion(name, is_late);
                }
                self.say(format!("delete claim {name}"));
                self.end_claim(name);
            }
            Write::DeletePod { name, uid } => {
                if let Some(pod) = self.pods.get_mut(name).filter(|pod| pod.uid().as_ref() == Some(uid)) {
                    pod.metadata.deletion_timestamp = Some(Time(self.now));
                    self.say(format!("delete pod {name}"));
                }
            }
            Write::Scale { uid, resource_version, replicas } => {
                let is_right = self.set.as_ref().is_some_and(|set| {
                    set.uid().as_ref() == Some(uid)
                        && resource_version
                            .as_ref()
                            .is_none_or(|version| set.resource_version().as_ref() == Some(version))
                });
                if is_right {
                    let patch = scale_patch(uid, None, *replicas);
                    self.change_set(&patch);
                    self.say(format!("scale to {replicas}"));
                }
            }
        }
        Ok(())
    }

    /// A change of the `StatefulSet`'s spec.
    pub(super) fn change_set(&mut self, patch: &Value) {
        let version = self.fresh();
        if let Some(set) = &mut self.set {
            let mut new: StatefulSet = changed(set, patch);
            new.metadata.generation = new.metadata.generation.map(|generation| generation + 1);
            new.metadata.resource_version = Some(version.to_string());
            *set = new;
        }
    }

    /// Somebody deletes the `StatefulSet` with its pods.
    pub(super) fn delete_set(&mut self) {
        self.set = None;
        self.pods.clear();
    }

    /// Somebody deletes the `StatefulSet` without its pods, and creates it again, which adopts them.
    pub(super) fn create_set_again(&mut self) {
        let Some(set) = &mut self.set else { return };
        set.metadata.uid = Some("set-2".to_owned());
        set.metadata.generation = Some(1);
        set.metadata.resource_version = Some("1".to_owned());
        set.status = None;
        set.spec.as_mut().unwrap().replicas = Some(REPLICAS);
        for owner in
            self.pods.values_mut().filter_map(|pod| pod.metadata.owner_references.as_mut()?.first_mut())
        {
            owner.uid = "set-2".to_owned();
        }
    }

    fn end_claim(&mut self, name: &str) {
        if let Some(claim) = self.claims.get_mut(name) {
            claim.metadata.deletion_timestamp = Some(Time(self.now));
        }
        self.collect_claim(name);
    }

    /// pvc-protection: a claim goes when no pod names it.
    fn collect_claim(&mut self, name: &str) -> bool {
        let ends = self.claims.get(name).is_some_and(|claim| claim.metadata.deletion_timestamp.is_some());
        let is_named = self.pods.values().any(|pod| names(pod).contains(name));
        let goes = ends && !is_named && self.claims[name].finalizers().is_empty();
        if goes {
            self.claims.remove(name);
        }
        goes
    }

    /// Somebody puts a finalizer on a claim, or takes it away.
    pub(super) fn hold_claim(&mut self, name: &str, is_held: bool) {
        let finalizers = is_held.then(|| vec!["example.com/hold".to_owned()]);
        self.claims.get_mut(name).unwrap().metadata.finalizers = finalizers;
    }

    /// The user deletes a claim, and the pod that uses it.
    pub(super) fn empty_replica(&mut self, ordinal: i32) {
        let claim = format!("data-db-{ordinal}");
        self.say(format!("its user deletes {claim}"));
        self.end_claim(&claim);
        self.emptied.insert(claim);
        let pod = self.pods.get_mut(&format!("db-{ordinal}")).unwrap();
        pod.metadata.deletion_timestamp = Some(Time(self.now));
    }

    // The controllers of the cluster: each does one thing, and says whether there was one.

    /// One thing that the `StatefulSet` controller does.
    pub(super) fn stateful_set_controller(&mut self) -> bool {
        let Some(set) = self.set.clone() else { return false };
        let spec = set.spec.as_ref().unwrap();
        let replicas = spec.replicas.unwrap_or(1);
        let generation = set.metadata.generation.unwrap();
        let templates: Vec<_> =
            spec.volume_claim_templates.iter().flatten().map(ResourceExt::name_any).collect();
        let own =
            |pod: &Pod| pod.owner_references().iter().any(|owner| Some(&owner.uid) == set.uid().as_ref());
        let ready = self.pods.values().filter(|pod| own(pod) && is_ready(pod)).count();
        let known = super::facts::SetFacts::of(&set);
        let ready = i32::try_from(ready).unwrap();
        if known.observed_generation != generation
            || set.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0) != ready
        {
            let version = self.fresh();
            let status = json!({ "replicas": 0, "observedGeneration": generation, "readyReplicas": ready });
            let metadata = json!({ "resourceVersion": version.to_string() });
            self.set = Some(changed(&set, &json!({ "status": status, "metadata": metadata })));
            return true;
        }
        for ordinal in 0..replicas {
            let name = format!("db-{ordinal}");
            if let Some(pod) = self.pods.get(&name) {
                let is_well = is_ready(pod) && pod.metadata.deletion_timestamp.is_none();
                if !self.setting.parallel && !is_well {
                    return false;
                }
                continue;
            }
            let claims: Vec<_> =
                templates.iter().map(|template| format!("{template}-db-{ordinal}")).collect();
            if claims.iter().any(|claim| {
                self.claims.get(claim).is_some_and(|claim| claim.metadata.deletion_timestamp.is_some())
            }) {
                return false;
            }
            for claim in &claims {
                if !self.claims.contains_key(claim) {
                    if self.is_between_two_volumes(claim) {
                        return false;
                    }
                    self.create_claim_of_set(claim);
                    return true;
                }
                // They stay now.
                self.claims.get_mut(claim).unwrap().metadata.owner_references = None;
            }
            self.create_pod(&name, &claims, &set);
            return true;
        }
        let condemned: Vec<_> =
            (replicas..REPLICAS + 2).rev().map(|ordinal| format!("db-{ordinal}")).collect();
        let all = (0..REPLICAS + 2).map(|ordinal| format!("db-{ordinal}"));
        let first_unhealthy =
            all.filter_map(|name| self.pods.get(&name)).find(|pod| !is_ready(pod)).map(ResourceExt::name_any);
        for name in condemned {
            let Some(pod) = self.pods.get(&name).filter(|pod| own(pod)) else { continue };
            if pod.metadata.deletion_timestamp.is_some() {
                if self.setting.parallel {
                    continue;
                }
                return false;
            }
            if !self.setting.parallel && !is_ready(pod) && first_unhealthy.as_ref() != Some(&name) {
                return false;
            }
            if self.setting.deletes_claims {
                let owner = json!([{ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod.uid() }]);
                for claim in names(pod) {
                    let claim = self.claims.get_mut(&claim).unwrap();
                    claim.metadata.owner_references = serde_json::from_value(owner.clone()).unwrap();
                }
            }
            self.pods.get_mut(&name).unwrap().metadata.deletion_timestamp = Some(Time(self.now));
            self.say(format!("controller deletes {name}"));
            return true;
        }
        false
    }

    /// On the way back, a claim that is just missing has no volume waiting for it from when the new one is let go until the
    /// old one is reserved: as never two may wait for a name, that cannot be helped, and takes some milliseconds. The
    /// controllers are taken to be slower.
    fn is_between_two_volumes(&self, claim: &str) -> bool {
        let goes_back = swap_of(self).is_some_and(|(_, toward)| toward == Toward::Previous);
        let is_one_of_ours =
            self.verdict.volumes.iter().any(|volume| volume.claim == claim && volume.snapshot.is_some());
        let mut volumes = self.volumes.values().map(VolumeFacts::of);
        let is_armed = volumes.any(|volume| volume.is_armed_for(NAMESPACE, claim));
        self.ended.is_none() && goes_back && is_one_of_ours && !is_armed
    }

    fn create_claim_of_set(&mut self, name: &str) {
        let uid = format!("claim-{}", self.fresh());
        self.say(format!("controller creates claim {name}"));
        let claim = json!({
            "metadata": { "name": name, "namespace": NAMESPACE, "uid": uid },
            "spec": {
                "accessModes": ["ReadWriteOnce"], "storageClassName": "fast",
                "resources": { "requests": { "storage": BYTES.to_string() } },
            },
            "status": { "phase": "Pending" },
        });
        self.claims.insert(name.to_owned(), serde_json::from_value(claim).unwrap());
    }

    fn create_pod(&mut self, name: &str, claims: &[String], set: &StatefulSet) {
        let volumes: Vec<_> = claims
            .iter()
            .map(|claim| json!({ "name": claim, "persistentVolumeClaim": { "claimName": claim } }))
            .collect();
        let uid = format!("pod-{}", self.fresh());
        let pod = json!({
            "metadata": {
                "name": name, "namespace": NAMESPACE, "uid": uid,
                "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "StatefulSet", "name": "db", "uid": set.uid(), "controller": true,
                }],
            },
            "spec": { "containers": [], "volumes": volumes },
            "status": { "phase": "Pending" },
        });
        self.pods.insert(name.to_owned(), serde_json::from_value(pod).unwrap());
        self.say(format!("controller creates {name}"));
    }

    /// One thing that happens to a pod: it ends, starts, or becomes ready.
    pub(super) fn kubelet(&mut self, choice: usize) -> bool {
        let names_of: Vec<_> = self.pods.keys().cloned().collect();
        let count = names_of.len();
        for name in names_of.iter().cycle().skip(choice % count.max(1)).take(count) {
            let pod = self.pods[name].clone();
            if pod.metadata.deletion_timestamp.is_some() {
                self.pods.remove(name);
                self.say(format!("{name} is gone"));
                return true;
            }
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            let handles: Option<Vec<_>> = names(&pod).iter().map(|claim| self.handle(claim)).collect();
            let Some(handles) = handles else { continue };
            if phase == Some("Pending") {
                self.pods.insert(name.clone(), changed(&pod, &json!({ "status": { "phase": "Running" } })));
                self.say(format!("{name} runs on {handles:?}"));
                self.check_running();
                return true;
            }
            let is_new = handles.iter().any(|handle| matches!(self.storage[handle], Data::New(_)));
            let is_broken = self.is_all_broken || (is_new && self.is_new_broken);
            if is_ready(&pod) == is_broken {
                let ready = if is_broken { "False" } else { "True" };
                let conditions =
                    json!({ "status": { "conditions": [{ "type": "Ready", "status": ready }] } });
                self.pods.insert(name.clone(), changed(&pod, &conditions));
                return true;
            }
        }
        false
    }

    /// The storage's volume below a claim that is bound and stays.
    fn handle(&self, claim: &str) -> Option<String> {
        let claim = self.claims.get(claim)?;
        let is_bound = claim.status.as_ref()?.phase.as_deref() == Some("Bound");
        if claim.metadata.deletion_timestamp.is_some() || !is_bound {
            return None;
        }
        let volume = self.volumes.get(claim.spec.as_ref()?.volume_name.as_ref()?)?;
        VolumeFacts::of(volume).handle
    }

    /// The garbage collector and pvc-protection.
    pub(super) fn collector(&mut self) -> bool {
        let mut is_done = false;
        for name in self.claims.keys().cloned().collect::<Vec<_>>() {
            let owner = self.claims[&name].owner_references().first().map(|owner| owner.uid.clone());
            let is_owner = |owner: &String| self.pods.values().any(|pod| pod.uid().as_ref() == Some(owner));
            if owner.is_some_and(|owner| !is_owner(&owner)) {
                self.say(format!("{name} goes with its pod"));
                self.claims.get_mut(&name).unwrap().metadata.owner_references = None;
                self.end_claim(&name);
                is_done = true;
            }
            is_done |= self.collect_claim(&name);
        }
        is_done
    }

    /// One thing that the controller of volumes does with a claim or a volume, or the provisioner.
    pub(super) fn volume_controller(&mut self) -> bool {
        for name in self.volumes.keys().cloned().collect::<Vec<_>>() {
            let volume = self.volumes[&name].clone();
            let facts = VolumeFacts::of(&volume);
            let phase = match facts.claim.as_ref().map(|claim| (&claim.name, &claim.uid)) {
                None | Some((_, None)) => "Available",
                Some((claim, Some(uid))) => {
                    let exists =
                        self.claims.get(claim).is_some_and(|claim| claim.uid().as_ref() == Some(uid));
                    if exists { "Bound" } else { "Released" }
                }
            };
            if facts.phase != phase {
                self.change_volume(&name, &json!({ "status": { "phase": phase } }));
                return true;
            }
            if phase == "Released" && facts.policy == "Delete" {
                self.volumes.remove(&name);
                self.storage.remove(&facts.handle.unwrap());
                self.say(format!("{name} is deleted"));
                return true;
            }
        }
        for name in self.claims.keys().cloned().collect::<Vec<_>>() {
            let claim = self.claims[&name].clone();
            let is_pending =
                claim.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Pending");
            if is_pending && claim.metadata.deletion_timestamp.is_none() && self.bind(&name, &claim) {
                return true;
            }
        }
        false
    }

    fn bind(&mut self, name: &str, claim: &PersistentVolumeClaim) -> bool {
        let asked = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone());
        let fits = |volume: &&PersistentVolume| {
            let facts = VolumeFacts::of(volume);
            let is_asked = asked.as_ref().is_none_or(|asked| *asked == facts.name);
            let is_ours = facts.claim.as_ref().is_some_and(|bound| bound.uid == claim.uid());
            is_asked && (facts.is_armed_for(NAMESPACE, name) || is_ours)
        };
        let found = self.volumes.values().find(fits).map(ResourceExt::name_any);
        if let Some(volume) = found {
            let claim_ref = json!({ "namespace": NAMESPACE, "name": name, "uid": claim.uid() });
            self.change_volume(
                &volume,
                &json!({ "spec": { "claimRef": claim_ref }, "status": { "phase": "Bound" } }),
            );
            self.set_bound(name, &volume);
            return true;
        }
        if asked.is_some() || self.is_storage_down || self.is_between_two_volumes(name) {
            return false;
        }
        let source =
            claim.spec.as_ref().and_then(|spec| spec.data_source.as_ref()).map(|source| source.name.clone());
        let data = match source {
            Some(snapshot) if self.snapshots.contains(&snapshot) => {
                Data::New(snapshot.strip_prefix("snap-").unwrap().to_owned())
            }
            Some(_) => return false,
            None => Data::Fresh(name.to_owned()),
        };
        let number = self.fresh();
        let (volume, handle) = (format!("pv-{number}"), format!("handle-{number}"));
        self.storage.insert(handle.clone(), data);
        let object = json!({
            "metadata": {
                "name": volume, "uid": format!("pv-uid-{number}"), "resourceVersion": number.to_string(),
                "annotations": { "pv.kubernetes.io/provisioned-by": DRIVER },
            },
            "spec": {
                "capacity": { "storage": BYTES.to_string() },
                "persistentVolumeReclaimPolicy": if self.setting.retain { "Retain" } else { "Delete" },
                "csi": { "driver": DRIVER, "volumeHandle": handle, "fsType": "ext4" },
                "claimRef": { "namespace": NAMESPACE, "name": name, "uid": claim.uid() },
            },
            "status": { "phase": "Bound" },
        });
        self.volumes.insert(volume.clone(), serde_json::from_value(object).unwrap());
        self.say(format!("{volume} is made for {name}"));
        self.set_bound(name, &volume);
        true
    }

    fn set_bound(&mut self, claim: &str, volume: &str) {
        let bound = json!({ "spec": { "volumeName": volume }, "status": { "phase": "Bound" } });
        let object = self.claims.get_mut(claim).unwrap();
        *object = changed(object, &bound);
        self.say(format!("{claim} is bound to {volume}"));
    }

    fn change_volume(&mut self, name: &str, patch: &Value) {
        let version = self.fresh();
        let volume = self.volumes.get_mut(name).unwrap();
        *volume = changed(volume, patch);
        volume.metadata.resource_version = Some(version.to_string());
    }

    /// What the agent's other loop does with volumes whose time has come.
    pub(super) fn expire(&mut self) -> bool {
        for name in self.volumes.keys().cloned().collect::<Vec<_>>() {
            let facts = VolumeFacts::of(&self.volumes[&name]);
            let patch = match expiry(&facts, self.now) {
                Expiry::Write { patch, .. } => patch,
                Expiry::Later(_) | Expiry::Never => continue,
            };
            self.say(format!("{name} expires: {patch}"));
            self.change_volume(&name, &patch);
            return true;
        }
        false
    }

    /// Everything but the agent comes to rest.
    pub(super) fn settle(&mut self) {
        for _ in 0..1000 {
            let is_busy = self.stateful_set_controller()
                || self.kubelet(0)
                || self.collector()
                || self.volume_controller()
                || self.expire();
            self.check();
            if !is_busy {
                return;
            }
        }
        unreachable!("the cluster does not come to rest:\n{}", self.log.join("\n"));
    }

    /// Everything comes to rest; time passes where somebody waits for it. False: the agent waits for a person.
    pub(super) fn rest(&mut self) {
        for _ in 0..400 {
            self.settle();
            self.check();
            match self.agent() {
                (true, _) => {}
                (false, Some(until)) => {
                    let is_over = self.restore.as_ref().is_none_or(|restore| {
                        restore.status.as_ref().is_some_and(|status| status.completion_time.is_some())
                    });
                    if is_over {
                        return;
                    }
                    self.now = until.max(self.now);
                }
                (false, None) => return,
            }
        }
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += SignedDuration::try_from(time).unwrap();
    }

    // What must always be so.

    fn fail(&self, what: &str) -> ! {
        unreachable!("{what}\n{}", self.log.join("\n"));
    }

    /// At most one volume waits for a name, and the storage loses nothing that is still wanted.
    pub(super) fn check(&self) {
        let mut armed = BTreeSet::new();
        for volume in self.volumes.values().map(VolumeFacts::of) {
            let Some(claim) = &volume.claim else {
                self.fail(&format!("{} is open to anybody", volume.name))
            };
            if claim.uid.is_none() && !armed.insert(claim.name.clone()) {
                self.fail(&format!("two volumes wait for {}", claim.name));
            }
        }
    }

    fn check_deletion(&self, name: &str, is_late: bool) {
        let swap = self.restore.as_ref().and_then(|restore| restore.status.as_ref()?.swap.as_ref());
        let Some(volume) = swap.and_then(|swap| swap.volumes.iter().find(|volume| volume.claim == name))
        else {
            self.fail(&format!("{name} is deleted, and nobody knows what it was"))
        };
        let claim = &self.claims[name];
        let bound = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_ref());
        if let Some(bound) = bound.and_then(|bound| self.volumes.get(bound))
            && VolumeFacts::of(bound).policy != "Retain"
        {
            self.fail(&format!("{name} is deleted, and its volume with it"));
        }
        if is_late {
            // Whoever leads by now makes it again, with the volume that is wanted by now.
            return;
        }
        let waits =
            self.volumes.values().map(VolumeFacts::of).find(|volume| volume.is_armed_for(NAMESPACE, name));
        let is_safe = waits.as_ref().is_some_and(|waiting| {
            waiting.phase == "Available"
                && waiting.policy == "Retain"
                && [&volume.previous, &volume.restored].into_iter().flatten().any(|pv| pv.uid == waiting.uid)
        });
        if !is_safe {
            self.fail(&format!("{name} is deleted, and no volume waits for it: {waits:?}"));
        }
    }

    /// A pod has only volumes that its claim had or was to have; who writes beside other data is noted.
    fn check_running(&mut self) {
        let (mut old, mut new) = (Vec::new(), Vec::new());
        for pod in self.pods.values() {
            if pod.status.as_ref().and_then(|status| status.phase.as_deref()) != Some("Running") {
                continue;
            }
            for name in names(pod) {
                let Some(claim) = self.claims.get(&name) else { continue };
                let volume = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_ref());
                let Some(volume) = volume.and_then(|volume| self.volumes.get(volume)) else { continue };
                let facts = VolumeFacts::of(volume);
                let handle = facts.handle.unwrap();
                let is_logs = name.starts_with("logs");
                match &self.storage[&handle] {
                    Data::Old(claim) | Data::New(claim) if *claim != name => {
                        self.fail(&format!("{name} has the data of {claim}"));
                    }
                    // With whenScaled: Delete, a claim that is to keep its volume is gone before that can wait for its name.
                    Data::Fresh(_) if self.setting.deletes_claims && is_logs => {}
                    Data::Fresh(_) if self.emptied.contains(&name) => {}
                    Data::Fresh(_) if !self.setting.lacks_last && self.restore_began() => {
                        self.fail(&format!("{name} is empty"));
                    }
                    Data::New(_) if !self.wanted.contains(&facts.uid) => {
                        self.fail(&format!("{name} has a volume that was never wanted"));
                    }
                    Data::Old(_) if !is_logs => old.push(handle),
                    Data::New(_) => new.push(handle),
                    Data::Old(_) | Data::Fresh(_) => {}
                }
            }
        }
        if !old.is_empty() && self.setting.from == 0 {
            self.tainted.extend(new);
        }
    }

    fn restore_began(&self) -> bool {
        self.restore.as_ref().is_none_or(|restore| restore.status.is_some())
    }

    /// What must be so when everything has come to rest: served by all old or all new data, and nothing is left behind.
    pub(super) fn check_end(&mut self, is_new: bool) {
        if let Some(restore) = &self.restore
            && !restore.finalizers().is_empty()
        {
            self.fail("the finalizer is left");
        }
        let swap = self.verdict.clone();
        for volume in &swap.volumes {
            let is_gone = volume.previous.is_none() && !is_new;
            let Some(handle) = self.handle(&volume.claim) else {
                if !is_gone {
                    self.fail(&format!("{} is not bound", volume.claim));
                }
                continue;
            };
            let expected = if is_new && volume.snapshot.is_some() {
                Data::New(volume.claim.clone())
            } else {
                Data::Old(volume.claim.clone())
            };
            if self.storage[&handle] != expected && !is_gone && volume.previous.is_some() {
                self.fail(&format!(
                    "{} has {:?} instead of {expected:?}",
                    volume.claim, self.storage[&handle]
                ));
            }
            if is_new && volume.snapshot.is_some() && self.tainted.contains(&handle) {
                self.fail(&format!("{} has data that was written beside other data", volume.claim));
            }
        }
        for ordinal in 0..self.replicas() {
            let name = format!("db-{ordinal}");
            let is_broken = self.is_all_broken || (is_new && self.is_new_broken);
            if self.pods.get(&name).is_none_or(|pod| !is_ready(pod)) && !is_broken && self.set.is_some() {
                self.fail(&format!("{name} is not ready"));
            }
        }
        if self.claims.values().any(|claim| claim.labels().contains_key(RESTORE_LABEL)) {
            self.fail("a staged claim is left");
        }
        for volume in self.volumes.values().map(VolumeFacts::of) {
            if volume.restore.is_some() && volume.expires_at.is_none() {
                self.fail(&format!("{} is left without an end", volume.name));
            }
        }
        self.pass(Duration::from_hours(3));
        self.settle();
        for volume in self.volumes.values().map(VolumeFacts::of) {
            let is_served = self
                .claims
                .values()
                .any(|claim| claim.uid() == volume.claim.as_ref().and_then(|claim| claim.uid.clone()));
            if volume.restore.is_some() {
                self.fail(&format!("{} is never given back", volume.name));
            }
            if !is_served && !self.setting.retain {
                self.fail(&format!("{} is left behind", volume.name));
            }
            if is_served && !self.setting.retain && volume.policy != "Delete" {
                self.fail(&format!("{} has not got its policy back", volume.name));
            }
        }
        if self.storage.len() != self.volumes.len() {
            self.fail("the storage has volumes that nobody knows of");
        }
    }
}

fn names(pod: &Pod) -> BTreeSet<String> {
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    volumes.filter_map(|volume| Some(volume.persistent_volume_claim.as_ref()?.claim_name.clone())).collect()
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut conditions = conditions.filter(|condition| condition.type_ == "Ready");
    conditions.any(|condition| condition.status == "True")
}

/// Where a swap is, for the tests.
pub(super) fn swap_of(cluster: &Cluster) -> Option<(SwapStep, Toward)> {
    let swap = cluster.restore.as_ref()?.status.as_ref()?.swap.as_ref()?;
    Some((swap.step, swap.toward))
}
