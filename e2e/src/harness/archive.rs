//! Container images without a container engine: files are collected and written as one `docker-archive`
//! (a layer, a config, a manifest; <https://github.com/moby/moby/blob/master/image/spec/v1.2.md>), which kind
//! and containerd load. The same content gives the same bytes, so an image is named by its content.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Cursor, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

use super::debian::Packages;

/// An image in the making: a root file system and how to start it.
#[derive(Debug, Default)]
pub struct Image {
    files: BTreeMap<PathBuf, Entry>,
    entrypoint: Vec<String>,
}

#[derive(Debug)]
enum Entry {
    Dir { mode: u32 },
    File { source: PathBuf, mode: u32 },
    Text { content: String, mode: u32 },
    Link { target: PathBuf },
}

/// An image written to disk.
#[derive(Clone, Debug)]
pub struct Archive {
    /// Its full name, as pods write it.
    pub name: String,
    /// The tar file.
    pub path: PathBuf,
}

impl Image {
    /// An image with Debian's merged-`/usr` layout, `/tmp`, and users `root` and `postgres` (999), `nobody`.
    #[must_use]
    pub fn new(entrypoint: &[&str]) -> Self {
        let mut image =
            Self { entrypoint: entrypoint.iter().map(ToString::to_string).collect(), ..Self::default() };
        for dir in ["bin", "sbin", "lib", "lib64"] {
            image.link(Path::new("/").join(dir), Path::new("usr").join(dir));
            image.dir(Path::new("/usr").join(dir), 0o755);
        }
        for dir in ["/etc", "/proc", "/sys", "/dev", "/run", "/var", "/root"] {
            image.dir(dir, 0o755);
        }
        image.dir("/tmp", 0o1777);
        image.text(
            "/etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\npostgres:x:999:999:PostgreSQL:/var/lib/postgresql:/bin/sh\n\
             nobody:x:65534:65534:nobody:/:/bin/sh\n",
            0o644,
        );
        image.text("/etc/group", "root:x:0:\npostgres:x:999:\nnogroup:x:65534:\n", 0o644);
        image.text("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n", 0o644);
        image
    }

    /// Adds a folder.
    pub fn dir(&mut self, path: impl AsRef<Path>, mode: u32) {
        self.put(path.as_ref(), Entry::Dir { mode });
    }

    /// Adds a small file.
    pub fn text(&mut self, path: impl AsRef<Path>, content: &str, mode: u32) {
        self.put(path.as_ref(), Entry::Text { content: content.to_owned(), mode });
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: impl AsRef<Path>, target: impl AsRef<Path>) {
        self.put(path.as_ref(), Entry::Link { target: target.as_ref().to_path_buf() });
    }

    /// Adds a file of the machine.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn file(&mut self, path: impl AsRef<Path>, source: &Path) -> Result<()> {
        let metadata = std::fs::metadata(source).with_context(|| format!("read {}", source.display()))?;
        let mode = metadata.permissions().mode() & 0o777;
        self.put(path.as_ref(), Entry::File { source: source.to_path_buf(), mode });
        Ok(())
    }

    /// Adds a folder of the machine with all below it, but what `skip` says yes to.
    ///
    /// # Errors
    /// When something in it cannot be read.
    pub fn tree(&mut self, path: &Path, source: &Path, skip: &dyn Fn(&Path) -> bool) -> Result<()> {
        self.dir(path, 0o755);
        for entry in std::fs::read_dir(source).with_context(|| format!("read {}", source.display()))? {
            let entry = entry?;
            let (from, to) = (entry.path(), path.join(entry.file_name()));
            if skip(&from) {
                continue;
            }
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.tree(&to, &from, skip)?;
            } else if kind.is_symlink() && from.metadata().is_ok_and(|target| target.is_dir()) {
                self.link(&to, std::fs::read_link(&from)?);
            } else if from.exists() {
                // A link to a file becomes the file: its target may be outside of the folder.
                self.file(&to, &from)?;
            }
        }
        Ok(())
    }

    /// Adds a program of the Debian packages at the path it has there, with all its libraries.
    ///
    /// # Errors
    /// When the program or a library is missing.
    pub async fn program(&mut self, packages: &Packages, name: &str) -> Result<()> {
        let source = packages.program(name)?;
        let path = packages.path_in_image(&source);
        self.binary(packages, &path, &source).await
    }

    /// Adds a binary of the machine at `path`, with all its libraries.
    ///
    /// # Errors
    /// When a library is missing.
    pub async fn binary(&mut self, packages: &Packages, path: &Path, source: &Path) -> Result<()> {
        self.file(path, source)?;
        self.libraries_of(packages, source).await
    }

    /// Adds the libraries that `source` needs.
    ///
    /// # Errors
    /// When one is missing.
    pub async fn libraries_of(&mut self, packages: &Packages, source: &Path) -> Result<()> {
        for library in packages.libraries(source).await? {
            self.file(packages.path_in_image(&library), &library)?;
        }
        Ok(())
    }

    /// Writes the image to `path`, named `name`, or `name:HASH` where the name has no tag.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn write(&self, name: &str, path: &Path) -> Result<Archive> {
        let layer = self.layer()?;
        let diff_id = hex::encode(Sha256::digest(&layer));
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint,
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/15/bin"],
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{diff_id}")]},
            "history": [{}],
        })
        .to_string();
        let image_id = hex::encode(Sha256::digest(&config));
        let name = if name.contains(':') { name.to_owned() } else { format!("{name}:{}", &image_id[..12]) };
        let manifest = json!([{
            "Config": format!("{image_id}.json"), "RepoTags": [name], "Layers": [format!("{diff_id}.tar")],
        }])
        .to_string();

        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        let mut tar = tar::Builder::new(file);
        for (file, content) in [
            (format!("{diff_id}.tar"), layer.as_slice()),
            (format!("{image_id}.json"), config.as_bytes()),
            ("manifest.json".to_owned(), manifest.as_bytes()),
        ] {
            let mut header = header(EntryType::Regular, 0o644);
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, file, Cursor::new(content))?;
        }
        tar.into_inner()?.flush()?;
        Ok(Archive { name, path: path.to_path_buf() })
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, entry) in &self.files {
            let path = path.strip_prefix("/").unwrap_or(path);
            match entry {
                Entry::Dir { mode } => {
                    tar.append_data(&mut header(EntryType::Directory, *mode), path, std::io::empty())?;
                }
                Entry::Text { content, mode } => {
                    let mut header = header(EntryType::Regular, *mode);
                    header.set_size(content.len() as u64);
                    tar.append_data(&mut header, path, content.as_bytes())?;
                }
                Entry::File { source, mode } => {
                    let content = File::open(source).with_context(|| format!("open {}", source.display()))?;
                    let mut header = header(EntryType::Regular, *mode);
                    header.set_size(content.metadata()?.len());
                    tar.append_data(&mut header, path, content)?;
                }
                Entry::Link { target } => {
                    tar.append_link(&mut header(EntryType::Symlink, 0o777), path, target)?;
                }
            }
        }
        Ok(tar.into_inner()?)
    }

    /// Files go below `/usr` where Debian's layout has links, and their folders come with them.
    fn put(&mut self, path: &Path, entry: Entry) {
        let mut path = path.to_path_buf();
        for merged in ["/bin", "/sbin", "/lib", "/lib64"] {
            if let Ok(rest) = path.strip_prefix(merged)
                && !rest.as_os_str().is_empty()
            {
                path = Path::new("/usr").join(&merged[1..]).join(rest);
                break;
            }
        }
        for parent in path.ancestors().skip(1).filter(|parent| parent.parent().is_some()) {
            self.files.entry(parent.to_path_buf()).or_insert(Entry::Dir { mode: 0o755 });
        }
        self.files.insert(path, entry);
    }
}

fn header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(0);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_content_gives_the_same_image() {
        let dir = tempfile::tempdir().unwrap();
        let image = |text: &str| {
            let mut image = Image::new(&["/bin/x"]);
            image.text("/bin/x", text, 0o755);
            image.write("sts-backup-e2e/x", &dir.path().join("x.tar")).unwrap().name
        };
        assert_eq!(image("one"), image("one"));
        assert_ne!(image("one"), image("two"));
    }

    #[test]
    fn files_land_below_usr_where_debian_has_links() {
        let mut image = Image::new(&[]);
        image.text("/lib/x86_64-linux-gnu/libx.so", "", 0o644);
        assert!(image.files.contains_key(Path::new("/usr/lib/x86_64-linux-gnu/libx.so")));
        assert!(matches!(image.files[Path::new("/lib")], Entry::Link { .. }));
    }
}
