//! Go programs, built from modules whose exact versions the `go.mod` files below `e2e/programs` pin.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tokio::process::Command;

use super::Harness;
use super::cache::{self, Key};
use super::paths::e2e_dir;

/// The Kubernetes version that `programs/kubernetes/go.mod` pins.
pub const KUBERNETES_VERSION: &str = "v1.36.3";

/// One Go module of ours: it holds no code but pins programs of others, which are built together.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// The folder below `e2e/programs`, and what a person reads.
    name: &'static str,
    /// `-tags`.
    tags: &'static str,
    /// What is built besides the module's `tool`s.
    packages: &'static [&'static str],
}

/// kind itself.
pub const KIND: Module = Module { name: "kind", tags: "", packages: &[] };
/// The control plane, kubelet, kubeadm, kubectl, etcd and `CoreDNS`.
pub const KUBERNETES: Module = Module { name: "kubernetes", tags: "", packages: &["./coredns"] };
/// containerd with its shim and `ctr`.
pub const CONTAINERD: Module =
    Module { name: "containerd", tags: "no_btrfs,no_zfs,no_devmapper", packages: &[] };
/// snapshot-controller, the CSI sidecars and csi-sanity.
pub const CSI: Module = Module { name: "csi", tags: "", packages: &[] };
/// helm, which installs our charts.
pub const HELM: Module = Module { name: "helm", tags: "", packages: &[] };

/// Prometheus' own engine, to see which alerts fire: only the full tier's tests build it.
pub const PROMETHEUS: Module = Module { name: "prometheus", tags: "", packages: &["./rules"] };

impl Module {
    /// Its folder in the checkout.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        e2e_dir().join("programs").join(self.name)
    }

    /// The folder with the built programs, all of them static.
    ///
    /// # Errors
    /// When Go is missing, or a download or build fails.
    pub async fn build(&self, harness: &Harness) -> Result<PathBuf> {
        let go = go_version(&self.dir()).await?;
        let ldflags = self.ldflags();
        let key = Key::new().with(&go).with(&ldflags).with(self.tags).with_files(&self.dir())?.finish();
        cache::entry(&harness.paths, &format!("programs-{}", self.name), &key, async |out| {
            let what = format!("build {} from Go modules", self.name);
            let remedy = "check that `go mod download` works in the module's folder below e2e/programs, and that \
                          there is room in the folder that `go env GOCACHE` names";
            harness
                .steps
                .run(&what, remedy, async |log| {
                    let mut command = self.go();
                    command.args(["build", "-mod=readonly", "-trimpath", "-tags", self.tags, "-ldflags", &ldflags]);
                    command.arg("-o").arg(format!("{}/", out.display())).arg("tool").args(self.packages);
                    log.run(&mut command).await
                })
                .await
        })
        .await
    }

    /// Where Go keeps the source of a module that this one pins.
    ///
    /// # Errors
    /// When it cannot be downloaded.
    pub async fn source(&self, module: &str) -> Result<PathBuf> {
        let download = self.go().args(["mod", "download", module]).output().await?;
        let list = self.go().args(["list", "-m", "-f", "{{.Dir}}", module]).output().await?;
        let dir = String::from_utf8_lossy(&list.stdout).trim().to_owned();
        if dir.is_empty() {
            let error = String::from_utf8_lossy(&download.stderr).into_owned();
            anyhow::bail!("no source of Go module {module}: {error}");
        }
        Ok(PathBuf::from(dir))
    }

    fn go(&self) -> Command {
        let mut go = Command::new("go");
        // CGO off makes static programs, which need nothing else in their image.
        go.current_dir(self.dir()).env("CGO_ENABLED", "0").env_remove("GOFLAGS").env("GOWORK", "off");
        go
    }

    fn ldflags(&self) -> String {
        let version = "k8s.io/component-base/version";
        let (major, minor) = ("1", "36");
        match self.name {
            "kubernetes" => format!(
                "-s -w -X {version}.gitVersion={KUBERNETES_VERSION} -X {version}.gitMajor={major} \
                 -X {version}.gitMinor={minor}"
            ),
            _ => "-s -w".to_owned(),
        }
    }
}

/// What `go version` prints in a module's folder, where an older Go fetches the version that the module wants.
///
/// # Errors
/// When there is no Go, or it is too old for that.
pub async fn go_version(dir: &Path) -> Result<String> {
    let install = "install Go 1.26 or newer from https://go.dev/dl and put its bin folder on PATH";
    let output = Command::new("go").arg("version").current_dir(dir).output().await;
    let output = output.with_context(|| format!("Go is not installed: {install}"))?;
    anyhow::ensure!(
        output.status.success(),
        "go version in {}: {}: {install}",
        dir.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
