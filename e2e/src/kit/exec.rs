//! Runs a command in a pod, once.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube::Api;
use kube::api::{AttachParams, AttachedProcess};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::Cluster;

/// Generous for any command of a test; a command that takes longer is stuck.
const EXEC_TIMEOUT: Duration = Duration::from_mins(1);

/// What a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// The command, for messages.
    pub command: String,
    /// Its standard output; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// Its standard error; bytes that are not UTF-8 are replaced.
    pub stderr: String,
    /// Its exit code; 0 is success.
    pub exit_code: i32,
}

impl Output {
    /// The standard output of a command that had to succeed.
    ///
    /// # Errors
    /// When the exit code is not 0; the text has the code and the standard error.
    pub fn success(self) -> Result<String> {
        let Self { command, stdout, stderr, exit_code } = self;
        if exit_code != 0 {
            bail!("`{command}` ended with code {exit_code}: {}", stderr.trim_end());
        }
        Ok(stdout)
    }
}

/// Runs `command` in a container and waits for its end. A failing command is a value, see
/// [`Output::success`]; it is never run twice.
///
/// # Errors
/// When the command could not be started, its end was not learned, or it took longer than a minute. It may
/// then still be running.
pub async fn exec(
    cluster: &Cluster,
    namespace: &str,
    pod: &str,
    container: &str,
    command: &[&str],
) -> Result<Output> {
    let name = command.join(" ");
    let outcome = async {
        let mut process = attach(cluster, namespace, pod, container, command, false).await?;
        let status = process.take_status().context("the process has a status")?;
        let stdout = process.stdout().context("the process has a stdout")?;
        let stderr = process.stderr().context("the process has a stderr")?;
        // Both must be read at once: a full pipe of either stops the other and the status.
        let (stdout, stderr, status) = tokio::join!(read_all(stdout), read_all(stderr), status);
        process.join().await?;
        let status = status.context("the connection ended before the command's exit status came")?;
        let (stdout, stderr, exit_code) = (stdout?, stderr?, exit_code(&status)?);
        anyhow::Ok(Output { command: name.clone(), stdout, stderr, exit_code })
    };
    match tokio::time::timeout(EXEC_TIMEOUT, outcome).await {
        Ok(output) => output.with_context(|| format!("run `{name}` in {namespace}/{pod}")),
        Err(_elapsed) => {
            bail!("`{name}` in {namespace}/{pod} did not end within {EXEC_TIMEOUT:?}; it may still run")
        }
    }
}

/// Starts a command in a container, for those that talk to it while it runs.
pub(super) async fn attach(
    cluster: &Cluster,
    namespace: &str,
    pod: &str,
    container: &str,
    command: &[&str],
    stdin: bool,
) -> Result<AttachedProcess> {
    let pods: Api<Pod> = Api::namespaced(cluster.exec_client(), namespace);
    let container = Some(container.to_owned());
    let how = AttachParams { container, stdin, stdout: true, stderr: true, ..AttachParams::default() };
    Ok(pods.exec(pod, command.iter().copied(), &how).await?)
}

/// Reads to the end; what is not UTF-8 is replaced.
pub(super) async fn read_all(mut from: impl AsyncRead + Unpin) -> Result<String> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).await?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The exit code in the status that ends a remote command, as `metav1.Status` carries it:
/// <https://github.com/kubernetes/kubernetes/blob/master/staging/src/k8s.io/apimachinery/pkg/util/remotecommand/constants.go>
fn exit_code(status: &Status) -> Result<i32> {
    if status.status.as_deref() == Some("Success") {
        return Ok(0);
    }
    let causes = status.details.iter().flat_map(|details| details.causes.iter().flatten());
    let code = causes.into_iter().find(|cause| cause.reason.as_deref() == Some("ExitCode"));
    match code.and_then(|cause| cause.message.as_deref()).map(str::parse) {
        Some(Ok(code)) => Ok(code),
        Some(Err(_)) | None => bail!("{}", status.message.as_deref().unwrap_or("the command failed")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn code_of(status: serde_json::Value) -> Result<i32> {
        exit_code(&serde_json::from_value(status).unwrap())
    }

    #[test]
    fn an_exit_code_is_told_from_a_command_that_never_ran() {
        assert_eq!(code_of(json!({ "status": "Success" })).unwrap(), 0);
        assert_eq!(
            code_of(json!({
                "status": "Failure", "reason": "NonZeroExitCode",
                "details": { "causes": [{ "reason": "ExitCode", "message": "3" }] },
            }))
            .unwrap(),
            3
        );
        let never_ran = code_of(json!({ "status": "Failure", "message": "no such file" })).unwrap_err();
        assert_eq!(never_ran.to_string(), "no such file");
    }

    #[test]
    fn a_failed_command_becomes_an_error_with_its_own_words() {
        let output = Output {
            command: "false".to_owned(),
            stdout: String::new(),
            stderr: "out of luck\n".to_owned(),
            exit_code: 1,
        };
        assert_eq!(output.success().unwrap_err().to_string(), "`false` ended with code 1: out of luck");
    }
}
