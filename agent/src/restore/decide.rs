//! Decides the next step of a restore from the facts and the time. Pure: no client, no clock.
//!
//! What is decided is written to the status before it is done, or is harmless to repeat: so a crash at any point
//! leaves a status from which the same decisions follow. What the steps of a swap are is in [`prepare`] (before and after
//! the exchange of the volumes, beside the running application) and [`exchange`] (while pods are down).

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::ResourceExt;
use sts_backup_api::conditions::DELETED;
use sts_backup_api::restore::{RestorePhase, RestorePlan};
use sts_backup_api::run::Failure;
use sts_backup_api::swap::{Swap, SwapStep, Toward};

use super::facts::RestoreFacts;
use super::plan::{Planned, Verdict};
use super::view::View;
use super::{exchange, prepare};

/// How soon something that passes by itself, and of which no watch tells, is looked at again.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// How soon what the API server refused is tried again while pods are down.
const TRY_AGAIN: Duration = Duration::from_secs(2);

/// Somebody else scaled the `StatefulSet` in the middle.
pub(super) const CONTESTED: &str = "Contested";
/// The old volumes were asked for.
pub(super) const ROLLED_BACK: &str = "RolledBack";
/// The pods did not become ready in time.
pub(super) const PODS_NOT_READY: &str = "PodsNotReady";
/// Claims could not be deleted.
pub(super) const CLAIM_HELD: &str = "ClaimHeld";
/// Another backup or restore has the `StatefulSet` in hand.
pub(super) const QUEUED: &str = "Queued";
/// The namespace is being deleted.
pub(super) const NAMESPACE_TERMINATING: &str = "NamespaceTerminating";
/// Only the plan was asked for.
pub(super) const DRY_RUN: &str = "DryRun";
/// What was approved is not what would be done now.
pub(super) const PLAN_CHANGED: &str = "PlanChanged";

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum RestoreStep {
    /// Hold the object while it has volumes in hand.
    AddFinalizer,
    /// Let the object go.
    RemoveFinalizer,
    /// Write down what would be done; nothing is touched.
    Plan(RestorePlan),
    /// Write down why nothing is done, for good.
    Refuse(Failure),
    /// Write down what is going to be done; nothing is touched yet.
    Begin { plan: RestorePlan, swap: Swap },
    /// Write down how far the swap is.
    Record(Swap),
    /// Write down that the user's wish to have the old volumes back is followed so.
    RollBack(Swap),
    /// Write down why the user's wish to have the old volumes back is not followed.
    RefuseRollback(String),
    /// Change the cluster: these writes are independent of each other.
    Do { work: Work, writes: Vec<Write> },
    /// Write down how it ended.
    Finish { outcome: Outcome, swap: Swap },
    /// Nothing can be done before something happens, or before that time.
    Wait { why: Why, until: Option<Timestamp> },
    /// Nothing is left to do.
    Idle,
}

/// What is waited for: a condition's reason, and what happened to what, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Why {
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// How a swap ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The application has the restored data.
    Completed,
    /// The application has its old data again.
    RolledBack,
    /// Nothing was swapped.
    Failed,
    /// The namespace goes, and nothing can be made in it any more.
    LetGo,
}

/// What some writes are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Volumes are kept from being deleted with their claims.
    Keep,
    /// New volumes are asked for.
    Stage,
    /// The claims by which new volumes were made go.
    Unstage,
    /// The `StatefulSet` is scaled down.
    ScaleDown,
    /// Volumes are no longer reserved for a claim's name.
    Disarm,
    /// Volumes are reserved for their claims' names.
    Arm,
    /// Pods go that the `StatefulSet`'s controller does not take down.
    DeletePods,
    /// Claims go, to be made again with another volume.
    DeleteClaims,
    /// Claims are made again.
    CreateClaims,
    /// The `StatefulSet` is scaled up.
    ScaleUp,
    /// Volumes are given back to their users, or their end.
    Release,
}

/// A change of the cluster. Each is refused where the object is another one by now, or has changed in a way that matters.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Write {
    Volume { name: String, uid: String, resource_version: Option<String>, change: VolumeChange },
    CreateClaim(Box<PersistentVolumeClaim>),
    DeleteClaim { name: String, uid: String },
    DeletePod { name: String, uid: String },
    Scale { uid: String, resource_version: Option<String>, replicas: i32 },
}

/// A change of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum VolumeChange {
    /// It is not deleted with its claim, and says whose it is; until it expires, where it does.
    Keep { restore: String, policy: String, claim: String, expires: Option<Timestamp> },
    /// The next claim of that name gets it.
    Arm { namespace: String, claim: String },
    /// No claim gets it.
    Disarm,
    /// It gets its own policy back, and nothing of us is left on it.
    Release { policy: String },
    /// It goes at that time, if its final policy says so; that policy is changed where one is given.
    Expire { at: Timestamp, policy: Option<&'static str> },
}

impl RestoreStep {
    pub(super) fn wait(reason: &'static str, message: impl Into<String>, until: Option<Timestamp>) -> Self {
        Self::Wait { why: Why { reason, message: message.into() }, until }
    }
}

/// The next step of a restore.
pub(super) fn next_restore_step(facts: &RestoreFacts, now: Timestamp) -> RestoreStep {
    if let Some(view) = View::of(facts, now) {
        return next_swap_step(&view);
    }
    if facts.is_over() { after_end(facts, now) } else { before_begin(facts, now) }
}

/// `then`, at the latest the end of time.
pub(super) fn later(time: Timestamp, by: Duration) -> Timestamp {
    SignedDuration::try_from(by).ok().and_then(|by| time.checked_add(by).ok()).unwrap_or(Timestamp::MAX)
}

fn before_begin(facts: &RestoreFacts, now: Timestamp) -> RestoreStep {
    if facts.is_deleting() {
        return if facts.has_finalizer() { RestoreStep::RemoveFinalizer } else { RestoreStep::Idle };
    }
    if facts.rollback_request().is_some() {
        let message = "the old volumes were asked for before the restore had begun".to_owned();
        return RestoreStep::Refuse(Failure { reason: ROLLED_BACK.to_owned(), message });
    }
    if let Some(holder) = &facts.busy_with {
        return queued(facts, holder);
    }
    let Planned { plan, swap } = match &facts.verdict {
        Some(Verdict::Go(planned)) => &**planned,
        Some(Verdict::Refuse(problems)) => {
            let messages: Vec<_> = problems.iter().map(|problem| problem.message.as_str()).collect();
            let reason = problems.first().map_or("Refused", |problem| problem.reason).to_owned();
            return RestoreStep::Refuse(Failure { reason, message: messages.join("; ") });
        }
        Some(Verdict::Wait(problem)) => {
            let until = Some(later(now, LOOK_AGAIN));
            return RestoreStep::wait(problem.reason, problem.message.clone(), until);
        }
        None => return RestoreStep::Idle,
    };
    let spec = &facts.restore.spec;
    let known = facts.status.plan.as_ref().map(|known| &known.hash);
    // What runs is written down when it begins.
    if known.is_none() || spec.dry_run && known != Some(&plan.hash) {
        return RestoreStep::Plan(plan.clone());
    }
    if let Some(why) = unapproved(facts, plan) {
        return RestoreStep::Wait { why, until: None };
    }
    if !facts.has_finalizer() {
        return RestoreStep::AddFinalizer;
    }
    RestoreStep::Begin { plan: plan.clone(), swap: swap.clone() }
}

fn queued(facts: &RestoreFacts, holder: &str) -> RestoreStep {
    let message = format!("{} is in the hands of {holder}, which comes first", facts.set_name());
    // Whoever vacates it wakes us.
    RestoreStep::wait(QUEUED, message, None)
}

/// Why a plan does not run, where only the plan is asked for.
pub(super) fn unapproved(facts: &RestoreFacts, plan: &RestorePlan) -> Option<Why> {
    use sts_backup_api::names::APPROVED_PLAN_ANNOTATION;
    if !facts.restore.spec.dry_run {
        return None;
    }
    let (namespace, name) = (facts.restore.namespace().unwrap_or_default(), facts.restore.name_any());
    let hash = &plan.hash;
    let remedy = format!(
        "kubectl annotate --overwrite statefulsetrestore {name} -n {namespace} {APPROVED_PLAN_ANNOTATION}={hash}"
    );
    match facts.approved() {
        Some(approved) if approved == hash => None,
        Some(approved) => Some(Why {
            reason: PLAN_CHANGED,
            message: format!(
                "the approved plan {approved} is not what would be done now: read the plan, then {remedy}"
            ),
        }),
        None => Some(Why {
            reason: DRY_RUN,
            message: format!("nothing is touched until the plan is approved: {remedy}"),
        }),
    }
}

fn after_end(facts: &RestoreFacts, now: Timestamp) -> RestoreStep {
    if facts.rollback_request().is_some() && !facts.is_deleting() {
        return rollback_after_end(facts, now);
    }
    if facts.has_finalizer() { RestoreStep::RemoveFinalizer } else { RestoreStep::Idle }
}

fn rollback_after_end(facts: &RestoreFacts, now: Timestamp) -> RestoreStep {
    let status = &facts.status;
    let (swap, world) = match (&status.swap, &facts.world) {
        (Some(swap), Some(world)) if status.phase == Some(RestorePhase::Completed) => (swap, world),
        _ => {
            let message = "the application has its old data: there is nothing to bring back";
            return RestoreStep::RefuseRollback(message.to_owned());
        }
    };
    if status.rollback_until.as_ref().is_none_or(|until| until.0 <= now) {
        let message =
            "the rollback window is over, or there were no volumes before: restore another recovery point";
        return RestoreStep::RefuseRollback(message.to_owned());
    }
    let view = View { facts, swap, world, now };
    if let Some(message) = view.no_way_back().or_else(|| view.moved_on()) {
        return RestoreStep::RefuseRollback(message);
    }
    if let Some(holder) = &facts.busy_with {
        return queued(facts, holder);
    }
    if !facts.has_finalizer() {
        return RestoreStep::AddFinalizer;
    }
    let mut swap = view.rolled_back(None);
    swap.down_since = None;
    if let Some(set) = &world.set {
        swap.replicas = set.replicas;
        swap.stateful_set_uid.clone_from(&set.uid);
    }
    RestoreStep::RollBack(swap)
}

fn next_swap_step(view: &View<'_>) -> RestoreStep {
    if view.world.namespace_ending {
        let mut swap = view.swap.clone();
        swap.failure = Some(Failure {
            reason: NAMESPACE_TERMINATING.to_owned(),
            message: format!(
                "the namespace {} is being deleted, and nothing can be made in it any more. The volumes stay: \
                 kubectl get persistentvolumes -l {}={}",
                view.facts.target_namespace(),
                sts_backup_api::names::RESTORE_LABEL,
                view.facts.uid()
            ),
        });
        return RestoreStep::Finish { outcome: Outcome::LetGo, swap };
    }
    if let Some(step) = wish(view) {
        return step;
    }
    match view.swap.step {
        SwapStep::Protecting => prepare::protecting(view),
        SwapStep::Staging => prepare::staging(view),
        SwapStep::ScalingDown => exchange::scaling_down(view),
        SwapStep::Swapping => exchange::swapping(view),
        SwapStep::ScalingUp => exchange::scaling_up(view),
        SwapStep::Releasing => prepare::releasing(view),
        SwapStep::Abandoning => prepare::abandoning(view),
    }
}

/// What the user wants otherwise by now: the old volumes back, or the restore gone.
fn wish(view: &View<'_>) -> Option<RestoreStep> {
    let swap = view.swap;
    if view.facts.rollback_request().is_some() {
        let message = "the old volumes were asked for";
        return Some(match (swap.toward, swap.step) {
            (Toward::Previous, _) | (_, SwapStep::Abandoning) => RestoreStep::RollBack(swap.clone()),
            (Toward::Restored, _) if !view.is_down() => {
                RestoreStep::RollBack(view.given_up(ROLLED_BACK, message))
            }
            (Toward::Restored, _) => match view.no_way_back() {
                Some(message) => RestoreStep::RefuseRollback(message),
                None => RestoreStep::RollBack(view.rolled_back(None)),
            },
        });
    }
    let is_before_swap = swap.toward == Toward::Restored && swap.step < SwapStep::Swapping;
    let has_swapped = view.is_down() && !view.is_untouched();
    if view.facts.is_deleting() && is_before_swap && !has_swapped {
        let message = "the StatefulSetRestore was deleted";
        return Some(RestoreStep::Record(view.given_up(DELETED, message)));
    }
    None
}

/// What follows when the API server refused some writes for good, in these words.
pub(super) fn after_refusal(facts: &RestoreFacts, work: Work, words: &str, now: Timestamp) -> RestoreStep {
    match (work, View::of(facts, now)) {
        (Work::Stage, Some(view)) => {
            let message = format!("the claims of the new volumes are refused: {words}");
            RestoreStep::Record(view.given_up("StagingRefused", &message))
        }
        (Work::CreateClaims, _) => {
            let message = format!("claims are refused, and the pods wait for them: {words}");
            RestoreStep::wait("ClaimRefused", message, Some(later(now, TRY_AGAIN)))
        }
        (
            Work::Stage
            | Work::Keep
            | Work::Unstage
            | Work::ScaleDown
            | Work::Disarm
            | Work::Arm
            | Work::DeletePods
            | Work::DeleteClaims
            | Work::ScaleUp
            | Work::Release,
            _,
        ) => RestoreStep::wait("Refused", words, Some(later(now, LOOK_AGAIN))),
    }
}
