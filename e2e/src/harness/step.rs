//! Steps as a person sees them: a line at the start, a line with the time at the end, and for a failure the
//! step, the last words of its log, the log file and the remedy.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// How often a long step says that it is still at work.
const STILL_AT_WORK: Duration = Duration::from_secs(30);

/// Runs steps and keeps their logs.
#[derive(Clone, Debug)]
pub struct Steps {
    logs: PathBuf,
}

impl Steps {
    /// Steps that log into the folder `logs`.
    #[must_use]
    pub fn new(logs: PathBuf) -> Self {
        Self { logs }
    }

    /// Runs one step. `name` reads after "failed to", as in `build Kubernetes`; `remedy` says what a person
    /// can do when it fails.
    ///
    /// # Errors
    /// The step's own, with name, log file and remedy around it.
    pub async fn run<T>(
        &self,
        name: &str,
        remedy: &str,
        work: impl AsyncFnOnce(&Log) -> Result<T>,
    ) -> Result<T> {
        let started = now();
        let log = Log::create(&self.logs, name)?;
        eprintln!("  … {name}");
        let work = work(&log);
        tokio::pin!(work);
        let result = loop {
            match tokio::time::timeout(STILL_AT_WORK, &mut work).await {
                Ok(result) => break result,
                Err(_) => eprintln!("  … {name}: {} s", started.elapsed().as_secs()),
            }
        };
        let seconds = started.elapsed().as_secs_f64();
        match result {
            Ok(value) => {
                eprintln!("  ✓ {name} ({seconds:.1} s)");
                Ok(value)
            }
            Err(error) => {
                eprintln!("  ✗ {name} ({seconds:.1} s)");
                Err(error.context(format!(
                    "failed to {name}\n  log:    {}\n  remedy: {remedy}\n  cause",
                    log.path.display()
                )))
            }
        }
    }
}

/// The log file of one step, to which the output of its commands goes.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
}

impl Log {
    fn create(dir: &Path, step: &str) -> Result<Self> {
        let name: String = step
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c.to_ascii_lowercase() } else { '-' })
            .collect();
        let path = dir.join(format!("{name}.log"));
        File::create(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { path })
    }

    /// The file, opened to append.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(&self) -> Result<File> {
        OpenOptions::new()
            .append(true)
            .open(&self.path)
            .with_context(|| format!("open {}", self.path.display()))
    }

    /// Runs a command to its end, all its output to the log.
    ///
    /// # Errors
    /// When it cannot be started or fails; the error ends with the log's last line.
    pub async fn run(&self, command: &mut Command) -> Result<()> {
        let file = self.open()?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        self.finish(command).await
    }

    /// Runs a command that reads `input`, such as a file or another one's output, all its output to the log.
    ///
    /// # Errors
    /// As [`Log::run`].
    pub async fn run_with_input(&self, command: &mut Command, input: Stdio) -> Result<()> {
        let file = self.open()?;
        command.stdin(input).stdout(file.try_clone()?).stderr(file);
        self.finish(command).await
    }

    /// Runs a command that reads `input`, all its output to the log.
    ///
    /// # Errors
    /// As [`Log::run`].
    pub async fn run_with_text(&self, command: &mut Command, input: &str) -> Result<()> {
        let file = self.open()?;
        command.stdin(Stdio::piped()).stdout(file.try_clone()?).stderr(file).kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("start {}", words(command)))?;
        let mut stdin = child.stdin.take().context("the child has no stdin")?;
        // A child that ends early closes the pipe; its exit status says why.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
        let status = child.wait().await?;
        self.check(command, status)
    }

    /// Runs a command and returns its standard output; standard error goes to the log.
    ///
    /// # Errors
    /// As [`Log::run`], and when the output is not UTF-8.
    pub async fn output(&self, command: &mut Command) -> Result<String> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(self.open()?).kill_on_drop(true);
        let output = command.output().await.with_context(|| format!("start {}", words(command)))?;
        self.check(command, output.status)?;
        String::from_utf8(output.stdout)
            .with_context(|| format!("the output of {} is not UTF-8", words(command)))
    }

    async fn finish(&self, command: &mut Command) -> Result<()> {
        command.kill_on_drop(true);
        let status = command.status().await.with_context(|| format!("start {}", words(command)))?;
        self.check(command, status)
    }

    fn check(&self, command: &Command, status: std::process::ExitStatus) -> Result<()> {
        if status.success() {
            return Ok(());
        }
        let log = std::fs::read(&self.path).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let last = log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("(nothing was logged)");
        bail!("{} ended with {status}: {last}", words(command))
    }
}

/// The first words of a command: enough to recognise it, without pages of arguments.
fn words(command: &Command) -> String {
    let command = command.as_std();
    let mut words = vec![Path::new(command.get_program()).file_name().unwrap_or_default()];
    words.extend(command.get_args().take(4));
    words.join(OsStr::new(" ")).to_string_lossy().into_owned()
}

#[expect(clippy::disallowed_methods, reason = "the harness shows a person how long its steps take")]
fn now() -> Instant {
    Instant::now()
}
