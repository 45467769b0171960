use std::collections::BTreeSet;

use sts_backup_service::clock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::*;
use crate::config::{self, Flags, Guardrails, LinkConfig};
use crate::lease::fake::{FakeApi, Fault};

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn clients(api: &FakeApi) -> Clients {
    Clients { repeating: api.client(), once: api.client() }
}

/// An agent on any free port, whose controllers are `control`.
async fn start<C, F>(api: &FakeApi, ends: &Ends, control: C) -> JoinHandle<Result<(), AppError>>
where
    C: FnOnce(Context, CancellationToken) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let mut config = config::load(None, &[].into(), &Flags::default()).expect("defaults");
    config.listen = "127.0.0.1:0".parse().expect("an address");
    let app = App::bind(config).await.expect("a free port");
    tokio::spawn(app.run(clients(api), ends.clone(), control))
}

/// Controllers that need `thaw` to end; the token is cancelled when they started.
fn thawing(
    thaw: Duration,
) -> (
    CancellationToken,
    impl FnOnce(Context, CancellationToken) -> futures::future::BoxFuture<'static, ()> + Send,
) {
    let started = CancellationToken::new();
    let starts = started.clone();
    let control = move |_: Context, stop: CancellationToken| -> futures::future::BoxFuture<'static, ()> {
        Box::pin(async move {
            starts.cancel();
            stop.cancelled().await;
            sleep(thaw).await;
        })
    };
    (started, control)
}

async fn ended_with(agent: JoinHandle<Result<(), AppError>>) -> (Result<(), AppError>, Instant) {
    let result = agent.await.expect("the agent itself does not panic");
    (result, clock::monotonic())
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_asked_to_end_keeps_the_lease_while_it_thaws_and_then_gives_it_back() {
    let (api, ends) = (FakeApi::new(), Ends::default());
    let (started, control) = thawing(seconds(20));
    let agent = start(&api, &ends, control).await;
    started.cancelled().await;
    let holder = api.holder();
    assert!(holder.starts_with("sts-backup-agent_"), "{holder}");
    ends.shutdown.cancel();
    sleep(seconds(19)).await;
    assert_eq!(api.holder(), holder, "longer than the lease lasts without renewal");
    let (result, _) = ended_with(agent).await;
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(api.holder(), "");
}

#[tokio::test(start_paused = true)]
async fn controllers_that_do_not_end_are_cut_off_and_the_lease_is_given_back_for_who_thaws() {
    let (api, ends) = (FakeApi::new(), Ends::default());
    let (started, control) = thawing(seconds(3600));
    let agent = start(&api, &ends, control).await;
    started.cancelled().await;
    ends.shutdown.cancel();
    let told = clock::monotonic();
    let (result, at) = ended_with(agent).await;
    assert!(matches!(result, Err(AppError::Unfinished)), "{result:?}");
    assert!((seconds(25)..seconds(28)).contains(&(at - told)), "{:?}", at - told);
    assert_eq!(api.holder(), "");
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_lost_ends_before_another_replica_may_act() {
    for (thaw, least, most) in
        [(seconds(1), seconds(9), seconds(12)), (seconds(3600), seconds(13), seconds(15))]
    {
        let (api, ends) = (FakeApi::new(), Ends::default());
        let (started, control) = thawing(thaw);
        let agent = start(&api, &ends, control).await;
        started.cancelled().await;
        let led_from = clock::monotonic();
        api.fails(Fault::Hang);
        let (result, at) = ended_with(agent).await;
        let error = result.expect_err("lost");
        assert!(matches!(error, AppError::LeadershipLost), "{error:?}");
        assert_eq!(error.exit_code(), 3);
        assert!((least..=most).contains(&(at - led_from)), "{:?}", at - led_from);
    }
}

#[tokio::test(start_paused = true)]
async fn leadership_lost_while_thawing_leaves_only_the_rest_of_the_lease() {
    let (api, ends) = (FakeApi::new(), Ends::default());
    let (started, control) = thawing(seconds(3600));
    let agent = start(&api, &ends, control).await;
    started.cancelled().await;
    ends.shutdown.cancel();
    api.fails(Fault::Hang);
    let told = clock::monotonic();
    let (result, at) = ended_with(agent).await;
    assert!(result.is_err(), "{result:?}");
    assert!(at - told <= seconds(15), "{:?}", at - told);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_lost_a_part_of_itself_ends() {
    let (api, ends) = (FakeApi::new(), Ends::default());
    let agent = start(&api, &ends, |_, _| async {}).await;
    let (result, _) = ended_with(agent).await;
    assert!(matches!(result, Err(AppError::PartEnded { part: "controllers" })), "{result:?}");
    assert_eq!(api.holder(), "", "another replica may act at once");

    let (api, ends) = (FakeApi::new(), Ends::default());
    let agent = start(&api, &ends, |_, _| async { panic_for_test() }).await;
    let (result, _) = ended_with(agent).await;
    assert!(matches!(result, Err(AppError::Panicked)), "{result:?}");
}

#[expect(clippy::panic, reason = "the panic is what is tested")]
fn panic_for_test() {
    panic!("a controller panicked, as the test wants it to");
}

#[tokio::test(start_paused = true)]
async fn a_panic_that_nobody_waits_for_ends_the_agent_after_it_thawed() {
    let (api, ends) = (FakeApi::new(), Ends::default());
    let (started, control) = thawing(seconds(5));
    let agent = start(&api, &ends, control).await;
    started.cancelled().await;
    let panicked = clock::monotonic();
    ends.panicked.cancel();
    let (result, at) = ended_with(agent).await;
    assert_eq!(result.expect_err("panicked").exit_code(), 101);
    assert!(at - panicked >= seconds(5));
    assert_eq!(api.holder(), "");
}

#[tokio::test(start_paused = true)]
async fn an_agent_waits_for_an_api_server_that_does_not_answer() {
    for fault in [Fault::Hang, Fault::Status(503)] {
        let (api, ends) = (FakeApi::new(), Ends::default());
        api.fails(fault);
        let (started, control) = thawing(Duration::ZERO);
        let agent = start(&api, &ends, control).await;
        sleep(seconds(600)).await;
        assert!(!started.is_cancelled() && !agent.is_finished(), "{fault:?}");
        api.fails(Fault::None);
        started.cancelled().await;
        ends.shutdown.cancel();
        assert!(ended_with(agent).await.0.is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_can_be_ended_before_it_leads() {
    let (api, ends) = (FakeApi::new(), Ends::default());
    api.fails(Fault::Hang);
    let agent = start(&api, &ends, |_, _| async {}).await;
    ends.shutdown.cancel();
    assert!(ended_with(agent).await.0.is_ok());

    let (api, ends) = (FakeApi::new(), Ends::default());
    let (started, control) = thawing(Duration::ZERO);
    let leader = start(&api, &ends, control).await;
    started.cancelled().await;
    let holder = api.holder();
    let follower_ends = Ends::default();
    let follower = start(&api, &follower_ends, |_, _| async {}).await;
    sleep(seconds(30)).await;
    follower_ends.shutdown.cancel();
    assert!(ended_with(follower).await.0.is_ok());
    assert_eq!(api.holder(), holder);
    drop(leader);
}

async fn get(address: std::net::SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("the agent listens");
    let request = format!("GET {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("answered");
    answer
}

#[tokio::test]
async fn a_leader_is_ready_and_says_so_until_it_is_asked_to_end() {
    let (api, ends) = (FakeApi::new(), Ends::default());
    let mut config = config::load(None, &[].into(), &Flags::default()).expect("defaults");
    config.listen = "127.0.0.1:0".parse().expect("an address");
    let app = App::bind(config).await.expect("a free port");
    let address = app.address();
    let shutdown = ends.shutdown.clone();
    let control = move |context: Context, stop: CancellationToken| async move {
        assert!(context.leadership.is_held());
        assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/metrics").await.contains("\nsts_backup_leader 1\n"));
        shutdown.cancel();
        stop.cancelled().await;
        assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 503"));
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
    };
    let result = app.run(clients(&api), ends, control).await;
    assert!(result.is_ok(), "{result:?}");
}

/// The families of an exposition: their name as it is scraped, their type and what they mean.
fn families(exposition: &str) -> BTreeSet<[String; 3]> {
    let of = |what: &str| {
        let lines = exposition.lines().filter_map(move |line| line.strip_prefix(what)?.split_once(' '));
        lines.map(|(name, told)| (name.to_owned(), told.to_owned())).collect::<Vec<_>>()
    };
    let (helps, types) = (of("# HELP "), of("# TYPE "));
    assert_eq!(helps.len(), types.len(), "{exposition}");
    let families = helps.into_iter().zip(types).map(|((name, help), (_, kind))| {
        let suffix = match kind.as_str() {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        // Every help ends with a full stop, which the encoder sets.
        [name + suffix, kind, help.trim_end_matches('.').to_owned()]
    });
    families.collect()
}

#[tokio::test]
async fn the_docs_list_exactly_the_metrics_that_a_leader_shows() {
    let page = include_str!("../../../docs/metrics.md");
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let documented: BTreeSet<[String; 3]> = rows
        .map(|row| {
            let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
            let [name, kind, meaning] = cells.try_into().expect("three cells");
            [name.trim_matches('`'), kind, meaning].map(str::to_owned)
        })
        .collect();

    let (api, ends) = (FakeApi::new(), Ends::default());
    let mut config = config::load(None, &[].into(), &Flags::default()).expect("defaults");
    config.listen = "127.0.0.1:0".parse().expect("an address");
    let (hub, certificates) = ("localhost:1".to_owned(), "/nowhere".into());
    config.link = Some(LinkConfig { hub, certificates, guardrails: Guardrails::default() });
    let app = App::bind(config).await.expect("a free port");
    let address = app.address();
    let shutdown = ends.shutdown.clone();
    let (scraped, exposition) = tokio::sync::oneshot::channel();
    // The controllers register what they show before anything else.
    let control = move |context: Context, stop: CancellationToken| async move {
        let scrape = async {
            scraped.send(get(address, "/metrics").await).expect("the test waits");
            shutdown.cancel();
        };
        tokio::join!(super::control(context, stop), scrape);
    };
    let result = app.run(clients(&api), ends, control).await;
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(families(&exposition.await.expect("scraped")), documented);
}

#[test]
fn pauses_before_the_next_greeting_grow_to_a_limit_and_differ() {
    for (attempt, luck, pause) in
        [(0, 0.0, 1.0), (1, 0.0, 2.0), (3, 0.0, 8.0), (4, 0.0, 15.0), (99, 0.0, 15.0)]
    {
        assert_eq!(greeting_pause(attempt, luck), Duration::from_secs_f64(pause), "attempt {attempt}");
    }
    assert_eq!(greeting_pause(2, 1.0), Duration::from_secs(2));
}
