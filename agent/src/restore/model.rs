//! A model of a cluster for tests: what is in it, its [`controllers`] and storage, and the agent's writes one by one. What
//! a rule here says is what the real controllers were seen to do; [`checks`] says what must always be so.

mod checks;
mod controllers;

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
use super::expire::{Due, Expiry, expiry};
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
            let (why, patch) = match expiry(&facts, self.now) {
                Expiry::Write { why, patch } => (why, patch),
                Expiry::Later(_) | Expiry::Never => continue,
            };
            let claim = facts.claim.as_ref().and_then(|claim| self.claims.get(&claim.name));
            let claim =
                claim.filter(|claim| claim.uid() == facts.claim.as_ref().and_then(|of| of.uid.clone()));
            let is_going = claim.is_some_and(|claim| claim.metadata.deletion_timestamp.is_some());
            if claim.is_some() != (why == Due::InUse) || is_going {
                continue;
            }
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
