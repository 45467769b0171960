//! What the docs list is what there is: alerts and their metrics, Events, and commands of the plugin.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

#[derive(Deserialize)]
struct Rules {
    groups: Vec<Group>,
}

#[derive(Deserialize)]
struct Group {
    rules: Vec<Alert>,
}

#[derive(Deserialize)]
struct Alert {
    #[serde(rename = "alert")]
    name: String,
    expr: String,
    labels: Labels,
    annotations: Annotations,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Labels {
    severity: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Annotations {
    runbook_url: String,
    summary: String,
    description: String,
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap_or_else(|err| format!("{path}: {err}"))
}

/// Those of both charts: the agent's, then the hub's.
fn alerts() -> Vec<Alert> {
    let rules = ["agent", "hub"].map(|part| {
        let rules = read(&format!("charts/sts-backup-{part}/files/alerts.yaml"));
        serde_saphyr::from_str::<Rules>(&rules).expect("rules")
    });
    rules.into_iter().flat_map(|rules| rules.groups).flat_map(|group| group.rules).collect()
}

/// The first column of all tables of a page, without its backticks.
fn first_column(page: &str) -> BTreeSet<String> {
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    rows.map(|(name, _)| name.to_owned()).collect()
}

#[test]
fn every_alert_has_a_runbook_and_every_runbook_an_alert() {
    let page = read("docs/alerts.md");
    let runbooks: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    let alerts = alerts();
    let names: Vec<&str> = alerts.iter().map(|alert| alert.name.as_str()).collect();
    assert_eq!(names, runbooks);
    for Alert { name: alert, labels: Labels { severity }, annotations, .. } in &alerts {
        let Annotations { runbook_url, summary, description } = annotations;
        assert_eq!(*runbook_url, format!("docs/alerts.md#{}", alert.to_lowercase()));
        assert!(!summary.is_empty() && description.ends_with('.'), "{alert}: {summary} {description}");
        let (_, text) = page.split_once(&format!("\n## {alert}\n")).expect("a section");
        let said = text.trim_start().split_once('*').and_then(|(_, rest)| rest.split_once(".*"));
        assert_eq!(said.map(|(said, _)| said.to_lowercase()).as_ref(), Some(severity), "{alert}");
        let section = text.split_once("\n## ").map_or(text, |(section, _)| section);
        for part in ["Look:", "Do", "Ends:"] {
            assert!(section.lines().any(|line| line.starts_with(part)), "{alert} has no {part}");
        }
    }
}

#[test]
fn alerts_speak_of_metrics_that_the_docs_list() {
    /// What else is in the expressions: words of `PromQL`, and labels.
    const WORDS: [&str; 18] = [
        "absent",
        "and",
        "backup",
        "by",
        "cluster",
        "group",
        "last_over_time",
        "max",
        "min",
        "min_over_time",
        "namespace",
        "offset",
        "on",
        "or",
        "policy",
        "statefulset",
        "time",
        "unless",
    ];
    let mut listed = first_column(&read("docs/metrics.md"));
    listed.extend(first_column(&read("docs/fleet.md")));
    let is_word = |letter: char| letter.is_ascii_alphanumeric() || letter == '_' || letter == ':';
    for Alert { name: alert, expr, .. } in alerts() {
        let words = expr.split(|letter| !is_word(letter));
        // Spans of time and numbers begin with a digit.
        let names = words.filter(|word| word.starts_with(|first: char| !first.is_ascii_digit()));
        let metrics: Vec<&str> = names.filter(|name| !WORDS.contains(name)).collect();
        assert!(!metrics.is_empty(), "{alert} speaks of no metric");
        for metric in metrics {
            assert!(
                listed.contains(metric),
                "{alert} speaks of {metric}, which neither docs/metrics.md nor docs/fleet.md lists"
            );
        }
    }
}

/// All pages for users, by their paths.
fn pages() -> Vec<(PathBuf, String)> {
    let docs = fs::read_dir(repository().join("docs")).expect("a folder");
    let docs = docs.map(|entry| entry.expect("an entry").path());
    let pages = docs.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    let pages = pages.chain([repository().join("README.md")]);
    pages.map(|path| (path.clone(), fs::read_to_string(path).expect("a page"))).collect()
}

#[test]
fn docs_name_subcommands_that_the_plugin_has() {
    let help =
        Command::new(env!("CARGO_BIN_EXE_kubectl-stsbackup")).arg("--help").output().expect("a plugin");
    let help = String::from_utf8(help.stdout).expect("text");
    let (_, list) = help.split_once("\nCommands:\n").expect("commands");
    let lines = list.lines().take_while(|line| !line.is_empty());
    // What a command does may go on in a line that is indented further.
    let names = lines.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let known: BTreeSet<&str> = names.filter(|name| !name.is_empty()).collect();
    assert!(known.contains("describe") && known.contains("run"), "{known:?}");
    let mut count = 0;
    for (path, page) in pages() {
        for rest in page.split("kubectl stsbackup ").skip(1) {
            let is_name = |letter: char| letter.is_ascii_lowercase() || letter == '-';
            let name = rest.split(|letter| !is_name(letter)).next().unwrap_or_default();
            // A placeholder, or a flag for every command.
            if name.is_empty() || name.starts_with('-') {
                continue;
            }
            assert!(known.contains(name), "{}: the plugin has no {name}: {known:?}", path.display());
            count += 1;
        }
    }
    assert!(count > 10, "only {count} are named");
}

/// The code of a folder, tests that lie beside it included.
fn code_of(folder: &Path) -> String {
    let mut code = String::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            code += &code_of(&path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            code += &fs::read_to_string(&path).expect("a source file");
        }
    }
    code
}

/// A string, or a constant that is named as what it holds.
fn reason(argument: &str) -> Option<String> {
    if let Some(text) = argument.strip_prefix('"') {
        return text.strip_suffix('"').map(str::to_owned);
    }
    let is_constant = argument.chars().all(|letter| letter.is_ascii_uppercase() || letter == '_');
    let word = |word: &str| word[..1].to_owned() + &word[1..].to_lowercase();
    is_constant.then(|| argument.split('_').map(word).collect())
}

#[test]
fn docs_list_the_events_that_are_published() {
    let documented = first_column(&read("docs/events.md"));
    let code = code_of(&repository().join("agent/src"));
    let calls = ["Note::normal(", "Note::warning("].into_iter().flat_map(|call| code.split(call).skip(1));
    let published: BTreeSet<String> =
        calls.filter_map(|call| reason(call.split_once(',')?.0.trim())).collect();
    assert!(
        published.contains("BackupStarted") && published.contains("NamespaceNotGranted"),
        "{published:?}"
    );
    let undocumented: Vec<&String> = published.difference(&documented).collect();
    assert!(undocumented.is_empty(), "docs/events.md lists no {undocumented:?}");

    // Reasons that come by a variable are somewhere else in the code.
    let code = code + &code_of(&repository().join("api/src"));
    let unknown: Vec<&String> =
        documented.iter().filter(|reason| !code.contains(&format!("\"{reason}\""))).collect();
    assert!(unknown.is_empty(), "the code knows no {unknown:?}");
}
