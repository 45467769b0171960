//! Programs from Debian packages, without installing anything: what the machine lacks is downloaded and
//! unpacked into the cache; what it has is used from where it is.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::Harness;
use super::cache::{self, Key};
use super::paths::Paths;
use super::step::Log;

/// Folders of a Debian system that hold programs.
const PROGRAM_DIRS: [&str; 5] = ["usr/sbin", "usr/bin", "sbin", "bin", "usr/lib/postgresql/15/bin"];
/// Folders of a Debian system that hold libraries.
const LIBRARY_DIRS: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// The names under which `xtables-nft-multi` is the iptables that everybody calls.
pub const IPTABLES: [&str; 6] =
    ["iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"];

/// A set of packages: a folder with those that the machine lacks, laid over the machine's own `/`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Packages {
    root: PathBuf,
    key: String,
}

impl Packages {
    /// Finds the packages and unpacks what the machine lacks of them and of what they depend on.
    ///
    /// # Errors
    /// When apt does not know a package or cannot download it.
    pub async fn get(harness: &Harness, name: &str, packages: &[&str]) -> Result<Self> {
        let what = format!("get Debian packages for {name}");
        let remedy = "check that apt-get can download: apt-get update && apt-get download debootstrap";
        let missing = missing_packages(&harness.paths, packages).await?;
        let mut key = Key::new().with(installed_versions(packages).await);
        for package in &missing {
            key = key.with(&package.line);
        }
        let key = key.finish();
        let entry = format!("debian-{name}");
        let root = cache::entry(&harness.paths, &entry, &key, async |dir| {
            if missing.is_empty() {
                return Ok(());
            }
            harness.steps.run(&what, remedy, async |log| download_and_unpack(log, &missing, dir).await).await
        })
        .await?;
        Ok(Self { root, key })
    }

    /// Changes when one of the packages does.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// A program by its name.
    ///
    /// # Errors
    /// When neither the packages nor the machine has it.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        PROGRAM_DIRS
            .iter()
            .map(|dir| format!("{dir}/{name}"))
            .find_map(|file| self.file(&file))
            .with_context(|| format!("none of the Debian packages used here has the program {name}"))
    }

    /// A file or folder by its path below `/`, from the packages or else from the machine.
    #[must_use]
    pub fn file(&self, path: &str) -> Option<PathBuf> {
        self.files(path).pop()
    }

    /// All that is at a path below `/`: the machine's, then the packages'. A folder may be in part of one and
    /// in part of the other.
    #[must_use]
    pub fn files(&self, path: &str) -> Vec<PathBuf> {
        [Path::new("/"), &self.root]
            .map(|root| root.join(path))
            .into_iter()
            .filter(|file| file.exists())
            .collect()
    }

    /// Whether the unpacked packages are still there.
    #[must_use]
    pub fn exist(&self) -> bool {
        self.root.exists()
    }

    /// Where `source` belongs in an image: its path without the packages' folder.
    #[must_use]
    pub fn path_in_image(&self, source: &Path) -> PathBuf {
        source
            .strip_prefix(&self.root)
            .map_or_else(|_| source.to_path_buf(), |rest| Path::new("/").join(rest))
    }

    /// A command that runs one of the programs with its libraries.
    ///
    /// # Errors
    /// As [`Packages::program`].
    pub fn command(&self, program: &str) -> Result<Command> {
        let mut command = Command::new(self.program(program)?);
        self.set_environment(&mut command);
        Ok(command)
    }

    /// Runs one of the programs and returns its standard output.
    ///
    /// # Errors
    /// When it is missing or fails; the error has what it said.
    pub async fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = self.command(program)?.args(arguments).output().await;
        let output = output.with_context(|| format!("start {program}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), said.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Lets a command find the packages' programs and libraries before the machine's.
    pub fn set_environment(&self, command: &mut Command) {
        command.env("PATH", self.search_path()).env("LD_LIBRARY_PATH", self.library_path());
        // iptables' own extensions, which it otherwise seeks at the place it was built for.
        for dir in LIBRARY_DIRS.map(|dir| self.root.join(dir).join("xtables")) {
            if dir.is_dir() {
                command.env("XTABLES_LIBDIR", dir);
            }
        }
    }

    /// `PATH` with the packages' programs first.
    #[must_use]
    pub fn search_path(&self) -> String {
        let own = PROGRAM_DIRS.iter().map(|dir| self.root.join(dir).display().to_string());
        let machine = std::env::var("PATH").unwrap_or_default();
        own.chain([machine, "/usr/sbin:/usr/bin:/sbin:/bin".to_owned()]).collect::<Vec<_>>().join(":")
    }

    fn library_path(&self) -> String {
        LIBRARY_DIRS.map(|dir| self.root.join(dir).display().to_string()).join(":")
    }

    /// The libraries that `binary` is linked to, its loader among them; none for a static one.
    ///
    /// # Errors
    /// When a library is to be had nowhere.
    pub async fn libraries(&self, binary: &Path) -> Result<BTreeSet<PathBuf>> {
        let output = Command::new("ldd")
            .arg(binary)
            .env("LD_LIBRARY_PATH", self.library_path())
            .output()
            .await
            .context("start ldd: install libc-bin")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if text.contains("not found") {
            bail!("{} misses a library:\n{text}", binary.display());
        }
        Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
    }
}

/// A package that the machine lacks, as apt plans to fetch it.
struct MissingPackage {
    name: String,
    /// apt's whole line, with file name, size and checksum.
    line: String,
}

/// Names and versions of those packages that the machine has.
async fn installed_versions(packages: &[&str]) -> String {
    let query = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${Version}\n"])
        .args(packages)
        .output()
        .await;
    // It fails when one is missing, and still prints the others.
    query.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

async fn missing_packages(paths: &Paths, packages: &[&str]) -> Result<Vec<MissingPackage>> {
    match planned_downloads(paths, packages).await {
        Ok(missing) => Ok(missing),
        // A new machine may have no package lists yet.
        Err(first) => {
            let update = Command::new("apt-get").args(["-q", "update"]).output().await;
            if !update.is_ok_and(|output| output.status.success()) {
                return Err(first.context(
                    "apt does not know a package, and apt-get update fails: run it as root, then try again",
                ));
            }
            planned_downloads(paths, packages).await
        }
    }
}

async fn planned_downloads(paths: &Paths, packages: &[&str]) -> Result<Vec<MissingPackage>> {
    // apt leaves out what it downloaded before, so it is shown an archive folder without anything.
    let archives = paths.cache().join(".apt-archives");
    std::fs::create_dir_all(archives.join("partial"))?;
    let output = Command::new("apt-get")
        .arg("-o")
        .arg(format!("Dir::Cache::archives={}", archives.display()))
        .args(["install", "--print-uris", "-y", "-qq", "--no-install-recommends", "--no-upgrade"])
        .args(packages)
        .output()
        .await
        .context("start apt-get: the harness takes programs from the packages of Debian 12")?;
    if !output.status.success() {
        bail!(
            "apt-get install --print-uris {}: {}",
            packages.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(parse_planned_downloads(&String::from_utf8_lossy(&output.stdout)))
}

/// Lines of the form `'URL' FILE SIZE CHECKSUM`; the file is `NAME_VERSION_ARCHITECTURE.deb`.
fn parse_planned_downloads(text: &str) -> Vec<MissingPackage> {
    text.lines()
        .filter(|line| line.starts_with('\''))
        .filter_map(|line| {
            let (_, plan) = line.split_once(' ')?;
            let (name, _) = plan.split_once('_')?;
            Some(MissingPackage { name: name.to_owned(), line: plan.to_owned() })
        })
        .collect()
}

async fn download_and_unpack(log: &Log, missing: &[MissingPackage], dir: &Path) -> Result<()> {
    let debs = dir.join(".debs");
    std::fs::create_dir(&debs)?;
    let mut download = Command::new("apt-get");
    // As root, apt would drop to a user that cannot write to the cache.
    download.args(["-q", "-o", "APT::Sandbox::User=root", "download"]).current_dir(&debs);
    log.run(download.args(missing.iter().map(|package| &package.name))).await?;
    for deb in std::fs::read_dir(&debs)? {
        log.run(Command::new("dpkg-deb").arg("-x").arg(deb?.path()).arg(dir)).await?;
    }
    // What an installation would link by update-alternatives.
    let sbin = dir.join("usr/sbin");
    if sbin.join("xtables-nft-multi").exists() {
        for name in IPTABLES {
            std::os::unix::fs::symlink("xtables-nft-multi", sbin.join(name))?;
        }
    }
    cache::remove_dir(&debs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apt_lines_give_the_package_and_a_key_without_the_mirror() {
        let text = "Reading package lists...\n'http://mirror.example/r/runc_1.1.5%2bds1_amd64.deb' \
                    runc_1.1.5+ds1-1_amd64.deb 2709960 MD5Sum:55\n";
        let missing = parse_planned_downloads(text);
        assert_eq!(missing.len(), 1);
        assert_eq!(missing[0].name, "runc");
        assert_eq!(missing[0].line, "runc_1.1.5+ds1-1_amd64.deb 2709960 MD5Sum:55");
    }
}
