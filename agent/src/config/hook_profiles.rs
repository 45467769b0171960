//! Hooks that policies name, as the configuration has them: both hooks of a profile share all but their commands.

use serde::{Deserialize, Serialize};
use sts_backup_api::backup::{Hook, HookPods, OnError};
use sts_backup_service::config::{ConfigError, Layers};

use super::is_dns_label;

/// The most words that the API server admits in a hook's command.
const MAX_ARGUMENTS: usize = 32;

/// The longest word that it admits there, bytes.
const MAX_ARGUMENT: usize = 8192;

/// Hooks that policies name: at least one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookProfile {
    /// Freezes the application.
    pub pre: Option<Hook>,
    /// Thaws it.
    pub post: Option<Hook>,
}

/// A profile as it is written.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenHookProfile {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pre: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    post: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    container: Option<String>,
    #[serde(default = "default_timeout_seconds")]
    timeout_seconds: i64,
    #[serde(default)]
    on_error: OnError,
    #[serde(default)]
    pods: HookPods,
}

fn default_timeout_seconds() -> i64 {
    60
}

impl WrittenHookProfile {
    pub(super) fn of(profile: &HookProfile) -> Self {
        let HookProfile { pre, post } = profile;
        let command =
            |hook: &Option<Hook>| hook.as_ref().map(|hook| hook.command.clone()).unwrap_or_default();
        let common = pre.as_ref().or(post.as_ref());
        Self {
            pre: command(pre),
            post: command(post),
            container: common.and_then(|hook| hook.container_name.clone()),
            timeout_seconds: common.map_or_else(default_timeout_seconds, |hook| hook.timeout_seconds),
            on_error: common.map(|hook| hook.on_error).unwrap_or_default(),
            pods: common.map(|hook| hook.pods).unwrap_or_default(),
        }
    }

    /// The profile, if the API server admits its hooks in a backup.
    pub(super) fn check(self, name: &str, layers: &Layers) -> Result<HookProfile, ConfigError> {
        let Self { pre, post, container, timeout_seconds, on_error, pods } = self;
        let key = |field: &str| format!("hook_profiles.{name}{field}");
        if !is_dns_label(name) {
            let remedy = "write lower-case letters, digits and -, such as postgres";
            return Err(layers.refuse(&key(""), name, "no policy can name it", remedy));
        }
        if pre.is_empty() && post.is_empty() {
            let remedy = "write pre and post, each as a list of a program and its arguments";
            return Err(layers.refuse(&key(""), name, "it has no command", remedy));
        }
        for (field, command) in [(".pre", &pre), (".post", &post)] {
            if command.len() > MAX_ARGUMENTS || command.iter().any(|word| word.len() > MAX_ARGUMENT) {
                let reason = format!(
                    "it has more than {MAX_ARGUMENTS} words, or one of more than {MAX_ARGUMENT} bytes"
                );
                let remedy = "put a script into the image, and call that";
                return Err(layers.refuse(&key(field), "a command", &reason, remedy));
            }
        }
        if let Some(container) = container.as_deref().filter(|container| !is_dns_label(container)) {
            let remedy = "write the name of a container, or leave it out";
            let reason = "no container can have this name";
            return Err(layers.refuse(&key(".container"), container, reason, remedy));
        }
        layers.seconds(&key(".timeout_seconds"), timeout_seconds)?;
        let hook = |command: Vec<String>| {
            let container_name = container.clone();
            let is_set = !command.is_empty();
            is_set.then_some(Hook { command, container_name, timeout_seconds, on_error, pods })
        };
        Ok(HookProfile { pre: hook(pre), post: hook(post) })
    }
}
