//! The layers of the configuration: what the file, the environment and the flags say, each with its origin.
//!
//! It knows how keys are spelled in each layer, and nothing of what values mean.

use std::collections::BTreeMap;
use std::path::Path;

use figment::error::Kind;
use figment::providers::{Format, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Error, Metadata, Profile, Provider};
use serde::Serialize;

use super::ConfigError;

/// Every variable of the environment that sets a key begins with this.
const PREFIX: &str = "STSB_";
const ENVIRONMENT: &str = "environment";
const COMMAND_LINE: &str = "command line";

/// What one place says.
pub(super) struct Layer {
    name: String,
    keys: Dict,
}

impl Layer {
    /// What our own `keys` hold, under a name for people.
    pub(super) fn of(name: &str, keys: &impl Serialize) -> Self {
        let keys = Value::serialize(keys).expect("strings and numbers have values");
        Self { name: name.to_owned(), keys: keys.into_dict().expect("a struct is a table") }
    }

    /// What the flags say.
    pub(super) fn of_flags(flags: &impl Serialize) -> Self {
        let mut layer = Self::of(COMMAND_LINE, flags);
        // A table without a flag says nothing, also not that it is a table.
        layer.keys.retain(|_, value| value.as_dict().is_none_or(|table| !table.is_empty()));
        layer
    }

    /// What the text of a configuration file says.
    pub(super) fn of_file(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let name = format!("file {}", path.display());
        match Toml::from_str(text) {
            Ok(keys) => Ok(Self { name, keys }),
            Err(error) => Err(ConfigError::Layer { place: name, reason: error.to_string() }),
        }
    }

    /// What the variables `STSB_LISTEN`, `STSB_LEASE__NAME` and so on say. A variable is text: it becomes a number
    /// where the default is one, and nowhere else, as a namespace may well be called `42`.
    pub(super) fn of_environment(environment: &BTreeMap<String, String>, defaults: &Self) -> Self {
        let defaults = Value::from(defaults.keys.clone());
        let mut keys = Dict::new();
        for (name, text) in environment {
            let Some(name) = name.strip_prefix(PREFIX).filter(|name| !is_service_link(name)) else {
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
pub(super) fn variable_of(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "__").to_uppercase())
}

/// The flag that sets a key.
pub(super) fn flag_of(key: &str) -> String {
    format!("--{}", key.replace(['.', '_'], "-"))
}

/// Where a key's value comes from, in words that say what to edit.
pub(super) fn origin_of(key: &str, metadata: Option<&Metadata>) -> String {
    match metadata.map(|metadata| metadata.name.as_ref()) {
        Some(ENVIRONMENT) => format!("environment variable {}", variable_of(key)),
        Some(COMMAND_LINE) => format!("flag {}", flag_of(key)),
        Some(other) => other.to_owned(),
        None => "unknown origin".to_owned(),
    }
}

/// An error of the layers as one of the configuration.
pub(super) fn unusable(error: &Error) -> ConfigError {
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
    ConfigError::Layer { place: format!("{key} ({})", origin_of(&key, error.metadata.as_ref())), reason }
}
