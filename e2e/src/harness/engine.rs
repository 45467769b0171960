//! The Docker Engine: the machine's own where a daemon answers, else Debian's, unpacked into the cache and
//! started by us with a private folder. Only the latter is ever stopped or cleaned up.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};
use tokio::process::Command;

use super::Harness;
use super::debian::Packages;
use super::paths::Paths;
use super::step::Log;
use super::traces::Before;

/// The Docker network of the nodes, ours alone, so that a user's own kind clusters are left in peace.
pub const NETWORK: &str = "sts-backup-e2e";

/// What the engine needs of Debian.
const PACKAGES: [&str; 5] = ["docker.io", "runc", "iptables", "iproute2", "nftables"];

/// How long a daemon may take to answer.
const START_TIMEOUT: Duration = Duration::from_mins(1);
/// How long a daemon may take to stop its containers and end.
const STOP_TIMEOUT: Duration = Duration::from_mins(1);

/// A Docker Engine that answers.
#[derive(Clone, Debug)]
pub struct Engine {
    docker: PathBuf,
    environment: Vec<(&'static str, OsString)>,
    /// Whether we started it.
    pub ours: bool,
}

/// The files of the engine that we start.
struct Files {
    dir: PathBuf,
}

impl Files {
    fn of(paths: &Paths) -> Self {
        Self { dir: engine_dir(paths) }
    }
    fn socket(&self) -> PathBuf {
        self.dir.join("docker.sock")
    }
    fn pid_file(&self) -> PathBuf {
        self.dir.join("dockerd.pid")
    }
    /// Of the containerd that dockerd starts for itself.
    fn containerd_pid_file(&self) -> PathBuf {
        self.dir.join("exec/containerd/containerd.pid")
    }
    /// The packages that the daemon was started with.
    fn packages(&self) -> PathBuf {
        self.dir.join("packages.json")
    }
    fn host(&self) -> OsString {
        format!("unix://{}", self.socket().display()).into()
    }
}

/// The folder of the engine that we start; every process, mount and loop device of it names this folder.
#[must_use]
pub fn engine_dir(paths: &Paths) -> PathBuf {
    paths.state().join("engine")
}

/// The Debian packages of the engine, with the network tools that clean up after it: those that it was started
/// with, as long as it has not been started with others, since a daemon runs programs from where they were.
///
/// # Errors
/// When they cannot be had.
pub async fn packages(harness: &Harness) -> Result<Packages> {
    let record = Files::of(&harness.paths).packages();
    let recorded = std::fs::read(record).ok().and_then(|file| serde_json::from_slice::<Packages>(&file).ok());
    match recorded.filter(Packages::exist) {
        Some(packages) => Ok(packages),
        None => Packages::get(harness, "engine", &PACKAGES).await,
    }
}

impl Engine {
    /// The engine that answers now: ours, else the machine's.
    pub async fn find(harness: &Harness) -> Option<Self> {
        let files = Files::of(&harness.paths);
        if files.socket().exists()
            && let Ok(packages) = packages(harness).await
            && let Ok(engine) = Self::ours(&files, &packages)
            && engine.answers().await
        {
            return Some(engine);
        }
        let machines = Self { docker: "docker".into(), environment: Vec::new(), ours: false };
        machines.answers().await.then_some(machines)
    }

    /// The engine that answers now, or ours, started.
    ///
    /// # Errors
    /// When Debian's packages cannot be had or the daemon does not start.
    pub async fn find_or_start(harness: &Harness) -> Result<Self> {
        if let Some(engine) = Self::find(harness).await {
            return Ok(engine);
        }
        ensure_no_other_daemon()?;
        let files = Files::of(&harness.paths);
        std::fs::create_dir_all(&files.dir)?;
        if let Some(pid) = running(&files.pid_file(), "dockerd", &files.dir) {
            // It lives but does not answer.
            end_process(pid, STOP_TIMEOUT).await.with_context(|| format!("stop dockerd, process {pid}"))?;
        }
        let packages = Packages::get(harness, "engine", &PACKAGES).await?;
        std::fs::write(files.packages(), serde_json::to_vec(&packages)?)?;
        // Recorded once, before the first change, and kept by a repeated run: it is what `down` restores.
        Before::record(&harness.paths, &packages).await?;
        harness
            .steps
            .run(
                "start the Docker engine",
                "read the log; `cargo e2e down` clears what a killed run left, then try again",
                async |log| start(log, &files, &packages).await,
            )
            .await?;
        Self::ours(&files, &packages)
    }

    /// Stops the engine if it is ours, and waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn stop(harness: &Harness) -> Result<()> {
        let files = Files::of(&harness.paths);
        if let Some(pid) = running(&files.pid_file(), "dockerd", &files.dir) {
            end_process(pid, STOP_TIMEOUT).await.with_context(|| format!("stop dockerd, process {pid}"))?;
        }
        remove_file(&files.pid_file())?;
        remove_file(&files.socket())
    }

    fn ours(files: &Files, packages: &Packages) -> Result<Self> {
        Ok(Self {
            docker: packages.program("docker")?,
            environment: vec![("DOCKER_HOST", files.host()), ("PATH", packages.search_path().into())],
            ours: true,
        })
    }

    async fn answers(&self) -> bool {
        let mut command = self.docker();
        command.args(["version", "--format", "{{.Server.Version}}"]).kill_on_drop(true);
        let answer = tokio::time::timeout(Duration::from_secs(10), command.output()).await;
        answer.is_ok_and(|output| output.is_ok_and(|output| output.status.success()))
    }

    /// A `docker` command for this engine.
    #[must_use]
    pub fn docker(&self) -> Command {
        let mut command = Command::new(&self.docker);
        self.set_environment(&mut command);
        command
    }

    /// Lets another program, such as kind, use this engine.
    pub fn set_environment(&self, command: &mut Command) {
        command.envs(self.environment.iter().map(|(name, value)| (*name, value)));
        command.env("KIND_EXPERIMENTAL_DOCKER_NETWORK", NETWORK).env("KIND_EXPERIMENTAL_PROVIDER", "docker");
    }

    /// Whether an image of this name is in the engine's store.
    pub async fn has_image(&self, name: &str) -> bool {
        let output = self.docker().args(["image", "inspect", "--format", "{{.Id}}", name]).output().await;
        output.is_ok_and(|output| output.status.success())
    }
}

async fn start(log: &Log, files: &Files, packages: &Packages) -> Result<()> {
    // A daemon that was killed leaves these. The numbers may belong to other programs by now, or to processes that
    // are ending, and dockerd would wait for them in vain.
    if let Some(pid) = running(&files.containerd_pid_file(), "containerd", &files.dir) {
        end_process(pid, STOP_TIMEOUT).await.with_context(|| format!("stop containerd, process {pid}"))?;
    }
    for file in [files.pid_file(), files.socket(), files.containerd_pid_file()] {
        remove_file(&file)?;
    }

    let mut dockerd = packages.command("dockerd")?;
    dockerd.arg("--host").arg(files.host()).arg("--pidfile").arg(files.pid_file());
    dockerd.arg("--data-root").arg(files.dir.join("data")).arg("--exec-root").arg(files.dir.join("exec"));
    // Not the machine's configuration, and the key that older engines write stays in our folder.
    let config = files.dir.join("daemon.json");
    let key = files.dir.join("key.json");
    std::fs::write(&config, serde_json::json!({ "deprecated-key-path": key }).to_string())?;
    dockerd.arg("--config-file").arg(config).args(["--group", "root"]);
    dockerd.args(["--storage-driver", "overlay2", "--exec-opt", "native.cgroupdriver=cgroupfs"]);
    // Lowering the score needs CAP_SYS_RESOURCE; a smaller MTU than the machine's never hurts on one host.
    dockerd.args(["--oom-score-adjust", "0", "--mtu", "1400"]);
    let runc = packages.program("runc")?;
    let runtime = if may_raise_limits()? { runc } else { write_runtime_wrapper(files, &runc)? };
    dockerd
        .arg("--add-runtime")
        .arg(format!("node={}", runtime.display()))
        .args(["--default-runtime", "node"]);
    let output = log.open()?;
    // A group of its own: an interrupt at the keyboard ends the harness, not the daemon.
    dockerd.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).process_group(0);
    let mut daemon = dockerd.spawn().context("start dockerd")?;

    let engine = Engine::ours(files, packages)?;
    let answer = async {
        while !engine.answers().await {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = answer => Ok(()),
        status = daemon.wait() => bail!("dockerd ended with {}", status?),
        () = tokio::time::sleep(START_TIMEOUT) => bail!("dockerd did not answer within {} s", START_TIMEOUT.as_secs()),
    }
}

/// Two daemons would share `docker0` and the firewall's chains, so ours is not started beside one that cannot be
/// reached.
fn ensure_no_other_daemon() -> Result<()> {
    let Ok(pid) = std::fs::read_to_string("/run/docker.pid") else { return Ok(()) };
    let pid = pid.trim();
    let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    anyhow::ensure!(
        command.trim() != "dockerd",
        "a Docker daemon runs (process {pid}) but does not answer: set DOCKER_HOST or the docker context so that \
         `docker version` works, or stop the daemon"
    );
    Ok(())
}

/// Whether `CAP_SYS_RESOURCE` is in the bounding set. Without it runc refuses `--privileged`, which asks for
/// every capability that the kernel knows.
fn may_raise_limits() -> Result<bool> {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = std::fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let bounding = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapBnd:")?.trim(), 16).ok())
        .context("/proc/self/status has no CapBnd")?;
    Ok(bounding & (1 << CAP_SYS_RESOURCE) != 0)
}

/// An OCI runtime that takes the capability out of what is asked for and then runs the real one.
fn write_runtime_wrapper(files: &Files, runc: &Path) -> Result<PathBuf> {
    let path = files.dir.join("runc-without-sys-resource");
    let script = include_str!("runc-without-sys-resource").replace("@RUNC@", &runc.display().to_string());
    std::fs::write(&path, script).with_context(|| format!("write {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// The process in a pid file. The file alone proves nothing: the number may have been given to another program
/// since.
fn running(pid_file: &Path, program: &str, dir: &Path) -> Option<i32> {
    let pid: i32 = std::fs::read_to_string(pid_file).ok()?.trim().parse().ok()?;
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let command = String::from_utf8_lossy(&command);
    (command.contains(program) && command.contains(&*dir.to_string_lossy())).then_some(pid)
}

/// Ends a process and waits until it is gone; after `patience` it is killed.
///
/// # Errors
/// When it is still there after that.
pub async fn end_process(pid: i32, patience: Duration) -> Result<()> {
    let gone = async || {
        while Path::new(&format!("/proc/{pid}/stat")).exists() && !is_zombie(pid) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    for (signal, patience) in [(Signal::TERM, patience), (Signal::KILL, Duration::from_secs(10))] {
        if let Some(process) = Pid::from_raw(pid) {
            // It may have ended by itself.
            let _ = rustix::process::kill_process(process, signal);
        }
        if tokio::time::timeout(patience, gone()).await.is_ok() {
            return Ok(());
        }
    }
    bail!("process {pid} does not end")
}

fn is_zombie(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}
