//! The charts ask for no more than the agent and the hub need, and say what is wrong with values.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sts_backup_e2e::kit::helm::{agent_chart, helm, hub_chart};

async fn template(values: &Value) -> Result<String> {
    let chart = agent_chart();
    let chart = chart.to_str().context("the checkout's path is not UTF-8")?;
    helm(None, &["template", "sts-backup-agent", chart, "--namespace=backups"], Some(values)).await
}

/// The objects of a rendered chart.
async fn objects(values: &Value) -> Result<Vec<Value>> {
    Ok(serde_saphyr::from_multiple(&template(values).await?)?)
}

/// What helm says of bad values.
async fn refusal(values: &Value) -> Result<String> {
    let outcome = template(values).await;
    Ok(format!("{:#}", outcome.err().with_context(|| format!("{values} was not refused"))?))
}

#[tokio::test]
#[ignore = "needs helm: cargo e2e test"]
async fn helm_lint_finds_nothing() -> Result<()> {
    let hub = json!({ "trustDomain": "fleet.example.com", "certificates": { "secretName": "hub-tls" } });
    for (chart, values) in [(agent_chart(), json!({})), (hub_chart(), hub)] {
        let said =
            helm(None, &["lint", "--strict", chart.to_str().context("no UTF-8")?], Some(&values)).await?;
        ensure!(said.contains("0 chart(s) failed"), "{said}");
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs helm: cargo e2e test"]
async fn a_hub_without_a_trust_domain_or_a_certificate_is_not_installed() -> Result<()> {
    let chart = hub_chart();
    let chart = chart.to_str().context("no UTF-8")?;
    for (values, missing) in [
        (json!({ "certificates": { "secretName": "hub-tls" } }), "trustDomain must be given"),
        (json!({ "trustDomain": "fleet.example.com" }), "certificates.secretName must be given"),
    ] {
        let refused = helm(None, &["template", "hub", chart], Some(&values)).await.err();
        let refused = format!("{:#}", refused.with_context(|| format!("{values} was not refused"))?);
        ensure!(refused.contains(missing), "{refused}");
    }
    Ok(())
}

/// Written out, so that nobody grants the agent more without changing this list.
#[tokio::test]
#[ignore = "needs helm: cargo e2e test"]
async fn the_agent_is_granted_exactly_what_it_uses() -> Result<()> {
    let granted = granted(&json!({ "userRoles": { "create": false } })).await?;
    let expected = [
        "ClusterRole backup.sts-backup.io/statefulsetbackups get,list,watch,create,patch,delete",
        "ClusterRole backup.sts-backup.io/statefulsetrestores get,list,watch,patch",
        "ClusterRole backup.sts-backup.io/statefulsetbackuppolicies list,watch",
        "ClusterRole backup.sts-backup.io/statefulsetbackups/status,statefulsetrestores/status,statefulsetbackuppolicies/status patch",
        "ClusterRole apps/statefulsets get,list,watch",
        "ClusterRole apps/statefulsets/scale patch",
        "ClusterRole /pods get,list,watch,delete",
        "ClusterRole /persistentvolumeclaims get,list,watch,create,delete",
        "ClusterRole /persistentvolumes get,list,watch,patch",
        "ClusterRole /resourcequotas,nodes list",
        "ClusterRole storage.k8s.io/storageclasses list",
        "ClusterRole autoscaling/horizontalpodautoscalers list",
        "ClusterRole /namespaces get,list,watch",
        "ClusterRole /pods/exec get,create",
        "ClusterRole snapshot.storage.k8s.io/volumesnapshots get,list,watch,create,delete",
        "ClusterRole snapshot.storage.k8s.io/volumesnapshotcontents get,list,watch",
        "ClusterRole snapshot.storage.k8s.io/volumesnapshotclasses list",
        "ClusterRole events.k8s.io/events create",
        "Role coordination.k8s.io/leases=sts-backup-agent get,update",
        "Role coordination.k8s.io/leases create",
    ];
    ensure!(granted == expected, "the chart grants {granted:#?}");
    Ok(())
}

/// What the agent is granted over that with a link to a hub.
#[tokio::test]
#[ignore = "needs helm: cargo e2e test"]
async fn what_the_link_takes_is_granted_only_with_a_hub() -> Result<()> {
    let without = granted(&json!({ "userRoles": { "create": false } })).await?;
    let values = json!({ "userRoles": { "create": false }, "link": { "hub": "hub.example.com:9443" } });
    let with = granted(&values).await?;
    let more: Vec<_> = with.iter().filter(|grant| !without.contains(grant)).map(String::as_str).collect();
    let expected = [
        "ClusterRole backup.sts-backup.io/statefulsetbackuppolicies get,create,patch,delete",
        "Role /configmaps=sts-backup-hub-link get,list,watch,patch",
        "Role /configmaps create",
    ];
    ensure!(more == expected, "the chart grants {more:#?}");
    Ok(())
}

/// What a rendered chart grants, a rule a line.
async fn granted(values: &Value) -> Result<Vec<String>> {
    let objects = objects(values).await?;
    let mut granted: Vec<String> = Vec::new();
    for role in
        objects.iter().filter(|object| matches!(object["kind"].as_str(), Some("Role" | "ClusterRole")))
    {
        let kind = role["kind"].as_str().unwrap_or_default();
        for rule in role["rules"].as_array().context("a role has rules")? {
            granted.push(format!(
                "{kind} {}/{}{} {}",
                words(&rule["apiGroups"]),
                words(&rule["resources"]),
                if rule["resourceNames"].is_null() { "" } else { "=" }.to_owned()
                    + &words(&rule["resourceNames"]),
                words(&rule["verbs"])
            ));
        }
    }
    Ok(granted)
}

fn words(list: &Value) -> String {
    let words = list.as_array().into_iter().flatten().filter_map(Value::as_str);
    words.collect::<Vec<_>>().join(",")
}

#[tokio::test]
#[ignore = "needs helm: cargo e2e test"]
async fn unknown_values_are_refused_by_name() -> Result<()> {
    let said = refusal(&json!({ "replicas": 3 })).await?;
    ensure!(said.contains("'replicas' not allowed"), "{said}");
    let said = refusal(&json!({ "config": { "lease": { "duration": 15 } } })).await?;
    ensure!(said.contains("/config/lease") && said.contains("'duration' not allowed"), "{said}");
    Ok(())
}

#[tokio::test]
#[ignore = "needs helm: cargo e2e test"]
async fn a_grace_that_is_too_short_to_thaw_pods_is_refused() -> Result<()> {
    let said = refusal(&json!({ "config": { "shutdown_seconds": 60 } })).await?;
    ensure!(said.contains("must be at least 5 more than config.shutdown_seconds (60)"), "{said}");
    Ok(())
}

#[tokio::test]
#[ignore = "needs helm: cargo e2e test"]
async fn the_configuration_becomes_toml_and_its_change_restarts_the_agents() -> Result<()> {
    let checksum = async |values: &Value| -> Result<(String, Value)> {
        let objects = objects(values).await?;
        let of_kind = |kind: &str| objects.iter().find(|object| object["kind"] == kind);
        let config = of_kind("ConfigMap").context("no ConfigMap")?["data"]["agent.toml"].as_str();
        let pod = &of_kind("Deployment").context("no Deployment")?["spec"]["template"]["metadata"];
        Ok((config.context("no file")?.to_owned(), pod["annotations"]["checksum/config"].clone()))
    };
    let (config, before) = checksum(&json!({ "config": { "lease": { "duration_seconds": 20 } } })).await?;
    let lines = ["lease.duration_seconds = 20", "log_format = \"json\"", "shutdown_seconds = 25"];
    ensure!(config.lines().eq(lines), "{config}");
    let (_, after) = checksum(&json!({ "config": { "lease": { "duration_seconds": 21 } } })).await?;
    ensure!(before != after, "the pods would go on with the old configuration");
    Ok(())
}

#[tokio::test]
#[ignore = "needs helm: cargo e2e test"]
async fn crds_stay_when_the_chart_is_uninstalled() -> Result<()> {
    let is_crd = |object: &&Value| object["kind"] == "CustomResourceDefinition";
    let all = objects(&json!({})).await?;
    let crds: Vec<_> = all.iter().filter(is_crd).collect();
    ensure!(!crds.is_empty(), "the chart has no CRDs");
    for crd in crds {
        let policy = &crd["metadata"]["annotations"]["helm.sh/resource-policy"];
        ensure!(policy == "keep", "{} would take all its objects with it", crd["metadata"]["name"]);
    }
    let without = objects(&json!({ "crds": { "install": false } })).await?;
    ensure!(!without.iter().any(|object| is_crd(&object)), "CRDs that were not wanted");
    Ok(())
}

#[tokio::test]
#[ignore = "needs helm: cargo e2e test"]
async fn who_writes_what_the_agent_acts_by_is_asked_unless_the_policies_are_not_wanted() -> Result<()> {
    let judged = async |values: Value| -> Result<Vec<String>> {
        let objects = objects(&values).await?;
        let of_kind = |kind: &'static str| objects.iter().filter(move |object| object["kind"] == kind);
        let bound: Vec<_> = of_kind("ValidatingAdmissionPolicyBinding").collect();
        let mut judged = Vec::new();
        for policy in of_kind("ValidatingAdmissionPolicy") {
            let name = &policy["metadata"]["name"];
            ensure!(policy["spec"]["failurePolicy"] == "Fail", "{name} lets pass what it cannot judge");
            let binds = |binding: &&&Value| binding["spec"]["policyName"] == *name;
            let binding = bound.iter().find(binds).with_context(|| format!("{name} is not bound"))?;
            ensure!(words(&binding["spec"]["validationActions"]) == "Deny", "{name} does not deny");
            let rule = &policy["spec"]["matchConstraints"]["resourceRules"][0];
            judged.push(format!("{} {}", words(&rule["resources"]), words(&rule["operations"])));
        }
        ensure!(judged.len() == bound.len(), "a binding without its policy");
        Ok(judged)
    };
    let (backups, policies) = ("statefulsetbackups CREATE,UPDATE", "statefulsetbackuppolicies CREATE,UPDATE");
    let (restores, restore_status) =
        ("statefulsetrestores CREATE,UPDATE", "statefulsetrestores/status UPDATE");
    let status = "statefulsetbackups/status UPDATE";
    let by_default = judged(json!({})).await?;
    ensure!(by_default == [backups, status, policies, restores, restore_status], "{by_default:?}");
    let without_hooks = judged(json!({ "hooks": { "enabled": false } })).await?;
    ensure!(without_hooks == by_default, "{without_hooks:?}");
    let unwanted = judged(json!({ "admissionPolicy": { "create": false } })).await?;
    ensure!(unwanted.is_empty(), "{unwanted:?}");
    Ok(())
}

/// The spec of an admission policy of a rendered chart, by the beginning of its name.
async fn admission_policy(values: &Value, name: &str) -> Result<Value> {
    let objects = objects(values).await?;
    let is_it = |object: &&Value| {
        let is_named = object["metadata"]["name"].as_str().is_some_and(|full| full.starts_with(name));
        object["kind"] == "ValidatingAdmissionPolicy" && is_named
    };
    Ok(objects.iter().find(is_it).with_context(|| format!("no {name}"))?["spec"].clone())
}

/// Where it may not exec, the backups of policies with hooks would not even be there to say so.
#[tokio::test]
#[ignore = "needs helm: cargo e2e test"]
async fn the_agent_is_not_asked_for_exec_when_it_writes_the_backups_of_policies() -> Result<()> {
    for (values, account) in [
        (json!({}), "system:serviceaccount:backups:sts-backup-agent"),
        (json!({ "hooks": { "enabled": false } }), "system:serviceaccount:backups:sts-backup-agent"),
        (
            json!({ "serviceAccount": { "create": false, "name": "other" } }),
            "system:serviceaccount:backups:other",
        ),
    ] {
        let spec = admission_policy(&values, "backup-hooks.").await?;
        let condition = &spec["matchConditions"][0]["expression"];
        ensure!(*condition == format!("request.userInfo.username != '{account}'"), "{values}: {condition}");
    }
    Ok(())
}

/// An agent that may not exec would be refused its own status.
#[tokio::test]
#[ignore = "needs helm: cargo e2e test"]
async fn who_writes_the_status_of_runs_is_asked_for_exec_only_where_the_agent_may() -> Result<()> {
    for (enabled, verbs) in [(true, &["delete", "create"][..]), (false, &["delete"])] {
        let values = json!({ "hooks": { "enabled": enabled } });
        let spec = admission_policy(&values, "run-status.").await?;
        let validations = spec["validations"].as_array().context("it validates nothing")?;
        let asked = validations.iter().map(|validation| {
            let (_, verb) = validation["expression"].as_str()?.split_once(".check('")?;
            Some(verb.split_once('\'')?.0)
        });
        ensure!(asked.eq(verbs.iter().map(|verb| Some(*verb))), "{validations:#?}");
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs helm: cargo e2e test"]
async fn alerts_and_scrapes_come_when_they_are_wanted() -> Result<()> {
    let by_default = template(&json!({})).await?;
    ensure!(!by_default.contains("monitoring.coreos.com"), "most clusters have no such CRDs");

    let values = json!({ "metrics": {
        "serviceMonitor": { "create": true, "labels": { "release": "prom" } },
        "prometheusRule": {
            "create": true,
            "labels": { "release": "prom" },
            "disabled": ["StsBackupUnprotected"],
            "runbookBase": "https://git.example.com/",
        },
    } });
    let objects = objects(&values).await?;
    let of_kind = |kind: &str| {
        let found = objects.iter().find(|object| object["kind"] == kind);
        let found = found.with_context(|| format!("no {kind}"))?;
        ensure!(found["metadata"]["labels"]["release"] == "prom", "Prometheus does not find {kind}");
        anyhow::Ok(found)
    };
    let endpoint = &of_kind("ServiceMonitor")?["spec"]["endpoints"][0];
    ensure!(endpoint["honorLabels"] == true, "the namespace of the agent would hide that of the backup");

    let expected = rules(&agent_chart(), "StsBackupUnprotected")?;
    let found = &of_kind("PrometheusRule")?["spec"]["groups"][0]["rules"];
    ensure!(*found == json!(expected), "{found:#}");
    Ok(())
}

#[tokio::test]
#[ignore = "needs helm: cargo e2e test"]
async fn alerts_of_the_hub_come_when_they_are_wanted() -> Result<()> {
    let chart = hub_chart();
    let disabled = "StsBackupHubFlapping";
    let values = json!({
        "trustDomain": "fleet.example.com",
        "certificates": { "secretName": "hub-tls" },
        "metrics": { "prometheusRule": {
            "create": true, "disabled": [disabled], "runbookBase": "https://git.example.com/",
        } },
    });
    let path = chart.to_str().context("no UTF-8")?;
    let rendered = helm(None, &["template", "hub", path], Some(&values)).await?;
    let objects: Vec<Value> = serde_saphyr::from_multiple(&rendered)?;
    let rule = objects.iter().find(|object| object["kind"] == "PrometheusRule").context("no rules")?;
    let found = &rule["spec"]["groups"][0]["rules"];
    ensure!(*found == json!(rules(&chart, disabled)?), "{found:#}");
    Ok(())
}

/// The rules of a chart without one of them, with the links that a chart makes of its runbooks.
fn rules(chart: &Path, disabled: &str) -> Result<Vec<Value>> {
    let written: Value = serde_saphyr::from_str(&std::fs::read_to_string(chart.join("files/alerts.yaml"))?)?;
    let mut rules = written["groups"][0]["rules"].as_array().context("no rules")?.clone();
    rules.retain(|rule| rule["alert"] != disabled);
    for rule in &mut rules {
        let runbook = rule["annotations"]["runbook_url"].as_str().context("no runbook")?;
        rule["annotations"]["runbook_url"] = json!(format!("https://git.example.com/{runbook}"));
    }
    Ok(rules)
}
