//! `restore`: has a `StatefulSet` given the data of a recovery point, by a plan that the user has seen.
//!
//! It only makes, approves and deletes the `StatefulSetRestore`: the agent does the rest. An object that is not approved
//! touches nothing, and is deleted again.

mod choose;
mod list;
mod plan;
mod progress;
mod rollback;

use std::fmt::{self, Display, Formatter};
use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt;
use kube::api::{DeleteParams, DynamicObject, Patch, PostParams, Preconditions};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::watch_object;
use serde_json::json;
use sts_backup_api::names::APPROVED_PLAN_ANNOTATION;
use sts_backup_api::restore::{OnFailure, RestorePlan, StatefulSetRestore, StatefulSetRestoreSpec};
use sts_backup_service::clock;

use self::choose::{Source, choose};
use self::plan::{downtime, target};
use self::progress::{End, Planning, planning, restoring};
use super::args::{OnUnready, Order, Restore, RestoreCommand};
use super::ask::confirmed;
use super::cluster::{Cluster, patch_params, understand};
use super::error::{Error, not_found};
use super::watch::{Look, follow};
use super::{Exit, output};
use sts_backup_service::table::{count, duration, second};

/// Said when it ends before the approval.
const UNDONE: &str = "nothing was restored";

/// The longest name of a restore, which is a label value.
const MAX_NAME: usize = 63;

/// Restores, or says what there is to say of restores.
pub(super) async fn restore(cluster: &Cluster, how: &Restore) -> Result<Exit, Error> {
    match (&how.command, &how.order) {
        (Some(RestoreCommand::List(how)), None) => list::list(cluster, how).await,
        (Some(RestoreCommand::Rollback(which)), None) => rollback::rollback(cluster, which).await,
        (None, Some(order)) => obey(cluster, order).await,
        (Some(_), Some(_)) | (None, None) => Err(Error::Ended {
            exit: Exit::Usage,
            message: "name a StatefulSet, or one of the commands list and rollback, and not both".to_owned(),
            remedy: Some("kubectl stsbackup restore --help".to_owned()),
        }),
    }
}

async fn obey(cluster: &Cluster, order: &Order) -> Result<Exit, Error> {
    let source = choose(cluster, &order.stateful_set, &order.to).await?;
    let made = make(cluster, &order_object(order, source, clock::now())).await?;
    let handle = Handle::of(&made);
    let approved = match approval(cluster, order, &made).await {
        Ok(Some(hash)) => hash,
        other => {
            handle.discard(cluster).await;
            return other.map(|_| Exit::Success);
        }
    };
    let say = |line: &str| {
        if order.output.is_none() {
            return output::say(line);
        }
        output::complain(line);
        Ok(())
    };
    say(&format!("{handle} is approved"))?;
    if !order.wait {
        output::complain(&handle.how_to_follow());
        return Ok(Exit::Success);
    }
    let look = |object: Option<&DynamicObject>| {
        let restore = object.map(understand::<StatefulSetRestore>).transpose()?;
        Ok(restoring(restore.as_ref(), &handle.uid, &approved))
    };
    let end = handle.follow(cluster, (order.timeout, "the restore is not over"), look, say).await?;
    let ended = cluster.get::<StatefulSetRestore>(&handle.name).await.unwrap_or(made);
    if end == End::PlanChanged {
        // Left as it is, it would run once that plan fits again.
        handle.discard(cluster).await;
    }
    verdict(&end, &ended, false, say)
}

/// A restore that only plans, until it is approved.
fn order_object(order: &Order, source: Source, now: Timestamp) -> StatefulSetRestore {
    let mut spec = StatefulSetRestoreSpec::new(&order.stateful_set);
    source.write(&mut spec);
    spec.replicas.clone_from(&order.replicas);
    spec.replicas.sort_unstable();
    // The schema wants each only once.
    spec.replicas.dedup();
    if let Some(window) = order.rollback_window {
        spec.rollback_window = window.into();
    }
    spec.on_failure = match order.on_failure {
        OnUnready::Hold => OnFailure::Hold,
        OnUnready::Rollback => OnFailure::Rollback,
    };
    spec.dry_run = true;
    StatefulSetRestore::new(&restore_name(&order.stateful_set, now), spec)
}

/// `<stateful set>-<yyyymmdd>-<hhmmss>`, of which what is too long of the `StatefulSet`'s name is cut.
fn restore_name(stateful_set: &str, now: Timestamp) -> String {
    let tail = now.strftime("-%Y%m%d-%H%M%S").to_string();
    let head = &stateful_set[..stateful_set.floor_char_boundary(MAX_NAME - tail.len())];
    format!("{}{tail}", head.trim_end_matches(['-', '.']))
}

async fn make(cluster: &Cluster, object: &StatefulSetRestore) -> Result<StatefulSetRestore, Error> {
    let api = cluster.api::<StatefulSetRestore>(&cluster.scope(false));
    let how = PostParams { field_manager: patch_params().field_manager, ..PostParams::default() };
    let what = format!("create StatefulSetRestore {}/{}", cluster.namespace(), object.name_any());
    api.create(&how, object).await.map_err(|err| Error::of(&what, None, err))
}

/// Waits for the plan, shows it, asks and approves: the hash of what was approved; none: nothing was to be.
async fn approval(
    cluster: &Cluster,
    order: &Order,
    made: &StatefulSetRestore,
) -> Result<Option<String>, Error> {
    let handle = Handle::of(made);
    let look = |object: Option<&DynamicObject>| {
        let restore = object.map(understand::<StatefulSetRestore>).transpose()?;
        Ok(planning(restore.as_ref(), &handle.uid))
    };
    let say = |line: &str| {
        output::complain(line);
        Ok(())
    };
    let planning = handle.follow(cluster, (order.timeout, "there is no plan"), look, say).await?;
    let plan = planned(planning, &target(made))?;
    output::print(&match order.output {
        Some(format) => output::data(&plan, format)?,
        None => plan::render(made, &plan, clock::now()),
    })?;
    if order.dry_run {
        output::complain("nothing was touched: this is only the plan");
        return Ok(None);
    }
    let question = format!("Restore {} so in the cluster of {}?", target(made), cluster.address());
    if !order.yes && !confirmed(&question, UNDONE)? {
        return Err(Error::Ended { exit: Exit::Failure, message: UNDONE.to_owned(), remedy: None });
    }
    let metadata = json!({ "uid": handle.uid, "annotations": { APPROVED_PLAN_ANNOTATION: plan.hash } });
    handle.patch(cluster, "approve", &Patch::Merge(json!({ "metadata": metadata }))).await?;
    Ok(Some(plan.hash))
}

/// The plan, or why there is none.
fn planned(planning: Planning, set: &str) -> Result<RestorePlan, Error> {
    let message = match planning {
        Planning::Planned(plan) => return Ok(*plan),
        Planning::Refused(why) => {
            format!("the restore of StatefulSet {set} is refused: {}", why.to_text())
        }
        Planning::Deleted => format!("{UNDONE}: somebody deleted the StatefulSetRestore"),
    };
    Err(Error::Ended { exit: Exit::Failure, message, remedy: None })
}

/// A `StatefulSetRestore` that exists, or did.
#[derive(Clone, Debug)]
struct Handle {
    namespace: String,
    name: String,
    uid: String,
}

impl Display for Handle {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "StatefulSetRestore {}/{}", self.namespace, self.name)
    }
}

impl Handle {
    fn of(restore: &StatefulSetRestore) -> Self {
        Self {
            namespace: restore.namespace().unwrap_or_default(),
            name: restore.name_any(),
            uid: restore.uid().unwrap_or_default(),
        }
    }

    fn how_to_follow(&self) -> String {
        let Self { namespace, name, uid: _ } = self;
        format!("kubectl get statefulsetrestore {name} -n {namespace} --watch follows it")
    }

    async fn patch(
        &self,
        cluster: &Cluster,
        what: &str,
        patch: &Patch<serde_json::Value>,
    ) -> Result<(), Error> {
        let api = cluster.whole::<StatefulSetRestore>(&cluster.scope(false));
        let patched = api.patch(&self.name, &patch_params(), patch).await;
        patched.map(drop).map_err(|err| Error::of(&format!("{what} {self}"), None, err))
    }

    /// Deletes what was not approved.
    async fn discard(&self, cluster: &Cluster) {
        let api = cluster.whole::<StatefulSetRestore>(&cluster.scope(false));
        let preconditions = Preconditions { uid: Some(self.uid.clone()), resource_version: None };
        let how = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        match api.delete(&self.name, &how).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if not_found(&status) => {}
            Err(err) => {
                let err = Error::of(&format!("delete {self}"), None, err);
                output::complain(&format!(
                    "{}; it touches nothing as long as nobody approves it",
                    err.brief()
                ));
            }
        }
    }

    /// Watches it to an end, for so long at most; then what is said of it is so.
    async fn follow<End>(
        &self,
        cluster: &Cluster,
        (timeout, late): (Duration, &str),
        look: impl Fn(Option<&DynamicObject>) -> Result<Look<End>, Error>,
        say: impl Fn(&str) -> Result<(), Error>,
    ) -> Result<End, Error> {
        let api = cluster.whole::<StatefulSetRestore>(&cluster.scope(false));
        let states = Box::pin(watch_object(api, &self.name).default_backoff());
        let followed = Box::pin(follow(states, "StatefulSetRestore", look, say));
        tokio::time::timeout(timeout, followed).await.unwrap_or_else(|_elapsed| {
            Err(Error::Ended {
                exit: Exit::Timeout,
                message: format!("{late} after {}", duration(timeout)),
                remedy: Some(format!(
                    "kubectl stsbackup doctor tells whether the agent is alive; kubectl stsbackup restore list -n {} what is under way",
                    self.namespace
                )),
            })
        })
    }
}

/// The exit code that the end deserves, or the words. What was wanted is the restored data, or, of a rollback, the old.
fn verdict(
    end: &End,
    restore: &StatefulSetRestore,
    back: bool,
    say: impl Fn(&str) -> Result<(), Error>,
) -> Result<Exit, Error> {
    let Handle { namespace, name, uid: _ } = Handle::of(restore);
    let set = target(restore);
    let rollback = format!("kubectl stsbackup restore rollback {name} -n {namespace}");
    let (message, remedy) = match end {
        End::Completed => {
            say(&completed(restore))?;
            return Ok(Exit::Success);
        }
        End::RolledBack(_) | End::Failed(_) if back => {
            say(&format!("StatefulSet {set} has its old data{}", down_for(restore)))?;
            return Ok(Exit::Success);
        }
        End::RolledBack(why) => {
            (format!("StatefulSet {set} was rolled back, and has its old data: {}", why.to_text()), None)
        }
        End::Failed(why) => {
            (format!("the restore failed, and StatefulSet {set} has its old data: {}", why.to_text()), None)
        }
        End::Held(why) => (
            format!("StatefulSet {set} is not ready: {}", why.to_text()),
            Some(if back {
                format!("kubectl get pods -n {namespace} shows what they wait for")
            } else {
                format!("mend the pods, and the restore completes; or {rollback} brings the old volumes back")
            }),
        ),
        End::PlanChanged => (
            "what was approved is not what would be done now, so nothing was touched".to_owned(),
            Some("the same command again: it shows the new plan".to_owned()),
        ),
        End::RollbackRefused(why) => {
            (format!("StatefulSet {set} is not rolled back: {}", why.to_text()), None)
        }
        End::Deleted => (format!("StatefulSetRestore {namespace}/{name} was deleted"), None),
    };
    Err(Error::Ended { exit: Exit::Failure, message, remedy })
}

/// The line that ends a restore.
fn completed(restore: &StatefulSetRestore) -> String {
    let Handle { namespace, name, uid: _ } = Handle::of(restore);
    let status = restore.status.clone().unwrap_or_default();
    let point = status.plan.map(|plan| format!(" of recovery point {}", plan.point)).unwrap_or_default();
    let line = format!(
        "StatefulSet {} has the data{point}: {}{}",
        target(restore),
        count(status.restored_snapshots.iter().filter(|restored| restored.success).count(), "volume"),
        down_for(restore)
    );
    match status.rollback_until {
        Some(until) => format!(
            "{line}\nuntil {} kubectl stsbackup restore rollback {name} -n {namespace} brings the old volumes back",
            second(until.0)
        ),
        None => line,
    }
}

fn down_for(restore: &StatefulSetRestore) -> String {
    let seconds = restore.status.as_ref().and_then(|status| status.downtime_seconds);
    seconds.map(|seconds| format!(", pods were down for {}", downtime(seconds))).unwrap_or_default()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
