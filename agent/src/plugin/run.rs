//! `run`: asks for a run, and follows it to its end if wanted.

use std::time::Duration;

use futures::{Stream, StreamExt};
use jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, Patch};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watch_object};
use kube::{Api, ResourceExt};
use serde_json::json;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::names::REQUESTED_AT_ANNOTATION;
use sts_backup_api::run::{RecoveryPoint, RunRecord, RunResult};

use super::args::{DataFormat, Run};
use super::cluster::{Cluster, patch_params, understand};
use super::error::{Error, forbidden, not_found};
use super::follow::{Asked, Progress, WAITING, blocked, not_ready, point_line, progress};
use super::remedy::remedy;
use super::table::span;
use super::{Exit, output};
use crate::clock;

/// An agent that is alive has begun by then, unless another run is under way.
const SILENCE: Duration = Duration::from_secs(15);

const SILENCE_HINT: &str =
    "nothing has happened yet: kubectl stsbackup doctor tells whether the agent is alive; still waiting";

/// Asks for a run; with `--wait`, follows it.
pub(super) async fn run(cluster: &Cluster, how: &Run) -> Result<Exit, Error> {
    let (namespace, name) = (cluster.namespace(), how.name.as_str());
    let backup = cluster.backup(name).await?;
    if backup.spec.suspend {
        return Err(Error::Ended {
            exit: Exit::Failure,
            message: format!(
                "StatefulSetBackup {namespace}/{name} is suspended, so nothing was asked for: no run begins"
            ),
            remedy: Some(format!("kubectl stsbackup resume {name} -n {namespace}")),
        });
    }
    if let Some((reason, message)) = blocked(&backup) {
        return Err(Error::Ended {
            exit: Exit::Failure,
            message: format!(
                "StatefulSetBackup {namespace}/{name} is not ready, so nothing was asked for: {reason}: {message}"
            ),
            remedy: Some(remedy(reason, namespace, name)),
        });
    }

    if let Some((reason, message)) = not_ready(&backup) {
        output::complain(&format!(
            "the last preflight found it not ready, the new run looks again: {reason}: {message}"
        ));
    }

    let annotation = request_value(clock::now());
    let resource = ApiResource::erase::<StatefulSetBackup>(&());
    let api: Api<DynamicObject> = Api::namespaced_with(cluster.client(), namespace, &resource);
    let object = format!("StatefulSetBackup {namespace}/{name}");
    let patch = Patch::Merge(request_patch(&annotation));
    let asked_of = api
        .patch(name, &patch_params(), &patch)
        .await
        .map_err(|err| Error::of(&format!("ask {object} for a run"), Some((namespace, &object)), err))?;
    let asked = Asked::new(&asked_of.uid().unwrap_or_default(), &annotation);

    let say = |line: &str| {
        if how.output.is_none() {
            return output::print(&format!("{line}\n"));
        }
        output::complain(line);
        Ok(())
    };
    say(&format!("a run of {namespace}/{name} is asked for"))?;
    if !how.wait {
        return Ok(Exit::Success);
    }

    let states = Box::pin(watch_object(api, name).default_backoff());
    let followed = tokio::time::timeout(how.timeout, follow(states, &asked, say)).await;
    let (record, point) = match followed {
        Ok(end) => conclude(end?, namespace, name)?,
        Err(_elapsed) => {
            return Err(Error::Ended {
                exit: Exit::Timeout,
                message: format!(
                    "the run is not over after {}; it goes on",
                    span(i64::try_from(how.timeout.as_millis()).unwrap_or(i64::MAX))
                ),
                remedy: Some(format!("kubectl stsbackup describe {name} -n {namespace} shows how far it is")),
            });
        }
    };
    if how.output.is_some() {
        output::print(&output::data(&record, DataFormat::Json)?)?;
    }
    if record.result != RunResult::Failed {
        say(&point_line(&record, point.as_ref()))?;
    }
    verdict(&record, namespace, name)
}

/// A value that no earlier request has: the present time to the nanosecond.
fn request_value(now: Timestamp) -> String {
    format!("{now:.9}")
}

fn request_patch(annotation: &str) -> serde_json::Value {
    json!({ "metadata": { "annotations": { REQUESTED_AT_ANNOTATION: annotation } } })
}

/// Says how far the run is whenever that has changed, until it goes no further.
async fn follow(
    mut states: impl Stream<Item = watcher::Result<Option<DynamicObject>>> + Unpin,
    asked: &Asked,
    say: impl Fn(&str) -> Result<(), Error>,
) -> Result<Progress, Error> {
    let mut said = String::new();
    let mut last_trouble = None;
    let mut silence = Box::pin(tokio::time::sleep(SILENCE));
    let mut hinted = false;
    loop {
        let state = tokio::select! {
            state = states.next() => state,
            () = &mut silence, if !hinted => {
                hinted = true;
                output::complain(SILENCE_HINT);
                continue;
            }
        };
        let backup = match state {
            Some(Ok(object)) => object.as_ref().map(understand).transpose()?,
            Some(Err(err)) => {
                // The watch goes on by itself, and catches up: only what will not change ends it.
                if let Some(end) = lasting(&err) {
                    return Err(Error::of("watch the StatefulSetBackup", None, kube::Error::Api(end)));
                }
                let trouble = err.to_string();
                if last_trouble.as_ref() != Some(&trouble) {
                    output::complain(&format!("the watch was interrupted and is tried again: {trouble}"));
                    last_trouble = Some(trouble);
                }
                continue;
            }
            None => return Ok(Progress::Deleted),
        };
        match progress(backup.as_ref(), asked) {
            Progress::Goes(line) => {
                hinted |= line != WAITING;
                if line != said {
                    say(&line)?;
                    said = line;
                }
            }
            end @ (Progress::Over { .. }
            | Progress::CannotStart { .. }
            | Progress::Replaced { .. }
            | Progress::Deleted) => return Ok(end),
        }
    }
}

/// The answer of the API server that a watch will get again and again.
fn lasting(err: &watcher::Error) -> Option<Box<kube::core::Status>> {
    let status = match err {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status,
        watcher::Error::InitialListFailed(_)
        | watcher::Error::WatchStartFailed(_)
        | watcher::Error::WatchFailed(_)
        | watcher::Error::NoResourceVersion => return None,
    };
    (forbidden(status) || not_found(status)).then(|| status.clone())
}

/// The finished run, or why there is none.
fn conclude(end: Progress, namespace: &str, name: &str) -> Result<(RunRecord, Option<RecoveryPoint>), Error> {
    let object = format!("StatefulSetBackup {namespace}/{name}");
    let (message, remedy) = match end {
        Progress::Over { record, point } => return Ok((record, point)),
        Progress::CannotStart { reason, message } => (
            format!(
                "{object} is not ready: {reason}: {message}; the request stands, and runs once that is solved"
            ),
            Some(remedy(&reason, namespace, name)),
        ),
        Progress::Replaced { by } => (
            format!("somebody asked {object} for another run ({by}) before this one began, so it will not"),
            Some(format!("kubectl stsbackup describe {name} -n {namespace} shows the other run")),
        ),
        Progress::Deleted | Progress::Goes(_) => (format!("{object} was deleted"), None),
    };
    Err(Error::Ended { exit: Exit::Failure, message, remedy })
}

/// The exit code that the result deserves, or the words.
fn verdict(record: &RunRecord, namespace: &str, name: &str) -> Result<Exit, Error> {
    let RunRecord { id, result, reason, message, .. } = record;
    let (exit, how) = match result {
        RunResult::Completed => return Ok(Exit::Success),
        RunResult::PartiallyFailed => (Exit::Partial, "left claims out"),
        RunResult::Failed => (Exit::Failure, "failed"),
    };
    Err(Error::Ended {
        exit,
        message: format!("run {id} {how}: {reason}: {message}"),
        remedy: Some(remedy(reason, namespace, name)),
    })
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
