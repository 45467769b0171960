//! Somebody else who scales the `StatefulSet` in the middle of a restore: no pod ever meets an empty volume, and in the end
//! all volumes have the same data.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use axum::http::{Method, Uri};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::Api;
use kube::api::DeleteParams;
use sts_backup_api::restore::{RestorePhase, StatefulSetRestoreStatus};
use sts_backup_e2e::condition::await_deleted;
use sts_backup_e2e::kit::proxy::{ApiProxy, is_deletion_of_claim, is_scale, is_write_of_restore};
use sts_backup_e2e::kit::restore_drill::POINT;
use sts_backup_e2e::kit::{App, RestoreDrill};
use tokio::task::JoinHandle;

use crate::alone_with_restore_drill;

/// Faster than pods start and end.
const PAUSE: Duration = Duration::from_millis(150);

/// Scales again and again through these replicas, until it is dropped.
struct Foreigner(JoinHandle<()>);

impl Foreigner {
    fn scales(app: &App, through: &'static [i32]) -> Self {
        let app = app.clone();
        Self(tokio::spawn(async move {
            for replicas in through.iter().cycle() {
                // It may be refused as an API server refuses anybody: the next one comes at once.
                let _ = app.scale(*replicas).await;
                tokio::time::sleep(PAUSE).await;
            }
        }))
    }
}

impl Drop for Foreigner {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Whether the restore is over, however.
fn has_ended(status: &StatefulSetRestoreStatus) -> bool {
    matches!(status.phase, Some(RestorePhase::Completed | RestorePhase::Failed | RestorePhase::RolledBack))
}

/// How often somebody was in the way.
fn contests(status: &StatefulSetRestoreStatus) -> Option<i32> {
    status.swap.as_ref().map(|swap| swap.contests)
}

/// Lets somebody scale from the first such request of the agent until the restore has ended, or was contested for the last
/// time.
async fn contest(
    drill: &RestoreDrill,
    proxy: &ApiProxy,
    from: fn(&Method, &Uri) -> bool,
    through: &'static [i32],
) -> Result<()> {
    let replicas = i32::try_from(drill.app().ordinals().len())?;
    let held = proxy.hold(from);
    let restore = drill.restore("back", |_| ()).await?;
    held.await_hits(1).await;
    let foreigner = Foreigner::scales(drill.app(), through);
    drop(held);
    let was_contested = |status: &StatefulSetRestoreStatus| {
        has_ended(status) || status.swap.as_ref().is_some_and(|swap| swap.contests >= 3)
    };
    restore.await_status("contested or over", was_contested).await?;
    drop(foreigner);
    let status = restore.await_status("over", has_ended).await?;
    let contests = contests(&status).context("it remembers its swap")?;
    drill.app().scale(replicas).await?;
    let text = drill.ensure_serves_either().await?;
    eprintln!("{contests} contests, {:?}, with the data of {text}", status.phase);
    let expected = status.phase == Some(RestorePhase::Completed);
    ensure!(expected == (text == POINT), "{:?} with the data of {text}", status.phase);
    Ok(())
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn pods_that_somebody_scales_up_in_the_middle_never_meet_an_empty_volume() -> Result<()> {
    alone_with_restore_drill(
        |app| app.replicas(3),
        async |_, drill, proxy| contest(drill, proxy, is_deletion_of_claim, &[3]).await,
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn somebody_who_scales_up_and_down_all_the_time_never_makes_an_empty_volume() -> Result<()> {
    alone_with_restore_drill(
        |app| app.replicas(3),
        async |_, drill, proxy| contest(drill, proxy, is_deletion_of_claim, &[3, 0, 0]).await,
    )
    .await
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn claims_that_go_with_their_pods_stay_ours_while_somebody_scales() -> Result<()> {
    alone_with_restore_drill(
        |app| app.replicas(3).claims_go(),
        // Claims go with their pods: the agent deletes none.
        async |_, drill, proxy| contest(drill, proxy, is_scale, &[3, 0, 1]).await,
    )
    .await
}

/// More than a restore of one claim has, and fewer.
const WRITES: RangeInclusive<u64> = 12..=60;

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn a_pod_that_somebody_starts_before_any_write_of_a_restore_never_meets_an_empty_volume() -> Result<()>
{
    alone_with_restore_drill(
        |app| app,
        async |_, drill, proxy| {
            for writes in 0..=*WRITES.end() {
                drill.write_later().await?;
                let written = AtomicU64::new(0);
                let held = proxy.hold(move |method, uri| {
                    is_write_of_restore(method, uri) && written.fetch_add(1, Ordering::SeqCst) >= writes
                });
                let window = Duration::from_secs(1);
                let name = format!("at-{writes}");
                let restore = drill.restore(&name, |spec| spec.rollback_window = window.into()).await?;
                let is_over_before = tokio::select! {
                    () = held.await_hits(1) => false,
                    over = restore.await_status("over", has_ended) => over.map(|_| true)?,
                };
                drill.app().scale(1).await?;
                drop(held);
                let status = restore.await_status("over", has_ended).await?;
                eprintln!("before write {writes}: {:?}, contests: {:?}", status.phase, contests(&status));
                drill.app().scale(1).await?;
                let text = drill.ensure_serves_either().await.context(name)?;
                let expected = status.phase == Some(RestorePhase::Completed);
                ensure!(expected == (text == POINT), "{:?} with the data of {text}", status.phase);
                restore.remove().await?;
                if is_over_before {
                    ensure!(WRITES.contains(&writes), "a restore had only {writes} writes");
                    return Ok(());
                }
            }
            anyhow::bail!("a restore of one claim has not completed after {WRITES:?} writes")
        },
    )
    .await
}

/// The check that the tests above rest on: it sees what happens to whoever deletes a claim and does not reserve its name.
#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_empty_volume_is_seen_where_a_claim_is_deleted_without_a_reserved_volume() -> Result<()> {
    alone_with_restore_drill(
        |app| app,
        async |ns, drill, _| {
            drill.ensure_none_was_empty()?;
            drill.app().scale(0).await?;
            drill.app().await_ready(0).await?;
            let claims: Api<PersistentVolumeClaim> = ns.api();
            let claim = claims.get("data-app-0").await?;
            claims.delete("data-app-0", &DeleteParams::default()).await?;
            await_deleted(&claims, &claim, Duration::from_mins(1)).await?;
            drill.app().scale(1).await?;
            drill.app().await_ready(1).await?;
            ensure!(drill.ensure_none_was_empty().is_err(), "the empty volume was not seen");
            ensure!(drill.ensure_serves_either().await.is_err(), "the empty volume passed for a full one");
            Ok(())
        },
    )
    .await
}
