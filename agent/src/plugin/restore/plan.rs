//! A plan, as people read it before they approve it. Pure.

use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt;
use sts_backup_api::restore::{PlannedVolume, RestorePlan, StatefulSetRestore, VolumeAction};

use sts_backup_service::table::{age, count, duration, indented, lines, second, size, table};

/// The whole plan.
pub(super) fn render(restore: &StatefulSetRestore, plan: &RestorePlan, now: Timestamp) -> String {
    let RestorePlan {
        hash: _,
        backup,
        point,
        time,
        consistency,
        replicas,
        replicas_meanwhile,
        volumes,
        expected_downtime_seconds,
        warnings,
    } = plan;
    let consistency = consistency.map_or("consistency unknown", |consistency| consistency.as_str());
    let backup = backup.as_ref().map_or("of no backup".to_owned(), |backup| format!("of backup {backup}"));
    let head = [
        format!("StatefulSet:   {}", target(restore)),
        format!("Data:          recovery point {point} {backup}, {consistency}"),
        format!("Time:          {} ({} ago)", second(time.0), age(time.0, now)),
        format!("Replicas:      {replicas}, {replicas_meanwhile} while volumes are exchanged"),
        format!("Downtime:      about {}", downtime(*expected_downtime_seconds)),
        format!("Old volumes:   {}", old_volumes(restore, volumes)),
        "Claims:".to_owned(),
    ];
    let mut text = lines(head) + &indented(&claims(volumes));
    if !warnings.is_empty() {
        text.push_str("Warnings:\n");
        text.push_str(&indented(&lines(warnings.iter().cloned())));
    }
    text
}

fn claims(volumes: &[PlannedVolume]) -> String {
    let row = |volume: &PlannedVolume| {
        let PlannedVolume { claim, action, snapshot, size_bytes, old_volume } = volume;
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        vec![
            claim.clone(),
            action_word(*action).to_owned(),
            or_none(snapshot),
            size_bytes.map_or("-".to_owned(), size),
            or_none(old_volume),
        ]
    };
    table(
        &["CLAIM", "ACTION", "SNAPSHOT", "SIZE", "OLD-VOLUME"],
        &volumes.iter().map(row).collect::<Vec<_>>(),
    )
}

/// The word of an action, as the API writes it.
fn action_word(action: VolumeAction) -> &'static str {
    match action {
        VolumeAction::Replace => "Replace",
        VolumeAction::Create => "Create",
        VolumeAction::Keep => "Keep",
    }
}

/// How long pods are down.
pub(super) fn downtime(seconds: i64) -> String {
    duration(Duration::from_secs(seconds.max(0).unsigned_abs()))
}

/// What becomes of the volumes that claims have now.
fn old_volumes(restore: &StatefulSetRestore, volumes: &[PlannedVolume]) -> String {
    let replaced = volumes.iter().filter(|volume| volume.action == VolumeAction::Replace).count();
    if replaced == 0 {
        return "none is replaced, so there is nothing to bring back".to_owned();
    }
    let window = duration(restore.spec.rollback_window.into());
    format!(
        "{}, kept for {window} after the restore to be brought back if need be",
        count(replaced, "volume")
    )
}

/// `namespace/name` of the `StatefulSet`.
pub(super) fn target(restore: &StatefulSetRestore) -> String {
    let own = restore.namespace().unwrap_or_default();
    let target = &restore.spec.stateful_set_ref;
    format!("{}/{}", target.namespace_or(&own), target.name)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::plugin::restore::tests::{plan, restore};

    fn now() -> Timestamp {
        "2026-02-03T05:00:00Z".parse().unwrap()
    }

    #[test]
    fn a_plan_says_what_happens_to_every_claim_and_for_how_long_pods_are_down() {
        let plan: RestorePlan = serde_json::from_value(plan()).unwrap();
        assert_eq!(
            render(&restore(&json!({})), &plan, now()),
            "StatefulSet:   shop/db\n\
             Data:          recovery point run-1 of backup nightly, Application\n\
             Time:          2026-02-03T02:00:00Z (3h ago)\n\
             Replicas:      3, 1 while volumes are exchanged\n\
             Downtime:      about 6.0 s\n\
             Old volumes:   1 volume, kept for 24 h 0 min after the restore to be brought back if need be\n\
             Claims:\n  \
             CLAIM       ACTION    SNAPSHOT          SIZE   OLD-VOLUME\n  \
             data-db-1   Replace   data-db-1-run-1   1Gi    pv-1\n  \
             data-db-2   Create    data-db-2-run-1   1Gi    -\n  \
             logs-db-1   Keep      -                 -      pv-9\n\
             Warnings:\n  \
             the point is older than a week\n"
        );
    }

    #[test]
    fn where_nothing_is_replaced_nothing_is_promised() {
        let mut plan: RestorePlan = serde_json::from_value(plan()).unwrap();
        plan.volumes.retain(|volume| volume.action == VolumeAction::Create);
        (plan.backup, plan.consistency) = (None, None);
        plan.warnings.clear();
        let text = render(&restore(&json!({})), &plan, now());
        assert!(text.contains("Old volumes:   none is replaced"), "{text}");
        assert!(text.contains("recovery point run-1 of no backup, consistency unknown"), "{text}");
        assert!(!text.contains("Warnings"), "{text}");
    }
}
