//! The chart's alerts fire when they should, and only then, by Prometheus' own engine.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sts_backup_e2e::harness::Harness;
use sts_backup_e2e::harness::programs::PROMETHEUS;
use sts_backup_e2e::kit::helm::agent_chart;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// When the alerts are asked for, minutes after the beginning of the series, which have a sample a minute.
const AT: i64 = 600;

/// Series of one backup that is as it should be: an hour between its runs, the last one 1,000 s ago.
const HEALTHY: [(&str, &str); 13] = [
    ("sts_backup_leader", "1x600"),
    ("sts_backup_created_timestamp_seconds", "0x600"),
    ("sts_backup_suspended", "0x600"),
    ("sts_backup_ready", "1x600"),
    ("sts_backup_last_status", "1x600"),
    ("sts_backup_last_partial_failure", "0x600"),
    ("sts_backup_last_successful_timestamp_seconds", "35000x600"),
    ("sts_backup_last_freeze_seconds", "2x600"),
    ("sts_backup_max_freeze_seconds", "120x600"),
    ("sts_backup_thaw_failed", "0x600"),
    ("sts_backup_expected_interval_seconds", "3600x600"),
    ("sts_backup_missed_runs_total", "3x600"),
    ("sts_backup_unprotected_statefulsets", "0x600"),
];

/// What is said, by which agent and with which samples instead of the healthy ones, and which alerts fire then. `0x3 1x1`
/// are four times 0 and twice 1, `_x600` is no sample at all.
type Case = (&'static str, &'static [(&'static str, &'static str, &'static str)], &'static [&'static str]);

const CASES: [Case; 24] = [
    ("all is well", &[], &[]),
    ("a thaw failed a minute ago", &[("thaw_failed", "a", "0x598 1x1")], &["StsBackupThawFailed"]),
    ("a thaw failed just now", &[("thaw_failed", "a", "0x599 1")], &[]),
    (
        "a thaw failed, and the next agent says so too",
        &[("thaw_failed", "a", "1x598"), ("thaw_failed", "b", "_x599 1x1")],
        &["StsBackupThawFailed"],
    ),
    ("no agent leads for 5 minutes", &[("leader", "a", "1x594 0x5")], &["StsBackupAgentDown"]),
    ("no agent leads for 4 minutes", &[("leader", "a", "1x595 0x4")], &[]),
    ("no agent is scraped", &[("leader", "a", "_x600")], &["StsBackupAgentDown"]),
    ("another agent leads", &[("leader", "a", "1x590 0x9"), ("leader", "b", "0x590 1x9")], &[]),
    (
        "the last success is too old for 5 minutes",
        &[("last_successful_timestamp_seconds", "a", "27599x600")],
        &["StsBackupOverdue"],
    ),
    (
        "the last success is not too old for 5 minutes",
        &[("last_successful_timestamp_seconds", "a", "27600x600")],
        &[],
    ),
    (
        "there was never a success",
        &[
            ("last_successful_timestamp_seconds", "a", "_x600"),
            ("created_timestamp_seconds", "a", "27599x600"),
        ],
        &["StsBackupOverdue"],
    ),
    (
        "there was never a success of a young backup",
        &[
            ("last_successful_timestamp_seconds", "a", "_x600"),
            ("created_timestamp_seconds", "a", "27600x600"),
        ],
        &[],
    ),
    (
        "a suspended backup has no success",
        &[("last_successful_timestamp_seconds", "a", "0x600"), ("suspended", "a", "1x600")],
        &[],
    ),
    (
        "a backup without a schedule has no success",
        &[("last_successful_timestamp_seconds", "a", "0x600"), ("expected_interval_seconds", "a", "_x600")],
        &[],
    ),
    ("the last run failed", &[("last_status", "a", "1x590 0x9")], &["StsBackupFailed"]),
    (
        "the last run left claims out",
        &[("last_status", "a", "0x600"), ("last_partial_failure", "a", "1x600")],
        &["StsBackupPartiallyFailed"],
    ),
    ("the spec is of no use for 15 minutes", &[("ready", "a", "1x584 0x15")], &["StsBackupNotReady"]),
    ("the spec is of no use for 14 minutes", &[("ready", "a", "1x585 0x14")], &[]),
    ("a run was missed lately", &[("missed_runs_total", "a", "3x500 4x99")], &["StsBackupMissedRuns"]),
    ("a run was missed long ago", &[("missed_runs_total", "a", "3x200 4x399")], &[]),
    (
        "a run was missed between two agents",
        &[("missed_runs_total", "a", "3x590"), ("missed_runs_total", "b", "_x591 4x8")],
        &["StsBackupMissedRuns"],
    ),
    (
        "the next agent counts on from where the last one was",
        &[("missed_runs_total", "a", "3x590"), ("missed_runs_total", "b", "_x591 3x8")],
        &[],
    ),
    ("a freeze took long", &[("last_freeze_seconds", "a", "97x600")], &["StsBackupFreezeTooLong"]),
    (
        "StatefulSets are unprotected for an hour",
        &[("unprotected_statefulsets", "a", "0x539 2x60")],
        &["StsBackupUnprotected"],
    ),
];

type Firing = BTreeMap<String, Vec<BTreeMap<String, String>>>;

#[tokio::test]
#[ignore = "builds Prometheus' engine: cargo e2e test --tier full"]
async fn alerts_fire_when_they_should_and_only_then() -> Result<()> {
    let program = PROMETHEUS.build(&Harness::open()?).await?.join("rules");
    for (case, changes, expected) in CASES {
        let firing = firing(&program, &load(changes)).await.context(case)?;
        ensure!(firing.keys().eq(expected), "{case}: {firing:#?}");
        for (alert, labels) in firing {
            let about: BTreeMap<String, String> = labels_of(&alert)
                .iter()
                .map(|(label, value)| ((*label).to_owned(), (*value).to_owned()))
                .collect();
            ensure!(labels == [about], "{case}: {alert} is about {labels:?}");
        }
    }
    Ok(())
}

/// What an alert is about; nothing of the agent that says so.
fn labels_of(alert: &str) -> &'static [(&'static str, &'static str)] {
    match alert {
        "StsBackupAgentDown" => &[],
        "StsBackupUnprotected" => &[("namespace", "shop")],
        _ => &[("namespace", "shop"), ("backup", "nightly"), ("statefulset", "db")],
    }
}

/// The healthy series with these changes, as the tests of Prometheus write series.
fn load(changes: &[(&str, &str, &str)]) -> String {
    let mut lines = vec!["load 1m".to_owned()];
    let mut add = |metric: &str, agent: &str, samples: &str| {
        let labels = match metric {
            "sts_backup_leader" => String::new(),
            "sts_backup_unprotected_statefulsets" => r#"namespace="shop","#.to_owned(),
            _ => r#"namespace="shop",backup="nightly",statefulset="db","#.to_owned(),
        };
        lines.push(format!(r#"  {metric}{{{labels}pod="{agent}"}} {samples}"#));
    };
    for (metric, samples) in HEALTHY {
        let others =
            changes.iter().filter(|(change, ..)| metric.strip_prefix("sts_backup_") == Some(*change));
        if others.clone().next().is_none() {
            add(metric, "a", samples);
        }
        for (_, agent, samples) in others {
            add(metric, agent, samples);
        }
    }
    lines.join("\n")
}

async fn firing(program: &Path, load: &str) -> Result<Firing> {
    let rules = agent_chart().join("files").join("alerts.yaml");
    let case = json!({ "rules": rules, "load": load, "at": AT * 60 });
    let mut evaluation = Command::new(program);
    evaluation.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut evaluation = evaluation.spawn().with_context(|| format!("start {}", program.display()))?;
    let mut stdin = evaluation.stdin.take().context("it has no stdin")?;
    stdin.write_all(case.to_string().as_bytes()).await?;
    drop(stdin);
    let output = evaluation.wait_with_output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim_end());
    Ok(serde_json::from_slice(&output.stdout)?)
}
