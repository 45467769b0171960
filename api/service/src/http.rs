//! What a program shows over HTTP: `/healthz`, `/readyz` and `/metrics`.
//!
//! It answers from what others noted ([`Health`]) and registered ([`Metrics`]); it decides nothing, and asks nobody.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::time::Instant;

use crate::clock;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Health and metrics cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Something else listens there.
    #[error("{listen} is in use by another process: stop that one, or set `listen` to another port")]
    InUse {
        /// The configured address.
        listen: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error(
        "listen on {listen}: set `listen` to an address of this machine and a port that this process may use"
    )]
    Bind {
        /// The configured address.
        listen: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What is scraped at `/metrics`. A handle: clones share what is registered.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
}

impl Metrics {
    /// The metrics of the process itself: version, memory and CPU time.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("sts_backup_build", "The program's version", version);
        registry.register_collector(Box::new(Process));
        Self { registry: Arc::new(Mutex::new(registry)) }
    }

    /// Adds metrics that count, or a collector that looks at the scrape.
    ///
    /// A controller registers here: `metrics.register(|registry| registry.register_collector(Box::new(mine)))`.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// All metrics as `OpenMetrics` text.
    ///
    /// # Errors
    /// If a collector fails.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        prometheus_client::encoding::text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// Encodes a gauge of an own collector under its name.
///
/// # Errors
/// If the text cannot be written.
pub fn encode_gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: i64,
) -> Result<(), fmt::Error> {
    let gauge = ConstGauge::new(value);
    let metric_type = gauge.metric_type();
    gauge.encode(encoder.encode_descriptor(name, help, None, metric_type)?)
}

/// Memory and CPU time, under the names that every Prometheus client gives them.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        // Where there is no such /proc, the series are absent rather than zero.
        if let Some(bytes) = read_to_string("/proc/self/status").as_deref().and_then(resident_bytes) {
            encode_gauge(
                &mut encoder,
                "process_resident_memory_bytes",
                "Memory that the process holds",
                bytes,
            )?;
        }
        if let Some(seconds) = read_to_string("/proc/self/stat").as_deref().and_then(cpu_seconds) {
            let counter = ConstCounter::new(seconds);
            let help = "CPU time that the process used";
            counter.encode(encoder.encode_descriptor(
                "process_cpu_seconds",
                help,
                None,
                counter.metric_type(),
            )?)?;
        }
        Ok(())
    }
}

fn read_to_string(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// proc(5), status: `VmRSS:      1234 kB`.
fn resident_bytes(status: &str) -> Option<i64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok()?.checked_mul(1024)
}

/// proc(5), stat: fields 14 and 15 are user and system time in ticks, of which Linux shows 100 a second on every
/// architecture. The second field, the program's name, may hold spaces and parentheses.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let (user, system) = (fields.next()?.parse::<f64>().ok()?, fields.next()?.parse::<f64>().ok()?);
    Some((user + system) / 100.0)
}

/// What the probes ask for. A handle: clones share what is noted.
#[derive(Clone, Debug)]
pub struct Health {
    inner: Arc<HealthInner>,
}

#[derive(Debug)]
struct HealthInner {
    patience: Duration,
    waits_for: &'static str,
    last_beat: Mutex<Instant>,
    reached: AtomicBool,
    draining: AtomicBool,
}

impl Health {
    /// Alive from now on, and dead whenever no beat comes for `patience`; ready once what it `waits_for` is there.
    #[must_use]
    pub fn new(patience: Duration, waits_for: &'static str) -> Self {
        let last_beat = Mutex::new(clock::monotonic());
        let (reached, draining) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { inner: Arc::new(HealthInner { patience, waits_for, last_beat, reached, draining }) }
    }

    /// The main loop came round.
    pub fn beat(&self) {
        *self.inner.last_beat.lock().unwrap_or_else(PoisonError::into_inner) = clock::monotonic();
    }

    /// What it waited for is there.
    pub fn reached(&self) {
        self.inner.reached.store(true, Ordering::Relaxed);
    }

    /// The process ends: it is not ready any more.
    pub fn drain(&self) {
        self.inner.draining.store(true, Ordering::Relaxed);
    }

    /// Whether the main loop still comes round.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let last = *self.inner.last_beat.lock().unwrap_or_else(PoisonError::into_inner);
        clock::monotonic() < last + self.inner.patience
    }

    /// Why it is not ready.
    #[must_use]
    pub fn unready(&self) -> Option<&'static str> {
        if self.inner.draining.load(Ordering::Relaxed) {
            return Some("shutting down");
        }
        let reached = self.inner.reached.load(Ordering::Relaxed);
        (!reached).then_some(self.inner.waits_for)
    }
}

/// The HTTP server, listening but not answering yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Listens; port 0 takes any free one.
    ///
    /// # Errors
    /// If the address is in use, or is none that this process may listen on.
    pub async fn bind(listen: SocketAddr) -> Result<Self, ServeError> {
        let bound = match TcpListener::bind(listen).await {
            Ok(listener) => listener.local_addr().map(|address| Self { listener, address }),
            Err(error) => Err(error),
        };
        bound.map_err(|source| {
            if source.kind() == io::ErrorKind::AddrInUse {
                ServeError::InUse { listen }
            } else {
                ServeError::Bind { listen, source }
            }
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until the process ends.
    ///
    /// # Errors
    /// If the listener fails.
    pub async fn serve(self, metrics: Metrics, health: Health) -> io::Result<()> {
        let routes = Router::new()
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .with_state(health)
            .route("/metrics", get(scrape))
            .with_state(metrics);
        axum::serve(self.listener, routes).await
    }
}

async fn healthz(State(health): State<Health>) -> Response {
    if health.is_alive() {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the main loop hangs\n").into_response()
    }
}

async fn readyz(State(health): State<Health>) -> Response {
    match health.unready() {
        None => "ok\n".into_response(),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn scrape(State(metrics): State<Metrics>) -> Response {
    match metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(fmt::Error) => (StatusCode::INTERNAL_SERVER_ERROR, "a collector failed\n").into_response(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn get(address: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: program\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let status = answer.split(' ').nth(1).expect("a status line").parse().unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").expect("a head");
        (status, body.to_owned())
    }

    async fn serve(metrics: &Metrics, health: &Health) -> SocketAddr {
        let server = Server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = server.address();
        tokio::spawn(server.serve(metrics.clone(), health.clone()));
        address
    }

    fn patient() -> Health {
        Health::new(Duration::from_hours(1), "the API server has not answered")
    }

    #[tokio::test]
    async fn a_program_is_ready_from_the_first_answer_until_it_drains() {
        let health = patient();
        let address = serve(&Metrics::new(), &health).await;
        let (status, why) = get(address, "/readyz").await;
        assert_eq!((status, why.contains("API server")), (503, true), "{why}");
        health.reached();
        assert_eq!(get(address, "/readyz").await, (200, "ok\n".to_owned()));
        health.drain();
        let (status, why) = get(address, "/readyz").await;
        assert_eq!((status, why.contains("shutting down")), (503, true), "{why}");
        assert_eq!(get(address, "/healthz").await.0, 200, "who drains is alive");
    }

    #[tokio::test(start_paused = true)]
    async fn a_program_whose_main_loop_hangs_is_not_alive() {
        let health = Health::new(Duration::from_secs(30), "nothing");
        tokio::time::advance(Duration::from_secs(29)).await;
        assert!(health.is_alive());
        health.beat();
        tokio::time::advance(Duration::from_secs(30)).await;
        assert!(!health.is_alive());
        health.beat();
        assert!(health.is_alive());
    }

    #[tokio::test]
    async fn a_hanging_main_loop_shows_at_the_probe() {
        let address = serve(&Metrics::new(), &Health::new(Duration::ZERO, "nothing")).await;
        assert_eq!(get(address, "/healthz").await, (503, "the main loop hangs\n".to_owned()));
    }

    #[tokio::test]
    async fn a_scrape_shows_the_process_and_what_was_registered_later() {
        #[derive(Debug)]
        struct Three;
        impl Collector for Three {
            fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
                encode_gauge(&mut encoder, "three", "Always three", 3)
            }
        }
        let metrics = Metrics::new();
        let address = serve(&metrics, &patient()).await;
        metrics.register(|registry| registry.register_collector(Box::new(Three)));
        let (status, text) = get(address, "/metrics").await;
        assert_eq!(status, 200);
        let version = format!("sts_backup_build_info{{version=\"{}\"}} 1\n", env!("CARGO_PKG_VERSION"));
        for part in
            [version.as_str(), "process_resident_memory_bytes ", "process_cpu_seconds_total ", "three 3\n"]
        {
            assert!(text.contains(part), "{part} is missing in:\n{text}");
        }
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[tokio::test]
    async fn an_address_in_use_is_named_with_the_remedy() {
        let first = Server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let refused = Server::bind(first.address()).await.expect_err("in use").to_string();
        let in_use = "is in use by another process: stop that one, or set `listen` to another port";
        assert_eq!(refused, format!("{} {in_use}", first.address()));
    }

    #[test]
    fn the_kernels_tables_are_read_as_they_are_written() {
        assert_eq!(resident_bytes("VmPeak:\t 1 kB\nVmRSS:\t    1234 kB\nThreads:\t3\n"), Some(1234 * 1024));
        assert_eq!(resident_bytes("Name:\tx\n"), None);
        let stat = "7 (a) (b c) S 1 7 7 0 -1 4194304 100 0 0 0 250 150 3 4 20 0 9 0 100";
        assert_eq!(cpu_seconds(stat), Some(4.0));
        assert_eq!(cpu_seconds("7 (a) S 1"), None);
    }
}
