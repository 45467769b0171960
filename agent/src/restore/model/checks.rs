//! What must always be so in the model, and what when it has come to rest.

use std::collections::BTreeSet;
use std::time::Duration;

use kube::ResourceExt;
use sts_backup_api::names::RESTORE_LABEL;

use super::{Cluster, Data, NAMESPACE, is_ready, names};
use crate::restore::facts::VolumeFacts;

impl Cluster {
    pub(super) fn fail(&self, what: &str) -> ! {
        unreachable!("{what}\n{}", self.log.join("\n"));
    }

    /// At most one volume waits for a name, and the storage loses nothing that is still wanted.
    pub(in crate::restore) fn check(&self) {
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

    pub(super) fn check_deletion(&self, name: &str, is_late: bool) {
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
    pub(super) fn check_running(&mut self) {
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

    pub(super) fn restore_began(&self) -> bool {
        self.restore.as_ref().is_none_or(|restore| restore.status.is_some())
    }

    /// What must be so when everything has come to rest: served by all old or all new data, and nothing is left behind.
    pub(in crate::restore) fn check_end(&mut self, is_new: bool) {
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
