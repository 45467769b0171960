//! The controllers of the model: those of `StatefulSets`, claims and volumes, the kubelet, and the provisioner.

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use serde_json::json;
use sts_backup_api::swap::Toward;

use super::{BYTES, Cluster, DRIVER, Data, NAMESPACE, REPLICAS, changed, is_ready, names, swap_of};
use crate::restore::facts::{SetFacts, VolumeFacts};

impl Cluster {
    /// One thing that the `StatefulSet` controller does.
    pub(in crate::restore) fn stateful_set_controller(&mut self) -> bool {
        let Some(set) = self.set.clone() else { return false };
        let spec = set.spec.as_ref().unwrap();
        let replicas = spec.replicas.unwrap_or(1);
        let generation = set.metadata.generation.unwrap();
        let templates: Vec<_> =
            spec.volume_claim_templates.iter().flatten().map(ResourceExt::name_any).collect();
        let own =
            |pod: &Pod| pod.owner_references().iter().any(|owner| Some(&owner.uid) == set.uid().as_ref());
        let ready = self.pods.values().filter(|pod| own(pod) && is_ready(pod)).count();
        let known = SetFacts::of(&set);
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
    pub(super) fn is_between_two_volumes(&self, claim: &str) -> bool {
        let goes_back = swap_of(self).is_some_and(|(_, toward)| toward == Toward::Previous);
        let is_one_of_ours =
            self.verdict.volumes.iter().any(|volume| volume.claim == claim && volume.snapshot.is_some());
        let mut volumes = self.volumes.values().map(VolumeFacts::of);
        let is_armed = volumes.any(|volume| volume.is_armed_for(NAMESPACE, claim));
        self.ended.is_none() && goes_back && is_one_of_ours && !is_armed
    }

    pub(super) fn create_claim_of_set(&mut self, name: &str) {
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

    pub(super) fn create_pod(&mut self, name: &str, claims: &[String], set: &StatefulSet) {
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
    pub(in crate::restore) fn kubelet(&mut self, choice: usize) -> bool {
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
    pub(super) fn handle(&self, claim: &str) -> Option<String> {
        let claim = self.claims.get(claim)?;
        let is_bound = claim.status.as_ref()?.phase.as_deref() == Some("Bound");
        if claim.metadata.deletion_timestamp.is_some() || !is_bound {
            return None;
        }
        let volume = self.volumes.get(claim.spec.as_ref()?.volume_name.as_ref()?)?;
        VolumeFacts::of(volume).handle
    }

    /// The garbage collector and pvc-protection.
    pub(in crate::restore) fn collector(&mut self) -> bool {
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
    pub(in crate::restore) fn volume_controller(&mut self) -> bool {
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

    pub(super) fn bind(&mut self, name: &str, claim: &PersistentVolumeClaim) -> bool {
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

    pub(super) fn set_bound(&mut self, claim: &str, volume: &str) {
        let bound = json!({ "spec": { "volumeName": volume }, "status": { "phase": "Bound" } });
        let object = self.claims.get_mut(claim).unwrap();
        *object = changed(object, &bound);
        self.say(format!("{claim} is bound to {volume}"));
    }

    /// pvc-protection: a claim goes when no pod names it.
    pub(super) fn collect_claim(&mut self, name: &str) -> bool {
        let ends = self.claims.get(name).is_some_and(|claim| claim.metadata.deletion_timestamp.is_some());
        let is_named = self.pods.values().any(|pod| names(pod).contains(name));
        let goes = ends && !is_named && self.claims[name].finalizers().is_empty();
        if goes {
            self.claims.remove(name);
        }
        goes
    }
}
