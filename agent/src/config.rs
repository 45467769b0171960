//! What the agent is told: defaults, then the file, then the environment, then flags, each over the one before.
//!
//! It parses and validates once; units live in the types from here on.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
pub use sts_backup_service::config::ConfigError;
use sts_backup_service::config::Layers;
use sts_backup_service::telemetry::LogFormat;

pub use self::hook_profiles::HookProfile;
use self::hook_profiles::WrittenHookProfile;

mod hook_profiles;
#[cfg(test)]
mod tests;

/// The agent's configuration, complete and valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where health and metrics are served.
    pub listen: SocketAddr,
    /// Where the lease lives.
    pub namespace: String,
    /// This replica's name; the lease's holder is this with a random suffix, so that no two processes share one.
    pub identity: String,
    /// The form of the log.
    pub log_format: LogFormat,
    /// The log's filter directives.
    pub log: String,
    /// The lease that the replicas share.
    pub lease: LeaseConfig,
    /// How long the agent may thaw databases before it ends.
    pub shutdown: Duration,
    /// How many objects each controller works on at once.
    pub concurrent_reconciles: u16,
    /// How much of the storage the backups may take at once.
    pub limits: Limits,
    /// Hooks that policies name.
    pub hook_profiles: BTreeMap<String, HookProfile>,
    /// The link to a hub; none: there is none.
    pub link: Option<LinkConfig>,
}

/// The link to a hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkConfig {
    /// The hub's host name, as its certificate has it, and port.
    pub hub: String,
    /// Directory with `tls.crt`, `tls.key` and `ca.crt`.
    pub certificates: PathBuf,
    /// What the hub may do.
    pub guardrails: Guardrails,
}

/// What a hub may do in this cluster. Only the file says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Guardrails {
    /// The namespaces that its policies reach; empty: all.
    pub allowed_namespaces: Vec<String>,
    /// Its policies may hold commands for hooks, instead of names of hook profiles.
    pub allow_hub_commands: bool,
    /// The least `keepLast` of its policies, where they have a retention at all.
    pub min_keep_last: i64,
    /// The most policies that it may place.
    pub max_policies: usize,
}

impl Default for Guardrails {
    fn default() -> Self {
        Self {
            allowed_namespaces: Vec::new(),
            allow_hub_commands: false,
            min_keep_last: 0,
            max_policies: 100,
        }
    }
}

/// The most snapshots that may be under way, each from its order until it is ready; at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// In the cluster.
    pub cluster: usize,
    /// Of each CSI driver.
    pub driver: usize,
}

/// The lease that the replicas share; `retry` < `renew_deadline` < `duration`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseConfig {
    /// The lease's name.
    pub name: String,
    /// How long others wait after the last renewal before they take the lease over; whole seconds.
    pub duration: Duration,
    /// How long after its last renewal the leader still acts as one.
    pub renew_deadline: Duration,
    /// The time between two tries to get or to renew the lease.
    pub retry: Duration,
}

/// The configuration's keys as flags; what is absent is left to the layers below.
#[derive(Clone, Debug, Default, Serialize, clap::Args)]
#[command(next_help_heading = "Configuration")]
#[expect(clippy::doc_markdown, reason = "the comments are the flags' help, which is plain text")]
pub struct Flags {
    /// Address and port that serve /healthz, /readyz and /metrics [default: 0.0.0.0:9090]
    #[arg(long, value_name = "ADDRESS:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<String>,
    /// Namespace of the lease [default: $POD_NAMESPACE, or default]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<String>,
    /// This replica's name; a random suffix is added to it [default: $POD_NAME or $HOSTNAME]
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    identity: Option<String>,
    /// Form of the log on stderr [default: text]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    log_format: Option<LogFormat>,
    /// What to log, such as warn,sts_backup_agent=debug [default: info]
    #[arg(long, value_name = "DIRECTIVES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    log: Option<String>,
    #[command(flatten)]
    lease: LeaseFlags,
    /// Time to thaw databases after SIGTERM before the agent ends [default: 25]
    #[arg(long, value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    shutdown_seconds: Option<i64>,
    /// Number of objects each controller works on at once [default: 16]
    #[arg(long, value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    concurrent_reconciles: Option<i64>,
    #[command(flatten)]
    limits: LimitFlags,
}

#[derive(Clone, Debug, Default, Serialize, clap::Args)]
struct LimitFlags {
    /// Number of snapshots that may be under way in the cluster [default: 500]
    #[arg(long = "limits-snapshots", value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshots: Option<i64>,
    /// Number of snapshots that may be under way of each CSI driver [default: 100]
    #[arg(long = "limits-snapshots-per-driver", value_name = "NUMBER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshots_per_driver: Option<i64>,
}

#[derive(Clone, Debug, Default, Serialize, clap::Args)]
struct LeaseFlags {
    /// Name of the lease that the replicas share [default: sts-backup-agent]
    #[arg(id = "lease_name", long = "lease-name", value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// Time after the leader's last renewal until another replica takes over [default: 15]
    #[arg(long = "lease-duration-seconds", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_seconds: Option<i64>,
    /// Time after its last renewal until the leader gives up and ends [default: 10]
    #[arg(long = "lease-renew-deadline-seconds", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    renew_deadline_seconds: Option<i64>,
    /// Time between two tries to get or to renew the lease [default: 2]
    #[arg(long = "lease-retry-seconds", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_seconds: Option<i64>,
}

/// The configuration as it is written, in the file and by `check`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    listen: String,
    namespace: String,
    identity: String,
    log_format: LogFormat,
    log: String,
    shutdown_seconds: i64,
    concurrent_reconciles: i64,
    lease: WrittenLease,
    limits: WrittenLimits,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    hook_profiles: BTreeMap<String, WrittenHookProfile>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    link: Option<WrittenLink>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenLink {
    hub: String,
    certificates: String,
    #[serde(default)]
    guardrails: Guardrails,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenLimits {
    snapshots: i64,
    snapshots_per_driver: i64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenLease {
    name: String,
    duration_seconds: i64,
    renew_deadline_seconds: i64,
    retry_seconds: i64,
}

impl Written {
    /// The lowest layer. `POD_NAME` and `POD_NAMESPACE` are what the chart hands down; every pod has a `HOSTNAME`.
    fn defaults(environment: &BTreeMap<String, String>) -> Self {
        let first = |names: &[&str]| names.iter().find_map(|name| environment.get(*name)).cloned();
        Self {
            listen: "0.0.0.0:9090".to_owned(),
            namespace: first(&["POD_NAMESPACE"]).unwrap_or_else(|| "default".to_owned()),
            identity: first(&["POD_NAME", "HOSTNAME"]).unwrap_or_else(|| "sts-backup-agent".to_owned()),
            log_format: LogFormat::Text,
            log: "info".to_owned(),
            shutdown_seconds: 25,
            concurrent_reconciles: 16,
            lease: WrittenLease {
                name: "sts-backup-agent".to_owned(),
                duration_seconds: 15,
                renew_deadline_seconds: 10,
                retry_seconds: 2,
            },
            limits: WrittenLimits { snapshots: 500, snapshots_per_driver: 100 },
            hook_profiles: BTreeMap::new(),
            link: None,
        }
    }
}

/// Every variable of the environment that sets a key begins with this.
const PREFIX: &str = "STSB_";

/// Lays flags over the environment, that over the file, and that over the defaults, and validates the result.
///
/// # Errors
/// If the file cannot be read, a key is unknown, or a value is not one that its key takes.
pub fn load(
    file: Option<&Path>,
    environment: &BTreeMap<String, String>,
    flags: &Flags,
) -> Result<Config, ConfigError> {
    let layers = Layers::load(PREFIX, file, environment, &Written::defaults(environment), flags)?;
    check(&layers, layers.extract()?)
}

impl Config {
    /// The configuration as a file that gives it again.
    ///
    /// # Panics
    /// Never: strings, numbers, lists and tables are always TOML.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let Self {
            listen,
            namespace,
            identity,
            log_format,
            log,
            lease,
            shutdown,
            concurrent_reconciles,
            limits,
            hook_profiles,
            link,
        } = self;
        let number = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        let LeaseConfig { name, duration, renew_deadline, retry } = lease;
        let whole = |span: &Duration| i64::try_from(span.as_secs()).unwrap_or(i64::MAX);
        let written = Written {
            listen: listen.to_string(),
            namespace: namespace.clone(),
            identity: identity.clone(),
            log_format: *log_format,
            log: log.clone(),
            shutdown_seconds: whole(shutdown),
            concurrent_reconciles: i64::from(*concurrent_reconciles),
            lease: WrittenLease {
                name: name.clone(),
                duration_seconds: whole(duration),
                renew_deadline_seconds: whole(renew_deadline),
                retry_seconds: whole(retry),
            },
            limits: WrittenLimits {
                snapshots: number(limits.cluster),
                snapshots_per_driver: number(limits.driver),
            },
            hook_profiles: hook_profiles
                .iter()
                .map(|(name, profile)| (name.clone(), WrittenHookProfile::of(profile)))
                .collect(),
            link: link.as_ref().map(|link| WrittenLink {
                hub: link.hub.clone(),
                certificates: link.certificates.display().to_string(),
                guardrails: link.guardrails.clone(),
            }),
        };
        toml::to_string(&written).expect("strings, numbers, lists and tables are always TOML")
    }
}

/// The validation.
fn check(layers: &Layers, written: Written) -> Result<Config, ConfigError> {
    let Written {
        listen,
        namespace,
        identity,
        log_format,
        log,
        shutdown_seconds,
        concurrent_reconciles,
        lease,
        limits,
        hook_profiles,
        link,
    } = written;
    let listen = layers.address("listen", &listen)?;
    if !is_dns_label(&namespace) {
        let remedy = "write the name of the namespace that the agent runs in";
        return Err(layers.refuse("namespace", &namespace, "no namespace can have this name", remedy));
    }
    if identity.trim().is_empty() || identity.chars().any(char::is_control) {
        let remedy = "write a name that people recognise in the lease, such as the pod's";
        return Err(layers.refuse("identity", &identity, "it is no readable name", remedy));
    }
    layers.directives("log", &log, "warn,sts_backup_agent=debug")?;
    let concurrent = layers.within("concurrent_reconciles", concurrent_reconciles, 1..=1000)?;
    Ok(Config {
        listen,
        namespace,
        identity,
        log_format,
        log,
        lease: check_lease(layers, lease)?,
        shutdown: layers.seconds("shutdown_seconds", shutdown_seconds)?,
        concurrent_reconciles: u16::try_from(concurrent).expect("at most 1000"),
        limits: Limits {
            cluster: layers.number("limits.snapshots", limits.snapshots)?,
            driver: layers.number("limits.snapshots_per_driver", limits.snapshots_per_driver)?,
        },
        hook_profiles: hook_profiles
            .into_iter()
            .map(|(name, profile)| Ok((name.clone(), profile.check(&name, layers)?)))
            .collect::<Result<_, ConfigError>>()?,
        link: link.map(|link| check_link(layers, link)).transpose()?,
    })
}

fn check_link(layers: &Layers, written: WrittenLink) -> Result<LinkConfig, ConfigError> {
    let WrittenLink { hub, certificates, guardrails } = written;
    let (name, port) = hub.rsplit_once(':').unwrap_or_default();
    if name.is_empty() || port.parse::<u16>().is_err() || hub.contains('/') {
        let remedy = "write the host name that the hub's certificate has, such as hub.example.com:9443";
        return Err(layers.refuse("link.hub", &hub, "it is no host name with a port", remedy));
    }
    for namespace in &guardrails.allowed_namespaces {
        if !is_dns_label(namespace) {
            let key = "link.guardrails.allowed_namespaces";
            let remedy = "write the names of namespaces";
            return Err(layers.refuse(key, namespace, "no namespace can have this name", remedy));
        }
    }
    let key = "link.guardrails.min_keep_last";
    layers.within(key, guardrails.min_keep_last, 0..=100_000)?;
    Ok(LinkConfig { hub, certificates: certificates.into(), guardrails })
}

fn check_lease(layers: &Layers, written: WrittenLease) -> Result<LeaseConfig, ConfigError> {
    let WrittenLease { name, duration_seconds, renew_deadline_seconds, retry_seconds } = written;
    if name.len() > 253 || !name.split('.').all(is_dns_label) {
        let remedy = "write lower-case letters, digits, - and ., such as sts-backup-agent";
        return Err(layers.refuse("lease.name", &name, "no lease can have this name", remedy));
    }
    let duration = layers.seconds("lease.duration_seconds", duration_seconds)?;
    let renew_deadline = layers.seconds("lease.renew_deadline_seconds", renew_deadline_seconds)?;
    let retry = layers.seconds("lease.retry_seconds", retry_seconds)?;
    if renew_deadline >= duration {
        let reason = format!(
            "a leader must give up before others take over, after lease.duration_seconds = {duration_seconds}"
        );
        let remedy = "lower it, or raise lease.duration_seconds";
        let value = renew_deadline_seconds.to_string();
        return Err(layers.refuse("lease.renew_deadline_seconds", &value, &reason, remedy));
    }
    if retry >= renew_deadline {
        let reason =
            format!("no second try would fit before lease.renew_deadline_seconds = {renew_deadline_seconds}");
        let remedy = "lower it, or raise lease.renew_deadline_seconds";
        return Err(layers.refuse("lease.retry_seconds", &retry_seconds.to_string(), &reason, remedy));
    }
    Ok(LeaseConfig { name, duration, renew_deadline, retry })
}

/// RFC 1123, as Kubernetes has it.
fn is_dns_label(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&name.len())
        && name.chars().all(allowed)
        && !name.starts_with('-')
        && !name.ends_with('-')
}
