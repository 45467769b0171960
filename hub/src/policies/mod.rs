//! The fleet policies: from files to a set that is valid as a whole, and from that to what a cluster gets.
//!
//! [`files`] reads a directory, [`document`] reads YAML and remembers where what is, [`check`] judges one policy. A set
//! with one bad policy is none: half of what somebody wrote is not what they meant.

mod check;
mod document;
mod files;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::path::Path;

use kube::core::{Selector, SelectorExt};

use sts_backup_api::link::body_hash;

use self::check::check;
pub use self::document::Place;
use self::document::documents;
pub use self::files::FilesError;
use self::files::{File, read};
use crate::store::Body;

/// All fleet policies, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PolicySet(BTreeMap<String, FleetPolicy>);

/// A fleet policy that can be used.
#[derive(Clone, Debug, PartialEq)]
struct FleetPolicy {
    clusters: Selector,
    body: Body,
}

/// What is wrong with the text of a file, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file, as the directory was named.
    pub file: String,
    /// Where in it.
    pub place: Place,
    /// What, and the remedy.
    pub message: String,
}

/// As compilers write it, so that editors find the place.
impl Display for Problem {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self { file, place: Place { line, column }, message } = self;
        write!(formatter, "{file}:{line}:{column}: {message}")
    }
}

/// Why policies cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PoliciesError {
    /// They cannot be read.
    #[error("the fleet policies cannot be read")]
    Files(#[from] FilesError),
    /// They are not valid.
    #[error("the fleet policies are not valid:\n  {}", list(.0))]
    Invalid(Vec<Problem>),
}

fn list(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n  ")
}

impl PolicySet {
    /// Reads the policies of a directory: of all its files that end in .yaml or .yml.
    ///
    /// # Errors
    /// If a file cannot be read, or anything in one of them is not valid: then with everything that is not.
    pub fn load(directory: &Path) -> Result<Self, PoliciesError> {
        Self::of(&read(directory)?).map_err(PoliciesError::Invalid)
    }

    /// The policies of some files.
    fn of(files: &[File]) -> Result<Self, Vec<Problem>> {
        let (mut policies, mut problems) = (BTreeMap::new(), Vec::new());
        let mut named: BTreeMap<String, String> = BTreeMap::new();
        for File { name: file, text } in files {
            let problem = |place, message| Problem { file: file.clone(), place, message };
            let documents = match documents(text) {
                Ok(documents) => documents,
                Err(flaw) => {
                    problems.push(problem(flaw.place, flaw.message));
                    continue;
                }
            };
            for document in &documents {
                let checked = match check(document) {
                    Ok(checked) => checked,
                    Err(flaws) => {
                        problems.extend(flaws.into_iter().map(|flaw| problem(flaw.place, flaw.message)));
                        continue;
                    }
                };
                let place = document.place("/metadata/name");
                let here = format!("{file}:{}", place.line);
                if let Some(other) = named.insert(checked.name.clone(), here) {
                    let message = format!("metadata.name: {other} has this name already; write another one");
                    problems.push(problem(place, message));
                    continue;
                }
                let json = serde_json::to_vec(&checked.policy).expect("a value is JSON");
                let body = Body { hash: body_hash(&json), json: json.into() };
                policies.insert(checked.name, FleetPolicy { clusters: checked.clusters, body });
            }
        }
        if problems.is_empty() { Ok(Self(policies)) } else { Err(problems) }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All policies: names, and what the clusters' objects are to be.
    pub fn all(&self) -> impl Iterator<Item = (&str, &Body)> {
        self.0.iter().map(|(name, policy)| (name.as_str(), &policy.body))
    }

    /// The policies that a cluster with these labels gets: names, and what its `StatefulSetBackupPolicy` objects are to be.
    pub fn of_cluster<'a>(
        &'a self,
        labels: &'a BTreeMap<String, String>,
    ) -> impl Iterator<Item = (&'a str, &'a Body)> {
        let placed = self.0.iter().filter(|(_, policy)| policy.clusters.matches(labels));
        placed.map(|(name, policy)| (name.as_str(), &policy.body))
    }
}
