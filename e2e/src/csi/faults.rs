//! Faults on demand: what the parameters of a `StorageClass` or `VolumeSnapshotClass` ask the driver to
//! do badly. Pure except for the call counters, which live in memory and start anew with the driver.
//!
//! | class | parameter | meaning |
//! | --- | --- | --- |
//! | `StorageClass` | `provisionDelay` | time from the first request for a volume until it is made |
//! | `VolumeSnapshotClass` | `cutDelay` | time from the first request for a snapshot until it is cut |
//! | `VolumeSnapshotClass` | `readyDelay` | time from the cut until the snapshot is ready, or `never` |
//! | both | `failOnCall` | `2` or `1-3`: these create calls fail with INTERNAL |
//! | both | `scope` | any text: gives a test call numbers of its own |
//!
//! Times are like `30s`, `500ms` or `1m30s`, at most 4 minutes: a call waits for its delay, and a sidecar
//! gives a call up after 5. Nothing is deleted while its creation is outstanding: csi-snapshotter waits for
//! the end of the call, so a snapshot that is never cut but can be deleted is `failOnCall: "1-999999"`.
//!
//! Calls are numbered from 1 for each set of equal class parameters. A call counts if its arguments are
//! well-formed and the object does not exist yet: csi-snapshotter asks whether a snapshot is ready by
//! repeating the call that made it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Parameters under this prefix are the sidecars' own metadata, different in each call.
const SIDECAR_PREFIX: &str = "csi.storage.k8s.io/";
const VOLUME_PARAMETERS: &[&str] = &["provisionDelay", "failOnCall", "scope"];
const SNAPSHOT_PARAMETERS: &[&str] = &["cutDelay", "readyDelay", "failOnCall", "scope"];

/// Those of the class itself, in the order of their keys.
type ClassParameters = BTreeMap<String, String>;

/// Shorter than the `--timeout` of the sidecars in e2e/manifests/csi-driver.yaml.
const LONGEST_DELAY: SignedDuration = SignedDuration::from_mins(4);

/// A class parameter that the driver refuses. Shows the key, never an unknown key's value.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum ParameterError {
    /// The driver has no such parameter.
    #[error("parameter {key} is unknown; this class may have: {known}")]
    Unknown {
        /// The refused key.
        key: String,
        /// All keys of this kind of class, comma-separated.
        known: String,
    },
    /// Not a time between zero and 4 minutes.
    #[error(
        "parameter {key} is {value:?}: expected a time like 30s or 500ms, at most 4m as the sidecars give a call up after 5m"
    )]
    Duration {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// Not a number of a call, nor a range of numbers.
    #[error("parameter failOnCall is {value:?}: expected a call number like 2 or a range like 1-3")]
    Calls {
        /// The value.
        value: String,
    },
}

/// When a snapshot that has been cut becomes ready to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum ReadyDelay {
    /// This long after the cut.
    After(Duration),
    /// It stays unready for good.
    Never,
}

impl ReadyDelay {
    /// Whether a snapshot cut at `cut_at` is ready at `now`.
    #[must_use]
    pub(super) fn is_over(self, cut_at: Timestamp, now: Timestamp) -> bool {
        match self {
            Self::After(delay) => now >= due(cut_at, delay),
            Self::Never => false,
        }
    }
}

/// The moment a delay ends: `start` plus `delay`, or the end of time.
#[must_use]
pub(super) fn due(start: Timestamp, delay: Duration) -> Timestamp {
    SignedDuration::try_from(delay)
        .ok()
        .and_then(|delay| start.checked_add(delay).ok())
        .unwrap_or(Timestamp::MAX)
}

/// Numbers of calls, from 1, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CallRange {
    first: u64,
    last: u64,
}

impl CallRange {
    /// Whether the call with this number is among them.
    #[must_use]
    pub(super) fn contains(self, call: u64) -> bool {
        (self.first..=self.last).contains(&call)
    }

    fn parse(value: &str) -> Result<Self, ParameterError> {
        let refused = || ParameterError::Calls { value: value.to_owned() };
        let number = |text: &str| text.trim().parse::<u64>().map_err(|_| refused());
        let (first, last) = match value.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(value)?, number(value)?),
        };
        if first == 0 || last < first { Err(refused()) } else { Ok(Self { first, last }) }
    }
}

/// What a `StorageClass` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct VolumeFaults {
    /// Time from the first request for a volume until it is made.
    pub(super) provision_delay: Duration,
    /// `CreateVolume` calls that fail.
    pub(super) fail_on_call: Option<CallRange>,
}

impl VolumeFaults {
    /// Reads the parameters of a `StorageClass`.
    ///
    /// # Errors
    /// An unknown parameter or a malformed value.
    pub(super) fn parse(parameters: &HashMap<String, String>) -> Result<Self, ParameterError> {
        refuse_unknown(parameters, VOLUME_PARAMETERS)?;
        Ok(Self {
            provision_delay: delay(parameters, "provisionDelay")?,
            fail_on_call: fail_on_call(parameters)?,
        })
    }
}

/// What a `VolumeSnapshotClass` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SnapshotFaults {
    /// Time from the first request for a snapshot until it is cut.
    pub(super) cut_delay: Duration,
    /// Time from the cut until the snapshot is ready.
    pub(super) ready_delay: ReadyDelay,
    /// `CreateSnapshot` calls that fail.
    pub(super) fail_on_call: Option<CallRange>,
}

impl SnapshotFaults {
    /// Reads the parameters of a `VolumeSnapshotClass`.
    ///
    /// # Errors
    /// An unknown parameter or a malformed value.
    pub(super) fn parse(parameters: &HashMap<String, String>) -> Result<Self, ParameterError> {
        refuse_unknown(parameters, SNAPSHOT_PARAMETERS)?;
        let never = parameters.get("readyDelay").is_some_and(|value| value == "never");
        Ok(Self {
            cut_delay: delay(parameters, "cutDelay")?,
            ready_delay: if never {
                ReadyDelay::Never
            } else {
                ReadyDelay::After(delay(parameters, "readyDelay")?)
            },
            fail_on_call: fail_on_call(parameters)?,
        })
    }
}

fn refuse_unknown(parameters: &HashMap<String, String>, known: &[&str]) -> Result<(), ParameterError> {
    // The smallest unknown key, so that the same parameters give the same message.
    let unknown = class_parameters(parameters).into_keys().find(|key| !known.contains(&key.as_str()));
    unknown.map_or(Ok(()), |key| Err(ParameterError::Unknown { key, known: known.join(", ") }))
}

fn class_parameters(parameters: &HashMap<String, String>) -> ClassParameters {
    parameters
        .iter()
        .filter(|(key, _)| !key.starts_with(SIDECAR_PREFIX))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn delay(parameters: &HashMap<String, String>, key: &'static str) -> Result<Duration, ParameterError> {
    let Some(value) = parameters.get(key) else { return Ok(Duration::ZERO) };
    value
        .parse::<SignedDuration>()
        .ok()
        .filter(|delay| *delay <= LONGEST_DELAY)
        .and_then(|delay| Duration::try_from(delay).ok())
        .ok_or_else(|| ParameterError::Duration { key, value: value.clone() })
}

fn fail_on_call(parameters: &HashMap<String, String>) -> Result<Option<CallRange>, ParameterError> {
    parameters.get("failOnCall").map(|value| CallRange::parse(value)).transpose()
}

/// What a counted call creates; volumes and snapshots are numbered apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum CallKind {
    /// `CreateVolume`.
    Volume,
    /// `CreateSnapshot`.
    Snapshot,
}

/// How often each set of equal class parameters has been used since the driver started.
#[derive(Debug, Default)]
pub(super) struct CallCounters {
    calls: Mutex<BTreeMap<(CallKind, ClassParameters), u64>>,
}

impl CallCounters {
    /// Counts a call; returns its number, from 1.
    pub(super) fn count(&self, kind: CallKind, parameters: &HashMap<String, String>) -> u64 {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let number = calls.entry((kind, class_parameters(parameters))).or_default();
        *number += 1;
        *number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_class_without_parameters_asks_for_no_fault() {
        let volume = VolumeFaults::parse(&parameters(&[])).unwrap();
        assert_eq!(volume, VolumeFaults { provision_delay: Duration::ZERO, fail_on_call: None });
        let snapshot = SnapshotFaults::parse(&parameters(&[])).unwrap();
        assert_eq!(snapshot.ready_delay, ReadyDelay::After(Duration::ZERO));
    }

    #[test]
    fn times_are_read_with_their_unit_and_refused_without() {
        let table = [
            ("30s", Some(Duration::from_secs(30))),
            ("500ms", Some(Duration::from_millis(500))),
            ("1m30s", Some(Duration::from_secs(90))),
            ("4m", Some(Duration::from_mins(4))),
            ("4m1s", None),
            ("-1s", None),
            ("5", None),
            ("", None),
            ("never", None),
        ];
        for (value, expected) in table {
            let faults = VolumeFaults::parse(&parameters(&[("provisionDelay", value)]));
            assert_eq!(faults.ok().map(|faults| faults.provision_delay), expected, "{value:?}");
        }
    }

    #[test]
    fn numbers_of_failing_calls_are_one_number_or_a_range_from_one() {
        let table = [
            ("2", vec![2]),
            ("1-3", vec![1, 2, 3]),
            ("0", vec![]),
            ("3-1", vec![]),
            ("x", vec![]),
            ("1-", vec![]),
        ];
        for (value, expected) in table {
            let range = CallRange::parse(value).ok();
            let failing: Vec<u64> =
                (0..6).filter(|call| range.is_some_and(|range| range.contains(*call))).collect();
            assert_eq!(failing, expected, "{value:?}");
        }
    }

    #[test]
    fn an_unknown_parameter_is_refused_by_name_with_the_known_ones() {
        let error = VolumeFaults::parse(&parameters(&[("cutDelay", "1s")])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "parameter cutDelay is unknown; this class may have: provisionDelay, failOnCall, scope"
        );
    }

    #[test]
    fn the_sidecars_own_parameters_are_ignored() {
        let sidecar = parameters(&[("csi.storage.k8s.io/pvc/name", "data-0"), ("failOnCall", "1")]);
        assert!(VolumeFaults::parse(&sidecar).is_ok());
        let counters = CallCounters::default();
        assert_eq!(counters.count(CallKind::Volume, &sidecar), 1);
        assert_eq!(counters.count(CallKind::Volume, &parameters(&[("failOnCall", "1")])), 2);
    }

    #[test]
    fn each_scope_and_each_kind_of_call_has_numbers_of_its_own() {
        let counters = CallCounters::default();
        let (one, other) = (parameters(&[("scope", "one")]), parameters(&[("scope", "other")]));
        assert_eq!(counters.count(CallKind::Volume, &one), 1);
        assert_eq!(counters.count(CallKind::Volume, &one), 2);
        assert_eq!(counters.count(CallKind::Volume, &other), 1);
        assert_eq!(counters.count(CallKind::Snapshot, &one), 1);
    }

    #[test]
    fn a_snapshot_is_ready_when_its_delay_has_passed_since_the_cut_or_never() {
        let cut: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let after = ReadyDelay::After(Duration::from_secs(30));
        assert!(!after.is_over(cut, "2026-01-01T00:00:29Z".parse().unwrap()));
        assert!(after.is_over(cut, "2026-01-01T00:00:30Z".parse().unwrap()));
        let never = SnapshotFaults::parse(&parameters(&[("readyDelay", "never")])).unwrap().ready_delay;
        assert!(!never.is_over(cut, Timestamp::MAX));
    }
}
