//! The hooks of `docs/hooks.md`, read out of that very page, so that tests run what users paste.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Namespace;
use super::exec::{Output, exec};

const PAGE: &str = include_str!("../../../docs/hooks.md");

/// The line by which each documented pre hook says after how many seconds its freeze ends by itself.
const EXPIRY: &str = "expires=180 ";

/// The line by which the pre hook for PostgreSQL says for how many seconds it tries.
const PATIENCE: &str = "patience=30 ";

/// The pre hook and the post hook that freeze and thaw one application.
#[derive(Clone, Debug)]
pub struct Hooks {
    /// Freezes the application, for 180 s or as long as [`Self::expiring_after`] says.
    pub pre: Hook,
    /// Thaws it, however often it is run.
    pub post: Hook,
    spec: Value,
}

/// A hook as the spec of a `StatefulSetBackup` has it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hook {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// The container it runs in.
    pub container_name: String,
    /// The seconds it may take.
    pub timeout_seconds: u32,
}

#[derive(Deserialize)]
struct Document {
    spec: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct HookSpec {
    pre_backup_hook: Hook,
    post_backup_hook: Hook,
}

impl Hooks {
    /// The hooks under the heading of the page that is the application's name.
    ///
    /// # Errors
    /// When the page has no such heading, or no sound example below it.
    pub fn documented(application: &str) -> Result<Self> {
        Self::parse(&example(application)?).with_context(|| format!("the hooks for {application}"))
    }

    /// The same hooks with another expiry, which tests wait for.
    ///
    /// # Errors
    /// When the pre hook does not set its expiry in the one way the page has.
    pub fn expiring_after(&self, seconds: u32) -> Result<Self> {
        let yaml = serde_json::to_string(&serde_json::json!({ "spec": self.spec }))?;
        ensure!(yaml.matches(EXPIRY).count() == 1, "the pre hook has one line that starts with {EXPIRY:?}");
        Self::parse(&yaml.replace(EXPIRY, &format!("expires={seconds} ")))
    }

    /// The same hooks with a pre hook that may take no longer than so many seconds, and gives up a second before:
    /// after an interruption the second thaw waits for that long.
    ///
    /// # Errors
    /// When the pre hook does not set its patience in the one way the page has for PostgreSQL.
    pub fn giving_up_after(&self, seconds: u32) -> Result<Self> {
        let mut spec = self.spec.clone();
        let script = self.pre.command.get(2).context("the pre hook is no shell script")?;
        ensure!(
            script.matches(PATIENCE).count() == 1,
            "the pre hook has one line that starts with {PATIENCE:?}"
        );
        let script = script.replace(PATIENCE, &format!("patience={} ", seconds.saturating_sub(1)));
        spec["preBackupHook"]["command"][2] = Value::from(script);
        spec["preBackupHook"]["timeoutSeconds"] = Value::from(seconds);
        Self::of(spec)
    }

    /// The same hooks, each of which writes down in the file `trace` of its container when it begins and when it
    /// has succeeded: see [`Trace`](super::trace::Trace).
    ///
    /// # Errors
    /// Never for sound hooks.
    pub fn traced(&self, trace: &str) -> Result<Self> {
        let mut spec = self.spec.clone();
        for (hook, [begins, succeeded]) in
            [("preBackupHook", ["freeze", "frozen"]), ("postBackupHook", ["thaw", "thawed"])]
        {
            // busybox' date knows no fractions of a second.
            let mark = |word| format!("touch {trace}.now; echo {word} $(stat -c %y {trace}.now) >>{trace}");
            let script = format!("{}; \"$@\" || exit; {}", mark(begins), mark(succeeded));
            let mut command = vec![json!("sh"), json!("-c"), json!(script), json!("sh")];
            let traced = spec[hook]["command"].as_array_mut().context("a hook has a command")?;
            command.append(traced);
            *traced = command;
        }
        Self::of(spec)
    }

    /// `preBackupHook` and `postBackupHook`, to be merged into the spec of a `StatefulSetBackup`.
    #[must_use]
    pub fn spec(&self) -> &Value {
        &self.spec
    }

    fn parse(yaml: &str) -> Result<Self> {
        let Document { spec } = serde_saphyr::from_str(yaml)?;
        Self::of(spec)
    }

    fn of(spec: Value) -> Result<Self> {
        let HookSpec { pre_backup_hook: pre, post_backup_hook: post } = serde_json::from_value(spec.clone())?;
        Ok(Self { pre, post, spec })
    }
}

impl Hook {
    /// Runs the hook in a pod as an agent would, and waits for its end.
    ///
    /// # Errors
    /// As [`exec`]; a hook that fails is a value.
    pub async fn run(&self, ns: &Namespace, pod: &str) -> Result<Output> {
        let command: Vec<&str> = self.command.iter().map(String::as_str).collect();
        exec(ns.cluster(), ns.name(), pod, &self.container_name, &command).await
    }
}

/// The first YAML block below a heading.
fn example(heading: &str) -> Result<String> {
    let section = PAGE.split("\n## ").find(|section| section.lines().next() == Some(heading));
    let section = section.with_context(|| format!("docs/hooks.md has no heading {heading}"))?;
    let block = section.split_once("```yaml\n").and_then(|(_, rest)| rest.split_once("```"));
    Ok(block.with_context(|| format!("docs/hooks.md has no example for {heading}"))?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const APPLICATIONS: [&str; 4] = ["PostgreSQL", "Redis", "MySQL", "MongoDB"];

    #[test]
    fn every_example_of_the_page_is_a_pair_of_hooks_in_sound_shell() {
        assert_eq!(PAGE.matches("```yaml\n").count(), APPLICATIONS.len());
        for application in APPLICATIONS {
            let hooks = Hooks::documented(application).unwrap();
            for hook in [&hooks.pre, &hooks.post] {
                assert_eq!(hook.command[..2], ["sh", "-c"], "{application}");
                let checked = Command::new("sh").args(["-n", "-c", &hook.command[2]]).status().unwrap();
                assert!(checked.success(), "{application}: {}", hook.command[2]);
            }
        }
    }

    #[test]
    fn a_traced_hook_is_the_same_command_with_its_own_exit_code() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let hooks = Hooks::documented("PostgreSQL").unwrap().giving_up_after(5).unwrap();
        assert!(hooks.pre.command[2].contains("\npatience=4 #"));
        let mut spec = hooks.spec().clone();
        spec["preBackupHook"]["command"] = json!(["sh", "-c", "set -e; false; true"]);
        spec["postBackupHook"]["command"] = json!(["sh", "-c", "exit 0"]);
        let traced = Hooks::of(spec).unwrap().traced(file.path().to_str().unwrap()).unwrap();
        let run = |hook: &Hook| Command::new(&hook.command[0]).args(&hook.command[1..]).status().unwrap();
        assert_eq!(run(&traced.pre).code(), Some(1));
        assert!(run(&traced.post).success());
        let trace = std::fs::read_to_string(file.path()).unwrap();
        let marks: Vec<&str> = trace.lines().filter_map(|line| line.split(' ').next()).collect();
        assert_eq!(marks, ["freeze", "thaw", "thawed"]);
    }

    #[test]
    fn every_documented_freeze_expires_and_tests_can_make_it_short() {
        for application in APPLICATIONS {
            let hooks = Hooks::documented(application).unwrap();
            let short = hooks.expiring_after(3).unwrap();
            assert!(short.pre.command[2].contains("\nexpires=3 #"), "{application}");
            assert_eq!(short.post.command, hooks.post.command, "{application}");
        }
    }
}
