use std::fs;

use serde_json::Value;

use super::*;

const GOLD: &str = "\
apiVersion: hub.sts-backup.io/v1alpha1
kind: FleetPolicy
metadata:
  name: gold
spec:
  clusterSelector:
    matchLabels: { env: prod }
  policy:
    statefulSetSelector: { matchLabels: { tier: gold } }
    rpo: 26h
    template:
      spec:
        schedule: 0 2 * * *
";

fn files(texts: &[(&str, &str)]) -> Vec<File> {
    texts.iter().map(|(name, text)| File { name: (*name).to_owned(), text: (*text).to_owned() }).collect()
}

/// What is said of the gold policy with some lines instead of others.
fn said(from: &str, to: &str) -> Vec<String> {
    assert!(GOLD.contains(from), "{from}");
    let refused = PolicySet::of(&files(&[("gold.yaml", &GOLD.replace(from, to))]));
    refused.err().unwrap_or_default().iter().map(ToString::to_string).collect()
}

#[test]
fn a_cluster_gets_the_policies_that_select_it_by_its_labels() {
    let silver = GOLD.replace("name: gold", "name: silver").replace("{ env: prod }", "{ env: test }");
    let all = GOLD.replace("name: gold", "name: all").replace("{ env: prod }", "{}");
    let set = PolicySet::of(&files(&[
        ("a.yaml", &format!("---\n{GOLD}---\n{silver}---\n")),
        ("b.yaml", &all),
        ("empty.yaml", "# nothing yet\n"),
    ]))
    .unwrap();
    assert_eq!(set.len(), 3);
    let of = |labels: &[(&str, &str)]| {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        set.of_cluster(&labels).map(|(name, _)| name.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(of(&[("env", "prod"), ("zone", "eu")]), ["all", "gold"]);
    assert_eq!(of(&[("env", "test")]), ["all", "silver"]);
    assert_eq!(of(&[]), ["all"]);

    let labels = BTreeMap::from([("env".to_owned(), "prod".to_owned())]);
    let gold = set.of_cluster(&labels).find(|(name, _)| *name == "gold").unwrap().1;
    let gold: Value = serde_json::from_slice(&gold.json).unwrap();
    assert_eq!(gold["rpo"], "26h");
    assert_eq!(gold.pointer("/template/spec/schedule"), Some(&Value::from("0 2 * * *")));
    assert_eq!(gold.get("priority"), None, "it would be the hub's, and nobody wrote it");
}

#[test]
fn each_problem_names_the_line_the_field_and_the_remedy() {
    let cases = [
        ("rpo: 26h", "rpos: 26h", "gold.yaml:10:5: spec.policy.rpos: there is no such field, only exclude, "),
        (
            "schedule: 0 2 * * *",
            "schedules: 0 2 * * *",
            "gold.yaml:13:9: spec.policy.template.spec.schedules: there is no such field",
        ),
        (
            "matchLabels: { tier: gold }",
            "matchLabel: { tier: gold }",
            "gold.yaml:9:28: spec.policy.statefulSetSelector.matchLabel: there is no such field",
        ),
        (
            "  name: gold\n",
            "  name: gold\n  labels: { a: b }\n",
            "gold.yaml:5:3: metadata.labels: there is no such field, only name",
        ),
        ("  name: gold\n", "  name: Gold_1\n", "gold.yaml:4:3: metadata.name: \"Gold_1\" does not match"),
        ("metadata:\n  name: gold\n", "", "gold.yaml:1:1: metadata: it is required; write it"),
        ("kind: FleetPolicy", "kind: FleetPolice", "gold.yaml:2:1: kind: \"FleetPolicy\" was expected"),
        ("rpo: 26h", "rpo: 26", "gold.yaml:10:5: spec.policy.rpo: 26 is not of type \"string\""),
        ("rpo: 26h", "rpo: 26 hours", "gold.yaml:10:5: spec.policy.rpo: \"26 hours\" does not match"),
        (
            "schedule: 0 2 * * *",
            "schedule: 0 2 * *",
            "gold.yaml:13:9: spec.policy.template.spec.schedule \"0 2 * *\": ",
        ),
        (
            "schedule: 0 2 * * *",
            "schedule: 0 2 * * *\n        timeZone: Mars/Base",
            "gold.yaml:14:9: spec.policy.template.spec.timeZone \"Mars/Base\": ",
        ),
        (
            "matchLabels: { env: prod }",
            "matchExpressions: [{ key: env, operator: Near }]",
            "gold.yaml:6:3: spec.clusterSelector: it cannot be used: ",
        ),
        ("spec:\n  clusterSelector", "spec: [\n  clusterSelector", "gold.yaml:"),
    ];
    for (from, to, expected) in cases {
        let said = said(from, to);
        assert!(said.len() == 1 && said[0].starts_with(expected), "{to}: {said:#?}");
    }
}

#[test]
fn the_rules_of_the_objects_in_the_clusters_hold() {
    let both =
        "template:\n      hookProfile: postgres\n      spec:\n        preBackupHook: { command: [sync] }";
    let said = said("template:\n      spec:", both);
    assert!(
        said.len() == 1
            && said[0].starts_with("gold.yaml:11:5: spec.policy.template: hookProfile stands for both"),
        "{said:#?}"
    );
}

#[test]
fn everything_that_is_wrong_is_told_at_once_and_nothing_is_used() {
    let broken = GOLD.replace("rpo: 26h", "rpo: 1").replace("kind: FleetPolicy", "kind: Fleet");
    let twin = format!("---\n{GOLD}---\n{GOLD}");
    let refused = PolicySet::of(&files(&[("a.yaml", &broken), ("b.yaml", "a: ["), ("c.yaml", &twin)]));
    let said: Vec<_> = refused.unwrap_err().iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 4, "{said:#?}");
    assert!(said[3].starts_with("c.yaml:19:3: metadata.name: c.yaml:5 has this name already"), "{said:#?}");
}

#[test]
fn a_value_that_is_left_empty_is_an_absent_one() {
    let without = GOLD.replace("clusterSelector:\n    matchLabels: { env: prod }", "clusterSelector:");
    let set = PolicySet::of(&files(&[("gold.yaml", &without)])).unwrap();
    assert_eq!(set.of_cluster(&BTreeMap::new()).count(), 1);
}

#[test]
fn of_a_directory_only_the_yaml_files_count_that_are_not_hidden() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    // As Kubernetes mounts a ConfigMap.
    fs::create_dir(at("..data")).unwrap();
    fs::write(at("..data/gold.yaml"), GOLD).unwrap();
    std::os::unix::fs::symlink("..data/gold.yaml", at("gold.yaml")).unwrap();
    fs::write(at(".gold.yaml.swp.yaml"), "a: [").unwrap();
    fs::write(at("README.md"), "a: [").unwrap();
    assert_eq!(PolicySet::load(directory.path()).unwrap().len(), 1);

    fs::write(at("large.yml"), vec![b'#'; (1 << 20) + 1]).unwrap();
    let refused = PolicySet::load(directory.path()).unwrap_err();
    assert!(matches!(refused, PoliciesError::Files(FilesError::TooLarge { .. })), "{refused:?}");
    let refused = PolicySet::load(&at("nowhere")).unwrap_err();
    assert!(matches!(refused, PoliciesError::Files(FilesError::Directory { .. })), "{refused:?}");
}

#[test]
fn the_policy_of_the_documentation_can_be_used() {
    let page = include_str!("../../../docs/fleet.md");
    let (_, rest) = page.split_once("```yaml\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    assert_eq!(PolicySet::of(&files(&[("fleet.md", example)])).unwrap().len(), 1);
}
