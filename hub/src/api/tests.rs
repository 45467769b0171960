//! The API as the commands use it, over real connections.

use std::path::Path;

use super::*;
use crate::client::{self, Clusters, Connection, FleetView, Policies};
use crate::pki::{Authority, Holder};
use crate::policies::PolicySet;
use crate::store::{ObjectKey, ObjectRow, Report, Store};
use clap::Parser;
use sts_backup_api::report::COVERAGE;

#[derive(Debug, Parser)]
struct ClustersLine {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: Clusters,
}

#[derive(Debug, Parser)]
struct FleetLine {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: FleetView,
}

#[derive(Debug, Parser)]
struct PoliciesLine {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: Policies,
}

struct Hub {
    directory: tempfile::TempDir,
    fleet: Arc<Fleet>,
    server: String,
}

const TOKEN: &str = "0123456789abcdef";

impl Hub {
    /// Over TLS and with a token, where it is to be reached from elsewhere.
    async fn start(is_remote: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("hub.db")).await.unwrap();
        let fleet = Arc::new(Fleet::open(store).await.unwrap());
        // A port that was free a moment ago.
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let mut config = ApiConfig { listen: free, token_file: None, certificates: None };
        if is_remote {
            let at = |name: &str| directory.path().join(name);
            std::fs::write(at("token"), TOKEN).unwrap();
            issue(&at("tls"));
            (config.token_file, config.certificates) = (Some(at("token")), Some(at("tls")));
        }
        tokio::spawn(bind(&config, Arc::clone(&fleet)).await.unwrap());
        let scheme = if is_remote { "https" } else { "http" };
        let name = if is_remote { "localhost" } else { "127.0.0.1" };
        Self { directory, fleet, server: format!("{scheme}://{name}:{}", free.port()) }
    }

    fn line(&self, words: &[&str]) -> Vec<String> {
        let own = ["hub", "--server", &self.server, "--output", "json"];
        own.iter().chain(words).map(ToString::to_string).collect()
    }

    async fn clusters(&self, words: &[&str]) -> Result<String, String> {
        let line = ClustersLine::parse_from(self.line(words));
        client::clusters(&line.connection, line.command).await.map_err(|error| chain(&error))
    }

    async fn fleet(&self, words: &[&str]) -> Result<String, String> {
        let line = FleetLine::parse_from(self.line(words));
        client::fleet(&line.connection, line.command).await.map_err(|error| chain(&error))
    }
}

/// A certificate of the API, with its authority.
fn issue(directory: &Path) {
    let now = clock::now();
    let authority = Authority::create(&"fleet.example.com".parse().unwrap(), now).unwrap();
    let authority = Authority::of(&authority).unwrap();
    let names = Holder::Hub(vec!["localhost".to_owned()]);
    let issued = authority.issue(&names, Duration::from_hours(24), now).unwrap();
    std::fs::create_dir(directory).unwrap();
    for (name, text) in
        [("tls.crt", &*issued.certificate), ("tls.key", &issued.key), ("ca.crt", authority.certificate())]
    {
        std::fs::write(directory.join(name), text).unwrap();
    }
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

#[tokio::test]
async fn clusters_are_added_labelled_revoked_and_removed() {
    let hub = Hub::start(false).await;
    let added = json(&hub.clusters(&["add", "prod", "--label", "env=test", "--label", "a=b"]).await.unwrap());
    assert_eq!((&added["state"], &added["labels"]["env"]), (&json!("Unknown"), &json!("test")));
    let refused = hub.clusters(&["add", "prod"]).await.unwrap_err();
    assert!(refused.contains("has the name prod already"), "{refused}");
    let labelled = json(&hub.clusters(&["label", "prod", "env=prod", "a-"]).await.unwrap());
    assert_eq!(labelled["labels"], json!({ "env": "prod" }));
    let revoked = json(&hub.clusters(&["revoke", "prod"]).await.unwrap());
    assert_eq!(revoked["state"], "Revoked");
    let refused = hub.clusters(&["confirm", "prod"]).await.unwrap_err();
    assert!(refused.contains("holds nothing back"), "{refused}");
    hub.clusters(&["remove", "prod"]).await.unwrap();
    let refused = hub.clusters(&["show", "prod"]).await.unwrap_err();
    assert!(refused.contains("there is no cluster prod"), "{refused}");
    let audit = json(&hub.fleet(&["audit"]).await.unwrap());
    let actions = audit.as_array().unwrap().iter().map(|entry| entry["action"].as_str().unwrap());
    let mut actions: Vec<_> = actions.collect();
    actions.sort_unstable();
    assert_eq!(actions, ["ClusterAdded", "ClusterLabelled", "ClusterRemoved", "ClusterRevoked"]);
}

#[tokio::test]
async fn backups_are_told_by_what_is_wrong_with_them() {
    let hub = Hub::start(false).await;
    hub.clusters(&["add", "prod"]).await.unwrap();
    let id = hub.fleet.named("prod").unwrap().id;
    let long_ago = "2020-01-01T00:00:00Z";
    let bodies = [
        ("fine", json!({ "rpoSeconds": 60, "lastSuccess": clock::now() })),
        ("overdue", json!({ "rpoSeconds": 60, "lastSuccess": long_ago })),
        ("unjudged", json!({ "lastSuccess": long_ago })),
        ("failed", json!({ "runs": [{ "id": "r", "started": long_ago, "result": "Failed" }] })),
    ];
    let object = |(name, body): (&str, serde_json::Value)| ObjectRow {
        key: ObjectKey {
            kind: "StatefulSetBackup".to_owned(),
            namespace: "shop".to_owned(),
            name: name.to_owned(),
        },
        body: body.to_string(),
        hash: vec![1],
    };
    let report = Report { objects: bodies.map(object).into(), ..Report::default() };
    hub.fleet.store.report(id, report).await.unwrap();
    let names = async |words: &[&str]| {
        let mut all = vec!["backups"];
        all.extend(words);
        let answer = json(&hub.fleet(&all).await.unwrap());
        let names =
            answer.as_array().unwrap().iter().map(|backup| backup["name"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    assert_eq!(names(&[]).await, ["failed", "fine", "overdue", "unjudged"]);
    assert_eq!(names(&["--overdue"]).await, ["overdue"]);
    assert_eq!(names(&["--failed"]).await, ["failed"]);
    assert_eq!(names(&["--overdue", "--failed"]).await, ["failed", "overdue"]);
    let refused = hub.fleet(&["backups", "--cluster", "other"]).await.unwrap_err();
    assert!(refused.contains("there is no cluster other"), "{refused}");
    let status = json(&hub.fleet(&["status"]).await.unwrap());
    let one = &status["clusters"][0];
    assert_eq!((&one["backups"], &one["overdue"], &one["failed"]), (&json!(4), &json!(1), &json!(1)));
}

#[tokio::test]
async fn a_cluster_shows_what_nothing_protects() {
    let hub = Hub::start(false).await;
    hub.clusters(&["add", "prod"]).await.unwrap();
    let shown = async || json(&hub.clusters(&["show", "prod"]).await.unwrap())["coverage"].clone();
    assert!(shown().await.is_null(), "its agent has not told yet");
    let coverage = json!({ "statefulSets": 12, "unprotected": 2, "firstUnprotected": ["shop/db", "shop/q"] });
    let key = ObjectKey { kind: COVERAGE.to_owned(), namespace: String::new(), name: COVERAGE.to_owned() };
    let object = ObjectRow { key, body: coverage.to_string(), hash: vec![1] };
    let id = hub.fleet.named("prod").unwrap().id;
    hub.fleet.store.report(id, Report { objects: vec![object], ..Report::default() }).await.unwrap();
    assert_eq!(shown().await, coverage);
    let status = json(&hub.fleet(&["status"]).await.unwrap());
    assert_eq!(status["clusters"][0]["coverage"], coverage);
}

#[tokio::test]
async fn a_policy_shows_who_has_it_and_who_does_not_yet() {
    let hub = Hub::start(false).await;
    hub.clusters(&["add", "prod"]).await.unwrap();
    let policies = hub.directory.path().join("policies");
    std::fs::create_dir(&policies).unwrap();
    let policy = json!({
        "apiVersion": "hub.sts-backup.io/v1alpha1", "kind": "FleetPolicy", "metadata": { "name": "gold" },
        "spec": { "policy": { "template": { "spec": {} } } },
    });
    std::fs::write(policies.join("gold.yaml"), policy.to_string()).unwrap();
    hub.fleet.use_policies(PolicySet::load(&policies).unwrap(), clock::now()).await.unwrap();
    let line = PoliciesLine::parse_from(hub.line(&["show", "gold"]));
    let shown = json(&client::policies(&line.connection, line.command).await.unwrap());
    assert_eq!((&shown["pending"], &shown["active"]), (&json!(["prod"]), &json!([])));
    let line = PoliciesLine::parse_from(hub.line(&["diff"]));
    let differs = json(&client::policies(&line.connection, line.command).await.unwrap());
    assert_eq!(differs[0]["name"], "gold");
    let line = PoliciesLine::parse_from(hub.line(&["show", "tin"]));
    let refused = client::policies(&line.connection, line.command).await.unwrap_err().to_string();
    assert!(refused.contains("there is no fleet policy tin"), "{refused}");
}

#[tokio::test]
async fn from_elsewhere_only_who_has_the_token_and_trusts_the_certificate_is_answered() {
    let hub = Hub::start(true).await;
    let at = |name: &str| hub.directory.path().join(name).to_string_lossy().into_owned();
    let (authority, token) = (at("tls/ca.crt"), at("token"));
    let refused = hub.clusters(&["list", "--ca-file", &authority]).await.unwrap_err();
    assert!(refused.contains("the token is missing or wrong"), "{refused}");
    std::fs::write(at("other"), "0123456789abcdeX").unwrap();
    let refused =
        hub.clusters(&["list", "--ca-file", &authority, "--token-file", &at("other")]).await.unwrap_err();
    assert!(refused.contains("the token is missing or wrong"), "{refused}");
    let refused = hub.clusters(&["list", "--token-file", &token]).await.unwrap_err();
    assert!(refused.contains("certificate"), "{refused}");
    assert_eq!(
        hub.clusters(&["list", "--ca-file", &authority, "--token-file", &token]).await.unwrap(),
        "[]\n"
    );
}

#[tokio::test]
async fn without_a_hub_the_commands_say_where_they_looked() {
    let hub = Hub::start(false).await;
    let line = ClustersLine::parse_from(["hub", "--server", "http://127.0.0.1:1", "list"]);
    let refused = chain(&client::clusters(&line.connection, line.command).await.unwrap_err());
    assert!(refused.contains("ask the hub at http://127.0.0.1:1"), "{refused}");
    assert_eq!(hub.clusters(&["list"]).await.unwrap(), "[]\n");
}
