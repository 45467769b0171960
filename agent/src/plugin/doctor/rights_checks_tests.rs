use serde_json::json;

use super::super::Level;
use super::*;

fn account(namespace: &str, name: &str) -> Account {
    Account { namespace: namespace.to_owned(), name: name.to_owned() }
}

fn deployment(app: &str, account: Option<&str>) -> Deployment {
    serde_json::from_value(json!({
        "metadata": { "name": "any", "namespace": "backups", "labels": { "app.kubernetes.io/name": app } },
        "spec": { "selector": {}, "template": { "spec": { "containers": [], "serviceAccountName": account } } },
    }))
    .unwrap()
}

#[test]
fn the_accounts_are_those_of_the_agents_pods() {
    let deployments = [
        deployment("sts-backup-agent", Some("mine")),
        deployment("sts-backup-agent", Some("mine")),
        deployment("sts-backup-agent", None),
        deployment("web", Some("other")),
    ];
    assert_eq!(accounts(&deployments), [account("backups", "default"), account("backups", "mine")].into());
}

#[test]
fn the_question_is_asked_as_the_account_for_all_namespaces() {
    let right = Right { group: "", resource: "pods/exec", verb: "create" };
    assert_eq!(
        serde_json::to_value(review(&account("backups", "agent"), &right).spec).unwrap(),
        json!({
            "user": "system:serviceaccount:backups:agent",
            "groups": ["system:serviceaccounts", "system:serviceaccounts:backups", "system:authenticated"],
            "resourceAttributes": { "group": "", "resource": "pods", "subresource": "exec", "verb": "create" },
        })
    );
}

#[test]
fn exec_is_needed_for_hooks_alone() {
    let execs = |hooks| needed(hooks).iter().filter(|right| right.resource == "pods/exec").count();
    assert_eq!((execs(false), execs(true)), (0, 2));
    assert_eq!(needed(true).len(), needed(false).len() + 2);
}

#[test]
fn a_right_that_is_missing_is_a_failure_that_names_it() {
    let check = |missing| check_rights(&account("backups", "agent"), &missing);
    let missing = vec![
        Right { group: "snapshot.storage.k8s.io", resource: "volumesnapshots", verb: "create" },
        Right { group: "", resource: "pods", verb: "list" },
    ];
    let finding = check(Ok(missing));
    assert_eq!(
        (finding.level, finding.reason.as_str()),
        (
            Level::Fail,
            "may not, in all namespaces: create volumesnapshots.snapshot.storage.k8s.io, list pods"
        )
    );
    assert_eq!(check(Ok(Vec::new())).level, Level::Ok);
    assert_eq!(check(Err("you may not".to_owned())).level, Level::Warn);
}

#[test]
fn what_is_asked_for_is_what_the_chart_grants_in_all_namespaces() {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/sts-backup-agent/templates/rbac.yaml");
    let chart = std::fs::read_to_string(chart).unwrap();
    let role = chart.split("---").find(|object| object.contains("kind: ClusterRole\n")).unwrap();
    // What only a link to a hub takes is none of its business.
    let (before, link) = role.split_once("{{- if .Values.link.hub }}").unwrap();
    let role = [before, link.split_once("{{- end }}").unwrap().1].concat();
    let plain: Vec<_> = role.lines().filter(|line| !line.contains("{{")).collect();
    let role: serde_json::Value = serde_saphyr::from_str(&plain.join("\n")).unwrap();
    let words = |list: &serde_json::Value| -> Vec<String> { serde_json::from_value(list.clone()).unwrap() };
    let mut granted = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        for group in words(&rule["apiGroups"]) {
            for resource in words(&rule["resources"]) {
                for verb in words(&rule["verbs"]) {
                    granted.insert((group.clone(), resource.clone(), verb));
                }
            }
        }
    }
    let needed = needed(true);
    let asked =
        needed.iter().map(|right| (right.group.to_owned(), right.resource.to_owned(), right.verb.to_owned()));
    assert_eq!(asked.collect::<BTreeSet<_>>(), granted);
}
