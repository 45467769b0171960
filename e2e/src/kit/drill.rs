//! A database under load with its backup, for tests that hurt the agent: and all that must hold of them afterwards,
//! whatever happened.
//!
//! The freeze does not expire within a test, so what ends it is a thaw. The hooks are the documented ones, traced.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use kube::ResourceExt;
use serde_json::json;
use sts_backup_api::backup::{Phase, StatefulSetBackup, StatefulSetBackupSpec};
use sts_backup_api::conditions::{self, INTERRUPTED, PROGRESSING, THAWED};
use sts_backup_api::names::{REQUESTED_AT_ANNOTATION, RUN_FINALIZER, RUN_LABEL};
use sts_backup_api::points::{is_ready, recovery_points};
use sts_backup_api::run::{
    Consistency, CurrentRun, RunId, RunRecord, RunResult, RunStep, RunVolume, request_key,
};
use sts_backup_api::snapshot::VolumeSnapshot;

use super::class::create_snapshot_class;
use super::crds::apply_crds;
use super::local_agent::{LocalAgent, LocalAgentConfig};
use super::postgres::VOLUME_PATH;
use super::snapshot::cut_time;
use super::trace::{Mark, Trace};
use super::{Backup, Namespace, Postgres, WriteLoad};
use crate::condition::await_condition;

/// How many servers the database has.
pub const REPLICAS: u32 = 3;

/// Longer than a test: what ends such a freeze is the post hook.
const NEVER: u32 = 600;

/// What the pre hook may take. An interrupted run waits for that long, and 5 s more, for its second thaw.
const PRE_HOOK_SECONDS: u32 = 8;

/// What an abort ends with.
const SIGABRT: i32 = 6;

/// Covers a run on a busy machine, two interruptions with their second thaws included.
const SETTLE_TIMEOUT: Duration = Duration::from_mins(4);

/// A pre hook's last checkpoint, on a busy machine.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(30);

/// Rows that must be committed before the load counts as going on.
const ROWS: u64 = 5;

/// The database, its load and its backup.
pub struct Drill {
    ns: Namespace,
    postgres: Postgres,
    backup: Backup,
    load: WriteLoad,
    requests: u32,
}

impl Drill {
    /// Deploys the database, starts to write to its first server, and creates the backup, whose snapshots are of a
    /// class with these [faults](super::class). The backup's first run is due as soon as an agent leads.
    ///
    /// # Errors
    /// When anything cannot be made.
    pub async fn deploy(
        ns: &Namespace,
        faults: &[(&str, &str)],
        adjust: impl FnOnce(&mut StatefulSetBackupSpec),
    ) -> Result<Self> {
        apply_crds(ns.cluster()).await?;
        let class = create_snapshot_class(ns, faults).await?;
        let postgres = Postgres::new(ns, "db").replicas(REPLICAS.cast_signed());
        postgres.deploy().await?;
        let load = WriteLoad::start(&postgres, 0).await?;

        let hooks = Postgres::freeze_hooks(NEVER)?.giving_up_after(PRE_HOOK_SECONDS)?.traced(&trace_file())?;
        let mut spec = hooks.spec().clone();
        spec["statefulSetRef"] = json!({ "name": "db" });
        spec["volumeSnapshotClassName"] = json!(class);
        spec["historyLimit"] = json!(100);
        let mut spec = serde_json::from_value(spec)?;
        adjust(&mut spec);
        let backup = Backup::create(ns, "db", spec).await?;
        Ok(Self { ns: ns.clone(), postgres, backup, load, requests: 0 })
    }

    /// An agent of this name that is going to be hurt: its lease is so short that another one soon takes over.
    #[must_use]
    pub fn agent(&self, identity: &str) -> LocalAgentConfig {
        LocalAgentConfig::new(&self.ns, identity).short_lease()
    }

    /// An agent of this name that is to stay.
    #[must_use]
    pub fn steady_agent(&self, identity: &str) -> LocalAgentConfig {
        LocalAgentConfig::new(&self.ns, identity).steady_lease()
    }

    /// The namespace of all this.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.ns
    }

    /// The database.
    #[must_use]
    pub fn postgres(&self) -> &Postgres {
        &self.postgres
    }

    /// The backup.
    #[must_use]
    pub fn backup(&self) -> &Backup {
        &self.backup
    }

    /// Puts another agent in the place of `sound`, asks it for a run, lets it die at a crash point of that run, and
    /// has a third one, `sound` from now on, bring the run to its end. Checks that it took so many attempts, and that
    /// [all holds](Self::ensure_sound).
    ///
    /// # Errors
    /// When anything is otherwise.
    pub async fn ensure_survives(
        &mut self,
        sound: &mut LocalAgent,
        crash_point: &str,
        attempts: usize,
    ) -> Result<()> {
        let failing = self.agent(crash_point).failpoints(&format!("{crash_point}=return"));
        let mut failing = LocalAgent::start(&failing).await?;
        sound.terminate()?;
        let status = sound.wait_exit().await?;
        ensure!(status.success(), "an idle agent ended with {status}");
        failing.await_leads().await?;
        *sound = LocalAgent::start(&self.steady_agent(&format!("after-{crash_point}"))).await?;

        self.request().await?;
        let status = failing.wait_exit().await?;
        ensure!(status.signal() == Some(SIGABRT), "the agent ended with {status}");
        let took = self.ensure_completed().await?;
        ensure!(took.len() == attempts, "it took {took:#?}");
        Ok(())
    }

    /// Asks for a run.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn request(&mut self) -> Result<()> {
        self.requests += 1;
        self.backup.request(&format!("request-{}", self.requests)).await
    }

    /// Waits until the run under way is at `step`, of any run or of attempt number `attempt`, and returns it.
    ///
    /// # Errors
    /// When it is not in time.
    pub async fn await_step(&self, step: RunStep, attempt: i32) -> Result<CurrentRun> {
        let is_at = |run: &CurrentRun| run.step == step && run.slot.attempt == attempt;
        let what = format!("at step {step:?} of attempt {attempt}");
        let status = self.backup.await_status(&what, |status| status.current_run.as_ref().is_some_and(is_at));
        status.await?.current_run.context("a run is under way")
    }

    /// Waits until attempt number `attempt` has frozen every server and ordered all snapshots. So it stays until they
    /// are cut, for as long as the class says.
    ///
    /// # Errors
    /// When it is not in time.
    pub async fn await_frozen(&self, attempt: i32) -> Result<CurrentRun> {
        let run = self.await_step(RunStep::Frozen, attempt).await?;
        try_join_all((0..REPLICAS).map(|ordinal| self.postgres.await_frozen(ordinal))).await?;
        let snapshots = self.ns.api();
        let ordered = |volume: &RunVolume| {
            let name = volume.snapshot.clone();
            let snapshots = snapshots.clone();
            async move {
                let is_there = |_: &VolumeSnapshot| true;
                await_condition(&snapshots, &name, "ordered", SNAPSHOT_TIMEOUT, is_there).await
            }
        };
        try_join_all(run.volumes.iter().map(ordered)).await?;
        Ok(run)
    }

    /// Whether any server is frozen.
    ///
    /// # Errors
    /// When one does not answer.
    pub async fn is_frozen(&self) -> Result<bool> {
        let frozen = try_join_all((0..REPLICAS).map(|ordinal| self.postgres.is_frozen(ordinal))).await?;
        Ok(frozen.contains(&true))
    }

    /// Waits until no run is under way or due and the finalizer is gone; returns the attempts at the last occasion,
    /// the first one first.
    ///
    /// # Errors
    /// When it does not come to that in time.
    pub async fn settled(&self) -> Result<Vec<RunRecord>> {
        let api = self.backup.api();
        let object = await_condition(&api, self.backup.name(), "settled", SETTLE_TIMEOUT, is_settled).await?;
        let mut history = object.status.unwrap_or_default().history;
        let occasion = history.first().map(|last| last.slot.clone()).context("a run ended")?;
        history.retain(|run| run.slot.due == occasion.due && run.slot.value == occasion.value);
        history.reverse();
        Ok(history)
    }

    /// Waits until all is settled, and the last occasion ended in a completed run, perhaps after interrupted
    /// attempts; checks that [all holds](Self::ensure_sound), and returns the attempts.
    ///
    /// # Errors
    /// When anything is otherwise.
    pub async fn ensure_completed(&mut self) -> Result<Vec<RunRecord>> {
        let attempts = self.settled().await?;
        let completed = attempts.last().is_some_and(|run| run.result == RunResult::Completed);
        ensure!(completed, "the last attempt did not complete: {attempts:#?}");
        self.ensure_sound().await?;
        Ok(attempts)
    }

    /// Waits until all is settled, and the last occasion ended with a failed run for that reason, at the first
    /// attempt; checks that [all holds](Self::ensure_sound).
    ///
    /// # Errors
    /// When anything is otherwise.
    pub async fn ensure_failed(&mut self, reason: &str) -> Result<RunRecord> {
        let attempts = self.settled().await?;
        let [run] = &attempts[..] else { anyhow::bail!("not a single attempt: {attempts:#?}") };
        ensure!(run.result == RunResult::Failed && run.reason == reason, "not {reason}: {run:#?}");
        let run = run.clone();
        self.ensure_sound().await?;
        Ok(run)
    }

    /// Checks all that must hold when no run is under way, whatever happened before.
    ///
    /// # Errors
    /// With the first thing that does not hold.
    pub async fn ensure_sound(&mut self) -> Result<()> {
        self.ensure_writable().await?;
        let object = self.backup.api().get(self.backup.name()).await?;
        let status = object.status.clone().unwrap_or_default();
        ensure!(is_settled(&object), "a run is under way or due: {status:#?}");
        for (condition, wanted) in [(THAWED, "True"), (PROGRESSING, "False")] {
            let found = conditions::find(&status.conditions, condition);
            ensure!(
                found.is_some_and(|found| found.status == wanted),
                "condition {condition} is not {wanted}: {found:?}"
            );
        }
        let completed = status.history.first().is_some_and(|run| run.result == RunResult::Completed);
        let phase = if completed { Phase::Ready } else { Phase::Failed };
        ensure!(status.phase == Some(phase), "the phase is {:?}, not {phase:?}", status.phase);
        ensure_attempts(&status.history)?;

        let traces = self.traces().await?;
        for trace in &traces {
            trace.ensure_thawed()?;
            ensure_frozen_once(trace, &status.history)?;
        }
        let snapshots = self.backup.snapshots().await?;
        self.ensure_snapshots(&snapshots, &status.history, &traces).await
    }

    /// No server is frozen: each takes a row, and the load goes on.
    ///
    /// # Errors
    /// When one is or does not.
    pub async fn ensure_writable(&mut self) -> Result<()> {
        ensure!(!self.is_frozen().await?, "a server is frozen");
        let write =
            "SET lock_timeout = '5s'; CREATE TABLE IF NOT EXISTS probe (); INSERT INTO probe DEFAULT VALUES";
        try_join_all((0..REPLICAS).map(|ordinal| self.postgres.psql(ordinal, write))).await?;
        self.load.wait_until(self.load.committed() + ROWS).await.context("writers do not go on")
    }

    /// What the hooks did in each pod.
    ///
    /// # Errors
    /// When that cannot be read.
    pub async fn traces(&self) -> Result<Vec<Trace>> {
        let file = trace_file();
        let traces =
            try_join_all((0..REPLICAS).map(|ordinal| self.postgres.read_file(ordinal, &file))).await?;
        traces.iter().map(|trace| Trace::parse(trace)).collect()
    }

    async fn ensure_snapshots(
        &self,
        snapshots: &[VolumeSnapshot],
        history: &[RunRecord],
        traces: &[Trace],
    ) -> Result<()> {
        let mut by_run: BTreeMap<RunId, Vec<&VolumeSnapshot>> = BTreeMap::new();
        for snapshot in snapshots {
            let run = snapshot.labels().get(RUN_LABEL).cloned().unwrap_or_default();
            by_run.entry(RunId::from(run)).or_default().push(snapshot);
        }
        let known: BTreeSet<&RunId> = history.iter().map(|run| &run.id).collect();
        let unknown: Vec<_> = by_run.keys().filter(|run| !known.contains(run)).collect();
        ensure!(unknown.is_empty(), "snapshots of runs that never were: {unknown:?}");

        for run in history {
            let of_run = by_run.get(&run.id).map(Vec::as_slice).unwrap_or_default();
            let names: Vec<_> = of_run.iter().map(|snapshot| snapshot.name_any()).collect();
            ensure!(of_run.len() <= REPLICAS as usize, "too many snapshots of run {}: {names:?}", run.id);
            ensure!(of_run.iter().all(|snapshot| is_ready(snapshot)), "not ready: of {names:?} of {run:?}");
            if run.result == RunResult::Completed {
                let claims: BTreeSet<_> = of_run
                    .iter()
                    .filter_map(|snapshot| snapshot.spec.source.persistent_volume_claim_name.as_deref())
                    .collect();
                ensure!(claims.len() == REPLICAS as usize, "run {} completed with {names:?}", run.id);
                self.ensure_cut_while_frozen(run, of_run, traces).await?;
            } else {
                // Neither the test's storage nor its claims can make a part of a failed run's snapshots stay.
                ensure!(of_run.is_empty(), "snapshots {names:?} are left of {run:?}");
            }
        }
        let complete = |run: &&RunRecord| run.result == RunResult::Completed;
        let completed: BTreeSet<_> = history.iter().filter(complete).map(|run| run.id.clone()).collect();
        let points = recovery_points(snapshots);
        let complete: BTreeSet<_> =
            points.iter().filter(|point| point.complete).map(|point| point.id.clone()).collect();
        ensure!(complete == completed, "complete points {complete:?}, completed runs {completed:?}");
        let consistent = points.iter().all(|point| point.consistency == Consistency::Application);
        ensure!(consistent, "a point is not consistent: {points:#?}");
        let count = completed.len();
        self.backup
            .await_status(&format!("with {count} recovery points"), |status| {
                let complete = status.recovery_points.iter().filter(|point| point.complete).count();
                usize::try_from(status.recovery_point_count) == Ok(count) && complete == count.min(50)
            })
            .await?;
        Ok(())
    }

    /// Every snapshot of a run that says so was cut while the freeze held in all pods.
    async fn ensure_cut_while_frozen(
        &self,
        run: &RunRecord,
        snapshots: &[&VolumeSnapshot],
        traces: &[Trace],
    ) -> Result<()> {
        let (from, to) = span(run)?;
        let cuts = try_join_all(snapshots.iter().map(|snapshot| cut_time(&self.ns, snapshot))).await?;
        for trace in traces {
            let (frozen, thaw) = trace.freeze_within(from, to).with_context(|| format!("{run:?}"))?;
            ensure!(
                cuts.iter().all(|cut| (frozen..=thaw).contains(cut)),
                "run {} froze a pod from {frozen} to {thaw}, and cut at {cuts:?}",
                run.id
            );
        }
        Ok(())
    }
}

fn trace_file() -> String {
    format!("{VOLUME_PATH}/hooks.trace")
}

/// No run is under way or due, and nothing holds the object.
fn is_settled(backup: &StatefulSetBackup) -> bool {
    let Some(status) = &backup.status else { return false };
    let request = backup.annotations().get(REQUESTED_AT_ANNOTATION);
    request.is_none_or(|request| status.last_request == Some(request_key(request)))
        && status.current_run.is_none()
        && status.history.first().is_some_and(|last| last.next_attempt().is_none())
        && !backup.finalizers().iter().any(|finalizer| finalizer == RUN_FINALIZER)
}

/// From the record of a run to its end. The end is cut down to whole milliseconds.
fn span(run: &RunRecord) -> Result<(jiff::Timestamp, jiff::Timestamp)> {
    let from = run.started.0;
    let duration = Duration::from_millis(u64::try_from(run.duration_ms)? + 1);
    Ok((from, from.checked_add(duration)?))
}

/// The attempts at each occasion are 1, 2, …, and each but the last was interrupted.
fn ensure_attempts(history: &[RunRecord]) -> Result<()> {
    for runs in history.windows(2) {
        // Newest first.
        let (next, run) = (&runs[0], &runs[1]);
        let same = next.slot.due == run.slot.due && next.slot.value == run.slot.value;
        let wanted = if same { run.slot.attempt + 1 } else { 1 };
        ensure!(next.slot.attempt == wanted, "not attempt {wanted}: {next:?} after {run:?}");
        ensure!(same == (run.reason == INTERRUPTED && run.slot.attempt < 3), "{next:?} after {run:?}");
    }
    let mut ids: Vec<_> = history.iter().map(|run| &run.id).collect();
    ids.sort();
    ids.dedup();
    ensure!(ids.len() == history.len(), "two runs have one id: {history:#?}");
    Ok(())
}

/// In one pod, every pre hook was started by a run, and no run started two.
fn ensure_frozen_once(trace: &Trace, history: &[RunRecord]) -> Result<()> {
    let mut freezes: Vec<_> = trace.times(Mark::Freeze).collect();
    for run in history {
        let (from, to) = span(run)?;
        let all = freezes.len();
        freezes.retain(|time| !(from..=to).contains(time));
        ensure!(all - freezes.len() <= 1, "{run:?} started {} pre hooks in a pod", all - freezes.len());
    }
    ensure!(freezes.is_empty(), "pre hooks at {freezes:?} are of no run: {history:#?}");
    Ok(())
}
