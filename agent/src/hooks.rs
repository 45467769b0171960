//! Runs the commands of hooks: one command in one container of one pod, exactly once, and tells what is known
//! of its end.
//!
//! It decides nothing about freezing and thawing, and never retries: whoever calls must know whether the
//! command may have run. A command and its output can hold secrets, so no part of either is logged, stored or
//! put in a reason, and neither are the words of the API server and of the container runtime, which may quote
//! the command. The filter of `telemetry` keeps kube from logging it.

use std::error::Error as _;
use std::fmt;
use std::io;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube::api::AttachParams;
use kube::{Api, Client, ResourceExt};
use tokio::io::{AsyncRead, sink};

/// Names the container that `kubectl` takes when none is named:
/// <https://kubernetes.io/docs/reference/labels-annotations-taints/#kubectl-kubernetes-io-default-container>
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

/// What container runtimes say when a command could not be started at all. The texts are runc's and crun's, as
/// containerd and CRI-O pass them on. Every phrase has a space: a command is quoted by other errors only in a
/// URL, where it has none.
const NEVER_STARTED: [&str; 3] =
    ["OCI runtime exec failed", "unable to start container process", "not found in $PATH"];

/// One command to run. The timeout covers everything from the first packet to the command's end.
#[derive(Clone, Copy)]
pub struct Command<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The pod.
    pub pod: &'a str,
    /// The container, see [`hook_container`].
    pub container: &'a str,
    /// The program and its arguments; no shell takes part unless it is the program.
    pub argv: &'a [String],
    /// After it the outcome is [`Outcome::Unknown`]; the command itself is not stopped.
    pub timeout: Duration,
}

/// Leaves `argv` out, which can hold secrets.
impl fmt::Debug for Command<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { namespace, pod, container, argv: _, timeout } = self;
        f.debug_struct("Command")
            .field("namespace", namespace)
            .field("pod", pod)
            .field("container", container)
            .field("timeout", timeout)
            .finish_non_exhaustive()
    }
}

/// What is known of a command. Reasons are for people, short, and free of the command and its output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ended with exit code 0.
    Succeeded,
    /// It ran and ended, but not with exit code 0. Some of its work may be done.
    Failed {
        /// Such as `exit code 3`.
        reason: String,
    },
    /// It certainly did not run, so there is nothing to undo.
    NotStarted {
        /// Who refused it, and what to do.
        reason: String,
    },
    /// It may never have run, may have ended, or may still be running.
    Unknown {
        /// What was lost.
        reason: String,
    },
}

/// Runs a command, once, and waits for its end or the timeout.
///
/// `exec_client` must be made with `default_retry = false`: by default kube repeats requests that were turned
/// away, and each repetition could run the command again.
pub async fn run(exec_client: &Client, command: &Command<'_>) -> Outcome {
    // Dropped at the timeout, the attempt ends the connection and the task that serves it.
    match tokio::time::timeout(command.timeout, attempt(exec_client, command)).await {
        Ok(outcome) => outcome,
        Err(_elapsed) => {
            let seconds = command.timeout.as_secs_f64();
            unknown(format!("no end was seen within {seconds} s: the command may still be running"))
        }
    }
}

async fn attempt(client: &Client, command: &Command<'_>) -> Outcome {
    let Command { namespace, pod, container, argv, timeout: _ } = *command;
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let how = AttachParams::default().container(container).stdin(false).stdout(true).stderr(true);
    let mut process = match pods.exec(pod, argv, &how).await {
        Ok(process) => process,
        Err(err) => return refusal(&err, namespace, pod),
    };
    let (Some(status), Some(stdout), Some(stderr)) =
        (process.take_status(), process.stdout(), process.stderr())
    else {
        return unknown("the connection to the command has no status".to_owned());
    };
    // A full pipe would hold up the command and its status, so both are read, and forgotten. The status ends
    // the wait, not the end of the pipes: kube does not close them when the connection breaks.
    let status = tokio::select! {
        status = status => status,
        () = async { tokio::join!(forget(stdout), forget(stderr)); std::future::pending().await } => None,
    };
    // Without a status there is nothing left to learn from kube's own task: dropping the process ends it.
    status.as_ref().map_or_else(connection_lost, outcome_of)
}

/// Reads to the end through one small buffer.
async fn forget(mut output: impl AsyncRead + Unpin) {
    // An error of the pipe is the end of the connection, which shows as the missing status.
    let _ = tokio::io::copy(&mut output, &mut sink()).await;
}

/// The outcome by the status that ends a remote command, `metav1.Status` with the exit code as a cause:
/// <https://github.com/kubernetes/kubernetes/blob/master/staging/src/k8s.io/apimachinery/pkg/util/remotecommand/constants.go>
fn outcome_of(status: &Status) -> Outcome {
    if status.status.as_deref() == Some("Success") {
        return Outcome::Succeeded;
    }
    let causes = status.details.iter().flat_map(|details| details.causes.iter().flatten());
    let exit_code = causes.into_iter().find(|cause| cause.reason.as_deref() == Some("ExitCode"));
    if let Some(cause) = exit_code {
        let code: Option<i32> = cause.message.as_deref().and_then(|code| code.parse().ok());
        let reason = code.map_or_else(|| "not exit code 0".to_owned(), |code| format!("exit code {code}"));
        return Outcome::Failed { reason };
    }
    let said = status.message.as_deref().unwrap_or_default();
    if NEVER_STARTED.iter().any(|phrase| said.contains(phrase)) {
        let reason = "the command could not be started in the container: check that its program exists there";
        return Outcome::NotStarted { reason: reason.to_owned() };
    }
    // The same kind of status tells that the API server lost the kubelet, or the kubelet the runtime, before
    // or after the start.
    unknown("the node did not tell how the command ended".to_owned())
}

/// The outcome when no connection to the command came about.
fn refusal(err: &kube::Error, namespace: &str, pod: &str) -> Outcome {
    if let kube::Error::Api(status) = err {
        let code = status.code;
        // A 5xx may come from a proxy that gave up on a request it had passed on, and 408 likewise.
        if !(400..500).contains(&code) || code == 408 {
            return unknown(format!("the API server answered {code}: the command may have started"));
        }
        let why = match code {
            401 => "its credentials were not accepted".to_owned(),
            403 => format!("the agent may not create pods/exec in the namespace {namespace}"),
            404 => format!("there is no pod {namespace}/{pod}"),
            429 => "it is overloaded".to_owned(),
            _ => {
                format!("the pod {namespace}/{pod} does not run, has no such container, or takes no command")
            }
        };
        return Outcome::NotStarted { reason: format!("the API server refused with {code}: {why}") };
    }
    if was_refused(err) {
        let reason = "the API server does not accept connections".to_owned();
        return Outcome::NotStarted { reason };
    }
    unknown("the connection broke before the command was known to run".to_owned())
}

/// Whether no connection was made: nothing else is refused in this sense.
fn was_refused(err: &kube::Error) -> bool {
    std::iter::successors(err.source(), |&err| err.source())
        .filter_map(|err| err.downcast_ref::<io::Error>())
        .any(|err| err.kind() == io::ErrorKind::ConnectionRefused)
}

fn connection_lost() -> Outcome {
    unknown("the connection was lost: the command may still be running".to_owned())
}

fn unknown(reason: String) -> Outcome {
    Outcome::Unknown { reason }
}

/// A hook names a container that its pod does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("pod {pod} has no container {container}: set containerName to one of {}", .existing.join(", "))]
pub struct NoSuchContainer {
    /// `namespace/name` of the pod.
    pub pod: String,
    /// What the hook names.
    pub container: String,
    /// The pod's containers.
    pub existing: Vec<String>,
}

/// The container that a hook runs in: the one it names, else the pod's default container as for `kubectl exec`,
/// else the first.
///
/// # Errors
/// When the named one is not among the pod's containers; init and ephemeral containers do not count.
pub fn hook_container(pod: &Pod, container_name: Option<&str>) -> Result<String, NoSuchContainer> {
    let containers: Vec<&str> =
        pod.spec.iter().flat_map(|spec| &spec.containers).map(|container| container.name.as_str()).collect();
    let exists = |name: &&str| containers.contains(name);
    let chosen = if let Some(name) = container_name {
        Some(name).filter(exists)
    } else {
        let default = pod.annotations().get(DEFAULT_CONTAINER).map(String::as_str).filter(exists);
        default.or(containers.first().copied())
    };
    chosen.map(ToOwned::to_owned).ok_or_else(|| NoSuchContainer {
        pod: format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()),
        container: container_name.unwrap_or("at all").to_owned(),
        existing: containers.into_iter().map(ToOwned::to_owned).collect(),
    })
}

#[cfg(test)]
#[path = "hooks_tests.rs"]
mod tests;
