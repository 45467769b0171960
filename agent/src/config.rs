//! What the agent is told: defaults, then the file, then the environment, then flags, each over the one before.
//!
//! It parses and validates once; units live in the types from here on. It reads the file it is given, but never
//! the process's environment: that is an argument, so that tests can say what it holds.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use figment::Figment;
use serde::{Deserialize, Serialize};
use sts_backup_api::backup::{Hook, HookPods, OnError};

use self::layers::{Layer, origin_of, unusable};
use crate::telemetry;

mod layers;
#[cfg(test)]
mod tests;

/// The most words that the API server admits in a hook's command.
const MAX_ARGUMENTS: usize = 32;

/// The longest word that it admits there, bytes.
const MAX_ARGUMENT: usize = 8192;

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
    /// Hooks that policies name.
    pub hook_profiles: BTreeMap<String, HookProfile>,
}

/// Hooks that policies name: at least one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookProfile {
    /// Freezes the application.
    pub pre: Option<Hook>,
    /// Thaws it.
    pub post: Option<Hook>,
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

/// The form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line for people.
    Text,
    /// One JSON object a line.
    Json,
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

/// A configuration that cannot be used; the text says which key, which value, why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration file {} cannot be read: correct --config, or leave it out to run on the defaults", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A layer holds something that no key takes: an unknown key, a wrong type, broken TOML.
    #[error("{place}: {reason}; correct it there, or leave it out to have the default")]
    Layer {
        /// Key and layer, as far as they are known.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// A value is outside of what its key takes.
    #[error("{key} = {value} ({origin}): {reason}; {remedy}")]
    Value {
        /// The key, with its table.
        key: String,
        /// The refused value.
        value: String,
        /// The layer that it comes from.
        origin: String,
        /// Why it is refused.
        reason: String,
        /// What to do.
        remedy: String,
    },
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
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    hook_profiles: BTreeMap<String, WrittenHookProfile>,
}

/// Both hooks with what they have in common.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenHookProfile {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pre: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    post: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    container: Option<String>,
    #[serde(default = "default_hook_timeout_seconds")]
    timeout_seconds: i64,
    #[serde(default)]
    on_error: OnError,
    #[serde(default)]
    pods: HookPods,
}

fn default_hook_timeout_seconds() -> i64 {
    60
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
            hook_profiles: BTreeMap::new(),
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
    let defaults = Layer::of("default", &Written::defaults(environment));
    let variables = Layer::of_environment(environment, &defaults);
    let mut layers = Figment::from(defaults);
    if let Some(path) = file {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|source| ConfigError::File { path: path.to_owned(), source })?;
        layers = layers.merge(Layer::of_file(path, &text)?);
    }
    let layers = layers.merge(variables).merge(Layer::of_flags(flags));
    let written: Written = layers.extract().map_err(|error| unusable(&error))?;
    Checks { layers: &layers }.config(written)
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
            hook_profiles,
        } = self;
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
            hook_profiles: hook_profiles
                .iter()
                .map(|(name, profile)| (name.clone(), WrittenHookProfile::of(profile)))
                .collect(),
        };
        toml::to_string(&written).expect("strings, numbers, lists and tables are always TOML")
    }
}

impl WrittenHookProfile {
    fn of(profile: &HookProfile) -> Self {
        let HookProfile { pre, post } = profile;
        let command =
            |hook: &Option<Hook>| hook.as_ref().map(|hook| hook.command.clone()).unwrap_or_default();
        let common = pre.as_ref().or(post.as_ref());
        Self {
            pre: command(pre),
            post: command(post),
            container: common.and_then(|hook| hook.container_name.clone()),
            timeout_seconds: common.map_or_else(default_hook_timeout_seconds, |hook| hook.timeout_seconds),
            on_error: common.map(|hook| hook.on_error).unwrap_or_default(),
            pods: common.map(|hook| hook.pods).unwrap_or_default(),
        }
    }
}

/// The validation; it knows the layers so that it can say where a refused value comes from.
struct Checks<'a> {
    layers: &'a Figment,
}

impl Checks<'_> {
    fn config(&self, written: Written) -> Result<Config, ConfigError> {
        let Written {
            listen,
            namespace,
            identity,
            log_format,
            log,
            shutdown_seconds,
            concurrent_reconciles,
            lease,
            hook_profiles,
        } = written;
        let listen = listen.parse().map_err(|_| {
            let remedy = "write them as 0.0.0.0:9090 or [::]:9090; a host name is not looked up";
            self.refuse("listen", &listen, "it is not an IP address with a port", remedy)
        })?;
        if !is_dns_label(&namespace) {
            let remedy = "write the name of the namespace that the agent runs in";
            return Err(self.refuse("namespace", &namespace, "no namespace can have this name", remedy));
        }
        if identity.trim().is_empty() || identity.chars().any(char::is_control) {
            let remedy = "write a name that people recognise in the lease, such as the pod's";
            return Err(self.refuse("identity", &identity, "it is no readable name", remedy));
        }
        telemetry::filter(&log).map_err(|error| {
            let remedy = "write a level, or levels by target such as warn,sts_backup_agent=debug";
            self.refuse("log", &log, &error.to_string(), remedy)
        })?;
        let concurrent = self.within("concurrent_reconciles", concurrent_reconciles, 1..=1000)?;
        Ok(Config {
            listen,
            namespace,
            identity,
            log_format,
            log,
            lease: self.lease(lease)?,
            shutdown: self.seconds("shutdown_seconds", shutdown_seconds)?,
            concurrent_reconciles: u16::try_from(concurrent).expect("at most 1000"),
            hook_profiles: hook_profiles
                .into_iter()
                .map(|(name, profile)| Ok((name.clone(), self.hook_profile(&name, profile)?)))
                .collect::<Result<_, ConfigError>>()?,
        })
    }

    /// Within what the API server admits in a backup.
    fn hook_profile(&self, name: &str, written: WrittenHookProfile) -> Result<HookProfile, ConfigError> {
        let WrittenHookProfile { pre, post, container, timeout_seconds, on_error, pods } = written;
        let key = |field: &str| format!("hook_profiles.{name}{field}");
        if !is_dns_label(name) {
            let remedy = "write lower-case letters, digits and -, such as postgres";
            return Err(self.refuse(&key(""), name, "no policy can name it", remedy));
        }
        if pre.is_empty() && post.is_empty() {
            let remedy = "write pre and post, each as a list of a program and its arguments";
            return Err(self.refuse(&key(""), name, "it has no command", remedy));
        }
        for (field, command) in [(".pre", &pre), (".post", &post)] {
            if command.len() > MAX_ARGUMENTS || command.iter().any(|word| word.len() > MAX_ARGUMENT) {
                let reason = format!(
                    "it has more than {MAX_ARGUMENTS} words, or one of more than {MAX_ARGUMENT} bytes"
                );
                let remedy = "put a script into the image, and call that";
                return Err(self.refuse(&key(field), "a command", &reason, remedy));
            }
        }
        if let Some(container) = container.as_deref().filter(|container| !is_dns_label(container)) {
            let remedy = "write the name of a container, or leave it out";
            return Err(self.refuse(
                &key(".container"),
                container,
                "no container can have this name",
                remedy,
            ));
        }
        self.seconds(&key(".timeout_seconds"), timeout_seconds)?;
        let hook = |command: Vec<String>| {
            let container_name = container.clone();
            (!command.is_empty()).then(|| Hook { command, container_name, timeout_seconds, on_error, pods })
        };
        Ok(HookProfile { pre: hook(pre), post: hook(post) })
    }

    fn lease(&self, written: WrittenLease) -> Result<LeaseConfig, ConfigError> {
        let WrittenLease { name, duration_seconds, renew_deadline_seconds, retry_seconds } = written;
        if name.len() > 253 || !name.split('.').all(is_dns_label) {
            let remedy = "write lower-case letters, digits, - and ., such as sts-backup-agent";
            return Err(self.refuse("lease.name", &name, "no lease can have this name", remedy));
        }
        let duration = self.seconds("lease.duration_seconds", duration_seconds)?;
        let renew_deadline = self.seconds("lease.renew_deadline_seconds", renew_deadline_seconds)?;
        let retry = self.seconds("lease.retry_seconds", retry_seconds)?;
        if renew_deadline >= duration {
            let reason = format!(
                "a leader must give up before others take over, after lease.duration_seconds = {duration_seconds}"
            );
            let remedy = "lower it, or raise lease.duration_seconds";
            let value = renew_deadline_seconds.to_string();
            return Err(self.refuse("lease.renew_deadline_seconds", &value, &reason, remedy));
        }
        if retry >= renew_deadline {
            let reason = format!(
                "no second try would fit before lease.renew_deadline_seconds = {renew_deadline_seconds}"
            );
            let remedy = "lower it, or raise lease.renew_deadline_seconds";
            return Err(self.refuse("lease.retry_seconds", &retry_seconds.to_string(), &reason, remedy));
        }
        Ok(LeaseConfig { name, duration, renew_deadline, retry })
    }

    /// A span of at least a second and at most an hour.
    fn seconds(&self, key: &str, value: i64) -> Result<Duration, ConfigError> {
        self.within(key, value, 1..=3600).map(Duration::from_secs)
    }

    fn within(&self, key: &str, value: i64, range: RangeInclusive<i64>) -> Result<u64, ConfigError> {
        let (least, most) = (*range.start(), *range.end());
        u64::try_from(value).ok().filter(|_| range.contains(&value)).ok_or_else(|| {
            let reason = format!("it is not from {least} to {most}");
            self.refuse(
                key,
                &value.to_string(),
                &reason,
                &format!("write a whole number from {least} to {most}"),
            )
        })
    }

    fn refuse(&self, key: &str, value: &str, reason: &str, remedy: &str) -> ConfigError {
        ConfigError::Value {
            key: key.to_owned(),
            value: value.to_owned(),
            origin: origin_of(key, self.layers.find_metadata(key)),
            reason: reason.to_owned(),
            remedy: remedy.to_owned(),
        }
    }
}

/// RFC 1123, as Kubernetes has it.
fn is_dns_label(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&name.len())
        && name.chars().all(allowed)
        && !name.starts_with('-')
        && !name.ends_with('-')
}
