//! The decisions under every interleaving of crashes, hooks, snapshots and time: a model of the cluster and of the
//! process, driven at random, with the invariants checked after each event.
//!
//! The model keeps what a crash keeps (the object, the pods, the snapshots) apart from what it does not (the
//! frozen section in the process). It runs the real `next_backup_step`, `next_status` and `after_thaw`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use proptest::prelude::*;
use serde_json::json;
use sts_backup_api::backup::{
    OnError, Phase, RetentionPolicy, StatefulSetBackupSpec, StatefulSetBackupStatus,
};
use sts_backup_api::conditions::{DELETED, INTERRUPTED};
use sts_backup_api::names::{
    CONSISTENCY_ANNOTATION, REPLICAS_ANNOTATION, RUN_LABEL, TIME_ANNOTATION, VOLUMES_ANNOTATION,
};
use sts_backup_api::points::{points_of, recovery_points};
use sts_backup_api::run::{CurrentRun, RunId, RunResult, RunStep, SnapshotState, ThawState};
use sts_backup_api::snapshot::VolumeSnapshot;

use super::decide::{
    BackupStep, START_WITHIN, ThawAttempt, after_thaw, failing, later, next_backup_step, with_snapshot_states,
};
use super::observe::{BackupFacts, ClaimFacts, ClassFacts, Target, TargetFacts};
use super::status::next_status;
use crate::hooks::Outcome;

const REPLICAS: i32 = 3;

/// From the creation of the model's backup on.
const SCHEDULE: &str = "*/10 * * * *";
const SCHEDULE_SECONDS: i64 = 600;

/// What the storage and the hooks did, which no crash undoes.
#[derive(Default)]
struct World {
    now: Timestamp,
    facts: Option<BackupFacts>,
    exists: bool,
    /// Pods that are frozen.
    frozen: BTreeSet<String>,
    /// Pods where a preBackupHook still runs, with the moment until which it may freeze the pod.
    lingering: BTreeMap<String, Timestamp>,
    /// How often the preBackupHook was started, by run and pod.
    freezes: BTreeMap<(String, String), u32>,
    snapshots: BTreeMap<String, Snapshot>,
    /// The section that the process runs.
    section: Option<Section>,
    /// How many scheduled times a run was begun for.
    scheduled: i64,
    /// When the backup was last no longer suspended.
    resumed: Option<Timestamp>,
    /// The newest recovery point that was complete, and not as the leftover of a failed run.
    newest: Option<(MicroTime, RunId)>,
}

struct Snapshot {
    object: VolumeSnapshot,
    /// All pods were frozen when it was cut.
    cut_frozen: Option<bool>,
}

/// How far the process is with the frozen section.
struct Section {
    run: CurrentRun,
    at: SectionStep,
    /// When the hooks run into their timeout. They start all at once, though the model looks at one after another.
    hooks_end: Timestamp,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum SectionStep {
    Freeze(usize),
    Create(usize),
    AwaitCut,
    Thaw(usize),
    Record,
}

/// Something that happens. The numbers choose which of several.
#[derive(Clone, Copy, Debug)]
enum Happening {
    /// The controller takes a step, if it can.
    Step,
    /// The section takes a step, if there is one; the hook in it fails when the number says so.
    Section(u8),
    /// The process dies, and another one takes over.
    Crash,
    /// The process is told to stop: its section is cancelled.
    Stop,
    /// The storage goes on with a snapshot.
    Cut(u8),
    Ready(u8),
    /// A lingering preBackupHook freezes its pod after all.
    LateFreeze(u8),
    /// The freeze budget, a hook's timeout, or a snapshot's deadline passes.
    Time(u8),
    /// The API server creates a snapshot that a run asked for which has failed since.
    LateCreate(u8),
    /// The process dies in the middle of pruning.
    PrunePart(u8),
    /// Somebody suspends the backup, or lets it go on.
    Suspend(bool),
    /// Somebody deletes the object.
    Delete,
    /// Somebody asks for a run.
    Request(u8),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        12 => Just(Happening::Step),
        16 => any::<u8>().prop_map(Happening::Section),
        2 => Just(Happening::Crash),
        1 => Just(Happening::Stop),
        8 => any::<u8>().prop_map(Happening::Cut),
        8 => any::<u8>().prop_map(Happening::Ready),
        2 => any::<u8>().prop_map(Happening::LateFreeze),
        2 => any::<u8>().prop_map(Happening::Time),
        2 => any::<u8>().prop_map(Happening::LateCreate),
        2 => any::<u8>().prop_map(Happening::PrunePart),
        1 => any::<bool>().prop_map(Happening::Suspend),
        1 => Just(Happening::Delete),
        1 => any::<u8>().prop_map(Happening::Request),
    ]
}

fn spec(on_error: OnError) -> StatefulSetBackupSpec {
    let mut spec = StatefulSetBackupSpec::new("db");
    let hook = |on_error| json!({ "command": ["x"], "timeoutSeconds": 60, "onError": on_error });
    spec.pre_backup_hook = Some(serde_json::from_value(hook(on_error)).unwrap());
    // With Continue a failed thaw is let be, as the user asked for.
    spec.post_backup_hook = Some(serde_json::from_value(hook(OnError::Fail)).unwrap());
    spec
}

fn target() -> TargetFacts {
    let pod = |ordinal: i32| -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": format!("db-{ordinal}"), "uid": format!("uid-{ordinal}") },
            "spec": { "containers": [{ "name": "main" }] },
            "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] },
        }))
        .unwrap()
    };
    let claim = |ordinal| ClaimFacts {
        template: "data".to_owned(),
        ordinal,
        bound: true,
        deleting: false,
        driver: Some("csi".to_owned()),
    };
    TargetFacts {
        replicas: REPLICAS,
        start: 0,
        settled: true,
        templates: vec!["data".to_owned()],
        pods: (0..REPLICAS).map(|ordinal| (ordinal, pod(ordinal))).collect(),
        claims: (0..REPLICAS).map(|ordinal| (format!("data-db-{ordinal}"), claim(ordinal))).collect(),
        classes: vec![ClassFacts { name: "fast".to_owned(), driver: "csi".to_owned(), is_default: true }],
    }
}

impl World {
    /// A new backup; with a schedule also a retention policy.
    fn new(on_error: OnError, schedule: Option<&str>) -> Self {
        let created: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let facts = BackupFacts {
            namespace: "shop".to_owned(),
            uid: "uid".to_owned(),
            generation: Some(1),
            created,
            deleting: false,
            has_finalizer: false,
            request: None,
            spec: StatefulSetBackupSpec {
                schedule: schedule.map(str::to_owned),
                retention_policy: schedule
                    .map(|_| RetentionPolicy { keep_last: Some(2), ..Default::default() }),
                ..spec(on_error)
            },
            status: StatefulSetBackupStatus::default(),
            in_section: false,
            target: Target::Unread,
            busy_with: None,
            snapshots: None,
        };
        Self { now: created, facts: Some(facts), exists: true, ..Self::default() }
    }

    fn facts(&self) -> BackupFacts {
        let mut facts = self.facts.clone().unwrap();
        facts.in_section = self.section.is_some();
        let step = facts.status.current_run.as_ref().map(|run| run.step);
        let next = facts.status.next_schedule_time.as_ref();
        let is_due = step.is_none() && next.is_some_and(|next| next.0 <= self.now);
        let is_listed = !is_due && !matches!(step, Some(RunStep::Frozen | RunStep::Thawing));
        facts.snapshots = is_listed.then(|| self.objects());
        facts.target = match step {
            Some(RunStep::Preflight) => Target::Read(Box::new(target())),
            None => Target::Exists,
            Some(_) => Target::Unread,
        };
        facts
    }

    fn objects(&self) -> Vec<VolumeSnapshot> {
        self.snapshots.values().map(|snapshot| snapshot.object.clone()).collect()
    }

    fn object(&mut self) -> &mut BackupFacts {
        self.facts.as_mut().unwrap()
    }

    fn write(&mut self, step: &BackupStep) {
        let status = next_status(&self.facts(), step, self.now);
        self.object().status = status;
    }

    /// One step of the controller; whether there was one to take.
    fn step(&mut self) -> bool {
        if !self.exists {
            return false;
        }
        let facts = self.facts();
        let step = next_backup_step(&facts, self.now);
        match &step {
            BackupStep::AddFinalizer => self.object().has_finalizer = true,
            BackupStep::RemoveFinalizer => {
                self.object().has_finalizer = false;
                self.exists = !facts.deleting;
            }
            BackupStep::Begin { run, .. } => {
                assert!(!facts.spec.suspend, "{} begins while the backup is suspended", run.id);
                if let (Some(slot), 1) = (run.slot.scheduled(), run.slot.attempt) {
                    let since = self.resumed.unwrap_or(facts.created);
                    assert!(slot > since, "the run due at {slot} begins, but times count from {since} on");
                    self.scheduled += 1;
                }
                self.write(&step);
            }
            BackupStep::Record(_)
            | BackupStep::Finish(_)
            | BackupStep::Skip { .. }
            | BackupStep::RefuseRequest => self.write(&step),
            BackupStep::Prune(point) => {
                for doomed in &point.snapshots {
                    self.snapshots.remove(&doomed.name);
                }
            }
            BackupStep::CleanUp { doomed, .. } => {
                self.snapshots.retain(|name, _| !doomed.contains(name));
                self.write(&step);
            }
            BackupStep::DeleteLate(late) => self.snapshots.retain(|name, _| !late.contains(name)),
            BackupStep::Freeze(run) => {
                self.write(&step);
                self.section =
                    Some(Section { run: run.clone(), at: SectionStep::Freeze(0), hooks_end: self.now });
            }
            BackupStep::Thaw(pods) => {
                let mut run = facts.status.current_run.clone().unwrap();
                for at in pods {
                    run.pods[*at] = self.thaw(&run, *at, Outcome::Succeeded);
                }
                self.write(&BackupStep::Record(run));
            }
            BackupStep::Cancel => self.cancel(DELETED),
            BackupStep::Wait { .. } | BackupStep::Idle(_) => {
                self.write(&step);
                return false;
            }
        }
        true
    }

    fn thaw(&mut self, run: &CurrentRun, at: usize, outcome: Outcome) -> sts_backup_api::run::RunPod {
        let pod = &run.pods[at];
        let hook = run.thaw_hook.clone().unwrap();
        if outcome == Outcome::Succeeded {
            self.frozen.remove(&pod.name);
        }
        after_thaw(pod, &ThawAttempt::Ran(outcome), &hook, self.now)
    }

    fn cancel(&mut self, reason: &str) {
        let now = self.now;
        if let Some(section) = &mut self.section
            && matches!(section.at, SectionStep::Freeze(_) | SectionStep::Create(_) | SectionStep::AwaitCut)
        {
            // What was not seen to end may still be running, for as long as its timeout.
            for pod in section.run.pods.iter_mut().filter(|pod| pod.hooks_may_run_until.is_some()) {
                pod.hooks_may_run_until = Some(MicroTime(now + SignedDuration::from_secs(60)));
            }
            section.run = failing(&section.run, reason, "cancelled");
            section.at = SectionStep::Thaw(0);
        }
    }

    /// One step of the frozen section, as `section.rs` takes them.
    fn section_step(&mut self, choice: u8) {
        let Some(mut section) = self.section.take() else { return };
        let facts = self.facts();
        let on_error = facts.spec.pre_backup_hook.as_ref().unwrap().on_error;
        let is_late = self.now > later(section.run.frozen_since.clone().unwrap().0, START_WITHIN);
        match section.at {
            SectionStep::Freeze(0) if is_late => {
                for pod in &mut section.run.pods {
                    (pod.freeze_container, pod.hooks_may_run_until) = (None, None);
                }
                section.run = failing(&section.run, INTERRUPTED, "late");
                section.at = SectionStep::Thaw(0);
            }
            SectionStep::Freeze(at) if at < section.run.pods.len() => {
                if at == 0 {
                    section.hooks_end = later(self.now, Duration::from_mins(1));
                }
                let run = section.run.id.to_string();
                let pod = &mut section.run.pods[at];
                *self.freezes.entry((run, pod.name.clone())).or_default() += 1;
                section.at = SectionStep::Freeze(at + 1);
                let failed = match choice % 8 {
                    0 => {
                        pod.hooks_may_run_until = None;
                        true
                    }
                    1 => {
                        let until = later(self.now, Duration::from_mins(1));
                        pod.hooks_may_run_until = Some(MicroTime(until));
                        self.lingering.insert(pod.name.clone(), section.hooks_end);
                        true
                    }
                    _ => {
                        pod.hooks_may_run_until = None;
                        self.frozen.insert(pod.name.clone());
                        false
                    }
                };
                if failed && on_error == OnError::Fail {
                    // Hooks run at once: those after it have started as well.
                    for pod in &mut section.run.pods[at + 1..] {
                        let run = section.run.id.to_string();
                        *self.freezes.entry((run, pod.name.clone())).or_default() += 1;
                        let until = later(self.now, Duration::from_mins(1));
                        pod.hooks_may_run_until = Some(MicroTime(until));
                        self.lingering.insert(pod.name.clone(), section.hooks_end);
                    }
                    section.run = failing(&section.run, "PreBackupHookFailed", "failed");
                    section.at = SectionStep::Thaw(0);
                }
            }
            SectionStep::Freeze(_) => section.at = SectionStep::Create(0),
            SectionStep::Create(at) if at < section.run.volumes.len() => {
                self.create(&section.run, at);
                section.at = SectionStep::Create(at + 1);
            }
            SectionStep::Create(_) => section.at = SectionStep::AwaitCut,
            SectionStep::AwaitCut => {
                let listed = BackupFacts { snapshots: Some(self.objects()), ..facts.clone() };
                section.run = with_snapshot_states(&listed, &section.run);
                let since = section.run.frozen_since.clone().unwrap().0;
                if section.run.volumes.iter().all(|volume| volume.state != SnapshotState::Pending) {
                    section.run.cut_at = Some(MicroTime(self.now));
                    section.at = SectionStep::Thaw(0);
                } else if self.now > later(since, facts.spec.max_freeze()) {
                    section.run = failing(&section.run, "FrozenTooLong", "not cut");
                    section.at = SectionStep::Thaw(0);
                }
            }
            SectionStep::Thaw(at) if at < section.run.pods.len() => {
                let outcome = match choice % 6 {
                    0 => Outcome::Failed { reason: "exit code 1".to_owned() },
                    1 => Outcome::Unknown { reason: "lost".to_owned() },
                    _ => Outcome::Succeeded,
                };
                section.run.pods[at] = self.thaw(&section.run, at, outcome);
                section.at = SectionStep::Thaw(at + 1);
            }
            SectionStep::Thaw(_) => {
                let owed =
                    |pod: &sts_backup_api::run::RunPod| pod.thaw.as_ref().unwrap().state == ThawState::Owed;
                section.run.step = match (section.run.pods.iter().any(owed), &section.run.failure) {
                    (true, _) => RunStep::Thawing,
                    (false, None) => RunStep::Readying,
                    (false, Some(_)) => RunStep::CleaningUp,
                };
                section.at = SectionStep::Record;
            }
            SectionStep::Record => {
                self.write(&BackupStep::Record(section.run));
                return;
            }
        }
        self.section = Some(section);
    }

    fn create(&mut self, run: &CurrentRun, at: usize) {
        let volume = &run.volumes[at];
        self.insert_snapshot(run.id.as_str(), &volume.claim, &volume.snapshot);
    }

    fn insert_snapshot(&mut self, run: &str, claim: &str, name: &str) {
        let object = serde_json::from_value(json!({
            "apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshot",
            "metadata": {
                "name": name,
                "labels": { RUN_LABEL: run },
                "annotations": {
                    TIME_ANNOTATION: self.now.to_string(),
                    VOLUMES_ANNOTATION: REPLICAS.to_string(),
                    REPLICAS_ANNOTATION: REPLICAS.to_string(),
                    CONSISTENCY_ANNOTATION: "Application",
                },
            },
            "spec": { "source": { "persistentVolumeClaimName": claim } },
            "status": { "boundVolumeSnapshotContentName": format!("content-of-{name}") },
        }));
        let snapshot = Snapshot { object: object.unwrap(), cut_frozen: None };
        self.snapshots.entry(name.to_owned()).or_insert(snapshot);
    }

    fn create_late(&mut self, choice: u8) {
        let history = self.facts().status.history;
        if let Some(run) = history.iter().find(|run| run.kept_volumes == Some(0)) {
            let claim = format!("data-db-{}", i32::from(choice) % REPLICAS);
            self.insert_snapshot(run.id.as_str(), &claim, &format!("{claim}-{}", run.id));
        }
    }

    fn cut(&mut self, choice: u8) {
        let all_frozen = self.frozen.len() == usize::try_from(REPLICAS).unwrap();
        let uncut = self.snapshots.values_mut().filter(|snapshot| snapshot.cut_frozen.is_none());
        let uncut: Vec<_> = uncut.collect();
        let count = uncut.len();
        if let Some(snapshot) = uncut.into_iter().nth(usize::from(choice) % count.max(1)) {
            snapshot.cut_frozen = Some(all_frozen);
            snapshot.object.status.get_or_insert_default().creation_time = Some(self.now.into());
        }
    }

    fn ready(&mut self, choice: u8) {
        let cut = self.snapshots.values_mut().filter(|snapshot| snapshot.cut_frozen.is_some());
        let cut: Vec<_> = cut.collect();
        let count = cut.len();
        if let Some(snapshot) = cut.into_iter().nth(usize::from(choice) % count.max(1)) {
            snapshot.object.status.get_or_insert_default().ready_to_use = Some(true);
        }
    }

    fn pass_time(&mut self, seconds: i64) {
        self.now += SignedDuration::from_secs(seconds);
        let now = self.now;
        self.lingering.retain(|_, until| now < *until);
    }

    fn happen(&mut self, happening: Happening) {
        self.pass_time(0);
        match happening {
            Happening::Step => {
                self.step();
            }
            Happening::Section(choice) => self.section_step(choice),
            Happening::Crash => {
                // Hooks that were being run are still running in their pods.
                if let Some(Section { run, at: SectionStep::Freeze(_), hooks_end }) = self.section.take() {
                    for pod in run.pods.iter().filter(|pod| pod.hooks_may_run_until.is_some()) {
                        let key = (run.id.to_string(), pod.name.clone());
                        if self.freezes.contains_key(&key) {
                            self.lingering.insert(pod.name.clone(), hooks_end);
                        }
                    }
                }
            }
            Happening::Stop => self.cancel(INTERRUPTED),
            Happening::Cut(choice) => self.cut(choice),
            Happening::Ready(choice) => self.ready(choice),
            Happening::LateFreeze(choice) => {
                let pods: Vec<_> = self.lingering.keys().cloned().collect();
                if let Some(pod) = pods.get(usize::from(choice) % pods.len().max(1)) {
                    self.lingering.remove(pod);
                    self.frozen.insert(pod.clone());
                }
            }
            Happening::Time(choice) => self.pass_time([1, 30, 61, 121, 3601][usize::from(choice) % 5]),
            Happening::LateCreate(choice) => self.create_late(choice),
            Happening::PrunePart(choice) => {
                if let (true, BackupStep::Prune(point)) =
                    (self.exists, next_backup_step(&self.facts(), self.now))
                {
                    let doomed = point.snapshots[usize::from(choice) % point.snapshots.len()].name.clone();
                    self.snapshots.remove(&doomed);
                }
            }
            Happening::Suspend(suspend) => {
                let object = self.object();
                if object.spec.suspend != suspend {
                    object.spec.suspend = suspend;
                    object.generation = object.generation.map(|generation| generation + 1);
                    // Seen by the agent, as it is with a watch: it may let the object go before it says so.
                    if self.step() {
                        self.step();
                    }
                    self.resumed = (!suspend).then_some(self.now).or(self.resumed);
                }
            }
            Happening::Delete => {
                self.object().deleting = true;
                self.exists = self.object().has_finalizer;
            }
            Happening::Request(choice) => self.object().request = Some(format!("request {choice}")),
        }
    }

    /// What must hold after everything that happens.
    fn check(&mut self) {
        self.pass_time(0);
        let facts = self.facts();
        let run = facts.status.current_run.as_ref();
        for pod in self.frozen.iter().chain(self.lingering.keys()) {
            let owed = run.is_some_and(|run| {
                run.pods.iter().any(|known| {
                    known.name == *pod
                        && known.thaw.as_ref().is_some_and(|thaw| thaw.state == ThawState::Owed)
                })
            });
            assert!(owed && facts.has_finalizer, "{pod} is or may become frozen, and nobody owes it a thaw");
        }
        for ((run, pod), started) in &self.freezes {
            assert!(*started <= 1, "the preBackupHook started {started} times in {pod} for {run}");
        }
        let mut of_runs: BTreeMap<&str, i32> = BTreeMap::new();
        let objects = self.objects();
        for snapshot in &objects {
            *of_runs.entry(&snapshot.metadata.labels.as_ref().unwrap()[RUN_LABEL]).or_default() += 1;
        }
        assert!(of_runs.values().all(|count| *count <= REPLICAS), "{of_runs:?}");

        self.check_schedule(&facts);
        self.check_retention(&facts, &objects);
        for point in recovery_points(&objects).iter().filter(|point| point.complete) {
            let under_way = run.is_some_and(|run| run.id == point.id);
            let record = facts.status.history.iter().find(|record| record.id == point.id);
            let completed = record.is_some_and(|record| record.result == RunResult::Completed);
            if record.is_some_and(|record| record.kept_volumes == Some(0)) {
                // Late ones, which go with the next look; the status never takes them for a point.
                assert!(
                    facts.status.recovery_points.iter().all(|said| said.id != point.id || !said.complete)
                );
                continue;
            }
            assert!(under_way || completed, "{} looks complete, and its run failed", point.id);
            if completed && facts.spec.pre_backup_hook.as_ref().unwrap().on_error == OnError::Fail {
                let of_run = |snapshot: &&Snapshot| {
                    snapshot.object.metadata.labels.as_ref().unwrap()[RUN_LABEL] == point.id.as_str()
                };
                let frozen =
                    self.snapshots.values().filter(of_run).all(|snapshot| snapshot.cut_frozen == Some(true));
                assert!(frozen, "{} completed, and was cut while a pod was not frozen", point.id);
            }
        }
    }

    /// Every scheduled time that is dealt with had its one run, or was missed.
    fn check_schedule(&self, facts: &BackupFacts) {
        let status = &facts.status;
        if facts.spec.schedule.is_none() || facts.spec.suspend || self.resumed.is_some() {
            return;
        }
        let passed = status
            .last_schedule_time
            .as_ref()
            .map_or(0, |last| last.0.duration_since(facts.created).as_secs() / SCHEDULE_SECONDS);
        assert_eq!(self.scheduled + status.missed_runs, passed, "{status:?}");
    }

    /// The newest complete point stays, whatever goes.
    fn check_retention(&mut self, facts: &BackupFacts, objects: &[VolumeSnapshot]) {
        let points = points_of(objects, &facts.status.history);
        let is_over = |id: &RunId| facts.status.current_run.as_ref().is_none_or(|run| run.id != *id);
        let mut complete = points.into_iter().filter(|point| point.complete && is_over(&point.id));
        let newest = complete.next().map(|point| (point.time, point.id));
        assert!(newest >= self.newest, "{:?} was the newest complete point, and is gone", self.newest);
        self.newest = newest;
    }

    /// Lets everything go well from here on, until nothing more happens.
    fn settle(&mut self) {
        for _ in 0..2000 {
            let went_on = self.step();
            self.section_step(7);
            self.cut(0);
            self.ready(0);
            for choice in 0..9 {
                self.ready(choice);
            }
            if !went_on && self.section.is_none() {
                let waits = self.exists && self.facts().status.current_run.is_some();
                if !waits {
                    return;
                }
                self.pass_time(1);
            }
            self.check();
        }
        assert_eq!(self.facts().status.current_run, None, "the run does not come to an end");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_every_pod_is_thawed_and_no_failed_run_looks_complete(
        happenings in prop::collection::vec(happening(), 0..120),
        goes_on in any::<bool>(),
        scheduled in any::<bool>(),
    ) {
        let on_error = if goes_on { OnError::Continue } else { OnError::Fail };
        let mut world = World::new(on_error, scheduled.then_some(SCHEDULE));
        for happening in happenings {
            if !world.exists {
                break;
            }
            world.happen(happening);
            world.check();
        }
        world.settle();
        if world.exists {
            let status = world.facts().status;
            let complete = recovery_points(&world.objects()).into_iter().filter(|point| point.complete).count();
            let completed = status.history.iter().filter(|run| run.result == RunResult::Completed).count();
            prop_assert!(complete <= completed, "{} complete points of {} completed runs", complete, completed);
        }
        prop_assert!(world.frozen.is_empty());
        prop_assert!(!world.exists || !world.facts().has_finalizer);
    }

    /// One crash, at every boundary in turn, and otherwise all goes well.
    #[test]
    fn one_crash_anywhere_costs_no_backup(boundary in 0_usize..60) {
        let mut world = World::new(OnError::Fail, None);
        for at in 0..60 {
            if at == boundary {
                world.happen(Happening::Crash);
            }
            world.step();
            world.section_step(7);
            world.cut(0);
            world.ready(0);
            world.check();
        }
        world.settle();
        let status = world.facts().status;
        prop_assert_eq!(status.phase, Some(Phase::Ready));
        prop_assert_eq!(status.history[0].result, RunResult::Completed);
        prop_assert_eq!(status.recovery_point_count, 1);
    }
}

#[test]
fn a_run_where_all_goes_well_takes_one_snapshot_a_claim_and_thaws_once() {
    let mut world = World::new(OnError::Fail, None);
    world.settle();
    let status = world.facts().status;
    assert_eq!(status.history.len(), 1);
    assert_eq!(status.history[0].message, "3/3 volumes");
    assert_eq!(world.snapshots.len(), 3);
    assert!(status.recovery_points[0].complete);
    let thawed = sts_backup_api::conditions::find(&status.conditions, "Thawed").unwrap();
    assert_eq!(thawed.status, "True");
}
