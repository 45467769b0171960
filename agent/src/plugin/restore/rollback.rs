//! `restore rollback`: has the volumes brought back that a `StatefulSet` had before a restore.

use jiff::Timestamp;
use kube::api::{DynamicObject, Patch};
use serde_json::json;
use sts_backup_api::names::ROLLBACK_REQUESTED_AT_ANNOTATION;
use sts_backup_api::restore::{RestorePhase, StatefulSetRestore, StatefulSetRestoreStatus};
use sts_backup_api::swap::SwapPv;
use sts_backup_service::clock;

use super::list::{Window, old_size, window};
use super::plan::target;
use super::progress::{phase_word, rolling_back};
use super::{Handle, verdict};
use crate::plugin::args::Rollback;
use crate::plugin::ask::confirmed;
use crate::plugin::cluster::{Cluster, understand};
use crate::plugin::error::Error;
use crate::plugin::{Exit, output};
use sts_backup_service::table::{indented, lines, second, size, table};

/// Said when it ends before anything was asked for.
const UNDONE: &str = "nothing is brought back";

/// Asks for a rollback; with `--wait`, follows it.
pub(super) async fn rollback(cluster: &Cluster, which: &Rollback) -> Result<Exit, Error> {
    let name = which.name.as_str();
    let restore = read(cluster, name).await?;
    let handle = Handle::of(&restore);
    if let Some(why) = refusal(&restore, clock::now()) {
        return Err(Error::Ended {
            exit: Exit::Failure,
            message: format!("{UNDONE}: {handle} {why}"),
            remedy: Some(format!("kubectl stsbackup restore list -n {}", cluster.namespace())),
        });
    }
    let is_under_way = phase(&restore) == Some(RestorePhase::RollingBack);
    let annotation = format!("{:.9}", clock::now());
    if is_under_way {
        output::print(&format!("{handle} is being rolled back already\n"))?;
    } else {
        output::complain(render(&restore).trim_end());
        let question = format!("Roll {} back in the cluster of {}?", target(&restore), cluster.address());
        if !which.yes && !confirmed(&question, UNDONE)? {
            return Err(Error::Ended { exit: Exit::Failure, message: UNDONE.to_owned(), remedy: None });
        }
        let metadata = json!({
            "uid": handle.uid, "annotations": { ROLLBACK_REQUESTED_AT_ANNOTATION: annotation },
        });
        handle.patch(cluster, "roll back", &Patch::Merge(json!({ "metadata": metadata }))).await?;
        output::print(&format!("the rollback of {handle} is asked for\n"))?;
    }
    if !which.wait {
        output::complain(&handle.how_to_follow());
        return Ok(Exit::Success);
    }
    let annotation = (!is_under_way).then_some(annotation);
    let look = |object: Option<&DynamicObject>| {
        let restore = object.map(understand::<StatefulSetRestore>).transpose()?;
        Ok(rolling_back(restore.as_ref(), &handle.uid, annotation.as_deref()))
    };
    let end = handle.follow(cluster, (which.timeout, "the rollback is not over"), look, output::say).await?;
    let ended = cluster.get::<StatefulSetRestore>(name).await.unwrap_or(restore);
    verdict(&end, &ended, true, output::say)
}

async fn read(cluster: &Cluster, name: &str) -> Result<StatefulSetRestore, Error> {
    match cluster.get(name).await {
        Err(Error::NotFound { object, namespace: _ }) => Err(Error::Ended {
            exit: Exit::Usage,
            message: format!("{object} does not exist"),
            remedy: Some(format!(
                "kubectl stsbackup restore list -n {} shows what is there",
                cluster.namespace()
            )),
        }),
        read => read,
    }
}

fn phase(restore: &StatefulSetRestore) -> Option<RestorePhase> {
    restore.status.as_ref()?.phase
}

/// Why nothing can be brought back; the agent may know more.
fn refusal(restore: &StatefulSetRestore, now: Timestamp) -> Option<String> {
    let unseen = StatefulSetRestoreStatus::default();
    let status = restore.status.as_ref().unwrap_or(&unseen);
    match (window(status, now), status.phase) {
        (Window::Open(_) | Window::UnderWay, _) => None,
        (Window::Closed(until), _) => Some(format!(
            "could be rolled back until {}: its old volumes are not kept any more",
            second(until)
        )),
        (Window::None, None) => Some("was not seen by the agent yet".to_owned()),
        (Window::None, Some(RestorePhase::Completed)) => {
            Some("replaced no volume, so it has none to bring back".to_owned())
        }
        (Window::None, Some(phase)) => {
            Some(format!("is {}: the application has its old data", phase_word(phase)))
        }
    }
}

/// What comes back.
fn render(restore: &StatefulSetRestore) -> String {
    let status = restore.status.clone().unwrap_or_default();
    let point = status.plan.as_ref().map_or("the recovery point", |plan| plan.point.as_str());
    let mut head = vec![
        format!("StatefulSet:   {}", target(restore)),
        format!("Data:          as before the restore of {point}; what was written since then is not in it"),
    ];
    head.extend(status.completion_time.map(|time| format!("Restored:      {}", second(time.0))));
    let swapped = status.swap.iter().flat_map(|swap| &swap.volumes);
    let rows: Vec<_> = swapped
        .filter(|volume| volume.snapshot.is_some())
        .map(|volume| {
            let name = |pv: Option<&SwapPv>| pv.map_or("-".to_owned(), |pv| pv.name.clone());
            let back = volume.previous.as_ref();
            vec![
                volume.claim.clone(),
                name(back),
                back.map_or("-".to_owned(), |pv| size(old_size(volume, pv))),
                name(volume.restored.as_ref()),
            ]
        })
        .collect();
    let claims = table(&["CLAIM", "COMES-BACK", "SIZE", "GOES"], &rows);
    lines(head) + "Claims:\n" + &indented(&claims)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::plugin::restore::tests::{plan, restore, swap};

    #[test]
    fn only_what_was_exchanged_and_is_kept_comes_back() {
        let now = "2026-02-03T05:00:00Z".parse().unwrap();
        let refusal = |status: Value| refusal(&restore(&status), now);
        for possible in [
            json!({ "phase": "Completed", "rollbackUntil": "2026-02-03T05:00:01Z" }),
            json!({ "phase": "Preparing" }),
            json!({ "phase": "ScalingUp" }),
            json!({ "phase": "RollingBack" }),
        ] {
            assert_eq!(refusal(possible), None);
        }
        for (status, why) in [
            (json!({}), "was not seen by the agent yet"),
            (json!({ "phase": "Planned" }), "is Planned: the application has its old data"),
            (json!({ "phase": "RolledBack" }), "is RolledBack: the application has its old data"),
            (json!({ "phase": "Completed" }), "replaced no volume, so it has none to bring back"),
            (
                json!({ "phase": "Completed", "rollbackUntil": "2026-02-03T05:00:00Z" }),
                "could be rolled back until 2026-02-03T05:00:00Z: its old volumes are not kept any more",
            ),
        ] {
            assert_eq!(refusal(status).as_deref(), Some(why));
        }
    }

    #[test]
    fn what_comes_back_is_shown_with_what_goes() {
        let status = json!({ "phase": "Completed", "plan": plan(), "swap": swap(),
            "completionTime": "2026-02-03T04:00:10.000000Z" });
        assert_eq!(
            render(&restore(&status)),
            "StatefulSet:   shop/db\n\
             Data:          as before the restore of run-1; what was written since then is not in it\n\
             Restored:      2026-02-03T04:00:10Z\n\
             Claims:\n  \
             CLAIM       COMES-BACK   SIZE   GOES\n  \
             data-db-1   pv-1         3Gi    pv-new-1\n  \
             data-db-2   -            -      pv-new-2\n"
        );
    }
}
