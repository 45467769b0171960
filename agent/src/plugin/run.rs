//! `run`: asks for a run, and follows it to its end if wanted.

use jiff::Timestamp;
use kube::ResourceExt;
use kube::api::{DynamicObject, Patch};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::watch_object;
use serde_json::json;
use sts_backup_api::backup::StatefulSetBackup;
use sts_backup_api::names::REQUESTED_AT_ANNOTATION;
use sts_backup_api::run::{RecoveryPoint, RunRecord, RunResult};
use sts_backup_service::clock;

use super::args::{DataFormat, Run};
use super::cluster::{Cluster, patch_params, understand};
use super::error::Error;
use super::follow::{Asked, Progress, blocked, not_ready, point_line, progress};
use super::remedy::remedy;
use super::watch::{Look, follow};
use super::{Exit, output};
use sts_backup_service::table::duration;

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
    let api = cluster.whole::<StatefulSetBackup>(&cluster.scope(false));
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
    let look = |object: Option<&DynamicObject>| look(object, &asked);
    let followed = follow(states, "StatefulSetBackup", look, say);
    let followed = tokio::time::timeout(how.timeout, followed).await;
    let (record, point) = match followed {
        Ok(end) => conclude(end?, namespace, name)?,
        Err(_elapsed) => {
            return Err(Error::Ended {
                exit: Exit::Timeout,
                message: format!("the run is not over after {}; it goes on", duration(how.timeout)),
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

/// What the object says of the run that was asked for.
fn look(object: Option<&DynamicObject>, asked: &Asked) -> Result<Look<Progress>, Error> {
    let backup = object.map(understand).transpose()?;
    Ok(match progress(backup.as_ref(), asked) {
        Progress::Goes(line) => Look::Goes(line),
        end @ (Progress::Over { .. }
        | Progress::CannotStart { .. }
        | Progress::Suspended
        | Progress::Replaced { .. }
        | Progress::Deleted) => Look::Ends(end),
    })
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
        Progress::Suspended => (
            format!("{object} was suspended before this run began, so it will not"),
            Some(format!("kubectl stsbackup resume {name} -n {namespace}, then ask again")),
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
