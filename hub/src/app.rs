//! The hub as a whole: what starts in which order, what is reloaded while it runs, and how it ends.
//!
//! It starts, connects and stops the parts. It decides nothing about the fleet, and leaves signals and the exit to `main`.

use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use sts_backup_service::clock;
use sts_backup_service::files::Watch;
use sts_backup_service::http::{Health, Metrics, ServeError, Server};
use sts_backup_service::telemetry::chain;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::api::{self, ApiError};
use crate::config::Config;
use crate::fleet::Fleet;
use crate::link;
use crate::link::tls::{TlsError, link_config};
use crate::metrics::FleetMetrics;
use crate::policies::PolicySet;
use crate::store::{Store, StoreError};

/// The main loop comes round this often.
const BEAT: Duration = Duration::from_secs(5);

/// What is too old is forgotten this often.
const FORGET: Duration = Duration::from_hours(1);

/// Why the hub ended, where it was not told to.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// Health and metrics cannot be served.
    #[error("serve health and metrics")]
    Serve(#[from] ServeError),
    /// The API cannot be served.
    #[error("serve the API")]
    Api(#[from] ApiError),
    /// The link's address cannot be listened on.
    #[error("listen for agents on {listen}: set `listen` to an address of this machine and a free port")]
    Listen {
        /// The configured address.
        listen: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The link's certificates cannot be used.
    #[error("use the certificates of the link")]
    Tls(#[from] TlsError),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A part that runs until it is told to end ended before.
    #[error("the {part} ended by itself")]
    PartEnded {
        /// The part.
        part: &'static str,
    },
    /// A task panicked.
    #[error("a task panicked")]
    Panicked,
}

/// What ends the hub from outside.
#[derive(Clone, Debug, Default)]
pub struct Ends {
    /// It is asked to end, in order.
    pub shutdown: CancellationToken,
    /// One of its tasks panicked.
    pub panicked: CancellationToken,
}

/// Whether what is there now is what is used.
#[derive(Debug, Default)]
pub struct Reloads {
    /// The newest policies cannot be used.
    pub policies_failed: AtomicBool,
    /// The newest certificates cannot be used.
    pub certificates_failed: AtomicBool,
}

/// Runs the hub until it is asked to end.
///
/// # Errors
/// If it cannot start, or a part ends without being asked to.
pub async fn run(config: Config, ends: Ends) -> Result<(), AppError> {
    let http = Server::bind(config.http_listen).await?;
    let health = Health::new(BEAT * 12, "the hub does not serve agents yet");
    let metrics = Metrics::new();
    info!(version = env!("CARGO_PKG_VERSION"), "the hub starts");
    let mut parts = JoinSet::new();
    {
        let serving = http.serve(metrics.clone(), health.clone());
        parts.spawn(async move {
            if let Err(error) = serving.await {
                error!(error = %chain(&error), "serving HTTP failed");
            }
            "HTTP server"
        });
    }

    // One of a large fleet may take minutes to be brought up to date, and that is no standstill.
    let store = beating(&health, Store::open(&config.database)).await?;
    let fleet = Arc::new(Fleet::open(store.clone()).await?);
    let tls = Arc::new(ArcSwap::from_pointee(link_config(&config.certificates)?));
    let reloads = Arc::new(Reloads::default());
    let of_fleet = FleetMetrics::new(Arc::clone(&fleet), Arc::clone(&reloads), config.metrics_clusters);
    metrics.register(|registry| registry.register_collector(Box::new(of_fleet)));

    // Watched before they are read: what changes in between is read again.
    let (policies, certificates) = (Watch::of(&config.policies), Watch::of(&config.certificates));
    read_policies(&fleet, &config.policies, &reloads).await;
    parts.spawn(reload_policies(policies, config.clone(), Arc::clone(&fleet), Arc::clone(&reloads)));
    parts.spawn({
        let fleet = Arc::clone(&fleet);
        async move {
            fleet.write_notes_as_they_come().await;
            "writing of notes"
        }
    });
    parts.spawn(reload_certificates(certificates, config.clone(), Arc::clone(&tls), Arc::clone(&reloads)));
    let served = api::bind(&config.api, Arc::clone(&fleet)).await?;
    parts.spawn(async move {
        served.await;
        "API server"
    });

    let listener = TcpListener::bind(config.listen).await;
    let listener = listener.map_err(|source| AppError::Listen { listen: config.listen, source })?;
    let stop = CancellationToken::new();
    let mut serving = JoinSet::new();
    let address = listener.local_addr().unwrap_or(config.listen);
    let links = link::serve(
        listener,
        tls,
        config.trust_domain.clone(),
        Arc::clone(&fleet),
        config.heartbeat,
        stop.clone(),
    );
    serving.spawn(async move {
        if let Err(error) = links.await {
            error!(error = %chain(&error), "serving agents failed");
        }
        "link"
    });
    health.reached();
    info!(%address, api = %config.api.listen, clusters = fleet.clusters().len(), "the hub serves agents");

    let mut beat = interval(BEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut forget = interval(FORGET);
    let why = loop {
        tokio::select! {
            biased;
            () = ends.panicked.cancelled() => break Err(AppError::Panicked),
            () = ends.shutdown.cancelled() => break Ok(()),
            part = parts.join_next() => break Err(ended(part)),
            part = serving.join_next() => break Err(ended(part)),
            _ = beat.tick() => health.beat(),
            _ = forget.tick() => {
                let before = clock::now().saturating_sub(config.history);
                if let Ok(before) = before && let Err(error) = store.forget_before(before).await {
                    warn!(error = %chain(&error), "what is too old cannot be forgotten");
                }
            }
        }
    };
    health.drain();
    stop.cancel();
    fleet.draining.cancel();
    info!("the hub ends: agents are told to come again");
    if timeout(config.shutdown, serving.join_next()).await.is_err() {
        warn!(limit = ?config.shutdown, "some agents have not left in time");
    }
    if let Err(error) = fleet.write_notes().await {
        warn!(error = %chain(&error), "what agents have said of themselves is not written: they say it again");
    }
    store.close().await;
    why
}

/// Waits for work of which it is not known how long it takes.
async fn beating<T>(health: &Health, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    let mut beat = interval(BEAT);
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = beat.tick() => health.beat(),
        }
    }
}

fn ended(part: Option<Result<&'static str, tokio::task::JoinError>>) -> AppError {
    match part {
        Some(Err(error)) if error.is_panic() => AppError::Panicked,
        Some(Ok(part)) => AppError::PartEnded { part },
        Some(Err(_)) | None => AppError::PartEnded { part: "hub" },
    }
}

async fn read_policies(fleet: &Fleet, directory: &Path, reloads: &Reloads) {
    let read = {
        let directory = directory.to_owned();
        tokio::task::spawn_blocking(move || PolicySet::load(&directory)).await
    };
    let Ok(read) = read else { return };
    let failed = match read {
        Ok(set) => {
            let (count, before) = (set.len(), fleet.policies());
            let is_news = before.error.is_some() || before.set.as_deref() != Some(&set);
            match fleet.use_policies(set, clock::now()).await {
                Ok(()) => {
                    // They are looked at again and again.
                    if is_news {
                        info!(count, "fleet policies are in use");
                    }
                    None
                }
                Err(error) => Some(chain(&error)),
            }
        }
        Err(error) => Some(chain(&error)),
    };
    reloads.policies_failed.store(failed.is_some(), Ordering::Relaxed);
    if let Some(error) = failed {
        error!(error, "the fleet policies cannot be used: the last good ones stay in use");
        fleet.policies_are_bad(error);
    }
}

async fn reload_policies(
    watch: Watch,
    config: Config,
    fleet: Arc<Fleet>,
    reloads: Arc<Reloads>,
) -> &'static str {
    loop {
        watch.changed().await;
        read_policies(&fleet, &config.policies, &reloads).await;
    }
}

async fn reload_certificates(
    watch: Watch,
    config: Config,
    tls: Arc<ArcSwap<rustls::ServerConfig>>,
    reloads: Arc<Reloads>,
) -> &'static str {
    loop {
        watch.changed().await;
        let read = link_config(&config.certificates);
        reloads.certificates_failed.store(read.is_err(), Ordering::Relaxed);
        match read {
            Ok(read) => tls.store(Arc::new(read)),
            Err(error) => {
                error!(error = %chain(&error), "the link's certificates cannot be used: the last good ones stay in use");
            }
        }
    }
}
