//! What the hub is told, complete and valid. Keys, layers and origins are as the agent's.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sts_backup_api::identity::TrustDomain;
use sts_backup_service::config::{ConfigError, Layers};
use sts_backup_service::telemetry::LogFormat;

#[cfg(test)]
mod tests;

/// Every variable of the environment that sets a key begins with this.
const PREFIX: &str = "STSB_HUB_";

/// The hub's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where agents connect to.
    pub listen: SocketAddr,
    /// Where health and metrics are served.
    pub http_listen: SocketAddr,
    /// Where people and programs ask for the fleet's state, and change it.
    pub api: ApiConfig,
    /// What the certificates of all clusters belong to.
    pub trust_domain: TrustDomain,
    /// Directory with `tls.crt`, `tls.key` and `ca.crt` for the link.
    pub certificates: PathBuf,
    /// Directory with the fleet policies.
    pub policies: PathBuf,
    /// The database file.
    pub database: PathBuf,
    /// The form of the log.
    pub log_format: LogFormat,
    /// The log's filter directives.
    pub log: String,
    /// The pause between two heartbeats of an agent.
    pub heartbeat: Duration,
    /// How long agents have to leave before the hub ends.
    pub shutdown: Duration,
    /// How long history and audit log are kept.
    pub history: Duration,
    /// For how many clusters the metrics have series of their own.
    pub metrics_clusters: usize,
}

/// How the API is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiConfig {
    /// Its address. Only with a token and certificates is it any but a loopback one.
    pub listen: SocketAddr,
    /// File with the token that every request must carry.
    pub token_file: Option<PathBuf>,
    /// Directory with `tls.crt` and `tls.key`.
    pub certificates: Option<PathBuf>,
}

/// The configuration's keys as flags; what is absent is left to the layers below.
#[derive(Clone, Debug, Default, Serialize, clap::Args)]
#[command(next_help_heading = "Configuration")]
pub struct Flags {
    /// Address and port that agents connect to [default: 0.0.0.0:9443]
    #[arg(long, value_name = "ADDRESS:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<String>,
    /// Address and port that serve /healthz, /readyz and /metrics [default: 0.0.0.0:9090]
    #[arg(long, value_name = "ADDRESS:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    http_listen: Option<String>,
    #[command(flatten)]
    api: ApiFlags,
    /// Name of what all certificates of the fleet belong to, such as fleet.example.com
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    trust_domain: Option<String>,
    /// Directory with the hub's tls.crt and tls.key and the fleet's ca.crt [default: /etc/sts-backup-hub/tls]
    #[arg(long, value_name = "DIRECTORY")]
    #[serde(skip_serializing_if = "Option::is_none")]
    certificates: Option<String>,
    /// Directory with the fleet policies [default: /etc/sts-backup-hub/policies]
    #[arg(long, value_name = "DIRECTORY")]
    #[serde(skip_serializing_if = "Option::is_none")]
    policies: Option<String>,
    /// Database file [default: /var/lib/sts-backup-hub/hub.db]
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    database: Option<String>,
    /// Form of the log on stderr [default: text]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    log_format: Option<LogFormat>,
    /// What to log, such as `warn,sts_backup_hub=debug` [default: info]
    #[arg(long, value_name = "DIRECTIVES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    log: Option<String>,
    /// Pause between two heartbeats of an agent [default: 30]
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    heartbeat_seconds: Option<i64>,
    /// Time that agents have to leave after SIGTERM before the hub ends [default: 10]
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    shutdown_seconds: Option<i64>,
    /// Days that history and audit log are kept [default: 90]
    #[arg(long, value_name = "DAYS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    history_days: Option<i64>,
    /// Number of clusters that have series of their own in the metrics [default: 1000]
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics_clusters: Option<i64>,
}

impl Flags {
    /// The directory with the fleet policies, where a flag names it.
    #[must_use]
    pub fn policies(&self) -> Option<&str> {
        self.policies.as_deref()
    }
}

#[derive(Clone, Debug, Default, Serialize, clap::Args)]
struct ApiFlags {
    /// Address and port of the API; any but a loopback one needs a token and certificates [default: 127.0.0.1:9444]
    #[arg(id = "api_listen", long = "api-listen", value_name = "ADDRESS:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<String>,
    /// File with the token that requests to the API must carry
    #[arg(id = "api_token_file", long = "api-token-file", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    token_file: Option<String>,
    /// Directory with tls.crt and tls.key of the API
    #[arg(id = "api_certificates", long = "api-certificates", value_name = "DIRECTORY")]
    #[serde(skip_serializing_if = "Option::is_none")]
    certificates: Option<String>,
}

/// The configuration as it is written. Empty text: none.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    listen: String,
    http_listen: String,
    trust_domain: String,
    certificates: String,
    policies: String,
    database: String,
    log_format: LogFormat,
    log: String,
    heartbeat_seconds: i64,
    shutdown_seconds: i64,
    history_days: i64,
    metrics_clusters: i64,
    api: WrittenApi,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenApi {
    listen: String,
    token_file: String,
    certificates: String,
}

impl Written {
    fn defaults() -> Self {
        Self {
            listen: "0.0.0.0:9443".to_owned(),
            http_listen: "0.0.0.0:9090".to_owned(),
            trust_domain: String::new(),
            certificates: "/etc/sts-backup-hub/tls".to_owned(),
            policies: "/etc/sts-backup-hub/policies".to_owned(),
            database: "/var/lib/sts-backup-hub/hub.db".to_owned(),
            log_format: LogFormat::Text,
            log: "info".to_owned(),
            heartbeat_seconds: 30,
            shutdown_seconds: 10,
            history_days: 90,
            metrics_clusters: 1000,
            api: WrittenApi {
                listen: "127.0.0.1:9444".to_owned(),
                token_file: String::new(),
                certificates: String::new(),
            },
        }
    }
}

/// Lays flags over the environment, that over the file, and that over the defaults, and validates the result.
///
/// # Errors
/// If the file cannot be read, a key is unknown, or a value is not one that its key takes.
pub fn load(
    file: Option<&Path>,
    environment: &BTreeMap<String, String>,
    flags: &Flags,
) -> Result<Config, ConfigError> {
    let layers = Layers::load(PREFIX, file, environment, &Written::defaults(), flags)?;
    check(&layers, layers.extract()?)
}

fn check(layers: &Layers, written: Written) -> Result<Config, ConfigError> {
    let trust_domain = written.trust_domain.parse().map_err(|_| {
        let remedy = "write the name that `pki init` was told, such as fleet.example.com";
        layers.refuse("trust_domain", &written.trust_domain, "it names no trust domain", remedy)
    })?;
    layers.directives("log", &written.log, "warn,sts_backup_hub=debug")?;
    let some = |path: &str| Some(PathBuf::from(path)).filter(|_| !path.is_empty());
    let api = ApiConfig {
        listen: layers.address("api.listen", &written.api.listen)?,
        token_file: some(&written.api.token_file),
        certificates: some(&written.api.certificates),
    };
    if !api.listen.ip().is_loopback() && (api.token_file.is_none() || api.certificates.is_none()) {
        let reason = "others could reach it, and it has no api.token_file or no api.certificates";
        let remedy = "set both, or listen on 127.0.0.1";
        return Err(layers.refuse("api.listen", &written.api.listen, reason, remedy));
    }
    let days = layers.within("history_days", written.history_days, 1..=3650)?;
    Ok(Config {
        listen: layers.address("listen", &written.listen)?,
        http_listen: layers.address("http_listen", &written.http_listen)?,
        api,
        trust_domain,
        certificates: written.certificates.into(),
        policies: written.policies.into(),
        database: written.database.into(),
        log_format: written.log_format,
        log: written.log,
        heartbeat: layers.seconds("heartbeat_seconds", written.heartbeat_seconds)?,
        shutdown: layers.seconds("shutdown_seconds", written.shutdown_seconds)?,
        history: Duration::from_hours(24 * days),
        metrics_clusters: layers.number("metrics_clusters", written.metrics_clusters)?,
    })
}

impl Config {
    /// The configuration as a file that gives it again.
    ///
    /// # Panics
    /// Never: strings, numbers and tables are always TOML.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let path = |path: &Path| path.display().to_string();
        let some = |at: &Option<PathBuf>| at.as_deref().map(path).unwrap_or_default();
        let written = Written {
            listen: self.listen.to_string(),
            http_listen: self.http_listen.to_string(),
            trust_domain: self.trust_domain.to_string(),
            certificates: path(&self.certificates),
            policies: path(&self.policies),
            database: path(&self.database),
            log_format: self.log_format,
            log: self.log.clone(),
            heartbeat_seconds: whole(self.heartbeat.as_secs()),
            shutdown_seconds: whole(self.shutdown.as_secs()),
            history_days: whole(self.history.as_secs() / 86_400),
            metrics_clusters: whole(self.metrics_clusters as u64),
            api: WrittenApi {
                listen: self.api.listen.to_string(),
                token_file: some(&self.api.token_file),
                certificates: some(&self.api.certificates),
            },
        };
        toml::to_string(&written).expect("strings, numbers and tables are always TOML")
    }
}
