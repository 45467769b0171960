//! How many snapshots may be under way at once, by CSI driver and in the cluster, and which run is next. Pure.
//!
//! A run counts from its freeze until all its snapshots are ready or it has failed. It is let in as a whole, in the order of
//! arrival; one that waits holds up only those that need what it needs. A run that is larger than a limit is let in alone.

use std::collections::BTreeMap;

use sts_backup_api::run::CurrentRun;

use crate::config::Limits;

/// The snapshots of a run, by driver.
type Need = BTreeMap<String, usize>;

/// Who is in, and who waits, by a key of the caller's.
#[derive(Debug)]
pub(super) struct Queue<Key> {
    limits: Limits,
    inside: Vec<(Key, Need)>,
    /// In the order of arrival.
    waiting: Vec<(Key, Need)>,
}

impl<Key: Clone + PartialEq> Queue<Key> {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, inside: Vec::new(), waiting: Vec::new() }
    }

    /// Lets a run in that has begun its freeze, whatever the limits say.
    pub(super) fn resume(&mut self, key: Key, run: &CurrentRun) {
        self.leave(&key);
        self.inside.push((key, need(run)));
    }

    /// Lets a run in, or says what it waits for.
    pub(super) fn enter(&mut self, key: &Key, run: &CurrentRun) -> Result<(), String> {
        if self.inside.iter().any(|(inside, _)| inside == key) {
            return Ok(());
        }
        let need = need(run);
        match self.waiting.iter_mut().find(|(waiting, _)| waiting == key) {
            Some((_, known)) => *known = need,
            None => self.waiting.push((key.clone(), need)),
        }
        let refused = self.verdicts().find(|(waiting, _)| *waiting == key).and_then(|(_, refused)| refused);
        if let Some(limit) = refused {
            return Err(limit.said(self.limits));
        }
        let at = self.waiting.iter().position(|(waiting, _)| waiting == key);
        self.inside.extend(at.map(|at| self.waiting.remove(at)));
        Ok(())
    }

    /// Those that wait, in their order, and what keeps each out if all that can be are let in.
    fn verdicts(&self) -> impl Iterator<Item = (&Key, Option<Limit>)> {
        let mut taken = Taken::default();
        self.inside.iter().for_each(|(_, need)| taken.reserve(need, true));
        self.waiting.iter().map(move |(waiting, need)| {
            let refused = taken.refuses(self.limits, need);
            // Who waits for a driver leaves the rest of the cluster to others.
            taken.reserve(need, !matches!(refused, Some(Limit::Driver(_))));
            (waiting, refused)
        })
    }

    /// Forgets those that are not to be kept.
    pub(super) fn retain(&mut self, is_kept: impl Fn(&Key) -> bool) {
        self.inside.retain(|(key, _)| is_kept(key));
        self.waiting.retain(|(key, _)| is_kept(key));
    }

    /// A run is over, or is no longer one. Returns those that can be let in now, in their order.
    pub(super) fn leave(&mut self, key: &Key) -> Vec<Key> {
        let count = self.inside.len() + self.waiting.len();
        self.retain(|other| other != key);
        if self.inside.len() + self.waiting.len() == count {
            return Vec::new();
        }
        self.verdicts().filter(|(_, refused)| refused.is_none()).map(|(waiting, _)| waiting.clone()).collect()
    }
}

fn need(run: &CurrentRun) -> Need {
    let mut need = Need::new();
    for volume in &run.volumes {
        *need.entry(volume.driver.clone()).or_default() += 1;
    }
    need
}

/// A limit that a run would exceed.
enum Limit {
    Cluster,
    Driver(String),
}

impl Limit {
    fn said(&self, limits: Limits) -> String {
        match self {
            Self::Cluster => format!("at most {} snapshots may be under way in the cluster", limits.cluster),
            Self::Driver(driver) => {
                format!("at most {} snapshots of the driver {driver} may be under way", limits.driver)
            }
        }
    }
}

/// What is taken, or reserved for somebody who came earlier.
#[derive(Default)]
struct Taken {
    cluster: usize,
    drivers: Need,
}

impl Taken {
    fn reserve(&mut self, need: &Need, of_cluster: bool) {
        for (driver, count) in need {
            self.cluster += if of_cluster { *count } else { 0 };
            *self.drivers.entry(driver.clone()).or_default() += count;
        }
    }

    /// The limit that a run would exceed; one that meets nobody else exceeds none.
    fn refuses(&self, limits: Limits, need: &Need) -> Option<Limit> {
        let wanted: usize = need.values().sum();
        if self.cluster > 0 && self.cluster + wanted > limits.cluster {
            return Some(Limit::Cluster);
        }
        let exceeds = |driver: &String, count: usize| {
            let taken = self.drivers.get(driver).copied().unwrap_or_default();
            taken > 0 && taken + count > limits.driver
        };
        need.iter()
            .find(|(driver, count)| exceeds(driver, **count))
            .map(|(driver, _)| Limit::Driver(driver.clone()))
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use proptest::prelude::*;
    use sts_backup_api::run::{RunVolume, Slot, SnapshotState};

    use super::super::decide::new_run;
    use super::*;

    const LIMITS: Limits = Limits { cluster: 6, driver: 4 };

    fn run(driver: &str, volumes: usize) -> CurrentRun {
        let volume = RunVolume {
            claim: String::new(),
            template: String::new(),
            ordinal: 0,
            snapshot: String::new(),
            snapshot_class: String::new(),
            driver: driver.to_owned(),
            state: SnapshotState::Pending,
        };
        let volumes = vec![volume; volumes];
        CurrentRun { volumes, ..new_run("uid", Slot::request("now"), Timestamp::UNIX_EPOCH) }
    }

    #[test]
    fn a_run_waits_for_its_driver_and_others_pass_it() {
        let mut queue = Queue::new(LIMITS);
        assert_eq!(queue.enter(&1, &run("a", 3)), Ok(()));
        assert_eq!(
            queue.enter(&2, &run("a", 2)),
            Err("at most 4 snapshots of the driver a may be under way".to_owned())
        );
        assert_eq!(queue.enter(&3, &run("b", 3)), Ok(()));
        // Smaller, but it came later.
        assert!(queue.enter(&4, &run("a", 1)).is_err());
        assert_eq!(queue.leave(&3), [0; 0]);
        assert!(queue.enter(&2, &run("a", 2)).is_err());
        assert_eq!(queue.leave(&1), [2, 4]);
        assert_eq!((queue.enter(&4, &run("a", 1)), queue.enter(&2, &run("a", 2))), (Ok(()), Ok(())));
    }

    #[test]
    fn the_limit_of_the_cluster_holds_up_everybody() {
        let mut queue = Queue::new(LIMITS);
        assert_eq!(queue.enter(&1, &run("a", 4)), Ok(()));
        let refused = queue.enter(&2, &run("b", 3));
        assert_eq!(refused, Err("at most 6 snapshots may be under way in the cluster".to_owned()));
        assert!(queue.enter(&3, &run("c", 1)).is_err());
    }

    #[test]
    fn a_run_that_is_larger_than_a_limit_is_let_in_alone() {
        let mut queue = Queue::new(LIMITS);
        assert_eq!(queue.enter(&1, &run("a", 100)), Ok(()));
        assert!(queue.enter(&2, &run("b", 1)).is_err());
        queue.leave(&1);
        assert_eq!(queue.enter(&2, &run("b", 1)), Ok(()));
        assert!(queue.enter(&1, &run("a", 100)).is_err());
    }

    #[test]
    fn a_run_that_had_begun_is_let_in_at_once_and_once() {
        let mut queue = Queue::new(LIMITS);
        queue.resume(1, &run("a", 4));
        queue.resume(2, &run("a", 4));
        assert_eq!(queue.enter(&1, &run("a", 4)), Ok(()));
        assert_eq!(queue.leave(&7), [0; 0]);
        assert_eq!((queue.leave(&1), queue.leave(&2)), (vec![], vec![]));
        assert_eq!(queue.enter(&3, &run("a", 4)), Ok(()));
    }

    proptest! {
        #[test]
        fn no_limit_is_exceeded_and_everybody_gets_in(
            needs in prop::collection::vec((0..3_usize, 1..5_usize), 1..20),
            choices in prop::collection::vec(any::<prop::sample::Index>(), 0..200),
        ) {
            let runs: Vec<_> = needs.iter().map(|(driver, count)| run(&driver.to_string(), *count)).collect();
            let mut queue = Queue::new(LIMITS);
            for choice in choices {
                let at = choice.index(runs.len());
                if queue.inside.iter().any(|(inside, _)| *inside == at) {
                    queue.leave(&at);
                } else {
                    let _ = queue.enter(&at, &runs[at]);
                }
                let mut drivers = Need::new();
                for (driver, count) in queue.inside.iter().flat_map(|(_, need)| need) {
                    *drivers.entry(driver.clone()).or_default() += count;
                }
                prop_assert!(drivers.values().all(|count| *count <= LIMITS.driver));
                prop_assert!(drivers.values().sum::<usize>() <= LIMITS.cluster);
            }
            // Whoever is inside leaves; the first one that waits is then let in, whatever it is.
            while let Some((first, _)) = queue.waiting.first().cloned() {
                for (inside, _) in queue.inside.clone() {
                    queue.leave(&inside);
                }
                prop_assert_eq!(queue.enter(&first, &runs[first]), Ok(()));
            }
        }
    }
}
