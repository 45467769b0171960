//! The binary as people and Kubernetes see it: commands, messages, signals, exit codes.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output, Stdio};

fn agent(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sts-backup-agent"));
    command.args(arguments).env_clear().stdin(Stdio::null());
    command
}

fn output(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("the agent starts");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn check_prints_the_effective_configuration() {
    let (code, stdout, stderr) = output(
        agent(&["check", "--lease-retry-seconds", "3"])
            .env("STSB_LEASE__NAME", "mine")
            .env("POD_NAME", "agent-0"),
    );
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    for line in
        ["identity = \"agent-0\"", "name = \"mine\"", "retry_seconds = 3", "listen = \"0.0.0.0:9090\""]
    {
        assert!(stdout.lines().any(|printed| printed == line), "{line} is missing in:\n{stdout}");
    }
}

#[test]
fn a_bad_configuration_is_refused_by_check_and_by_run() {
    for command in ["check", "run"] {
        let (code, stdout, stderr) = output(&mut agent(&[command, "--lease-retry-seconds", "10"]));
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{command}");
        assert!(
            stderr.starts_with("error: lease.retry_seconds = 10 (flag --lease-retry-seconds): "),
            "{stderr}"
        );
    }
}

#[test]
fn version_help_and_completion_are_printed() {
    let (code, stdout, _) = output(&mut agent(&["--version"]));
    assert_eq!((code, stdout), (Some(0), format!("sts-backup-agent {}\n", env!("CARGO_PKG_VERSION"))));
    let (code, stdout, _) = output(&mut agent(&["completion", "bash"]));
    assert!(code == Some(0) && stdout.contains("--lease-duration-seconds"), "{stdout}");
    assert_eq!(output(&mut agent(&["run", "--help"])).0, Some(0));
    assert_eq!(output(&mut agent(&["explode"])).0, Some(2));
}

#[test]
fn without_a_cluster_the_agent_says_what_to_set() {
    let (code, _, stderr) =
        output(agent(&["run", "--listen", "127.0.0.1:0"]).env("KUBECONFIG", "/nonexistent"));
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("run the agent in a pod with a service account, or set KUBECONFIG"), "{stderr}");
}

#[test]
fn an_agent_that_waits_for_its_api_server_ends_well_on_sigterm() {
    let folder = tempfile::tempdir().expect("a folder");
    let kubeconfig = folder.path().join("config");
    // Port 9 is the discard service's: nothing answers there as an API server does.
    let nowhere = "apiVersion: v1\nkind: Config\ncurrent-context: a\n\
        clusters: [{name: a, cluster: {server: 'http://127.0.0.1:9'}}]\n\
        users: [{name: a, user: {}}]\n\
        contexts: [{name: a, context: {cluster: a, user: a}}]\n";
    std::fs::write(&kubeconfig, nowhere).expect("written");
    let mut running = agent(&["run", "--listen", "127.0.0.1:0", "--log-format", "json"])
        .env("KUBECONFIG", &kubeconfig)
        .stderr(Stdio::piped())
        .spawn()
        .expect("the agent starts");
    let mut log = BufReader::new(running.stderr.take().expect("piped"));
    let mut line = String::new();
    while !line.contains("the API server cannot be reached") {
        line.clear();
        assert!(log.read_line(&mut line).expect("text") > 0, "the agent ended instead of waiting");
    }
    let event: serde_json::Value = serde_json::from_str(&line).expect("one JSON object a line");
    assert_eq!(event["level"], "WARN");
    let kill = format!("kill -TERM {}", running.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().expect("a shell").success());
    let mut rest = String::new();
    log.read_to_string(&mut rest).expect("text");
    assert_eq!(running.wait().expect("it ends").code(), Some(0), "{rest}");
}
