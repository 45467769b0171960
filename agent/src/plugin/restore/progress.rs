//! What a `StatefulSetRestore` says of itself: how far it is, or how it ended. Pure.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;
use sts_backup_api::conditions;
use sts_backup_api::restore::{RestorePhase, RestorePlan, StatefulSetRestore, StatefulSetRestoreStatus};

use crate::plugin::watch::{Look, WAITING};

/// The condition that says how it ended.
const SUCCEEDED: &str = "Succeeded";

/// The reason for which a restore or a rollback may stay in its last phase for ever: everything stays as it is.
const PODS_NOT_READY: &str = "PodsNotReady";

/// The reason of a plan that only waits for its approval.
const DRY_RUN: &str = "DryRun";

/// What comes of a restore that is to plan only.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Planning {
    /// It can be done so.
    Planned(Box<RestorePlan>),
    /// It cannot be done; nothing was touched.
    Refused(Why),
    /// Somebody deleted the object.
    Deleted,
}

/// How a restore or a rollback ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The application serves the restored data.
    Completed,
    /// The application serves its old data again.
    RolledBack(Why),
    /// It was given up, and the application has its old data.
    Failed(Why),
    /// The pods did not become ready in time, and everything stays as it is.
    Held(Why),
    /// What was approved is not what would be done now; nothing was touched.
    PlanChanged,
    /// The wish to have the old volumes back is not followed.
    RollbackRefused(Why),
    /// Somebody deleted the object.
    Deleted,
}

/// The reason and the message of a condition; empty where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Why {
    reason: String,
    message: String,
}

impl Why {
    /// `reason: message`, or what of both there is.
    pub(super) fn to_text(&self) -> String {
        let Self { reason, message } = self;
        match (reason.as_str(), message.as_str()) {
            ("", "") => "the agent does not say why".to_owned(),
            (reason, "") => reason.to_owned(),
            (reason, message) => format!("{reason}: {message}"),
        }
    }
}

impl From<&Condition> for Why {
    fn from(condition: &Condition) -> Self {
        Self { reason: condition.reason.clone(), message: condition.message.clone() }
    }
}

/// What has come of the restore with that uid, which only plans.
pub(super) fn planning(restore: Option<&StatefulSetRestore>, uid: &str) -> Look<Planning> {
    let Some(restore) = same(restore, uid) else { return Look::Ends(Planning::Deleted) };
    let unseen = StatefulSetRestoreStatus::default();
    let status = restore.status.as_ref().unwrap_or(&unseen);
    match (status.phase, &status.plan) {
        (Some(RestorePhase::Failed), _) => Look::Ends(Planning::Refused(why(status))),
        (None | Some(RestorePhase::New), _) | (_, None) => Look::Goes(waiting(status)),
        (
            Some(
                RestorePhase::Planned
                | RestorePhase::Preparing
                | RestorePhase::ScalingDown
                | RestorePhase::Restoring
                | RestorePhase::ScalingUp
                | RestorePhase::Completed
                | RestorePhase::RollingBack
                | RestorePhase::RolledBack,
            ),
            Some(plan),
        ) => Look::Ends(Planning::Planned(Box::new(plan.clone()))),
    }
}

/// How far the restore with that uid is, of which the plan with that hash was approved.
pub(super) fn restoring(restore: Option<&StatefulSetRestore>, uid: &str, approved: &str) -> Look<End> {
    let Some(restore) = same(restore, uid) else { return Look::Ends(End::Deleted) };
    let unseen = StatefulSetRestoreStatus::default();
    let status = restore.status.as_ref().unwrap_or(&unseen);
    match status.phase {
        None | Some(RestorePhase::New) => Look::Goes(waiting(status)),
        Some(RestorePhase::Planned) => match &status.plan {
            Some(plan) if plan.hash != approved => Look::Ends(End::PlanChanged),
            Some(_) | None => Look::Goes(waiting(status)),
        },
        Some(RestorePhase::ScalingUp) => held(status).unwrap_or_else(|| Look::Goes(how_far(status))),
        Some(
            RestorePhase::Preparing
            | RestorePhase::ScalingDown
            | RestorePhase::Restoring
            | RestorePhase::RollingBack,
        ) => Look::Goes(how_far(status)),
        Some(RestorePhase::Completed) => Look::Ends(End::Completed),
        Some(RestorePhase::Failed) => Look::Ends(End::Failed(why(status))),
        Some(RestorePhase::RolledBack) => Look::Ends(End::RolledBack(why(status))),
    }
}

/// How far the rollback is that the restore with that uid was asked for by the annotation.
pub(super) fn rolling_back(
    restore: Option<&StatefulSetRestore>,
    uid: &str,
    annotation: Option<&str>,
) -> Look<End> {
    let Some(restore) = same(restore, uid) else { return Look::Ends(End::Deleted) };
    let unseen = StatefulSetRestoreStatus::default();
    let status = restore.status.as_ref().unwrap_or(&unseen);
    let is_handled = annotation.is_none_or(|asked| status.last_rollback_request.as_deref() == Some(asked));
    match status.phase {
        Some(RestorePhase::RolledBack) => Look::Ends(End::RolledBack(why(status))),
        Some(RestorePhase::Failed) => Look::Ends(End::Failed(why(status))),
        Some(RestorePhase::RollingBack) => held(status).unwrap_or_else(|| Look::Goes(how_far(status))),
        // What was being restored goes back by way of the phases it has been through.
        Some(RestorePhase::Completed) if is_handled => {
            let said = conditions::find(&status.conditions, conditions::PROGRESSING);
            Look::Ends(End::RollbackRefused(said.map(Why::from).unwrap_or_default()))
        }
        None | Some(RestorePhase::New | RestorePhase::Planned | RestorePhase::Completed) => {
            Look::Goes(WAITING.to_owned())
        }
        Some(
            RestorePhase::Preparing
            | RestorePhase::ScalingDown
            | RestorePhase::Restoring
            | RestorePhase::ScalingUp,
        ) => Look::Goes(if is_handled { how_far(status) } else { WAITING.to_owned() }),
    }
}

/// The object that was made, unless it is gone, or another one has its name.
fn same<'a>(restore: Option<&'a StatefulSetRestore>, uid: &str) -> Option<&'a StatefulSetRestore> {
    restore.filter(|restore| restore.uid().as_deref() == Some(uid))
}

fn held(status: &StatefulSetRestoreStatus) -> Option<Look<End>> {
    let mut conditions = status.conditions.iter();
    let late = conditions.find(|condition| condition.reason == PODS_NOT_READY)?;
    Some(Look::Ends(End::Held(late.into())))
}

/// Why it ended as it did, or goes no further.
fn why(status: &StatefulSetRestoreStatus) -> Why {
    let condition = conditions::find(&status.conditions, SUCCEEDED)
        .or_else(|| conditions::find(&status.conditions, conditions::PROGRESSING));
    condition.map(Why::from).unwrap_or_default()
}

/// What it waits for before it touches anything, in the agent's words.
fn waiting(status: &StatefulSetRestoreStatus) -> String {
    let progressing = conditions::find(&status.conditions, conditions::PROGRESSING);
    let message = progressing.filter(|condition| condition.reason != DRY_RUN).map(|it| it.message.as_str());
    message.filter(|message| !message.is_empty()).unwrap_or(WAITING).to_owned()
}

/// How far it is, in one line that changes only when something has happened.
fn how_far(status: &StatefulSetRestoreStatus) -> String {
    let mut line = status.phase.map_or("waiting", phase_word).to_owned();
    let progressing = conditions::find(&status.conditions, conditions::PROGRESSING);
    if let Some(condition) = progressing.filter(|condition| !condition.message.is_empty()) {
        line = format!("{line}: {}", condition.message);
    }
    match &status.progress {
        Some(progress) => format!("{line} ({progress})"),
        None => line,
    }
}

/// The word of a phase, as the API writes it.
pub(super) fn phase_word(phase: RestorePhase) -> &'static str {
    match phase {
        RestorePhase::New => "New",
        RestorePhase::Planned => "Planned",
        RestorePhase::Preparing => "Preparing",
        RestorePhase::ScalingDown => "ScalingDown",
        RestorePhase::Restoring => "Restoring",
        RestorePhase::ScalingUp => "ScalingUp",
        RestorePhase::Completed => "Completed",
        RestorePhase::Failed => "Failed",
        RestorePhase::RollingBack => "RollingBack",
        RestorePhase::RolledBack => "RolledBack",
    }
}

#[cfg(test)]
#[path = "progress_tests.rs"]
mod tests;
