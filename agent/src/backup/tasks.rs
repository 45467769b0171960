//! Runs hooks in tasks of their own, and writes down what comes of them.
//!
//! A hook can hang for as long as its timeout, so no reconciliation waits for one. While an object has a task here,
//! nobody else in this process touches its run.

use std::sync::Arc;
use std::time::Duration;

use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::run::CurrentRun;
use sts_backup_service::{clock, telemetry};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, error, info_span, warn};

use super::context::Context;
use super::decide::BackupStep;
use super::observe::observe;
use super::{perform, write};
use crate::error::Error;
use crate::events::Note;

/// How long an attempt to write down what came of a section may take.
const OUTCOME_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs hooks in a task of their own, and writes down the run that comes of it.
pub(super) fn spawn_section<Run>(
    cx: &Arc<Context>,
    backup: StatefulSetBackup,
    section: impl FnOnce(Arc<Context>, Arc<StatefulSetBackup>, CancellationToken) -> Run,
) where
    Run: Future<Output = CurrentRun> + Send + 'static,
{
    let (cx, backup) = (Arc::clone(cx), Arc::new(backup));
    let cancel = cx.stop.child_token();
    let registered = Registered::new(&cx, &backup, cancel.clone());
    let span = info_span!("section", namespace = backup.namespace(), backup = backup.name_any());
    let section = section(Arc::clone(&cx), Arc::clone(&backup), cancel);
    let tasks = cx.tasks.clone();
    let task = async move {
        let run = section.await;
        tell_thaws(&cx, &backup, &run);
        write_outcome(&cx, &backup, run).await;
        drop(registered);
    };
    tasks.spawn(task.instrument(span));
}

/// Marks an object as having a section in this process; ends with the section, however that ends.
struct Registered {
    cx: Arc<Context>,
    uid: String,
    object: ObjectRef<StatefulSetBackup>,
}

impl Registered {
    fn new(cx: &Arc<Context>, backup: &StatefulSetBackup, cancel: CancellationToken) -> Self {
        let uid = backup.uid().unwrap_or_default();
        cx.sections.insert(uid.clone(), cancel);
        Self { cx: Arc::clone(cx), uid, object: ObjectRef::from_obj(backup) }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.cx.sections.remove(&self.uid);
        // Without a receiver the controller has ended, and nobody is to be woken.
        let _ = self.cx.wake.send(self.object.clone());
    }
}

/// Writes down what came of a section; tries until it is written, or somebody else has gone on with the run.
async fn write_outcome(cx: &Context, backup: &StatefulSetBackup, run: CurrentRun) {
    let was_at = backup.status.as_ref().and_then(|status| status.current_run.as_ref()).map(|run| run.step);
    let mut failures = 0;
    loop {
        let attempt = async {
            let Some(latest) = perform::refreshed(&cx.client, backup).await? else { return Ok(()) };
            let current = latest.status.as_ref().and_then(|status| status.current_run.as_ref());
            if current.is_none_or(|current| current.id != run.id || Some(current.step) != was_at) {
                warn!(run = %run.id, "another replica has gone on with the run");
                return Ok(());
            }
            let facts = observe(&cx.client, &latest, true, None).await?;
            let step = BackupStep::Record(run.clone());
            write(cx, &latest, &facts, &step, clock::now()).await?;
            crash_point!("after-outcome");
            Ok::<_, Error>(())
        };
        // A request that hangs is a failed one: pods may be waiting.
        let attempt = tokio::time::timeout(OUTCOME_TIMEOUT, attempt).await;
        let Err(err) = attempt.unwrap_or(Err(Error::NoAnswer { operation: "write what came of the hooks" }))
        else {
            return;
        };
        if !err.is_conflict() && !err.is_transient() {
            // The duties are written down: the next look at the object goes on from there.
            error!(error = %telemetry::chain(&err), run = %run.id, "outcome of the section cannot be written");
            return;
        }
        if !err.is_conflict() {
            warn!(error = %telemetry::chain(&err), run = %run.id, "outcome of the section not written yet");
        }
        tokio::time::sleep(err.backoff(failures).min(Duration::from_secs(2))).await;
        failures += 1;
    }
}

/// Says which pods were thawed, and which were not.
fn tell_thaws(cx: &Context, backup: &StatefulSetBackup, run: &CurrentRun) {
    let duties = || run.pods.iter().filter_map(|pod| Some((pod, pod.thaw.as_ref()?)));
    for (pod, thaw) in duties() {
        let Some(reason) = &thaw.message else { continue };
        warn!(run = %run.id, pod = pod.name, reason, failures = thaw.failures, "postBackupHook failed");
        // It is repeated often, and said ever more rarely.
        if u32::try_from(thaw.failures).is_ok_and(u32::is_power_of_two) {
            let message = format!("run {}: postBackupHook in pod {}: {reason}", run.id, pod.name);
            cx.publish(backup, Note::warning("ThawFailed", "Thaw", message));
        }
    }
    let thawed = duties().filter(|(_, thaw)| thaw.message.is_none()).count();
    if thawed > 0 {
        let after = run.freeze_ms.map_or_else(String::new, |ms| format!(", after {ms} ms"));
        cx.publish(backup, Note::normal("Thawed", "Thaw", format!("run {}: {thawed} pods{after}", run.id)));
    }
}
