//! The chart's alerts fire when they should, and only then, by Prometheus' own engine.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use sts_backup_e2e::harness::Harness;
use sts_backup_e2e::harness::programs::PROMETHEUS;
use sts_backup_e2e::kit::helm::{agent_chart, hub_chart};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// When the alerts are asked for, minutes after the beginning of the series, which have a sample a minute.
const AT: i64 = 600;

/// Series of one backup, and of its policy, that are as they should be: the last success was 1,000 s ago.
const HEALTHY: [(&str, &str); 17] = [
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
    ("sts_backup_recovery_points", "7x600"),
    ("sts_backup_next_success_deadline_timestamp_seconds", "40000x600"),
    ("sts_backup_missed_runs_total", "3x600"),
    ("sts_backup_unprotected_statefulsets", "0x600"),
    ("sts_backup_policy_ready", "1x600"),
    ("sts_backup_policy_applied", "1x600"),
    ("sts_backup_policy_overdue", "0x600"),
];

/// What is said, by which agent and with which samples instead of the healthy ones, and which alerts fire then. `0x3 1x1`
/// are four times 0 and twice 1, `_x600` is no sample at all.
type Case = (&'static str, &'static [(&'static str, &'static str, &'static str)], &'static [&'static str]);

const CASES: [Case; 37] = [
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
        "the second run after the last success is overdue for 5 minutes",
        &[("next_success_deadline_timestamp_seconds", "a", "35699x600")],
        &["StsBackupOverdue"],
    ),
    (
        "the second run after the last success is overdue for less",
        &[("next_success_deadline_timestamp_seconds", "a", "35700x600")],
        &[],
    ),
    (
        "the last success was before a long gap, at the end of which a run is under way",
        &[
            ("last_successful_timestamp_seconds", "a", "0x600"),
            ("next_success_deadline_timestamp_seconds", "a", "36000x600"),
        ],
        &[],
    ),
    (
        "there was never a success",
        &[
            ("last_successful_timestamp_seconds", "a", "_x600"),
            ("recovery_points", "a", "0x600"),
            ("next_success_deadline_timestamp_seconds", "a", "35699x600"),
        ],
        &["StsBackupOverdue"],
    ),
    (
        "the next agent knows of a later success",
        &[
            ("next_success_deadline_timestamp_seconds", "a", "35000x598"),
            ("next_success_deadline_timestamp_seconds", "b", "_x590 40000x9"),
        ],
        &[],
    ),
    (
        "a suspended backup has no success",
        &[("next_success_deadline_timestamp_seconds", "a", "0x600"), ("suspended", "a", "1x600")],
        &[],
    ),
    (
        "a backup without a schedule has no success",
        &[
            ("last_successful_timestamp_seconds", "a", "0x600"),
            ("next_success_deadline_timestamp_seconds", "a", "_x600"),
        ],
        &[],
    ),
    (
        "the points are gone for 5 minutes",
        &[("recovery_points", "a", "7x594 0x5")],
        &["StsBackupNoRecoveryPoint"],
    ),
    ("the points are gone for 4 minutes", &[("recovery_points", "a", "7x595 0x4")], &[]),
    (
        "there was never a point",
        &[("recovery_points", "a", "0x600"), ("last_successful_timestamp_seconds", "a", "_x600")],
        &[],
    ),
    (
        "StatefulSets of a policy are overdue for 5 minutes",
        &[("policy_overdue", "a", "0x594 2x5")],
        &["StsBackupPolicyOverdue"],
    ),
    ("StatefulSets of a policy are overdue for 4 minutes", &[("policy_overdue", "a", "0x595 2x4")], &[]),
    (
        "a policy is of no use for 15 minutes, and so not applied",
        &[("policy_ready", "a", "1x584 0x15"), ("policy_applied", "a", "1x584 0x15")],
        &["StsBackupPolicyNotReady"],
    ),
    (
        "a policy is not applied for 15 minutes",
        &[("policy_applied", "a", "1x584 0x15")],
        &["StsBackupPolicyNotApplied"],
    ),
    (
        "a policy is neither for 14 minutes",
        &[("policy_ready", "a", "1x585 0x14"), ("policy_applied", "a", "1x585 0x14")],
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
    (
        "runs were missed while no agent led for 8 hours",
        &[("missed_runs_total", "a", "3x100"), ("missed_runs_total", "b", "_x581 4x18")],
        &["StsBackupMissedRuns"],
    ),
    (
        "runs were missed while no agent led for 6 hours, 4 hours ago",
        &[("missed_runs_total", "a", "3x10 _x359 4x229")],
        &["StsBackupMissedRuns"],
    ),
    ("a run was missed long before no agent led", &[("missed_runs_total", "a", "3x50 4x50 _x400 4x98")], &[]),
    ("a new backup missed a run", &[("missed_runs_total", "a", "_x500 0x50 1x48")], &["StsBackupMissedRuns"]),
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
        let firing = firing(&program, &agent_chart(), &load(changes)).await.context(case)?;
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

/// One Prometheus has the series of two clusters.
#[tokio::test]
#[ignore = "builds Prometheus' engine: cargo e2e test --tier full"]
async fn an_agent_that_is_down_is_told_of_its_cluster_alone() -> Result<()> {
    let program = PROMETHEUS.build(&Harness::open()?).await?.join("rules");
    let leader = |cluster: &str, pod: &str, samples: &str| {
        format!(r#"  sts_backup_leader{{cluster="{cluster}",pod="{pod}"}} {samples}"#)
    };
    for (case, east, west, expected) in [
        ("both lead", "1x600", "1x600", &[][..]),
        ("one stands by", "1x600", "0x600", &["west"]),
        ("one was scraped for the last time hours ago", "1x600", "1x100", &["west"]),
        ("none leads", "1x590 0x9", "1x100", &["east", "west"]),
    ] {
        let load = ["load 1m".to_owned(), leader("east", "a", east), leader("west", "a", west)].join("\n");
        let firing = firing(&program, &agent_chart(), &load).await.context(case)?;
        let down: Vec<&String> =
            firing.get("StsBackupAgentDown").into_iter().flatten().flat_map(BTreeMap::values).collect();
        ensure!(firing.len() == usize::from(!expected.is_empty()) && down == expected, "{case}: {firing:#?}");
    }
    Ok(())
}

#[tokio::test]
#[ignore = "builds Prometheus' engine: cargo e2e test --tier full"]
async fn alerts_of_the_hub_fire_when_they_should_and_only_then() -> Result<()> {
    let program = PROMETHEUS.build(&Harness::open()?).await?.join("rules");
    let healthy = [
        ("clusters", "2x600"),
        ("cluster_connected{cluster=\"east\"}", "1x600"),
        ("cluster_policies_rejected{cluster=\"east\"}", "0x600"),
        ("clusters_held", "0x600"),
        ("clusters_flapping", "0x600"),
        ("policies_reload_failed", "0x600"),
        ("certificates_reload_failed", "0x600"),
    ];
    for (case, series, samples, expected) in [
        ("all is well", "clusters", "2x600", &[][..]),
        ("it is gone for 10 minutes", "clusters", "2x583", &["StsBackupHubDown"]),
        ("it was away for a while", "clusters", "2x400 _x100 2x99", &[]),
        (
            "a cluster is away for 15 minutes",
            "cluster_connected{cluster=\"east\"}",
            "1x580 0x19",
            &["StsBackupHubClusterUnknown"],
        ),
        ("a cluster is away for 5 minutes", "cluster_connected{cluster=\"east\"}", "1x593 0x6", &[]),
        (
            "a cluster refuses policies",
            "cluster_policies_rejected{cluster=\"east\"}",
            "2x600",
            &["StsBackupHubPoliciesRejected"],
        ),
        ("a cluster holds back", "clusters_held", "1x600", &["StsBackupHubHeld"]),
        ("two agents fight", "clusters_flapping", "1x600", &["StsBackupHubFlapping"]),
        ("bad files", "policies_reload_failed", "1x600", &["StsBackupHubPoliciesUnusable"]),
        ("bad certificates", "certificates_reload_failed", "1x600", &["StsBackupHubCertificatesUnusable"]),
    ] {
        let lines = healthy.iter().map(|(name, well)| {
            format!("  sts_backup_hub_{name} {}", if *name == series { samples } else { well })
        });
        let load = std::iter::once("load 1m".to_owned()).chain(lines).collect::<Vec<_>>().join("\n");
        let firing = firing(&program, &hub_chart(), &load).await.context(case)?;
        ensure!(firing.keys().eq(expected), "{case}: {firing:#?}");
    }
    Ok(())
}

/// What an alert is about; nothing of the agent that says so.
fn labels_of(alert: &str) -> &'static [(&'static str, &'static str)] {
    match alert {
        "StsBackupAgentDown" => &[],
        "StsBackupUnprotected" => &[("namespace", "shop")],
        "StsBackupPolicyOverdue" | "StsBackupPolicyNotReady" | "StsBackupPolicyNotApplied" => {
            &[("policy", "gold")]
        }
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
            policy if policy.starts_with("sts_backup_policy_") => r#"policy="gold","#.to_owned(),
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

async fn firing(program: &Path, chart: &Path, load: &str) -> Result<Firing> {
    let rules = chart.join("files").join("alerts.yaml");
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
