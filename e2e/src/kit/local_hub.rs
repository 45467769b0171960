//! A hub as a process on this machine, for benches and tests of fleets that no machine can run: it can be killed, and starts
//! again with what it remembers.

use std::fs::OpenOptions;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt, stream};
use kube::{Client, Config};
use rustix::param::clock_ticks_per_second;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::hub::{fleet_policy, pki};
use crate::simulated::cluster_id;

/// A debug build on a busy machine.
const START_TIMEOUT: Duration = Duration::from_mins(1);

/// Between two looks at whether it is ready: a process has no event for that.
const START_POLL: Duration = Duration::from_millis(20);

/// Requests to its API that are under way at once.
const AT_ONCE: usize = 64;

/// Memory of a process, bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Resident now.
    pub resident: u64,
    /// The most that was resident.
    pub peak: u64,
}

/// Where it listens.
#[derive(Clone, Copy)]
struct Addresses {
    link: SocketAddr,
    http: SocketAddr,
    api: SocketAddr,
}

/// A hub, with the authority of its fleet; killed when it is dropped.
pub struct LocalHub {
    program: PathBuf,
    processor: Option<usize>,
    files: TempDir,
    authority: &'static str,
    addresses: Addresses,
    http: Client,
    api: Client,
    process: Child,
}

impl LocalHub {
    /// What all certificates belong to.
    pub const TRUST_DOMAIN: &str = "fleet.example.com";

    /// Starts this program with an empty database; pinned to a processor where one is named.
    ///
    /// # Errors
    /// When it ends, or is not ready within a minute.
    pub async fn start(program: &Path, processor: Option<usize>) -> Result<Self> {
        let files = tempfile::tempdir()?;
        let authority = "ca";
        make_certificates(program, files.path(), authority, "tls").await?;
        std::fs::create_dir(files.path().join("policies"))?;
        let addresses = Addresses::free()?;
        let process = spawn(program, processor, files.path(), addresses)?;
        let (http, api) = (client(addresses.http)?, client(addresses.api)?);
        let program = program.to_owned();
        let mut hub = Self { program, processor, files, authority, addresses, http, api, process };
        hub.await_ready().await?;
        Ok(hub)
    }

    /// Where agents connect to.
    #[must_use]
    pub fn link(&self) -> String {
        self.addresses.link.to_string()
    }

    /// The directory of the fleet's authority.
    #[must_use]
    pub fn authority(&self) -> PathBuf {
        self.files.path().join(self.authority)
    }

    /// Another authority from now on, and certificates of it over those of the hub, which runs.
    ///
    /// # Errors
    /// When they cannot be made or written.
    pub async fn replace_authority(&mut self) -> Result<()> {
        self.authority = "new-ca";
        make_certificates(&self.program, self.files.path(), self.authority, "new-tls").await?;
        for file in ["ca.crt", "tls.crt", "tls.key"] {
            std::fs::rename(
                self.files.path().join("new-tls").join(file),
                self.files.path().join("tls").join(file),
            )?;
        }
        Ok(())
    }

    /// What the kernel says of its memory.
    ///
    /// # Errors
    /// When it has ended.
    pub fn memory(&self) -> Result<Memory> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()?))?;
        // proc(5): `VmRSS:      1234 kB`.
        let value = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
            let kibibytes: u64 = kibibytes.with_context(|| format!("no {name}"))?.parse()?;
            Ok(kibibytes << 10)
        };
        Ok(Memory { resident: value("VmRSS")?, peak: value("VmHWM")? })
    }

    /// The processor time that it has used, seconds.
    ///
    /// # Errors
    /// When it has ended.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()?))?;
        // proc(5): after the name in parentheses, which may hold anything; utime and stime are the 14th and 15th field.
        let (_, rest) = stat.rsplit_once(") ").context("no name")?;
        let times = rest.split(' ').skip(11).take(2).map(str::parse::<u64>);
        let ticks: u64 = times.sum::<Result<_, _>>()?;
        #[expect(clippy::cast_precision_loss, reason = "ticks are few")]
        Ok(ticks as f64 / clock_ticks_per_second() as f64)
    }

    fn pid(&self) -> Result<u32> {
        self.process.id().context("the hub has ended")
    }

    /// Kills it with SIGKILL, and waits until it is gone.
    ///
    /// # Errors
    /// When it cannot be killed.
    pub async fn kill(&mut self) -> Result<()> {
        self.process.kill().await.context("kill the hub")
    }

    /// Starts it again, and waits until it is ready.
    ///
    /// # Errors
    /// When it ends, or is not ready within a minute.
    pub async fn restart(&mut self) -> Result<()> {
        self.process = spawn(&self.program, self.processor, self.files.path(), self.addresses)?;
        self.await_ready().await
    }

    /// Lets in the clusters of so many simulated agents.
    ///
    /// # Errors
    /// When it refuses one.
    pub async fn add_clusters(&self, count: usize) -> Result<()> {
        let added = stream::iter(0..count).map(async |number| {
            let cluster = json!({
                "id": cluster_id(number).to_string(),
                "name": format!("cluster-{number}"),
                "labels": { "env": "production" },
            });
            self.ask("POST", "/v1/clusters", Some(&cluster)).await.map(drop)
        });
        added.buffer_unordered(AT_ONCE).try_collect().await
    }

    /// Lets in a cluster whose agent may have only this namespace in hand, and returns its configuration file.
    ///
    /// # Errors
    /// When it refuses, or a file cannot be written.
    pub async fn let_in(&self, name: &str, namespace: &str) -> Result<PathBuf> {
        let added = self.ask("POST", "/v1/clusters", Some(&json!({ "name": name }))).await?;
        let id = added["id"].as_str().context("a cluster has an id")?;
        let certificates = self.issue(name, id).await?;
        let file = self.files.path().join(format!("{name}.toml"));
        let config = format!(
            "[link]\nhub = \"{}\"\ncertificates = \"{}\"\n\
             [link.guardrails]\nallowed_namespaces = [\"{namespace}\"]\n",
            self.addresses.link,
            certificates.display()
        );
        std::fs::write(&file, config)?;
        Ok(file)
    }

    /// Writes another certificate over that of a cluster that was let in.
    ///
    /// # Errors
    /// When it cannot be issued or written.
    pub async fn issue_again(&self, name: &str) -> Result<()> {
        let cluster = self.ask("GET", &format!("/v1/clusters/{name}"), None).await?;
        let id = cluster["id"].as_str().context("a cluster has an id")?;
        let new = self.issue("new", id).await?;
        for file in ["tls.crt", "tls.key"] {
            std::fs::rename(new.join(file), self.files.path().join(name).join(file))?;
        }
        Ok(())
    }

    async fn issue(&self, directory: &str, id: &str) -> Result<PathBuf> {
        let at = |name: &str| self.files.path().join(name).to_string_lossy().into_owned();
        let issue = ["issue", "--authority", &at(self.authority), "--dir", &at(directory), "--cluster", id];
        pki(&self.program, &issue).await?;
        Ok(self.files.path().join(directory))
    }

    /// A copy of the database of a hub that does not run.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn copy_database(&self) -> Result<TempDir> {
        let copy = tempfile::tempdir()?;
        copy_files(self.files.path(), copy.path(), "hub.db")?;
        Ok(copy)
    }

    /// Puts a copy in the place of the database of a hub that does not run.
    ///
    /// # Errors
    /// When it cannot be copied.
    pub fn put_back(&self, copy: &TempDir) -> Result<()> {
        for entry in std::fs::read_dir(self.files.path())? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("hub.db")) {
                std::fs::remove_file(path)?;
            }
        }
        copy_files(copy.path(), self.files.path(), "hub.db")
    }

    /// Removes the file of a fleet policy.
    ///
    /// # Errors
    /// When there is none.
    pub fn remove_policy(&self, name: &str) -> Result<()> {
        Ok(std::fs::remove_file(self.files.path().join("policies").join(format!("{name}.yaml")))?)
    }

    /// Writes the file of a fleet policy, all at once.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_policy(&self, name: &str, spec: &Value) -> Result<()> {
        let path = self.files.path().join("policies").join(format!("{name}.yaml"));
        let new = self.files.path().join("new-policy");
        std::fs::write(&new, fleet_policy(name, spec))?;
        std::fs::rename(new, &path).with_context(|| format!("write {}", path.display()))
    }

    /// What its API answers.
    ///
    /// # Errors
    /// When that is no success, or no JSON.
    pub async fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let body = body.map(ToString::to_string).unwrap_or_default();
        let said = request(&self.api, method, path, body).await?;
        if said.is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&said)?) }
    }

    /// What it says at `path`, such as `/metrics`.
    ///
    /// # Errors
    /// When it does not answer with success.
    pub async fn get(&self, path: &str) -> Result<String> {
        request(&self.http, "GET", path, String::new()).await
    }

    /// All that it has logged.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.files.path().join("hub.log"))?)
    }

    async fn await_ready(&mut self) -> Result<()> {
        let ready = async {
            while self.get("/readyz").await.is_err() {
                if let Some(status) = self.process.try_wait()? {
                    bail!("the hub ended with {status}: {}", self.log().unwrap_or_default());
                }
                tokio::time::sleep(START_POLL).await;
            }
            Ok(())
        };
        let ready = tokio::time::timeout(START_TIMEOUT, ready).await;
        ready.with_context(|| format!("the hub is not ready after {START_TIMEOUT:?}"))?
    }
}

/// Makes an authority, and certificates of it for the hub, in directories of these names.
async fn make_certificates(program: &Path, files: &Path, authority: &str, tls: &str) -> Result<()> {
    let at = |name: &str| files.join(name).to_string_lossy().into_owned();
    let init = ["init", "--dir", &at(authority), "--trust-domain", LocalHub::TRUST_DOMAIN];
    pki(program, &init).await?;
    let issue = ["issue", "--authority", &at(authority), "--dir", &at(tls), "--hub", "127.0.0.1"];
    pki(program, &issue).await.map(drop)
}

/// Copies the files whose names begin so: a database has some beside it.
fn copy_files(from: &Path, to: &Path, beginning: &str) -> Result<()> {
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(beginning) {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

fn spawn(
    program: &Path,
    processor: Option<usize>,
    files: &Path,
    Addresses { link, http, api }: Addresses,
) -> Result<Child> {
    let output = OpenOptions::new().create(true).append(true).open(files.join("hub.log"))?;
    let mut command = Command::new("setpriv");
    command.arg("--pdeathsig=KILL");
    if let Some(processor) = processor {
        command.args(["taskset", "--cpu-list", &processor.to_string()]);
    }
    command.arg(program).args(["serve", "--trust-domain", LocalHub::TRUST_DOMAIN]);
    for (flag, address) in [("--listen", link), ("--http-listen", http), ("--api-listen", api)] {
        command.args([flag, &address.to_string()]);
    }
    for (flag, name) in [("--certificates", "tls"), ("--policies", "policies"), ("--database", "hub.db")] {
        command.arg(flag).arg(files.join(name));
    }
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).kill_on_drop(true);
    command.spawn().context("start the hub")
}

impl Addresses {
    /// The kernel gives free ports, and does not give them again soon.
    fn free() -> Result<Self> {
        let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
        let (link, http, api) = (bind()?, bind()?, bind()?);
        Ok(Self { link: link.local_addr()?, http: http.local_addr()?, api: api.local_addr()? })
    }
}

fn client(address: SocketAddr) -> Result<Client> {
    let mut config = Config::new(format!("http://{address}").parse().context("an address is a URI")?);
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}

async fn request(client: &Client, method: &str, path: &str, body: String) -> Result<String> {
    let request = hyper::Request::builder().method(method).uri(path);
    let request = request.header("content-type", "application/json").body(body.into_bytes())?;
    let said = client.request_text(request).await;
    said.with_context(|| format!("{method} {path} of the hub"))
}
