use std::fs;

use sts_backup_api::backup::{HookPods, OnError};
use sts_backup_service::config::{flag_of, variable_of};

use super::*;

fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Loads from the text of a file and variables.
fn load_text(text: &str, pairs: &[(&str, &str)], flags: &Flags) -> Result<Config, ConfigError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.toml");
    fs::write(&path, text).unwrap();
    load(Some(&path), &variables(pairs), flags)
}

fn refusal(text: &str, pairs: &[(&str, &str)]) -> String {
    load_text(text, pairs, &Flags::default()).expect_err("refused").to_string()
}

/// Every key of the file, with its default.
fn keys() -> BTreeMap<String, String> {
    let written = Written::defaults(&BTreeMap::new());
    let mut keys = BTreeMap::new();
    for (key, value) in toml::Table::try_from(&written).unwrap() {
        match value.as_table() {
            Some(table) => {
                keys.extend(table.iter().map(|(inner, value)| (format!("{key}.{inner}"), plain(value))));
            }
            None => drop(keys.insert(key, plain(&value))),
        }
    }
    keys
}

fn plain(value: &toml::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[test]
fn without_anything_the_defaults_hold() {
    let config = load(None, &BTreeMap::new(), &Flags::default()).unwrap();
    let seconds = Duration::from_secs;
    assert_eq!(
        config,
        Config {
            listen: "0.0.0.0:9090".parse().unwrap(),
            namespace: "default".to_owned(),
            identity: "sts-backup-agent".to_owned(),
            log_format: LogFormat::Text,
            log: "info".to_owned(),
            lease: LeaseConfig {
                name: "sts-backup-agent".to_owned(),
                duration: seconds(15),
                renew_deadline: seconds(10),
                retry: seconds(2),
            },
            shutdown: seconds(25),
            concurrent_reconciles: 16,
            limits: Limits { cluster: 500, driver: 100 },
            hook_profiles: BTreeMap::new(),
            link: None,
        }
    );
}

#[test]
fn a_pods_name_and_namespace_are_defaults_that_every_layer_wins_over() {
    let pod = [("POD_NAME", "agent-0"), ("HOSTNAME", "node"), ("POD_NAMESPACE", "backup")];
    let config = load_text("", &pod, &Flags::default()).unwrap();
    assert_eq!((config.identity.as_str(), config.namespace.as_str()), ("agent-0", "backup"));
    let config = load_text("identity = 'mine'\nnamespace = 'other'", &pod, &Flags::default()).unwrap();
    assert_eq!((config.identity.as_str(), config.namespace.as_str()), ("mine", "other"));
    assert_eq!(load_text("", &pod[1..2], &Flags::default()).unwrap().identity, "node");
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let file =
        "log = 'file'\nidentity = 'file'\nnamespace = 'file'\n[lease]\nname = 'file'\nretry_seconds = 1";
    let environment = [
        ("STSB_IDENTITY", "environment"),
        ("STSB_NAMESPACE", "environment"),
        ("STSB_LEASE__NAME", "environment"),
        ("STSB_LEASE__DURATION_SECONDS", "20"),
    ];
    let flags = Flags {
        namespace: Some("flag".to_owned()),
        lease: LeaseFlags { name: Some("flag".to_owned()), ..LeaseFlags::default() },
        ..Flags::default()
    };
    let config = load_text(file, &environment, &flags).unwrap();
    assert_eq!(config.log, "file");
    assert_eq!(config.identity, "environment");
    assert_eq!(config.namespace, "flag");
    assert_eq!(config.lease.name, "flag");
    assert_eq!(config.lease.duration, Duration::from_secs(20));
    assert_eq!(config.lease.retry, Duration::from_secs(1));
}

#[test]
fn every_key_can_be_set_by_a_variable_and_by_a_flag() {
    let command = <Flags as clap::Args>::augment_args(clap::Command::new("agent"));
    let flags: Vec<String> =
        command.get_arguments().filter_map(|flag| Some(format!("--{}", flag.get_long()?))).collect();
    for (key, default) in keys() {
        assert!(flags.contains(&flag_of(&key)), "{key} has no flag: {flags:?}");
        let variable = variable_of(PREFIX, &key);
        load_text("", &[(&variable, &default)], &Flags::default()).expect(&variable);
    }
    assert_eq!(flags.len(), keys().len(), "a flag sets no key");
}

#[test]
fn every_key_is_in_the_reference_with_its_variable_flag_and_default() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/agent.md");
    let reference = fs::read_to_string(path).unwrap();
    for (key, default) in keys() {
        let (variable, flag) = (variable_of(PREFIX, &key), flag_of(&key));
        let row = format!("| `{key}` | `{variable}` | `{flag}` | ");
        let row = reference.lines().find(|line| line.starts_with(&row)).expect(&row);
        // What these two default to depends on the pod.
        if key != "namespace" && key != "identity" {
            assert!(row.contains(&format!("| `{default}` |")), "{row} does not name the default {default}");
        }
    }
}

#[test]
fn what_is_written_out_gives_the_same_configuration_again() {
    let file = "listen = '[::1]:0'\nidentity = 'a \"quoted\" name'\nlog_format = 'json'\n\
                [lease]\nduration_seconds = 30";
    let config = load_text(file, &[], &Flags::default()).unwrap();
    assert_eq!(load_text(&config.to_toml(), &[], &Flags::default()).unwrap(), config);
}

const HOOK_PROFILE: &str = "[hook_profiles.postgres]\npre = ['/freeze', '\"now\"']\npost = ['/thaw']\n\
     container = 'postgres'\ntimeout_seconds = 30\non_error = 'Continue'\npods = 'First'\n\
     [hook_profiles.flush]\npre = ['sync']";

#[test]
fn hook_profiles_become_the_hooks_of_backups() {
    let config = load_text(HOOK_PROFILE, &[], &Flags::default()).unwrap();
    let HookProfile { pre, post } = &config.hook_profiles["postgres"];
    let (pre, post) = (pre.as_ref().unwrap(), post.as_ref().unwrap());
    assert_eq!(
        (pre.command.as_slice(), post.command.as_slice()),
        (&["/freeze".to_owned(), "\"now\"".to_owned()][..], &["/thaw".to_owned()][..])
    );
    for hook in [pre, post] {
        assert_eq!((hook.container_name.as_deref(), hook.timeout_seconds), (Some("postgres"), 30));
        assert_eq!((hook.on_error, hook.pods), (OnError::Continue, HookPods::First));
    }
    let HookProfile { pre, post } = &config.hook_profiles["flush"];
    let hook = pre.as_ref().unwrap();
    assert_eq!((hook.container_name.as_deref(), hook.timeout_seconds), (None, 60));
    assert_eq!((hook.on_error, hook.pods, post), (OnError::Fail, HookPods::All, &None));
    assert_eq!(load_text(&config.to_toml(), &[], &Flags::default()).unwrap(), config);
}

#[test]
fn hook_profiles_that_no_backup_could_have_are_refused() {
    let refused = refusal("[hook_profiles.Postgres]\npre = ['sync']", &[]);
    assert!(refused.starts_with("hook_profiles.Postgres = Postgres (file "), "{refused}");
    for (profile, words) in [
        ("", "hook_profiles.p = p"),
        ("pre = 'sync'", "hook_profiles.p.pre ("),
        ("pre = ['sync']\ntimeout_seconds = 0", "hook_profiles.p.timeout_seconds = 0"),
        ("pre = ['sync']\ncontainer = 'A'", "hook_profiles.p.container = A"),
        ("pre = ['sync']\npods = 'Last'", "Last is not All or First"),
        ("pre = ['sync']\nlast = 1", "hook_profiles.p.last"),
    ] {
        let refused = refusal(&format!("[hook_profiles.p]\n{profile}"), &[]);
        assert!(refused.contains(words) && refused.contains("agent.toml"), "{profile}: {refused}");
    }
    let long = format!("[hook_profiles.p]\npre = ['{}']", "x".repeat(8193));
    assert!(refusal(&long, &[]).starts_with("hook_profiles.p.pre = a command (file "));
}

#[test]
fn a_refusal_names_key_value_origin_reason_and_remedy() {
    assert_eq!(
        refusal("", &[("STSB_LEASE__RENEW_DEADLINE_SECONDS", "15")]),
        "lease.renew_deadline_seconds = 15 (environment variable STSB_LEASE__RENEW_DEADLINE_SECONDS): a leader must \
         give up before others take over, after lease.duration_seconds = 15; lower it, or raise \
         lease.duration_seconds"
    );
    let refused = refusal("shutdown_seconds = -3", &[]);
    assert!(refused.starts_with("shutdown_seconds = -3 (file /"), "{refused}");
    assert!(refused.ends_with("agent.toml): it is not from 1 to 3600; write a whole number from 1 to 3600"));
    assert_eq!(
        refusal("", &[("STSB_LOG_FORMAT", "xml")]),
        "log_format (environment variable STSB_LOG_FORMAT): xml is not text or json; correct it there, or leave it \
         out to have the default"
    );
    assert!(refusal("shutdown_seconds = '1m'", &[]).contains(": it is string \"1m\", not a whole number; "));
    let flags = Flags { log: Some("x=loud".to_owned()), ..Flags::default() };
    let refused = load_text("", &[], &flags).expect_err("no level").to_string();
    assert!(refused.starts_with("log = x=loud (flag --log): "), "{refused}");
}

#[test]
fn values_that_mean_nothing_are_refused() {
    for (file, key) in [
        ("listen = 'localhost:9090'", "listen"),
        ("listen = '0.0.0.0'", "listen"),
        ("namespace = 'Shop'", "namespace"),
        ("namespace = ''", "namespace"),
        ("identity = ' '", "identity"),
        ("log_format = 'xml'", "log_format"),
        ("concurrent_reconciles = 0", "concurrent_reconciles"),
        ("concurrent_reconciles = 'many'", "concurrent_reconciles"),
        ("shutdown_seconds = 9999", "shutdown_seconds"),
        ("shutdown_seconds = 1.5", "shutdown_seconds"),
        ("[lease]\nname = 'a..b'", "lease.name"),
        ("[lease]\nduration_seconds = 0", "lease.duration_seconds"),
        ("[lease]\nretry_seconds = 10", "lease.retry_seconds"),
        ("lease = 'mine'", "lease"),
    ] {
        let refused = refusal(file, &[]);
        assert!(refused.starts_with(&format!("{key} ")), "{file}: {refused}");
        assert!(refused.contains("agent.toml)"), "{file}: {refused}");
    }
}

#[test]
fn unknown_keys_are_refused_by_name_in_every_layer() {
    let refused = refusal("lissten = ':1'", &[]);
    assert!(refused.starts_with("lissten (file "), "{refused}");
    assert!(refused.contains("no such key, only listen, namespace"), "{refused}");
    let refused = refusal("[lease]\nnome = 'x'", &[]);
    assert!(refused.starts_with("lease.nome (file "), "{refused}");
    let refused = refusal("", &[("STSB_LEASE_NAME", "x")]);
    assert!(refused.starts_with("lease_name (environment variable STSB_LEASE_NAME): "), "{refused}");
    assert!(refusal("listen = ", &[]).starts_with("file /"));
}

#[test]
fn variables_that_kubelet_sets_for_services_configure_nothing() {
    let links = [
        ("STSB_HUB_SERVICE_HOST", "10.0.0.1"),
        ("STSB_HUB_SERVICE_PORT_GRPC", "443"),
        ("STSB_HUB_PORT", "tcp://10.0.0.1:443"),
        ("STSB_HUB_PORT_443_TCP_ADDR", "10.0.0.1"),
    ];
    assert!(load_text("", &links, &Flags::default()).is_ok());
}

#[test]
fn text_that_looks_like_a_number_stays_text_where_text_belongs() {
    let config = load_text("", &[("STSB_NAMESPACE", "42")], &Flags::default()).unwrap();
    assert_eq!(config.namespace, "42");
}

#[test]
fn a_missing_file_is_named_with_the_remedy() {
    let missing = Path::new("/nonexistent/agent.toml");
    let refused = load(Some(missing), &BTreeMap::new(), &Flags::default()).expect_err("missing").to_string();
    assert!(refused.starts_with("configuration file /nonexistent/agent.toml cannot be read: "), "{refused}");
}
