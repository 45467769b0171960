//! Turns facts and the decided step into the status that users see, and into Events. Pure.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use sts_backup_api::conditions::{self, PROGRESSING};
use sts_backup_api::restore::{RestorePhase, RestoredSnapshot, StatefulSetRestoreStatus};
use sts_backup_api::run::Failure;
use sts_backup_api::swap::{Swap, SwapStep, SwapVolume, Toward};

use super::decide::{
    CLAIM_HELD, NAMESPACE_TERMINATING, Outcome, PODS_NOT_READY, QUEUED, ROLLED_BACK, RestoreStep, Why, later,
    unapproved,
};
use super::facts::RestoreFacts;
use super::view::View;
use crate::events::Note;

/// The application has the restored data. Absent until the restore has ended.
pub(super) const SUCCEEDED: &str = "Succeeded";

/// What a restore under way waits for that may need somebody.
const STUCK: [&str; 10] = [
    PODS_NOT_READY,
    CLAIM_HELD,
    "ClaimRefused",
    "ClaimStuck",
    "NotBound",
    "NotReserved",
    "NotScaledDown",
    "PodsGoing",
    "Refused",
    "VolumeGone",
];

/// The status after the step is written down, and before it is done.
pub(super) fn next_status(
    facts: &RestoreFacts,
    step: &RestoreStep,
    now: Timestamp,
) -> StatefulSetRestoreStatus {
    let mut status = facts.status.clone();
    match step {
        RestoreStep::Plan(plan) => {
            status.plan = Some(plan.clone());
            status.phase = Some(RestorePhase::Planned);
        }
        RestoreStep::Refuse(_) => {
            status.last_rollback_request = facts.rollback_request().or(status.last_rollback_request);
            status.phase = Some(RestorePhase::Failed);
            status.completion_time = Some(MicroTime(now));
        }
        RestoreStep::Begin { plan, swap } => {
            status.original_replicas = Some(swap.replicas);
            status.start_time = Some(MicroTime(now));
            status.plan = Some(plan.clone());
            status.swap = Some(swap.clone());
        }
        RestoreStep::Record(swap) => record(&mut status, swap, now),
        RestoreStep::RollBack(swap) => {
            status.last_rollback_request = facts.rollback_request();
            status.completion_time = None;
            status.rollback_until = None;
            record(&mut status, swap, now);
        }
        RestoreStep::RefuseRollback(_) => status.last_rollback_request = facts.rollback_request(),
        RestoreStep::Finish { outcome, swap } => {
            finish(facts, &mut status, *outcome, swap);
            status.completion_time = Some(MicroTime(now));
        }
        RestoreStep::AddFinalizer
        | RestoreStep::RemoveFinalizer
        | RestoreStep::Do { .. }
        | RestoreStep::Wait { .. }
        | RestoreStep::Idle => {}
    }
    let under_way = status.swap.as_ref().filter(|_| status.completion_time.is_none());
    if let Some(swap) = under_way {
        status.phase = Some(phase(swap));
        status.progress = Some(progress(facts, swap));
    } else if let RestoreStep::Wait { .. } = step
        && status.completion_time.is_none()
    {
        let is_planned = facts.restore.spec.dry_run && status.plan.is_some();
        status.phase = Some(if is_planned { RestorePhase::Planned } else { RestorePhase::New });
    }
    set_conditions(facts, step, &mut status, now);
    status
}

fn record(status: &mut StatefulSetRestoreStatus, swap: &Swap, now: Timestamp) {
    let was = status.swap.as_ref().map(|swap| swap.step);
    let comes_to = |step| swap.step == step && was != Some(step);
    if comes_to(SwapStep::ScalingUp) && swap.toward == Toward::Restored {
        let restored = |volume: &SwapVolume| {
            Some(RestoredSnapshot {
                snapshot_name: volume.snapshot.clone()?,
                pvc_name: volume.claim.clone(),
                restore_time: Some(Time(now)),
                success: true,
            })
        };
        status.restored_snapshots = swap.volumes.iter().filter_map(restored).collect();
    }
    if comes_to(SwapStep::Releasing)
        && let Some(down) = &swap.down_since
    {
        status.downtime_seconds = Some(now.duration_since(down.0).as_secs());
    }
    status.swap = Some(swap.clone());
}

fn finish(facts: &RestoreFacts, status: &mut StatefulSetRestoreStatus, outcome: Outcome, swap: &Swap) {
    let mut is_kept = swap.volumes.iter().filter(|volume| volume.snapshot.is_some());
    match outcome {
        Outcome::Completed => {
            // As `releasing` has the old volumes expire.
            let until = later(swap.step_since.0, facts.restore.spec.rollback_window.into());
            status.rollback_until = is_kept.any(|volume| volume.previous.is_some()).then_some(Time(until));
            status.phase = Some(RestorePhase::Completed);
        }
        Outcome::RolledBack => {
            status.restored_snapshots.iter_mut().for_each(|restored| restored.success = false);
            status.phase = Some(RestorePhase::RolledBack);
        }
        Outcome::Failed | Outcome::LetGo => status.phase = Some(RestorePhase::Failed),
    }
    status.swap = Some(swap.clone());
}

/// One word for how far a swap is.
pub(super) fn phase(swap: &Swap) -> RestorePhase {
    match (swap.toward, swap.step) {
        (Toward::Previous, _) | (Toward::Restored, SwapStep::Abandoning) => RestorePhase::RollingBack,
        (Toward::Restored, SwapStep::Protecting | SwapStep::Staging) => RestorePhase::Preparing,
        (Toward::Restored, SwapStep::ScalingDown) => RestorePhase::ScalingDown,
        (Toward::Restored, SwapStep::Swapping) => RestorePhase::Restoring,
        (Toward::Restored, SwapStep::ScalingUp | SwapStep::Releasing) => RestorePhase::ScalingUp,
    }
}

/// How many volumes are made, or how many claims have theirs.
fn progress(facts: &RestoreFacts, swap: &Swap) -> String {
    let volumes = || swap.volumes.iter().filter(|volume| volume.snapshot.is_some());
    let is_done = |volume: &&SwapVolume| match (&facts.world, swap.step) {
        (_, SwapStep::ScalingUp | SwapStep::Releasing) => true,
        (_, SwapStep::Protecting | SwapStep::Staging | SwapStep::ScalingDown | SwapStep::Abandoning)
            if swap.toward == Toward::Restored =>
        {
            volume.restored.is_some()
        }
        (Some(world), _) => {
            let view = View { facts, swap, world, now: swap.step_since.0 };
            view.target(volume).is_some_and(|pv| view.is_bound(volume, pv))
        }
        (None, _) => false,
    };
    format!("{}/{} volumes", volumes().filter(is_done).count(), volumes().count())
}

fn set_conditions(
    facts: &RestoreFacts,
    step: &RestoreStep,
    status: &mut StatefulSetRestoreStatus,
    now: Timestamp,
) {
    let generation = facts.restore.metadata.generation;
    let conditions = &mut status.conditions;
    let mut set =
        |type_, value: (bool, &str, &str)| conditions::set(conditions, type_, value, generation, now);
    match step {
        RestoreStep::Plan(plan) => match unapproved(facts, plan) {
            Some(why) => set(PROGRESSING, (false, why.reason, &why.message)),
            None => set(PROGRESSING, (true, "Planned", "the plan is made, and begins")),
        },
        RestoreStep::Refuse(failure) => {
            let message = format!("{}; nothing was touched", failure.message);
            set(PROGRESSING, (false, &failure.reason, &message));
            set(SUCCEEDED, (false, &failure.reason, &message));
        }
        RestoreStep::Begin { swap, .. } | RestoreStep::Record(swap) | RestoreStep::RollBack(swap) => {
            let (reason, message) = going_on(swap);
            set(PROGRESSING, (true, reason, &message));
        }
        RestoreStep::RefuseRollback(message) => {
            set(
                PROGRESSING,
                (false, "RollbackRefused", &format!("the old volumes are not brought back: {message}")),
            );
        }
        RestoreStep::Wait { why, .. } => {
            let is_going_on = facts.under_way().is_some() && !STUCK.contains(&why.reason);
            set(PROGRESSING, (is_going_on, why.reason, &why.message));
        }
        RestoreStep::Finish { outcome, swap } => {
            let (reason, message) = ended(facts, *outcome, swap);
            set(PROGRESSING, (false, reason, "the restore has ended"));
            set(SUCCEEDED, (*outcome == Outcome::Completed, reason, &message));
        }
        RestoreStep::AddFinalizer
        | RestoreStep::RemoveFinalizer
        | RestoreStep::Do { .. }
        | RestoreStep::Idle => {}
    }
}

/// What a swap does now.
fn going_on(swap: &Swap) -> (&'static str, String) {
    let what = match swap.step {
        SwapStep::Protecting => ("Protecting", "the volumes that claims have now are kept"),
        SwapStep::Staging => ("Provisioning", "new volumes are made beside the running application"),
        SwapStep::ScalingDown => ("ScalingDown", "the pods are going"),
        SwapStep::Swapping => {
            ("Exchanging", "claims are deleted and made again, each with its wanted volume")
        }
        SwapStep::ScalingUp => ("ScalingUp", "the pods are coming back"),
        SwapStep::Releasing => ("Releasing", "the volumes get their own reclaim policies back"),
        SwapStep::Abandoning => ("Abandoning", "nothing was exchanged; the new volumes go"),
    };
    let why = match (&swap.failure, swap.toward) {
        (Some(failure), _) => format!("; the restore is given up: {}", failure.message),
        (None, Toward::Previous) => "; the old volumes are brought back".to_owned(),
        (None, Toward::Restored) => String::new(),
    };
    (what.0, format!("{}{why}", what.1))
}

/// How it ended, and what to do next.
fn ended(facts: &RestoreFacts, outcome: Outcome, swap: &Swap) -> (&'static str, String) {
    let why = swap.failure.as_ref().map(|Failure { reason, message }| format!("{reason}: {message}. "));
    let why = why.unwrap_or_default();
    match outcome {
        Outcome::Completed => {
            let window = SignedDuration::try_from(Duration::from(facts.restore.spec.rollback_window));
            let window = window.unwrap_or(SignedDuration::MAX);
            let message =
                format!("{why}the application has the restored data; its old volumes stay for {window:#}");
            ("Completed", message)
        }
        Outcome::RolledBack => {
            let message =
                format!("{why}the application has its old data again; create another restore to try again");
            (ROLLED_BACK, message)
        }
        Outcome::Failed => {
            let message = format!("{why}Nothing was exchanged; create another restore to try again");
            ("Abandoned", message)
        }
        Outcome::LetGo => (NAMESPACE_TERMINATING, why),
    }
}

/// The Events that go with a step, once it is written down.
pub(super) fn notes(facts: &RestoreFacts, step: &RestoreStep) -> Vec<Note> {
    match step {
        RestoreStep::Plan(plan) => {
            let message = format!(
                "the plan {} is made: {} claims, {} s of downtime expected",
                plan.hash,
                plan.volumes.len(),
                plan.expected_downtime_seconds
            );
            vec![Note::normal("Planned", "Plan", message)]
        }
        RestoreStep::Refuse(Failure { reason, message }) => {
            vec![Note::warning(
                "RestoreRefused",
                "Refuse",
                format!("{reason}: {message}; nothing was touched"),
            )]
        }
        RestoreStep::Begin { plan, .. } => {
            let message = format!("the data of {} is restored into {}", plan.point, facts.set_name());
            vec![Note::normal("RestoreStarted", "Begin", message)]
        }
        RestoreStep::Record(swap) => change(facts, swap),
        RestoreStep::RollBack(swap) if facts.under_way() != Some(swap) => {
            vec![Note::normal(
                "RollbackStarted",
                "RollBack",
                "the old volumes are brought back, as was asked for".to_owned(),
            )]
        }
        RestoreStep::RefuseRollback(message) => {
            vec![Note::warning("RollbackRefused", "RollBack", message.clone())]
        }
        RestoreStep::Finish { outcome, swap } => {
            let (_, message) = ended(facts, *outcome, swap);
            vec![match outcome {
                Outcome::Completed => Note::normal("RestoreCompleted", "Finish", message),
                Outcome::RolledBack => Note::warning(ROLLED_BACK, "Finish", message),
                Outcome::Failed => Note::warning("RestoreFailed", "Finish", message),
                Outcome::LetGo => Note::warning(NAMESPACE_TERMINATING, "LetGo", message),
            }]
        }
        RestoreStep::Wait { why, .. } => waits(facts, why).into_iter().collect(),
        RestoreStep::RollBack(_)
        | RestoreStep::AddFinalizer
        | RestoreStep::RemoveFinalizer
        | RestoreStep::Do { .. }
        | RestoreStep::Idle => Vec::new(),
    }
}

/// What is new in a swap.
fn change(facts: &RestoreFacts, swap: &Swap) -> Vec<Note> {
    let mut notes = Vec::new();
    let Some(old) = facts.under_way() else { return notes };
    if swap.contests > old.contests {
        let message = format!(
            "{} was changed by somebody else while claims were being exchanged: the restore takes it back",
            facts.set_name()
        );
        notes.push(Note::warning("Contested", "Exchange", message));
    }
    if swap.step == old.step && swap.toward == old.toward {
        return notes;
    }
    let failure = swap.failure.as_ref().map_or_else(String::new, |failure| failure.message.clone());
    let (_, message) = going_on(swap);
    notes.push(match (swap.toward, swap.step) {
        (Toward::Previous, _) if old.toward == Toward::Restored => Note::warning(
            "RollbackStarted",
            "RollBack",
            format!("the old volumes are brought back: {failure}"),
        ),
        (_, SwapStep::Abandoning) => Note::warning("RestoreAbandoned", "Abandon", failure),
        (_, SwapStep::Releasing) if facts.world.as_ref().is_some_and(|world| world.set.is_none()) => {
            let message =
                format!("{} does not exist any more: its claims are as they should be", facts.set_name());
            Note::warning("StatefulSetGone", "ScaleUp", message)
        }
        (_, SwapStep::Staging) => Note::normal("Preparing", "Stage", message),
        (_, SwapStep::ScalingDown) if old.step == SwapStep::ScalingUp => Note::warning(
            "ScalingDown",
            "ScaleDown",
            "claims were given other volumes since they were exchanged: pods go again, and the claims get their volumes back"
                .to_owned(),
        ),
        (_, SwapStep::ScalingDown) => Note::normal("ScalingDown", "ScaleDown", message),
        (_, SwapStep::Swapping) => Note::normal("Restoring", "Exchange", message),
        (_, SwapStep::ScalingUp) => Note::normal("ScalingUp", "ScaleUp", message),
        (_, SwapStep::Protecting | SwapStep::Releasing) => return notes,
    });
    notes
}

/// Said once, when it begins.
fn waits(facts: &RestoreFacts, why: &Why) -> Option<Note> {
    let known = conditions::find(&facts.status.conditions, PROGRESSING);
    let is_new = known.is_none_or(|known| known.reason != why.reason);
    if !is_new {
        return None;
    }
    match why.reason {
        QUEUED => Some(Note::normal(QUEUED, "Wait", why.message.clone())),
        reason if STUCK.contains(&reason) => Some(Note::warning(reason, "Wait", why.message.clone())),
        _ => None,
    }
}
