//! The installed agent under random kills, and under an upgrade.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sts_backup_e2e::kit::agent::Agent;
use sts_backup_e2e::kit::drill::Drill;

use crate::{UNCUT_FOR_A_WHILE, alone_in_namespace};

const KILLS: u32 = 20;

/// Set to the seed that a failed test printed, to have the same kills.
const SEED_VARIABLE: &str = "E2E_SEED";

/// A run takes about this long: a kill may come at any point of it.
const LATEST_KILL: Duration = Duration::from_secs(5);

fn values() -> Value {
    json!({ "config": { "lease": { "duration_seconds": 4, "renew_deadline_seconds": 3, "retry_seconds": 1 } } })
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn twenty_runs_whose_leader_is_killed_at_random_all_complete() -> Result<()> {
    let mut random = Random::seeded()?;
    alone_in_namespace("kills", async |ns| {
        let agent = Agent::install(ns, &values()).await?;
        let mut drill = Drill::deploy(ns, &[("cutDelay", "1500ms")], |_| ()).await?;
        drill.ensure_completed().await?;
        let mut interrupted = 0;
        for kill in 1..=KILLS {
            let delay = LATEST_KILL.mul_f64(random.fraction());
            let deletes = random.fraction() < 0.5;
            let how = if deletes { "its pod is deleted" } else { "its process is killed" };
            eprintln!("kill {kill}: {how} after {delay:?}");
            let survived = async {
                let leader = agent.await_present_leader().await?;
                drill.request().await?;
                tokio::time::sleep(delay).await;
                if deletes {
                    agent.delete_pod(&leader).await?;
                } else {
                    agent.kill(&leader).await?;
                }
                let attempts = drill.ensure_completed().await?;
                interrupted += u32::from(attempts.len() > 1);
                if !deletes {
                    // The kubelet would wait longer after each kill of a pod: the next one is to meet two agents.
                    agent.delete_pod(&leader).await?;
                }
                agent.await_rolled_out().await
            };
            survived.await.with_context(|| format!("kill {kill}, when {how} after {delay:?}"))?;
        }
        eprintln!("{interrupted} of {KILLS} kills interrupted a freeze");
        ensure!(interrupted > 0, "no kill met a freeze: choose another seed");
        Ok(())
    })
    .await
}

/// As good as any for test input, and the same for the same seed: <https://prng.di.unimi.it/splitmix64.c>
struct Random(u64);

impl Random {
    fn seeded() -> Result<Self> {
        let seed = match std::env::var(SEED_VARIABLE) {
            Ok(seed) => seed.parse().with_context(|| format!("{SEED_VARIABLE} is no number"))?,
            Err(_) => u64::from(std::process::id()),
        };
        eprintln!("{SEED_VARIABLE}={seed}");
        Ok(Self(seed))
    }

    /// From 0 to less than 1.
    fn fraction(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let upper = u32::try_from((mixed ^ (mixed >> 31)) >> 32).unwrap_or_default();
        f64::from(upper) / (f64::from(u32::MAX) + 1.0)
    }
}

#[tokio::test]
#[ignore = "needs clusters: cargo e2e test --tier full"]
async fn an_upgrade_of_the_agent_in_mid_run_ends_in_a_completed_run() -> Result<()> {
    alone_in_namespace("upgrade", async |ns| {
        let agent = Agent::install(ns, &values()).await?;
        let mut drill = Drill::deploy(ns, &UNCUT_FOR_A_WHILE, |_| ()).await?;
        drill.await_frozen(1).await?;
        let mut newer = values();
        newer["podAnnotations"] = json!({ "sts-backup-e2e/version": "newer" });
        agent.upgrade_to(&newer).await?;
        let attempts = drill.ensure_completed().await?;
        eprintln!("the run took {} attempts", attempts.len());
        Ok(())
    })
    .await
}
