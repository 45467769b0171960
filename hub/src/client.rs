//! The commands that ask a hub that runs: what they ask for, and how the answer is shown.

mod tables;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;
use reqwest::{Client, Method};
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sts_backup_api::identity::ClusterId;

use crate::api::{
    AuditEntry, BackupAnswer, BackupQuery, ClusterAnswer, ClusterDetail, FleetAnswer, HistoryQuery,
    NewCluster, PolicyAnswer, RestoreAnswer, RunAnswer,
};

/// Where the hub is, and how its answers are shown.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Hub")]
pub struct Connection {
    /// URL of the hub's API
    #[arg(
        long,
        global = true,
        env = "STSB_SERVER",
        value_name = "URL",
        default_value = "http://127.0.0.1:9444"
    )]
    server: String,
    /// File with the token of the hub's API
    #[arg(long, global = true, env = "STSB_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// File with the authority of the API's certificate
    #[arg(long, global = true, env = "STSB_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Form of the answer
    #[arg(short, long, global = true, value_enum, default_value_t = Form::Table)]
    output: Form,
}

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Form {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Clusters of the fleet.
#[derive(Debug, clap::Subcommand)]
pub enum Clusters {
    /// Let a cluster in: its certificate carries the id that this prints
    Add {
        /// Name of the cluster, such as prod-eu-1
        name: String,
        /// Label that policies select clusters by; may be repeated
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
        labels: Vec<(String, String)>,
        /// Id that its certificate carries [default: a new one]
        #[arg(long, value_name = "UUID")]
        id: Option<ClusterId>,
    },
    /// List the clusters
    List,
    /// Show a cluster, what is placed on it, and what its agent has made of that
    Show {
        /// Name of the cluster
        name: String,
    },
    /// Change labels of a cluster: KEY=VALUE sets one, KEY- takes one away
    Label {
        /// Name of the cluster
        name: String,
        /// Changes
        #[arg(required = true, value_name = "CHANGE", value_parser = change)]
        changes: Vec<(String, Option<String>)>,
    },
    /// Confirm what the agent of a cluster holds back
    Confirm {
        /// Name of the cluster
        name: String,
    },
    /// Refuse a cluster from now on, and end its session
    Revoke {
        /// Name of the cluster
        name: String,
    },
    /// Forget a cluster; what it has, stays in it
    Remove {
        /// Name of the cluster
        name: String,
    },
}

/// The state of the fleet.
#[derive(Debug, clap::Subcommand)]
pub enum FleetView {
    /// Show all clusters with their sums
    Status,
    /// List backups of all clusters
    Backups {
        /// Of this cluster only
        #[arg(long)]
        cluster: Option<String>,
        /// Those without a recovery point that is recent enough
        #[arg(long)]
        overdue: bool,
        /// Those whose newest run failed
        #[arg(long)]
        failed: bool,
    },
    /// List runs that have ended, newest first
    Runs {
        /// Of this cluster only
        #[arg(long)]
        cluster: Option<String>,
        /// At most so many
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: u32,
    },
    /// List restores
    Restores,
    /// List who did what
    Audit,
}

/// The fleet policies in use.
#[derive(Debug, clap::Subcommand)]
pub enum Policies {
    /// List the policies
    List,
    /// Show a policy and which clusters have it
    Show {
        /// Name of the policy
        name: String,
    },
    /// List what clusters do not have as it is wanted, and why
    Diff,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE, such as env=production")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn change(text: &str) -> Result<(String, Option<String>), String> {
    if let Some((key, value)) = text.split_once('=') {
        return Ok((key.to_owned(), Some(value.to_owned())));
    }
    let key = text.strip_suffix('-').ok_or("write KEY=VALUE to set a label, or KEY- to take it away")?;
    Ok((key.to_owned(), None))
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// A file cannot be used.
    #[error("use {}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// TLS cannot be set up.
    #[error("set up TLS")]
    Tls(#[from] rustls::Error),
    /// The hub does not answer.
    #[error("ask the hub at {server}: name it with --server, or run this where the hub runs")]
    Ask {
        /// Its URL.
        server: String,
        /// Why not.
        #[source]
        source: reqwest::Error,
    },
    /// The hub refuses.
    #[error("{0}")]
    Refused(String),
}

/// Asks a hub.
struct Hub<'a> {
    connection: &'a Connection,
    client: Client,
    token: Option<String>,
}

impl<'a> Hub<'a> {
    fn of(connection: &'a Connection) -> Result<Self, ClientError> {
        let file = |path: &PathBuf, reason: String| ClientError::File { path: path.clone(), reason };
        let mut roots = RootCertStore::empty();
        if let Some(path) = &connection.ca_file {
            let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
            for authority in read.map_err(|error| file(path, error.to_string()))? {
                roots.add(authority)?;
            }
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let client = Client::builder().use_preconfigured_tls(tls).no_proxy().build();
        let client =
            client.map_err(|source| ClientError::Ask { server: connection.server.clone(), source })?;
        let token = connection.token_file.as_ref().map(|path| {
            let read = std::fs::read_to_string(path).map_err(|error| file(path, error.to_string()))?;
            Ok::<_, ClientError>(read.trim().to_owned())
        });
        Ok(Self { connection, client, token: token.transpose()? })
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        query: &impl Serialize,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        let server = &self.connection.server;
        let asked = |source| ClientError::Ask { server: server.clone(), source };
        let refused = |reason: String| ClientError::Refused(reason);
        let mut url: reqwest::Url = server.parse().map_err(|_| refused(format!("{server} is no URL")))?;
        url.path_segments_mut()
            .map_err(|()| refused(format!("{server} is no URL of a hub")))?
            .pop_if_empty()
            .push("v1")
            .extend(path);
        let mut request = self.client.request(method, url).query(query);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.map_err(asked)?;
        if response.status().is_success() {
            return response.json().await.map_err(asked);
        }
        let status = response.status();
        let said: Value = response.json().await.unwrap_or_default();
        Err(refused(
            said["error"].as_str().map_or_else(|| format!("the hub answers {status}"), str::to_owned),
        ))
    }

    async fn get<T: DeserializeOwned>(&self, path: &[&str]) -> Result<T, ClientError> {
        self.ask(Method::GET, path, &(), None::<&()>).await
    }

    async fn post<T: DeserializeOwned>(
        &self,
        path: &[&str],
        body: &(impl Serialize + Sync),
    ) -> Result<T, ClientError> {
        self.ask(Method::POST, path, &(), Some(body)).await
    }

    fn show<T: Serialize>(&self, answer: &T, table: impl FnOnce(&T) -> String) -> String {
        match self.connection.output {
            Form::Json => serde_json::to_string_pretty(answer).expect("answers are JSON") + "\n",
            Form::Table => table(answer),
        }
    }
}

/// Carries out a command on clusters; what it prints.
///
/// # Errors
/// If the hub does not answer, or refuses.
pub async fn clusters(connection: &Connection, command: Clusters) -> Result<String, ClientError> {
    let hub = Hub::of(connection)?;
    let one =
        |answer: &ClusterAnswer| hub.show(answer, |answer| tables::clusters(std::slice::from_ref(answer)));
    Ok(match command {
        Clusters::Add { name, labels, id } => {
            let id = id.map(|id| id.to_string());
            let new = NewCluster { name, id, labels: labels.into_iter().collect() };
            one(&hub.post(&["clusters"], &new).await?)
        }
        Clusters::List => {
            let answer: Vec<ClusterAnswer> = hub.get(&["clusters"]).await?;
            hub.show(&answer, |answer| tables::clusters(answer))
        }
        Clusters::Show { name } => {
            let answer: ClusterDetail = hub.get(&["clusters", &name]).await?;
            hub.show(&answer, tables::cluster)
        }
        Clusters::Label { name, changes } => {
            let changes: BTreeMap<_, _> = changes.into_iter().collect();
            one(&hub.post(&["clusters", &name, "labels"], &changes).await?)
        }
        Clusters::Confirm { name } => one(&hub.post(&["clusters", &name, "confirm"], &()).await?),
        Clusters::Revoke { name } => one(&hub.post(&["clusters", &name, "revoke"], &()).await?),
        Clusters::Remove { name } => {
            let path = ["clusters", &name];
            hub.ask::<Value>(Method::DELETE, &path, &(), None::<&()>).await?;
            format!("{name}: removed here; what it has, stays in it\n")
        }
    })
}

/// Carries out a command on the fleet; what it prints.
///
/// # Errors
/// If the hub does not answer, or refuses.
pub async fn fleet(connection: &Connection, command: FleetView) -> Result<String, ClientError> {
    let hub = Hub::of(connection)?;
    Ok(match command {
        FleetView::Status => {
            let answer: FleetAnswer = hub.get(&["fleet"]).await?;
            hub.show(&answer, tables::fleet)
        }
        FleetView::Backups { cluster, overdue, failed } => {
            let query = BackupQuery { cluster, overdue, failed };
            let answer: Vec<BackupAnswer> = hub.ask(Method::GET, &["backups"], &query, None::<&()>).await?;
            hub.show(&answer, |answer| tables::backups(answer))
        }
        FleetView::Runs { cluster, limit } => {
            let query = HistoryQuery { cluster, limit: Some(limit) };
            let answer: Vec<RunAnswer> = hub.ask(Method::GET, &["runs"], &query, None::<&()>).await?;
            hub.show(&answer, |answer| tables::runs(answer))
        }
        FleetView::Restores => {
            let answer: Vec<RestoreAnswer> = hub.get(&["restores"]).await?;
            hub.show(&answer, |answer| tables::restores(answer))
        }
        FleetView::Audit => {
            let answer: Vec<AuditEntry> = hub.get(&["audit"]).await?;
            hub.show(&answer, |answer| tables::audit(answer))
        }
    })
}

/// Carries out a command on policies; what it prints.
///
/// # Errors
/// If the hub does not answer, or refuses.
pub async fn policies(connection: &Connection, command: Policies) -> Result<String, ClientError> {
    let hub = Hub::of(connection)?;
    Ok(match command {
        Policies::List => {
            let answer: Vec<PolicyAnswer> = hub.get(&["policies"]).await?;
            hub.show(&answer, |answer| tables::policies(answer))
        }
        Policies::Show { name } => {
            let answer: PolicyAnswer = hub.get(&["policies", &name]).await?;
            hub.show(&answer, tables::policy)
        }
        Policies::Diff => {
            let answer: Vec<PolicyAnswer> = hub.get(&["policies"]).await?;
            let differs = |policy: &PolicyAnswer| !(policy.pending.is_empty() && policy.rejected.is_empty());
            let answer: Vec<_> = answer.into_iter().filter(differs).collect();
            hub.show(&answer, |answer| tables::diff(answer))
        }
    })
}
