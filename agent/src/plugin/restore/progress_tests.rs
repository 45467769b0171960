use serde_json::{Value, json};

use super::*;
use crate::plugin::restore::tests::{plan, restore};

fn condition(kind: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({ "type": kind, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": "2026-02-03T05:00:00Z" })
}

fn goes<End>(line: &str) -> Look<End> {
    Look::Goes(line.to_owned())
}

fn because(reason: &str, message: &str) -> Why {
    Why { reason: reason.to_owned(), message: message.to_owned() }
}

#[test]
fn a_plan_is_waited_for_in_the_agent_s_words() {
    let planning = |status: Value| planning(Some(&restore(&status)), "uid-1");
    assert_eq!(planning(json!({})), goes(WAITING));
    let queued = condition("Progressing", "False", "Queued", "backup shop/nightly comes first");
    assert_eq!(
        planning(json!({ "phase": "New", "conditions": [queued] })),
        goes("backup shop/nightly comes first")
    );
    let planned = planning(json!({ "phase": "Planned", "plan": plan() }));
    assert_eq!(planned, Look::Ends(Planning::Planned(Box::new(serde_json::from_value(plan()).unwrap()))));
    let refused = condition("Succeeded", "False", "QuotaTooSmall", "no room; no class");
    assert_eq!(
        planning(json!({ "phase": "Failed", "conditions": [refused] })),
        Look::Ends(Planning::Refused(because("QuotaTooSmall", "no room; no class")))
    );
}

#[test]
fn an_object_that_is_gone_or_made_anew_ends_every_wait() {
    let other = restore(&json!({}));
    for object in [None, Some(&other)] {
        assert_eq!(planning(object, "uid-2"), Look::Ends(Planning::Deleted));
        assert_eq!(restoring(object, "uid-2", "hash-1"), Look::Ends(End::Deleted));
        assert_eq!(rolling_back(object, "uid-2", None), Look::Ends(End::Deleted));
    }
}

#[test]
fn every_phase_has_a_line_or_an_end() {
    let restoring = |status: Value| restoring(Some(&restore(&status)), "uid-1", "hash-1");
    let succeeded = |status, reason| condition("Succeeded", status, reason, "it said so");
    let said = condition("Progressing", "True", "PodsGoing", "pods db-1, db-2 are going");
    for (status, seen) in [
        (json!({ "phase": "New" }), goes(WAITING)),
        (
            json!({ "phase": "Planned", "plan": plan(), "conditions": [condition("Progressing", "False", "DryRun", "approve it")] }),
            goes(WAITING),
        ),
        (json!({ "phase": "Preparing", "progress": "1/3 volumes" }), goes("Preparing (1/3 volumes)")),
        (
            json!({ "phase": "ScalingDown", "progress": "3/3 volumes", "conditions": [said] }),
            goes("ScalingDown: pods db-1, db-2 are going (3/3 volumes)"),
        ),
        (json!({ "phase": "Restoring" }), goes("Restoring")),
        (json!({ "phase": "ScalingUp" }), goes("ScalingUp")),
        (json!({ "phase": "RollingBack" }), goes("RollingBack")),
        (json!({ "phase": "Completed" }), Look::Ends(End::Completed)),
        (
            json!({ "phase": "Failed", "conditions": [succeeded("False", "ProvisioningFailed")] }),
            Look::Ends(End::Failed(because("ProvisioningFailed", "it said so"))),
        ),
        (
            json!({ "phase": "RolledBack", "conditions": [succeeded("False", "PodsNotReady")] }),
            Look::Ends(End::RolledBack(because("PodsNotReady", "it said so"))),
        ),
    ] {
        assert_eq!(restoring(status.clone()), seen, "{status}");
    }
}

#[test]
fn a_plan_that_changed_after_its_approval_ends_the_wait() {
    let status = json!({ "phase": "Planned", "plan": plan() });
    let seen = restoring(Some(&restore(&status)), "uid-1", "hash-of-another");
    assert_eq!(seen, Look::Ends(End::PlanChanged));
}

#[test]
fn pods_that_are_late_end_the_wait_though_the_restore_may_yet_complete() {
    let late = condition("Progressing", "True", "PodsNotReady", "db-1");
    let held = |phase| restore(&json!({ "phase": phase, "conditions": [late] }));
    let end = Look::Ends(End::Held(because("PodsNotReady", "db-1")));
    assert_eq!(restoring(Some(&held("ScalingUp")), "uid-1", "hash-1"), end);
    assert_eq!(rolling_back(Some(&held("RollingBack")), "uid-1", None), end);
}

#[test]
fn a_rollback_is_over_when_the_old_data_is_there_and_one_that_is_not_followed_says_why() {
    let asked = Some("now");
    let rolling_back = |status: Value| rolling_back(Some(&restore(&status)), "uid-1", asked);
    assert_eq!(rolling_back(json!({ "phase": "Completed", "lastRollbackRequest": "before" })), goes(WAITING));
    assert_eq!(rolling_back(json!({ "phase": "ScalingUp" })), goes(WAITING));
    assert_eq!(
        rolling_back(json!({ "phase": "RollingBack", "lastRollbackRequest": "now", "progress": "1/3" })),
        goes("RollingBack (1/3)")
    );
    assert_eq!(
        rolling_back(json!({ "phase": "RolledBack", "lastRollbackRequest": "now" })),
        Look::Ends(End::RolledBack(Why::default()))
    );
    let over = condition("Progressing", "False", "RollbackRefused", "the window is over");
    assert_eq!(
        rolling_back(json!({ "phase": "Completed", "lastRollbackRequest": "now", "conditions": [over] })),
        Look::Ends(End::RollbackRefused(because("RollbackRefused", "the window is over")))
    );
}

#[test]
fn a_reason_without_words_is_said_all_the_same() {
    assert_eq!(because("Refused", "no room").to_text(), "Refused: no room");
    assert_eq!(because("Refused", "").to_text(), "Refused");
    assert_eq!(Why::default().to_text(), "the agent does not say why");
}
