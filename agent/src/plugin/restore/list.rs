//! `restore list`: the `StatefulSetRestores`, a line each, and what they keep for a rollback.

use jiff::Timestamp;
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::Value;
use sts_backup_api::points::bytes;
use sts_backup_api::restore::{RestorePhase, StatefulSetRestore, StatefulSetRestoreStatus, VolumeAction};
use sts_backup_api::swap::{SwapPv, SwapVolume};
use sts_backup_service::clock;

use super::progress::phase_word;
use crate::plugin::args::Restores;
use crate::plugin::cluster::{Cluster, Scope, understand};
use crate::plugin::error::Error;
use crate::plugin::list::as_list;
use crate::plugin::{Exit, output};
use sts_backup_service::table::{age, second, size, table};

/// Whether the old volumes can be brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Window {
    /// Nothing has been exchanged that could be brought back.
    None,
    /// The restore or the rollback is under way.
    UnderWay,
    /// They can be, until then.
    Open(Timestamp),
    /// They could be, until then.
    Closed(Timestamp),
}

/// Lists the restores of a namespace or of all.
pub(super) async fn list(cluster: &Cluster, how: &Restores) -> Result<Exit, Error> {
    let scope = cluster.scope(how.all_namespaces);
    let mut restores = cluster.list::<StatefulSetRestore>(&scope).await?;
    for restore in &mut restores {
        // As kubectl does: nobody reads them.
        restore.metadata.managed_fields = None;
    }
    match how.output {
        Some(format) => output::print(&output::data(&as_list(&restores), format)?)?,
        None if restores.is_empty() => output::complain(&nothing_in(&scope)),
        None => output::print(&render(&restores, &scope, clock::now()))?,
    }
    Ok(Exit::Success)
}

/// Where was looked, and what to do next.
fn nothing_in(scope: &Scope) -> String {
    let elsewhere = match scope {
        Scope::All => "",
        Scope::Namespace(_) => "  kubectl stsbackup restore list -A looks in all namespaces\n",
    };
    format!(
        "No StatefulSetRestore in {}.\n{elsewhere}  kubectl stsbackup restore STATEFULSET --to latest makes one",
        scope.describe()
    )
}

fn render(restores: &[DynamicObject], scope: &Scope, now: Timestamp) -> String {
    let everywhere = *scope == Scope::All;
    let mut header = if everywhere { vec!["NAMESPACE"] } else { Vec::new() };
    header.extend([
        "NAME",
        "STATEFULSET",
        "POINT",
        "PHASE",
        "PROGRESS",
        "DOWNTIME",
        "ROLLBACK",
        "UNTIL",
        "KEPT",
        "AGE",
    ]);
    let row = |object: &DynamicObject| {
        let mut row = Vec::new();
        if everywhere {
            row.push(object.namespace().unwrap_or_default());
        }
        row.push(object.name_any());
        match understand(object) {
            Ok(restore) => row.extend(columns(&restore, now)),
            // Made by a newer agent; the others are shown all the same.
            Err(_) => row.extend(
                ["?", "?", "?", "?", "?", "?", "?", "?", "unknown to this version of the plugin"]
                    .map(String::from),
            ),
        }
        row
    };
    table(&header, &restores.iter().map(row).collect::<Vec<_>>())
}

fn columns(restore: &StatefulSetRestore, now: Timestamp) -> [String; 9] {
    let none = || "-".to_owned();
    let unseen = StatefulSetRestoreStatus::default();
    let status = restore.status.as_ref().unwrap_or(&unseen);
    let own = restore.namespace().unwrap_or_default();
    let target = &restore.spec.stateful_set_ref;
    let window = window(status, now);
    let (rollback, until) = match window {
        Window::None => ("-", none()),
        Window::UnderWay => ("under way", none()),
        Window::Open(until) => ("open", second(until)),
        Window::Closed(until) => ("closed", second(until)),
    };
    [
        match target.namespace_or(&own) {
            namespace if namespace == own => target.name.clone(),
            namespace => format!("{namespace}/{}", target.name),
        },
        status.plan.as_ref().map_or_else(none, |plan| plan.point.clone()),
        status.phase.map_or("-", phase_word).to_owned(),
        status.progress.clone().unwrap_or_else(none),
        status.downtime_seconds.map_or_else(none, |seconds| format!("{seconds}s")),
        rollback.to_owned(),
        until,
        kept(status, window).map_or_else(none, size),
        restore.creation_timestamp().map_or_else(none, |created| age(created.0, now)),
    ]
}

/// Whether the old volumes can be brought back.
pub(super) fn window(status: &StatefulSetRestoreStatus, now: Timestamp) -> Window {
    match (status.phase, &status.rollback_until) {
        (Some(RestorePhase::Completed), Some(until)) if until.0 > now => Window::Open(until.0),
        (Some(RestorePhase::Completed), Some(until)) => Window::Closed(until.0),
        (
            Some(
                RestorePhase::Preparing
                | RestorePhase::ScalingDown
                | RestorePhase::Restoring
                | RestorePhase::ScalingUp
                | RestorePhase::RollingBack,
            ),
            _,
        ) => Window::UnderWay,
        (
            None
            | Some(
                RestorePhase::New
                | RestorePhase::Planned
                | RestorePhase::Completed
                | RestorePhase::Failed
                | RestorePhase::RolledBack,
            ),
            _,
        ) => Window::None,
    }
}

/// How large the old volumes are that are kept, bytes.
fn kept(status: &StatefulSetRestoreStatus, window: Window) -> Option<i64> {
    match window {
        Window::UnderWay | Window::Open(_) => {}
        Window::None | Window::Closed(_) => return None,
    }
    if let Some(swap) = &status.swap {
        let replaced = swap.volumes.iter().filter(|volume| volume.snapshot.is_some());
        let sizes = replaced.filter_map(|volume| Some(old_size(volume, volume.previous.as_ref()?)));
        return Some(sizes.fold(0, i64::saturating_add));
    }
    let volumes = &status.plan.as_ref()?.volumes;
    let replaced = volumes.iter().filter(|volume| volume.action == VolumeAction::Replace);
    Some(replaced.filter_map(|volume| volume.size_bytes).fold(0, i64::saturating_add))
}

/// What the volume's own manifest says; the new one is at least as large.
pub(super) fn old_size(volume: &SwapVolume, previous: &SwapPv) -> i64 {
    let manifest = previous.manifest.as_deref().and_then(|it| serde_json::from_str::<Value>(it).ok());
    let capacity = manifest.and_then(|manifest| bytes(manifest["spec"]["capacity"]["storage"].as_str()?));
    capacity.unwrap_or(volume.size_bytes)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::plugin::restore::tests::{plan, restore, swap};

    fn now() -> Timestamp {
        "2026-02-03T05:00:00Z".parse().unwrap()
    }

    fn listed(status: &Value) -> Vec<DynamicObject> {
        vec![serde_json::from_value(serde_json::to_value(restore(status)).unwrap()).unwrap()]
    }

    #[test]
    fn the_list_says_which_windows_are_open_and_what_they_keep() {
        let mut objects = Vec::new();
        for status in [
            json!({ "phase": "Completed", "plan": plan(), "progress": "2/2 volumes", "downtimeSeconds": 7,
                "swap": swap(), "rollbackUntil": "2026-02-04T04:00:00Z" }),
            json!({ "phase": "Completed", "plan": plan(), "swap": swap(), "rollbackUntil": "2026-02-03T04:00:00Z" }),
            json!({ "phase": "Restoring", "plan": plan(), "swap": swap() }),
            json!({ "phase": "Levitating" }),
        ] {
            objects.extend(match serde_json::from_value::<StatefulSetRestoreStatus>(status.clone()) {
                Ok(_) => listed(&status),
                Err(_) => vec![
                    serde_json::from_value(json!({
                        "metadata": { "name": "odd", "namespace": "shop" }, "spec": {}, "status": status,
                    }))
                    .unwrap(),
                ],
            });
        }
        assert_eq!(
            render(&objects, &Scope::Namespace("shop".to_owned()), now()),
            "NAME                 STATEFULSET   POINT   PHASE       PROGRESS      DOWNTIME   ROLLBACK    UNTIL                  KEPT   AGE\n\
             db-20260203-040000   db            run-1   Completed   2/2 volumes   7s         open        2026-02-04T04:00:00Z   3Gi    60m\n\
             db-20260203-040000   db            run-1   Completed   -             -          closed      2026-02-03T04:00:00Z   -      60m\n\
             db-20260203-040000   db            run-1   Restoring   -             -          under way   -                      3Gi    60m\n\
             odd                  ?             ?       ?           ?             ?          ?           ?                      ?      unknown to this version of the plugin\n"
        );
    }

    #[test]
    fn a_restore_that_only_plans_keeps_nothing() {
        let text = render(&listed(&json!({ "phase": "Planned", "plan": plan() })), &Scope::All, now());
        assert_eq!(
            text,
            "NAMESPACE   NAME                 STATEFULSET   POINT   PHASE     PROGRESS   DOWNTIME   ROLLBACK   UNTIL   KEPT   AGE\n\
             shop        db-20260203-040000   db            run-1   Planned   -          -          -          -       -      60m\n"
        );
    }

    #[test]
    fn without_what_the_swap_remembers_the_plan_tells_the_size() {
        let status = json!({ "phase": "Completed", "plan": plan(), "rollbackUntil": "2026-02-04T04:00:00Z" });
        let text = render(&listed(&status), &Scope::All, now());
        assert!(text.contains("   1Gi    60m"), "{text}");
    }

    #[test]
    fn an_empty_list_says_where_it_looked_and_what_to_do() {
        assert_eq!(
            nothing_in(&Scope::Namespace("shop".to_owned())),
            "No StatefulSetRestore in namespace shop.\n  \
             kubectl stsbackup restore list -A looks in all namespaces\n  \
             kubectl stsbackup restore STATEFULSET --to latest makes one"
        );
        assert!(!nothing_in(&Scope::All).contains("-A"));
    }
}
