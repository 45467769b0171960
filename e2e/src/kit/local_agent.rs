//! An agent as a process on this machine, for tests of crashes, pauses and lost API servers.
//!
//! Its lease is in the test's namespace, but it sees the objects of all namespaces: hold
//! [`alone`](super::agent::alone) as long as it runs.

use std::fs::OpenOptions;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use jiff::SignedDuration;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, Client, Config};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use super::agent::{RELEASE, holder};
use super::{Cluster, Namespace};
use crate::condition::await_condition;
use crate::harness::paths::Paths;

/// A debug build on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Longer than the agent may take to end after SIGTERM, 25 s by default.
const EXIT_TIMEOUT: Duration = Duration::from_mins(1);

/// A lease of the default length that has to run out, on a busy machine.
const LEADS_TIMEOUT: Duration = Duration::from_mins(1);

/// Between two looks at whether it answers yet: a process has no event for that.
const START_POLL: Duration = Duration::from_millis(50);

/// How a local agent is to run.
#[derive(Clone)]
pub struct LocalAgentConfig {
    ns: Namespace,
    identity: String,
    kubeconfig: PathBuf,
    file: Option<PathBuf>,
    environment: Vec<(String, String)>,
}

impl LocalAgentConfig {
    /// An agent of this name, with its lease in the test's namespace.
    #[must_use]
    pub fn new(ns: &Namespace, identity: &str) -> Self {
        let kubeconfig = ns.cluster().kubeconfig().to_owned();
        Self {
            ns: ns.clone(),
            identity: identity.to_owned(),
            kubeconfig,
            file: None,
            environment: Vec::new(),
        }
    }

    /// Reaches the API server by another kubeconfig, such as a proxy's.
    #[must_use]
    pub fn kubeconfig(self, kubeconfig: &Path) -> Self {
        Self { kubeconfig: kubeconfig.to_owned(), ..self }
    }

    /// Gives it a configuration file.
    #[must_use]
    pub fn config(self, file: &Path) -> Self {
        Self { file: Some(file.to_owned()), ..self }
    }

    /// Sets a configuration key as the environment names it, such as `STSB_LEASE__DURATION_SECONDS`.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets its wall clock ahead, for tests in which days must pass.
    #[must_use]
    pub fn clock_ahead(self, by: SignedDuration) -> Self {
        self.env("CLOCK_AHEAD_SECONDS", &by.as_secs().to_string())
    }

    /// A lease of the default length, which it keeps also on a busy machine; it looks each second whether that of another
    /// one has run out.
    #[must_use]
    pub fn steady_lease(self) -> Self {
        self.env("STSB_LEASE__RETRY_SECONDS", "1")
    }

    /// A lease of four seconds, for an agent that is going to die: another one soon takes over. On a busy machine it may
    /// lose such a lease by itself.
    #[must_use]
    pub fn short_lease(self) -> Self {
        self.env("STSB_LEASE__DURATION_SECONDS", "4")
            .env("STSB_LEASE__RENEW_DEADLINE_SECONDS", "3")
            .env("STSB_LEASE__RETRY_SECONDS", "1")
    }

    /// Orders failpoints, as the crate `fail` reads them: `name=action;…`.
    #[must_use]
    pub fn failpoints(self, failpoints: &str) -> Self {
        self.env("FAILPOINTS", failpoints)
    }
}

/// A running agent; killed when it is dropped. Its log is printed when the test fails.
pub struct LocalAgent {
    child: Child,
    address: SocketAddr,
    log: PathBuf,
    identity: String,
    leases: Api<Lease>,
}

impl LocalAgent {
    /// Starts the agent that the harness built, and waits until it answers `/healthz`.
    ///
    /// # Errors
    /// When it ends before that or does not answer; the text ends with its last words.
    pub async fn start(config: &LocalAgentConfig) -> Result<Self> {
        let LocalAgentConfig { ns, identity, kubeconfig, file, environment } = config;
        let dir = log_dir(ns.cluster(), ns.name())?;
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let log = dir.join(format!("{identity}.log"));
        // Appended: an agent that is started again goes on with the log of its predecessor.
        let output = OpenOptions::new().create(true).append(true).open(&log);
        let output = output.with_context(|| format!("open {}", log.display()))?;
        // The kernel gives a free port, and does not give it again soon.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;

        // It must not outlive a test that is killed: it would go on in the cluster, with nobody to be alone with.
        let mut command = Command::new("setpriv");
        command.arg("--pdeathsig=KILL").arg(Paths::find()?.program("sts-backup-agent")).arg("run");
        command.args(file.iter().flat_map(|file| ["--config".as_ref(), file.as_os_str()]));
        command.env("KUBECONFIG", kubeconfig);
        command.env("STSB_LISTEN", address.to_string());
        command.env("STSB_NAMESPACE", ns.name()).env("STSB_IDENTITY", identity);
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).kill_on_drop(true);
        let child = command.spawn().context("start the agent: run cargo e2e up")?;
        let (identity, leases) = (identity.clone(), ns.api());
        let mut agent = Self { child, address, log, identity: identity.clone(), leases };

        let healthy = async {
            while agent.get("/healthz").await.is_err() {
                if let Some(status) = agent.child.try_wait()? {
                    bail!("the agent {identity} ended with {status}");
                }
                tokio::time::sleep(START_POLL).await;
            }
            Ok(())
        };
        let healthy = tokio::time::timeout(START_TIMEOUT, healthy).await;
        let healthy = healthy.unwrap_or_else(|_| {
            bail!("the agent {identity} does not answer /healthz after {START_TIMEOUT:?}")
        });
        healthy.with_context(|| format!("its last words: {}", last_line(&agent.log)))?;
        Ok(agent)
    }

    /// Waits until it leads.
    ///
    /// # Errors
    /// When it does not within a minute.
    pub async fn await_leads(&self) -> Result<()> {
        let what = format!("held by {}", self.identity);
        let held = |lease: &Lease| holder(lease) == Some(&self.identity);
        await_condition(&self.leases, RELEASE, &what, LEADS_TIMEOUT, held).await?;
        Ok(())
    }

    /// What it says at `path`, such as `/metrics`.
    ///
    /// # Errors
    /// When it does not answer with success.
    pub async fn get(&self, path: &str) -> Result<String> {
        let uri = format!("http://{}", self.address).parse().context("an address is a URI")?;
        let mut config = Config::new(uri);
        config.default_retry = false;
        let request = hyper::Request::get(path).body(Vec::new())?;
        let said = Client::try_from(config)?.request_text(request).await;
        said.with_context(|| format!("get {path} of the agent"))
    }

    /// All that it has logged.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn log(&self) -> Result<String> {
        let log = std::fs::read(&self.log).with_context(|| format!("read {}", self.log.display()))?;
        Ok(String::from_utf8_lossy(&log).into_owned())
    }

    /// Waits until it ends by itself, for instance at a failpoint.
    ///
    /// # Errors
    /// When it still runs after a minute.
    pub async fn wait_exit(&mut self) -> Result<ExitStatus> {
        let ended = tokio::time::timeout(EXIT_TIMEOUT, self.child.wait()).await;
        Ok(ended.with_context(|| format!("the agent still runs after {EXIT_TIMEOUT:?}"))??)
    }

    /// Kills it with SIGKILL, and waits until it is gone.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub async fn kill(mut self) -> Result<ExitStatus> {
        self.child.kill().await.context("kill the agent")?;
        self.wait_exit().await
    }

    /// Asks it to end, and waits until it has, in good order.
    ///
    /// # Errors
    /// When it does not.
    pub async fn end(mut self) -> Result<()> {
        self.terminate()?;
        let status = self.wait_exit().await?;
        ensure!(status.success(), "the agent {} ended with {status}", self.identity);
        Ok(())
    }

    /// Asks it to end, with SIGTERM; [`wait_exit`](Self::wait_exit) waits for it.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Stops it where it is, with SIGSTOP: to others it seems dead, and it does not notice. Returns when every thread
    /// of it stands still, which may be a little after the signal was sent.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)?;
        let pid = self.child.id().context("the agent has ended already")?;
        while !is_stopped(pid)? {
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Lets it go on, with SIGCONT.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let pid = pid.context("the agent has ended already")?;
        kill_process(pid, signal).with_context(|| format!("send {signal:?} to the agent"))
    }
}

fn last_line(log: &Path) -> String {
    let log = std::fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&log).trim_end().lines().last().unwrap_or("(nothing)").to_owned()
}

/// Where local agents of a test's namespace log.
pub(super) fn log_dir(cluster: &Cluster, namespace: &str) -> Result<PathBuf> {
    Ok(cluster.dir()?.join("agents").join(namespace))
}

/// Whether all threads of a process stand still, by proc(5).
fn is_stopped(pid: u32) -> Result<bool> {
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = std::fs::read_to_string(task?.path().join("stat"))?;
        // After the name in parentheses, which may hold anything.
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        if state != Some('T') {
            return Ok(false);
        }
    }
    Ok(true)
}
