//! Runs commands against an API server of one connection, on a real socket.

use std::sync::{Arc, Mutex};

use futures::{SinkExt, StreamExt};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::{Error as WebSocketError, Message};
use tokio_tungstenite::{WebSocketStream, accept_hdr_async};
use tracing_subscriber::fmt::format::FmtSpan;

use super::*;

const SECRET: &str = "hunter2";

/// Runs a command against an API server that answers the one connection with `answer`, which gets it.
async fn run_against<F: Future<Output = ()> + Send + 'static>(
    timeout: Duration,
    answer: impl FnOnce(TcpStream) -> F + Send + 'static,
) -> Outcome {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        // No second connection is accepted: whoever retries is refused or waits forever.
        drop(listener);
        answer(stream).await;
    });
    let outcome = run_on_port(port, timeout).await;
    server.await.unwrap();
    assert!(!format!("{outcome:?}").contains(SECRET), "{outcome:?}");
    outcome
}

async fn run_on_port(port: u16, timeout: Duration) -> Outcome {
    let mut config = kube::Config::new(format!("http://127.0.0.1:{port}").parse().unwrap());
    config.default_retry = false;
    let client = Client::try_from(config).unwrap();
    let argv = ["sh", "-c", SECRET].map(ToOwned::to_owned);
    let command = Command { namespace: "shop", pod: "db-0", container: "db", argv: &argv, timeout };
    run(&client, &command).await
}

const LONG: Duration = Duration::from_mins(1);

async fn upgrade(stream: TcpStream) -> WebSocketStream<TcpStream> {
    try_upgrade(stream).await.unwrap()
}

async fn try_upgrade(stream: TcpStream) -> Result<WebSocketStream<TcpStream>, WebSocketError> {
    #[expect(clippy::result_large_err, reason = "the type is the library's")]
    let accept_protocol = |request: &Request, mut response: Response| -> Result<_, ErrorResponse> {
        assert_eq!(
            request.uri().to_string(),
            "/api/v1/namespaces/shop/pods/db-0/exec?&stdout=true&stderr=true&container=db\
             &command=sh&command=-c&command=hunter2"
        );
        response.headers_mut().insert("Sec-WebSocket-Protocol", "v5.channel.k8s.io".parse().unwrap());
        Ok(response)
    };
    accept_hdr_async(stream, accept_protocol).await
}

fn on_channel(channel: u8, content: &[u8]) -> Message {
    Message::binary([&[channel], content].concat())
}

async fn finish(mut socket: WebSocketStream<TcpStream>, status: serde_json::Value) {
    socket.send(on_channel(3, status.to_string().as_bytes())).await.unwrap();
    // The client may be gone already.
    let _ = socket.close(None).await;
}

async fn answer_http(stream: TcpStream, head: &str) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = stream;
    let mut request = [0; 4096];
    assert!(stream.read(&mut request).await.unwrap() > 0);
    let code: u16 = head[..3].parse().unwrap();
    let body = json!({ "status": "Failure", "message": SECRET, "reason": "Any", "code": code }).to_string();
    let length = body.len();
    let answer = format!("HTTP/1.1 {head}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
    stream.write_all(answer.as_bytes()).await.unwrap();
}

#[tokio::test]
async fn a_command_that_prints_without_end_is_drained_and_succeeds() {
    let outcome = run_against(LONG, |stream| async move {
        let mut socket = upgrade(stream).await;
        for round in 0..64 {
            socket.send(on_channel(1 + round % 2, SECRET.repeat(4096).as_bytes())).await.unwrap();
        }
        finish(socket, json!({ "status": "Success" })).await;
    });
    assert_eq!(outcome.await, Outcome::Succeeded);
}

#[tokio::test]
async fn a_failing_command_is_told_by_its_exit_code_alone() {
    let outcome = run_against(LONG, |stream| async move {
        let mut socket = upgrade(stream).await;
        socket.send(on_channel(2, SECRET.as_bytes())).await.unwrap();
        let causes = json!([{ "reason": "ExitCode", "message": "3" }]);
        finish(socket, json!({ "status": "Failure", "message": SECRET, "details": { "causes": causes } }))
            .await;
    });
    assert_eq!(outcome.await, Outcome::Failed { reason: "exit code 3".to_owned() });
}

/// What a subscriber wrote.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn neither_a_command_nor_its_output_reaches_a_log_of_any_level() {
    let written = Written::default();
    let writer = written.clone();
    let log = tracing_subscriber::fmt()
        .with_env_filter(sts_backup_service::telemetry::filter("trace").unwrap())
        .with_span_events(FmtSpan::FULL)
        .with_writer(move || writer.clone());
    // The runtime of a test has one thread, so its tasks log here too.
    let _guard = tracing::subscriber::set_default(log.finish());
    tracing::debug!("this log is read");

    let outcome = run_against(LONG, |stream| async move {
        let mut socket = upgrade(stream).await;
        socket.send(on_channel(1, SECRET.as_bytes())).await.unwrap();
        finish(socket, json!({ "status": "Success" })).await;
    });
    assert_eq!(outcome.await, Outcome::Succeeded);
    let log = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
    assert!(log.contains("this log is read"), "{log}");
    assert!(!log.contains(SECRET), "{log}");
}

#[tokio::test]
async fn a_lost_connection_leaves_the_outcome_unknown() {
    let outcome = run_against(LONG, |stream| async move {
        let mut socket = upgrade(stream).await;
        socket.send(on_channel(1, b"started")).await.unwrap();
        // Dropped without a close frame, as when a proxy dies.
    });
    assert_eq!(outcome.await, connection_lost());
}

#[tokio::test]
async fn a_connection_lost_before_the_answer_leaves_the_outcome_unknown() {
    let outcome = run_against(LONG, |stream| async move { drop(stream) });
    assert!(matches!(outcome.await, Outcome::Unknown { .. }));
}

#[tokio::test]
async fn a_timeout_leaves_the_outcome_unknown_and_closes_the_connection() {
    let (closed, was_closed) = oneshot::channel();
    let outcome = run_against(Duration::from_millis(500), |stream| async move {
        // On a very slow machine the time is up during the upgrade, to the same effect.
        if let Ok(mut socket) = try_upgrade(stream).await {
            // Only the client's end of the connection ends this.
            while let Some(Ok(_)) = socket.next().await {}
        }
        closed.send(()).unwrap();
    });
    let reason = "no end was seen within 0.5 s: the command may still be running".to_owned();
    assert_eq!(outcome.await, Outcome::Unknown { reason });
    was_closed.await.unwrap();
}

#[tokio::test]
async fn a_refused_connection_means_that_the_command_did_not_run() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    assert!(matches!(run_on_port(port, LONG).await, Outcome::NotStarted { .. }));
}

#[tokio::test]
async fn a_4xx_means_that_the_command_did_not_run_and_a_5xx_that_it_may_have() {
    for (head, may_have_run) in [
        ("400 Bad Request", false),
        ("403 Forbidden", false),
        ("404 Not Found", false),
        ("408 Request Timeout", true),
        ("429 Too Many Requests", false),
        ("500 Internal Server Error", true),
        ("503 Service Unavailable", true),
        ("504 Gateway Timeout", true),
    ] {
        let outcome = run_against(LONG, move |stream| answer_http(stream, head)).await;
        match outcome {
            Outcome::NotStarted { reason } => {
                assert!(!may_have_run, "{head}");
                assert!(reason.contains(&head[..3]), "{reason}");
            }
            Outcome::Unknown { .. } => assert!(may_have_run, "{head}"),
            Outcome::Succeeded | Outcome::Failed { .. } => unreachable!("{head}: {outcome:?}"),
        }
    }
}

#[test]
fn a_status_tells_a_failure_from_a_command_that_never_started_and_from_one_out_of_sight() {
    let exit = |code| json!({ "status": "Failure", "details": { "causes": [{ "reason": "ExitCode", "message": code }] } });
    let said = |message| json!({ "status": "Failure", "reason": "InternalError", "message": message });
    let failed = |reason: &str| Outcome::Failed { reason: reason.to_owned() };
    let not_started = Outcome::NotStarted {
        reason: "the command could not be started in the container: check that its program exists there"
            .to_owned(),
    };
    let lost = unknown("the node did not tell how the command ended".to_owned());
    for (status, outcome) in [
        (json!({ "status": "Success" }), Outcome::Succeeded),
        (exit("1"), failed("exit code 1")),
        (exit("137"), failed("exit code 137")),
        (exit(SECRET), failed("not exit code 0")),
        (
            said(
                "error executing command in container: failed to exec in container: failed to start exec \
                  \"8a\": OCI runtime exec failed: exec failed: unable to start container process: exec: \
                  \"hunter2\": executable file not found in $PATH",
            ),
            not_started,
        ),
        (said("error reading from error stream: unexpected EOF"), lost.clone()),
        // A kubelet's URL quotes the command, but with no spaces: it cannot look like the runtime's words.
        (
            said(
                "Post \"https://10.0.0.1:10250/exec/shop/db-0/db?command=echo&command=OCI+runtime+exec+failed\": EOF",
            ),
            lost.clone(),
        ),
        (json!({ "status": "Failure" }), lost.clone()),
        (json!({}), lost),
    ] {
        assert_eq!(outcome_of(&serde_json::from_value(status.clone()).unwrap()), outcome, "{status}");
    }
}

fn pod(annotations: &serde_json::Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": { "namespace": "shop", "name": "db-0", "annotations": annotations },
        "spec": {
            "containers": [{ "name": "db" }, { "name": "exporter" }],
            "initContainers": [{ "name": "init" }],
        },
    }))
    .unwrap()
}

#[test]
fn a_hook_runs_in_the_container_it_names_else_in_the_default_else_in_the_first() {
    let unmarked = json!({});
    let marked = json!({ DEFAULT_CONTAINER: "exporter" });
    let stale = json!({ DEFAULT_CONTAINER: "gone" });
    for (annotations, named, container) in [
        (&unmarked, None, "db"),
        (&unmarked, Some("exporter"), "exporter"),
        (&marked, None, "exporter"),
        (&marked, Some("db"), "db"),
        (&stale, None, "db"),
    ] {
        assert_eq!(hook_container(&pod(annotations), named).as_deref(), Ok(container), "{annotations}");
    }
}

#[test]
fn a_hook_that_names_no_container_of_the_pod_is_refused_with_those_there_are() {
    for name in ["gone", "init"] {
        assert_eq!(
            hook_container(&pod(&json!({})), Some(name)).unwrap_err().to_string(),
            format!("pod shop/db-0 has no container {name}: set containerName to one of db, exporter")
        );
    }
}

#[test]
fn a_command_does_not_show_its_arguments() {
    let argv = [SECRET.to_owned()];
    let command = Command { namespace: "shop", pod: "db-0", container: "db", argv: &argv, timeout: LONG };
    assert!(!format!("{command:?}").contains(SECRET));
}
