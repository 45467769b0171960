//! All simulated agents of a process, and what it is asked of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use jiff::{SignedDuration, Timestamp};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType};
use serde_json::value::{RawValue, to_raw_value};
use sts_backup_api::identity::{ClusterId, TrustDomain};
use sts_backup_api::report::RunReport;
use sts_backup_service::clock;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::sync::watch;
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use super::agent::Agent;
use super::{Answer, Order, cluster_id};

/// Agents start one after the other: a fleet does not come into being in one moment.
const STARTS_AT_ONCE: usize = 64;

/// A backup remembers so many runs; as many as the API's default.
const RUNS: u32 = 10;

/// What the agents are to connect with.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The hub, as HOST:PORT
    #[arg(long)]
    hub: String,
    /// Directory of the fleet's authority, with tls.crt and tls.key
    #[arg(long)]
    authority: PathBuf,
    /// The fleet's trust domain
    #[arg(long)]
    trust_domain: TrustDomain,
    /// Number of the first one
    #[arg(long, default_value_t = 0)]
    first: usize,
    /// How many there are
    #[arg(long)]
    agents: usize,
    /// How many backups each has from the start
    #[arg(long, default_value_t = 3)]
    objects: usize,
}

/// What agents are to have reported.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) round: u32,
    pub(super) objects: usize,
    /// Of the first run of each backup: none is so old that a hub forgets it.
    pub(super) since: Timestamp,
    /// The runs of each backup, as JSON: they are made once for all, or it would cost more than to send them.
    pub(super) runs: Arc<[Box<RawValue>]>,
}

impl Wanted {
    /// In this round each backup has had one more run than in the one before.
    fn in_round(round: u32, objects: usize, since: Timestamp) -> Result<Self> {
        let runs = (round..round + RUNS).map(|number| {
            let started = day(since, number);
            Ok(to_raw_value(&RunReport {
                id: started.strftime("%Y%m%d-%H%M%S").to_string(),
                started,
                duration_ms: 4200,
                freeze_ms: Some(310),
                result: "Completed".to_owned(),
                reason: "Completed".to_owned(),
                message: "3 of 3 volumes".to_owned(),
            })?)
        });
        Ok(Self { round, objects, since, runs: runs.collect::<Result<_>>()? })
    }

    /// When the newest run began.
    pub(super) fn last_run(&self) -> Timestamp {
        day(self.since, self.round + RUNS - 1)
    }
}

fn day(since: Timestamp, number: u32) -> Timestamp {
    since + SignedDuration::from_hours(24) * i32::try_from(number).unwrap_or(i32::MAX)
}

/// When each agent, by its number, did what is counted.
type Times = watch::Sender<Vec<Option<Timestamp>>>;

/// What the agents have in common.
pub(super) struct Crowd {
    pub(super) hub: String,
    connected: watch::Sender<usize>,
    applied: Times,
    reported: Times,
    wanted: watch::Sender<Wanted>,
}

/// An agent is connected as long as this is there.
pub(super) struct IsConnected<'a>(&'a Crowd);

impl Drop for IsConnected<'_> {
    fn drop(&mut self) {
        self.0.connected.send_modify(|count| *count -= 1);
    }
}

fn note(times: &Times, number: usize) {
    times.send_modify(|times| {
        let _ = times[number].get_or_insert_with(clock::now);
    });
}

fn forget(times: &Times) {
    times.send_modify(|times| times.fill(None));
}

async fn all(times: &Times) -> Result<Answer> {
    let mut seen = times.subscribe();
    // Each change is looked at up to the first agent that is not there: it is seldom the last one.
    let times = seen.wait_for(|times| times.iter().all(Option::is_some)).await?;
    let mut times: Vec<_> = times.iter().copied().flatten().collect();
    times.sort_unstable();
    let at = |percent: usize| times.get((times.len() * percent).div_ceil(100).max(1) - 1).copied();
    let one = || at(50).zip(at(99)).zip(at(100));
    let ((half, nearly_all), all) = one().context("there are no agents")?;
    Ok(Answer { half, nearly_all, all })
}

impl Crowd {
    pub(super) fn connected(&self) -> IsConnected<'_> {
        self.connected.send_modify(|count| *count += 1);
        IsConnected(self)
    }

    pub(super) fn applied(&self, number: usize) {
        note(&self.applied, number);
    }

    pub(super) fn reported(&self, number: usize, round: u32) {
        if self.wanted.borrow().round == round {
            note(&self.reported, number);
        }
    }

    pub(super) fn wanted(&self) -> watch::Receiver<Wanted> {
        self.wanted.subscribe()
    }

    async fn obey(&self, order: Order) -> Result<Answer> {
        let now = || {
            let now = clock::now();
            Answer { half: now, nearly_all: now, all: now }
        };
        match order {
            Order::AwaitConnected(wanted) => {
                self.connected.subscribe().wait_for(|count| *count == wanted).await?;
                Ok(now())
            }
            Order::CountApplied => {
                forget(&self.applied);
                Ok(now())
            }
            Order::AwaitApplied => all(&self.applied).await,
            Order::Report(objects) => {
                forget(&self.reported);
                let (round, since) = {
                    let wanted = self.wanted.borrow();
                    (wanted.round, wanted.since)
                };
                self.wanted.send_replace(Wanted::in_round(round + 1, objects, since)?);
                all(&self.reported).await
            }
        }
    }
}

/// Makes certificates of the fleet's authority.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
    trust_domain: TrustDomain,
}

impl Authority {
    fn read(directory: &Path, trust_domain: TrustDomain) -> Result<Self> {
        let read = |name: &str| {
            let path = directory.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
        };
        let (certificate, key) = (read("tls.crt")?, KeyPair::from_pem(&read("tls.key")?)?);
        let issuer = Issuer::from_ca_cert_pem(&certificate, key)?;
        Ok(Self { certificate, issuer, trust_domain })
    }

    fn issue(&self, cluster: ClusterId) -> Result<ClientTlsConfig> {
        let uri = self.trust_domain.cluster_uri(cluster);
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into()?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.certificate))
            .identity(Identity::from_pem(certificate.pem(), key.serialize_pem())))
    }
}

/// Runs the agents, and answers orders of standard input, until that ends.
///
/// # Errors
/// If the authority cannot be read, or an order is none.
pub async fn run(options: Options) -> Result<()> {
    let Options { hub, authority, trust_domain, first, agents, objects } = options;
    let authority = Authority::read(&authority, trust_domain)?;
    let since = clock::now() - SignedDuration::from_hours(24 * 30);
    let crowd = Arc::new(Crowd {
        hub,
        connected: watch::Sender::new(0),
        applied: watch::Sender::new(vec![None; agents]),
        reported: watch::Sender::new(vec![None; agents]),
        wanted: watch::Sender::new(Wanted::in_round(0, objects, since)?),
    });
    for number in 0..agents {
        let cluster = cluster_id(first + number);
        tokio::spawn(Agent::new(Arc::clone(&crowd), number, authority.issue(cluster)?).run());
        if number % STARTS_AT_ONCE == 0 {
            tokio::task::yield_now().await;
        }
    }
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    let mut out = tokio::io::stdout();
    while let Some(line) = orders.next_line().await? {
        let order = serde_json::from_str(&line).with_context(|| format!("{line:?} is no order"))?;
        let mut answer = serde_json::to_string(&crowd.obey(order).await?)?;
        answer.push('\n');
        out.write_all(answer.as_bytes()).await?;
        out.flush().await?;
    }
    Ok(())
}
