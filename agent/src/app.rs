//! The agent as a whole: what starts in which order, who is told when it ends, and what it ends with.
//!
//! It starts, connects and stops the parts. It decides nothing about backups, and leaves signals and the exit to
//! `main`.

use std::sync::Arc;
use std::time::Duration;

use kube::{Client, Config as ClusterConfig};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use sts_backup_api::report::CoverageReport;
use sts_backup_service::http::{Health, Metrics, ServeError, Server, encode_gauge};
use sts_backup_service::telemetry::chain;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::backup;
use crate::config::Config;
use crate::lease::{Elector, Leadership};
use crate::link;
use crate::occupancy::Occupancy;
use crate::policy;
use crate::restore;

#[cfg(test)]
mod tests;

/// Why it is not ready; leader and follower both are.
const WAITS_FOR: &str = "the API server has not answered a request for the lease yet";
/// How long one request for the API server's version may take.
const GREETING: Duration = Duration::from_secs(5);
/// The longest pause between two of them.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// How long giving the lease back may take.
const RELEASE: Duration = Duration::from_secs(5);

/// Why the agent ended, where it was not told to.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// Health and metrics cannot be served.
    #[error("serve health and metrics")]
    Serve(#[from] ServeError),
    /// Nothing says where the API server is.
    #[error("find the API server: run the agent in a pod with a service account, or set KUBECONFIG")]
    Locate(#[source] kube::config::InferConfigError),
    /// The client cannot be made from what says where the API server is.
    #[error("prepare the connection to the API server: check the certificates and tokens it names")]
    Connect(#[source] kube::Error),
    /// Another replica may act from now on.
    #[error("leadership is lost: this process ends, and starts again as a follower")]
    LeadershipLost,
    /// A part that runs until it is told to end ended before.
    #[error("the {part} ended by itself")]
    PartEnded {
        /// The part.
        part: &'static str,
    },
    /// A task panicked.
    #[error("a task panicked")]
    Panicked,
    /// The controllers did not end in the time they had.
    #[error(
        "the controllers did not end in time: databases may still be frozen until the next leader thaws them"
    )]
    Unfinished,
}

impl AppError {
    /// The process's exit code, as docs/agent.md lists them.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Serve(_)
            | Self::Locate(_)
            | Self::Connect(_)
            | Self::PartEnded { .. }
            | Self::Unfinished => 1,
            Self::LeadershipLost => 3,
            Self::Panicked => 101,
        }
    }
}

/// What ends the agent from outside.
#[derive(Clone, Debug, Default)]
pub struct Ends {
    /// It is asked to end, in order.
    pub shutdown: CancellationToken,
    /// One of its tasks panicked, and nobody may have noticed.
    pub panicked: CancellationToken,
}

/// The API server, in two ways.
#[derive(Clone)]
pub struct Clients {
    /// Repeats requests that fail in passing.
    pub repeating: Client,
    /// Sends every request once: for what must not happen twice, and for who judges failures by themselves.
    pub once: Client,
}

impl Clients {
    /// Clients for the cluster that the kubeconfig, or else the pod's service account, names.
    ///
    /// # Errors
    /// If neither does, or if what they name cannot be used.
    pub async fn infer() -> Result<Self, AppError> {
        let config = ClusterConfig::infer().await.map_err(AppError::Locate)?;
        Self::of(config).map_err(AppError::Connect)
    }

    fn of(mut config: ClusterConfig) -> kube::Result<Self> {
        config.connect_timeout = Some(Duration::from_secs(10));
        let mut once = config.clone();
        once.default_retry = false;
        // A hook may be silent for as long as its own timeout allows.
        once.read_timeout = None;
        config.default_retry = true;
        // Longer than a watch lasts, which its server ends within 290 s; counted from the request, not from
        // when its connection went idle.
        config.read_timeout = Some(Duration::from_secs(295));
        config.reset_reader_on_write = true;
        // With its first client kube installs the process's TLS provider, aws-lc-rs.
        Ok(Self { repeating: Client::try_from(config)?, once: Client::try_from(once)? })
    }
}

/// What the controllers work with, from when this replica leads.
#[derive(Clone)]
pub struct Context {
    /// Repeats requests that fail in passing; sets no timeout for a request as a whole.
    pub client: Client,
    /// Sends every request once, and waits for an answer for as long as it takes: for hooks.
    pub exec_client: Client,
    /// Whether this replica still leads.
    pub leadership: Leadership,
    /// What the agent was told.
    pub config: Arc<Config>,
    /// Where to register metrics.
    pub metrics: Metrics,
    /// Which backup or restore has which `StatefulSet` in hand.
    pub(crate) occupancy: Arc<Occupancy>,
    /// What of the cluster is protected; none: not everything is known yet.
    pub(crate) coverage: watch::Sender<Option<CoverageReport>>,
}

/// Runs the agent until it is asked to end.
///
/// # Errors
/// If it ends without being asked to, or could not do all that ending takes.
pub async fn run(config: Config, ends: Ends) -> Result<(), AppError> {
    let app = App::bind(config).await?;
    let clients = Clients::infer().await?;
    app.run(clients, ends, control).await
}

/// The controllers: they run until `stop`, and end when every database they froze is thawed.
async fn control(context: Context, stop: CancellationToken) {
    tokio::join!(
        backup::run(context.clone(), stop.clone()),
        restore::run(context.clone(), stop.clone()),
        policy::run(context.clone(), stop.clone()),
        link::run(context, stop)
    );
}

/// The agent, listening but not connected yet.
#[derive(Debug)]
pub struct App {
    config: Arc<Config>,
    metrics: Metrics,
    health: Health,
    server: Server,
}

impl App {
    /// Listens for probes and scrapes, before anything else.
    ///
    /// # Errors
    /// If it cannot.
    pub async fn bind(config: Config) -> Result<Self, AppError> {
        let server = Server::bind(config.listen).await?;
        // A round of the elector takes at most 3.2 times its pause.
        let patience = (config.lease.retry * 5).max(2 * (GREETING + LONGEST_PAUSE));
        Ok(Self {
            config: Arc::new(config),
            metrics: Metrics::new(),
            health: Health::new(patience, WAITS_FOR),
            server,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> std::net::SocketAddr {
        self.server.address()
    }

    /// Waits for the API server, then for leadership, then runs `control` until one of the `ends`.
    ///
    /// # Errors
    /// As [`run`].
    pub async fn run<C, F>(self, clients: Clients, ends: Ends, control: C) -> Result<(), AppError>
    where
        C: FnOnce(Context, CancellationToken) -> F,
        F: Future<Output = ()> + Send + 'static,
    {
        let Self { config, metrics, health, server } = self;
        info!(version = env!("CARGO_PKG_VERSION"), address = %server.address(), "the agent starts");
        let mut http = JoinSet::new();
        let serving = server.serve(metrics.clone(), health.clone());
        http.spawn(async {
            if let Err(error) = serving.await {
                error!(error = %chain(&error), "serving HTTP failed");
            }
        });
        tokio::select! {
            biased;
            why = told(&ends) => return why,
            why = ended(&mut http, "HTTP server") => return Err(why),
            () = await_api_server(&clients.once, &health) => {}
        }

        // No two processes share a name, not even two lives of one pod.
        let we = format!("{}_{:016x}", config.identity, rand::random::<u64>());
        let (elector, leadership) =
            Elector::new(clients.once.clone(), &config.namespace, config.lease.clone(), we);
        let leads = Leads { leadership: leadership.clone() };
        metrics.register(|registry| registry.register_collector(Box::new(leads)));
        let release = CancellationToken::new();
        let mut election = JoinSet::new();
        election.spawn(elector.run(release.clone(), health.clone()));
        let why = tokio::select! {
            biased;
            why = told(&ends) => Some(why),
            why = ended(&mut http, "HTTP server") => Some(Err(why)),
            why = ended(&mut election, "leader election") => Some(Err(why)),
            () = leadership.acquired() => None,
        };
        if let Some(why) = why {
            health.drain();
            give_up(&mut election, &release).await;
            return why;
        }

        let limit = config.shutdown;
        let context = Context {
            client: clients.repeating,
            exec_client: clients.once,
            leadership: leadership.clone(),
            config,
            metrics,
            occupancy: Arc::new(Occupancy::new()),
            coverage: watch::Sender::default(),
        };
        let stop = CancellationToken::new();
        let mut controllers = JoinSet::new();
        controllers.spawn(control(context, stop.clone()));
        let why = tokio::select! {
            biased;
            () = leadership.lost() => Err(AppError::LeadershipLost),
            why = told(&ends) => why,
            why = ended(&mut http, "HTTP server") => Err(why),
            why = ended(&mut controllers, "controllers") => Err(why),
        };
        health.drain();
        stop.cancel();
        match &why {
            Ok(()) => info!("the agent is asked to end: it thaws what is frozen"),
            Err(why) => error!(error = %chain(why), "the agent ends: it thaws what is frozen"),
        }
        let finished = finish(&mut controllers, limit, &leadership).await;
        give_up(&mut election, &release).await;
        if ends.panicked.is_cancelled() {
            return Err(AppError::Panicked);
        }
        why.and(finished)
    }
}

/// Returns when somebody outside ends the agent: in order, or because it is broken.
async fn told(ends: &Ends) -> Result<(), AppError> {
    tokio::select! {
        biased;
        () = ends.panicked.cancelled() => Err(AppError::Panicked),
        () = ends.shutdown.cancelled() => Ok(()),
    }
}

/// Returns when a part that should run ends, with what that means.
async fn ended(part: &mut JoinSet<()>, name: &'static str) -> AppError {
    match part.join_next().await {
        Some(Err(error)) if error.is_panic() => AppError::Panicked,
        Some(_) | None => AppError::PartEnded { part: name },
    }
}

/// Waits for the controllers to thaw and to end: for `limit` while the lease is renewed, and once it is lost only
/// until another replica may act.
async fn finish(
    controllers: &mut JoinSet<()>,
    limit: Duration,
    leadership: &Leadership,
) -> Result<(), AppError> {
    let cut_off = async {
        tokio::select! {
            biased;
            () = leadership.lost() => sleep(leadership.remaining()).await,
            () = sleep(limit) => {}
        }
    };
    let done = tokio::select! {
        biased;
        done = controllers.join_next() => done,
        () = cut_off => {
            controllers.abort_all();
            error!(error = %AppError::Unfinished, "the agent ends before its controllers");
            return Err(AppError::Unfinished);
        }
    };
    match done {
        Some(Err(error)) if error.is_panic() => Err(AppError::Panicked),
        Some(_) | None => Ok(()),
    }
}

/// Gives the lease back, if it is held.
async fn give_up(election: &mut JoinSet<()>, release: &CancellationToken) {
    release.cancel();
    if timeout(RELEASE, election.join_next()).await.is_err() {
        warn!(limit = ?RELEASE, "the lease was not released in time: the next leader waits until it expires");
    }
}

/// Waits until the API server answers, however long that takes: an agent that crashed instead would be backed off,
/// and late when it is back.
async fn await_api_server(client: &Client, health: &Health) {
    for attempt in 0.. {
        health.beat();
        let problem = match timeout(GREETING, client.apiserver_version()).await {
            Ok(Ok(version)) => return info!(version = %version.git_version, "the API server answers"),
            // It answers, and what it refuses here it may allow where it matters.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
                return info!(code = status.code, "the API server answers, but does not tell its version");
            }
            Ok(Err(error)) => chain(&error),
            Err(_) => format!("no answer within {GREETING:?}"),
        };
        let pause = greeting_pause(attempt, rand::random());
        warn!(error = problem, ?pause, "the API server cannot be reached: the agent waits for it");
        sleep(pause).await;
    }
}

/// One second, doubled with each attempt up to the longest pause, of which `luck` (0 to 1) takes away up to half: after
/// an outage the agents of a fleet do not come all at once.
fn greeting_pause(attempt: u32, luck: f64) -> Duration {
    let full = Duration::from_secs(1 << attempt.min(6)).min(LONGEST_PAUSE);
    full.mul_f64(1.0 - luck / 2.0)
}

/// `sts_backup_leader`, as of the scrape: a process that was stopped does not claim what it lost.
#[derive(Debug)]
struct Leads {
    leadership: Leadership,
}

impl Collector for Leads {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let leads = i64::from(self.leadership.is_held());
        encode_gauge(&mut encoder, "sts_backup_leader", "Whether this replica leads", leads)
    }
}
