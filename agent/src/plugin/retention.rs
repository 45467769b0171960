//! `retention`: what the retentionPolicy would prune now, and why. It deletes nothing: the agent prunes by itself.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use sts_backup_api::run::RecoveryPoint;
use sts_backup_api::schedule::time_zone;
use sts_backup_service::clock;

use super::args::Retention;
use super::cluster::Cluster;
use super::error::Error;
use super::owned::Owned;
use super::timing::{retention_line, zone};
use super::{Exit, output};
use crate::backup::retention::judge;
use sts_backup_service::table::{age, count, second, size, table};

/// A recovery point and what becomes of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Judged {
    #[serde(flatten)]
    point: RecoveryPoint,
    /// It stays.
    keep: bool,
    why: String,
}

/// Shows the verdicts.
pub(super) async fn retention(cluster: &Cluster, how: &Retention) -> Result<Exit, Error> {
    let name = &how.name;
    if !how.dry_run {
        return Err(Error::Ended {
            exit: Exit::Usage,
            message: "nothing to do by hand: the agent itself prunes what the retentionPolicy does not keep"
                .to_owned(),
            remedy: Some(format!(
                "add --dry-run to see what it would prune now; kubectl stsbackup delete-points {name} POINT deletes a point"
            )),
        });
    }
    let backup = cluster.backup(name).await?;
    let owned = Owned::of(cluster, backup).await?;
    let judged = judged(&owned, clock::now())?;
    let (text, notes) = match how.output {
        Some(format) => (output::data(&json!({ "recoveryPoints": judged }), format)?, Vec::new()),
        None => (render(&judged, clock::now()), notes(&owned)),
    };
    output::print(&text)?;
    for note in notes {
        output::complain(&note);
    }
    Ok(Exit::Success)
}

/// The verdicts as the agent comes to them, newest point first.
fn judged(owned: &Owned, now: Timestamp) -> Result<Vec<Judged>, Error> {
    let Some(backup) = &owned.backup else { return Ok(Vec::new()) };
    let zone = time_zone(backup.spec.time_zone.as_deref()).map_err(|err| Error::Ended {
        exit: Exit::Failure,
        message: format!("StatefulSetBackup {}: {err}; nothing is pruned meanwhile", owned.full_name()),
        remedy: None,
    })?;
    let mut points = owned.points();
    points.retain(|point| Some(&point.id) != owned.current_run());
    let policy = backup.spec.retention_policy.as_ref();
    let verdicts = judge(policy, &zone, &points, &owned.in_use(), now);
    let judged = points.into_iter().zip(verdicts);
    Ok(judged
        .map(|(point, verdict)| Judged { point, keep: verdict.keep, why: verdict.why.to_string() })
        .collect())
}

fn render(judged: &[Judged], now: Timestamp) -> String {
    let row = |Judged { point, keep, why }: &Judged| {
        vec![
            point.id.to_string(),
            format!("{} ({})", second(point.time.0), age(point.time.0, now)),
            format!("{}/{}", point.ready_volumes, point.expected_volumes),
            size(point.size_bytes),
            if *keep { "stays" } else { "goes" }.to_owned(),
            why.clone(),
        ]
    };
    let goes: Vec<_> = judged.iter().filter(|judged| !judged.keep).collect();
    let freed = goes.iter().map(|judged| judged.point.size_bytes).fold(0, i64::saturating_add);
    let sum = match (judged.len(), goes.len()) {
        (0, _) => "no recovery point\n".to_owned(),
        (all, 0) => format!("{}, all stay\n", count(all, "recovery point")),
        (all, goes) => {
            format!("{}: {} stay, {goes} go ({})\n", count(all, "recovery point"), all - goes, size(freed))
        }
    };
    if judged.is_empty() {
        return sum;
    }
    let rows: Vec<_> = judged.iter().map(row).collect();
    format!("{}\n{sum}", table(&["POINT", "TIME", "VOLUMES", "SIZE", "VERDICT", "WHY"], &rows))
}

/// By which rules, and what keeps them from being carried out.
fn notes(owned: &Owned) -> Vec<String> {
    let Some(backup) = &owned.backup else { return Vec::new() };
    let policy = backup.spec.retention_policy.as_ref();
    let mut notes =
        vec![format!("retentionPolicy: {} (calendar of {})", retention_line(policy), zone(&backup.spec))];
    if let Some(run) = owned.current_run() {
        notes.push(format!("run {run} is under way and not counted: the agent prunes after it"));
    }
    if backup.spec.suspend {
        notes.push("the backup is suspended: nothing is pruned until it is resumed".to_owned());
    }
    notes
}

#[cfg(test)]
mod tests {
    use kube::ResourceExt;
    use sts_backup_api::backup::RetentionPolicy;
    use sts_backup_api::names::HOLD_LABEL;

    use super::*;
    use crate::plugin::owned::owned;

    fn with_policy(runs: &[&str]) -> Owned {
        let mut owned = owned(runs);
        let spec = &mut owned.backup.as_mut().unwrap().spec;
        spec.retention_policy = Some(RetentionPolicy { keep_last: Some(1), ..RetentionPolicy::default() });
        owned
    }

    fn now() -> Timestamp {
        "2026-02-28T05:00:00Z".parse().unwrap()
    }

    #[test]
    fn every_point_has_a_verdict_with_its_reason_and_the_sum_is_below() {
        let mut owned = with_policy(&["r3", "r2", "r1"]);
        owned.snapshots[5].labels_mut().insert(HOLD_LABEL.to_owned(), "true".to_owned());
        assert_eq!(
            render(&judged(&owned, now()).unwrap(), now()),
            "POINT   TIME                          VOLUMES   SIZE   VERDICT   WHY\n\
             r3      2026-02-28T02:00:00Z (3h)     2/2       20Mi   stays     keepLast\n\
             r2      2026-02-27T02:00:00Z (27h)    2/2       20Mi   goes      no rule keeps it\n\
             r1      2026-02-26T02:00:00Z (2d3h)   2/2       20Mi   stays     on hold\n\
             \n3 recovery points: 2 stay, 1 go (20Mi)\n"
        );
    }

    #[test]
    fn the_run_under_way_is_not_counted() {
        let mut owned = with_policy(&["r2", "r1"]);
        owned.backup.as_mut().unwrap().status.as_mut().unwrap().current_run = serde_json::from_value(json!({
            "id": "r2", "slot": { "due": "Request", "value": "x", "attempt": 1 }, "step": "Readying",
            "started": "2026-02-28T04:59:00.000000Z",
        }))
        .unwrap();
        let judged = judged(&owned, now()).unwrap();
        assert_eq!(judged.iter().map(|judged| judged.point.id.as_str()).collect::<Vec<_>>(), ["r1"]);
        assert_eq!(
            notes(&owned),
            [
                "retentionPolicy: keepLast 1 (calendar of UTC)",
                "run r2 is under way and not counted: the agent prunes after it"
            ]
        );
    }

    #[test]
    fn without_a_policy_nothing_goes_and_it_says_so() {
        let mut owned = owned(&["r2", "r1"]);
        owned.backup.as_mut().unwrap().spec.suspend = true;
        let judged = judged(&owned, now()).unwrap();
        assert!(judged.iter().all(|judged| judged.keep));
        assert!(render(&judged, now()).ends_with("\n2 recovery points, all stay\n"));
        assert_eq!(
            notes(&owned),
            [
                "retentionPolicy: none: nothing is ever pruned (calendar of UTC)",
                "the backup is suspended: nothing is pruned until it is resumed"
            ]
        );
        assert_eq!(render(&[], now()), "no recovery point\n");
    }

    #[test]
    fn a_time_zone_that_does_not_exist_is_told() {
        let mut owned = with_policy(&["r1"]);
        owned.backup.as_mut().unwrap().spec.time_zone = Some("Mars/Olympus".to_owned());
        let refused = judged(&owned, now()).unwrap_err().to_text();
        assert!(refused.contains("\"Mars/Olympus\": the IANA database has no such time zone"), "{refused}");
    }

    #[test]
    fn programs_get_the_point_with_its_verdict() {
        let judged = judged(&with_policy(&["r2", "r1"]), now()).unwrap();
        let said = serde_json::to_value(&judged[1]).unwrap();
        assert_eq!(
            (&said["id"], &said["keep"], &said["why"]),
            (&json!("r1"), &json!(false), &json!("no rule keeps it"))
        );
    }
}
