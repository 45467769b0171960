//! What a program is told: defaults, then the file, then the environment, then flags, each over the one before.
//!
//! It knows how keys are spelled in each layer and where a value came from; what keys there are and what they mean, the
//! programs know. It reads the file it is given, but never the process's environment: that is an argument, so that tests
//! can say what it holds.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use figment::error::Kind;
use figment::providers::{Format, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Error, Figment, Metadata, Profile, Provider};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The process's environment, as far as it is text.
#[must_use]
pub fn environment() -> BTreeMap<String, String> {
    let text =
        |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
    std::env::vars_os().filter_map(text).collect()
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

/// All layers of a configuration.
#[derive(Debug)]
pub struct Layers {
    figment: Figment,
    prefix: &'static str,
}

impl Layers {
    /// Lays flags over the environment, that over the file, and that over the defaults. A variable counts whose name begins
    /// with `prefix`.
    ///
    /// # Errors
    /// If the file cannot be read, or is no TOML.
    pub fn load(
        prefix: &'static str,
        file: Option<&Path>,
        environment: &BTreeMap<String, String>,
        defaults: &impl Serialize,
        flags: &impl Serialize,
    ) -> Result<Self, ConfigError> {
        let defaults = Layer::of("default", defaults);
        let variables = Layer::of_environment(prefix, environment, &defaults);
        let mut figment = Figment::from(defaults);
        if let Some(path) = file {
            let text = std::fs::read_to_string(path);
            let text = text.map_err(|source| ConfigError::File { path: path.to_owned(), source })?;
            figment = figment.merge(Layer::of_file(path, &text)?);
        }
        let figment = figment.merge(variables).merge(Layer::of_flags(flags));
        Ok(Self { figment, prefix })
    }

    /// What they say together.
    ///
    /// # Errors
    /// If a key is unknown or missing, or its value is of another type.
    pub fn extract<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        self.figment.extract().map_err(|error| self.unusable(&error))
    }

    /// A number that is no limit when it is large.
    ///
    /// # Errors
    /// If it is not from 1 to a million.
    pub fn number(&self, key: &str, value: i64) -> Result<usize, ConfigError> {
        self.within(key, value, 1..=1_000_000).map(|value| usize::try_from(value).unwrap_or(usize::MAX))
    }

    /// A span of at least a second and at most an hour.
    ///
    /// # Errors
    /// If it is shorter or longer.
    pub fn seconds(&self, key: &str, value: i64) -> Result<Duration, ConfigError> {
        self.within(key, value, 1..=3600).map(Duration::from_secs)
    }

    /// An address to listen on.
    ///
    /// # Errors
    /// If it is no IP address with a port.
    pub fn address(&self, key: &str, value: &str) -> Result<std::net::SocketAddr, ConfigError> {
        value.parse().map_err(|_| {
            let remedy = "write them as 0.0.0.0:9090 or [::]:9090; a host name is not looked up";
            self.refuse(key, value, "it is not an IP address with a port", remedy)
        })
    }

    /// Directives for the log.
    ///
    /// # Errors
    /// If they do not parse.
    pub fn directives(&self, key: &str, value: &str, example: &str) -> Result<(), ConfigError> {
        crate::telemetry::filter(value).map(drop).map_err(|error| {
            let remedy = format!("write a level, or levels by target such as {example}");
            self.refuse(key, value, &error.to_string(), &remedy)
        })
    }

    /// A number of this range.
    ///
    /// # Errors
    /// If it is not.
    pub fn within(&self, key: &str, value: i64, range: RangeInclusive<i64>) -> Result<u64, ConfigError> {
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

    /// The error that says why a value is refused, and where it comes from.
    #[must_use]
    pub fn refuse(&self, key: &str, value: &str, reason: &str, remedy: &str) -> ConfigError {
        ConfigError::Value {
            key: key.to_owned(),
            value: value.to_owned(),
            origin: self.origin_of(key, self.figment.find_metadata(key)),
            reason: reason.to_owned(),
            remedy: remedy.to_owned(),
        }
    }

    /// An error of the layers as one of the configuration.
    fn unusable(&self, error: &Error) -> ConfigError {
        let mut key = error.path.join(".");
        let reason = if let Kind::UnknownField(field, known) = &error.kind {
            // The path ends at the table for some sources, and at the key for others.
            if error.path.last() != Some(field) {
                key = if key.is_empty() { field.clone() } else { format!("{key}.{field}") };
            }
            format!("there is no such key, only {}", known.join(", "))
        } else if let Kind::UnknownVariant(found, known) = &error.kind {
            format!("{found} is not {}", known.join(" or "))
        } else if let Kind::InvalidType(found, wanted) = &error.kind {
            format!("it is {found}, not {}", if wanted == "i64" { "a whole number" } else { wanted })
        } else {
            error.kind.to_string()
        };
        ConfigError::Layer {
            place: format!("{key} ({})", self.origin_of(&key, error.metadata.as_ref())),
            reason,
        }
    }

    /// Where a key's value comes from, in words that say what to edit.
    fn origin_of(&self, key: &str, metadata: Option<&Metadata>) -> String {
        match metadata.map(|metadata| metadata.name.as_ref()) {
            Some(ENVIRONMENT) => format!("environment variable {}", variable_of(self.prefix, key)),
            Some(COMMAND_LINE) => format!("flag {}", flag_of(key)),
            Some(other) => other.to_owned(),
            None => "unknown origin".to_owned(),
        }
    }
}

const ENVIRONMENT: &str = "environment";
const COMMAND_LINE: &str = "command line";

/// What one place says.
struct Layer {
    name: String,
    keys: Dict,
}

impl Layer {
    /// What our own `keys` hold, under a name for people.
    fn of(name: &str, keys: &impl Serialize) -> Self {
        let keys = Value::serialize(keys).expect("strings and numbers have values");
        Self { name: name.to_owned(), keys: keys.into_dict().expect("a struct is a table") }
    }

    /// What the flags say.
    fn of_flags(flags: &impl Serialize) -> Self {
        let mut layer = Self::of(COMMAND_LINE, flags);
        // A table without a flag says nothing, also not that it is a table.
        layer.keys.retain(|_, value| value.as_dict().is_none_or(|table| !table.is_empty()));
        layer
    }

    /// What the text of a configuration file says.
    fn of_file(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let name = format!("file {}", path.display());
        match Toml::from_str(text) {
            Ok(keys) => Ok(Self { name, keys }),
            Err(error) => Err(ConfigError::Layer { place: name, reason: error.to_string() }),
        }
    }

    /// What the variables `STSB_LISTEN`, `STSB_LEASE__NAME` and so on say. A variable is text: it becomes a number
    /// where the default is one, and nowhere else, as a namespace may well be called `42`.
    fn of_environment(prefix: &str, environment: &BTreeMap<String, String>, defaults: &Self) -> Self {
        let defaults = Value::from(defaults.keys.clone());
        let mut keys = Dict::new();
        for (name, text) in environment {
            let Some(name) = name.strip_prefix(prefix).filter(|name| !is_service_link(name)) else {
                continue;
            };
            let key = name.to_lowercase().replace("__", ".");
            let numeric = defaults.find_ref(&key).is_some_and(|default| default.to_i128().is_some());
            let number = text.trim().parse::<i64>().ok().filter(|_| numeric);
            insert(&mut keys, &key, number.map_or_else(|| Value::from(text.as_str()), Value::from));
        }
        Self { name: ENVIRONMENT.to_owned(), keys }
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, Error> {
        Ok(Map::from([(Profile::Default, self.keys.clone())]))
    }
}

/// kubelet sets such variables for every Service of the namespace: one that is called `stsb-hub` configures nothing.
fn is_service_link(name: &str) -> bool {
    let link = |suffix: &str| name.split_once(suffix).is_some_and(|(service, _)| !service.is_empty());
    link("_SERVICE_HOST") || link("_SERVICE_PORT") || name.ends_with("_PORT") || link("_PORT_")
}

fn insert(keys: &mut Dict, key: &str, value: Value) {
    let Some((table, rest)) = key.split_once('.') else {
        keys.insert(key.to_owned(), value);
        return;
    };
    let table = keys.entry(table.to_owned()).or_insert_with(|| Dict::new().into());
    // Text where a table belongs stays as it is, and is refused by its type.
    if let Value::Dict(_, table) = table {
        insert(table, rest, value);
    }
}

/// The variable that sets a key.
#[must_use]
pub fn variable_of(prefix: &str, key: &str) -> String {
    format!("{prefix}{}", key.replace('.', "__").to_uppercase())
}

/// The flag that sets a key.
#[must_use]
pub fn flag_of(key: &str) -> String {
    format!("--{}", key.replace(['.', '_'], "-"))
}
