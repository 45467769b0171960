//! A report of an agent, taken apart: what is to be written of each object, and what has ended.
//!
//! It reads what agents of other versions say, too, and keeps what it does not know.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;
use sts_backup_api::link::{self, Object, body_hash};
use sts_backup_api::report::{BACKUP, BackupReport, RESTORE, RestoreReport, RunReport};
use tonic::Status;

use crate::store::{HistoryRow, ObjectKey, ObjectRow, Report};

/// How much of what has ended a session remembers.
const REMEMBERED: usize = 10_000;

/// What a session has written of what has ended, as hashes: a backup reports all runs that it remembers, and most of them
/// again and again.
#[derive(Default)]
pub(super) struct Written(HashSet<u64>);

impl Written {
    /// What is to be written of a report.
    pub(super) fn take_apart(
        &mut self,
        objects: Vec<Object>,
        gone: Vec<link::ObjectKey>,
    ) -> Result<Report, Status> {
        let mut report = Report { gone: gone.into_iter().map(key).collect(), ..Report::default() };
        for object in objects {
            let at = key(object.key.ok_or_else(bad)?);
            let hash = body_hash(&object.body);
            let body = String::from_utf8(object.body).map_err(|_| bad())?;
            let body = match at.kind.as_str() {
                BACKUP => self.backup(&at, &body, &mut report.history)?,
                RESTORE => {
                    self.restore(&at, &body, &mut report.history)?;
                    body
                }
                // Of a newer agent, too.
                _ => {
                    read::<serde::de::IgnoredAny>(&body)?;
                    body
                }
            };
            report.objects.push(ObjectRow { key: at, body, hash });
        }
        Ok(report)
    }

    /// Takes a backup's runs for the history, and returns it with the newest of them alone. A hub that is to keep more of it
    /// empties `objects.hash` in a migration: what is known by its hash is not written again.
    fn backup(
        &mut self,
        at: &ObjectKey,
        body: &str,
        history: &mut Vec<HistoryRow>,
    ) -> Result<String, Status> {
        // Most runs are known, and are not read as a whole.
        let mut backup: BackupReport<Option<&RawValue>> = read(body)?;
        let mut newest = None;
        for raw in std::mem::take(&mut backup.runs).into_iter().flatten() {
            let started = read::<Started>(raw.get())?.started;
            if newest.is_none_or(|(since, _)| since <= started) {
                newest = Some((started, raw));
            }
            if self.is_news(&backup.uid, raw.get()) {
                let RunReport { id, result, .. } = read(raw.get())?;
                let (key, uid, body) = (at.clone(), backup.uid.clone(), raw.get().to_owned());
                history.push(HistoryRow { key, uid, run: id, started, result, body });
            }
        }
        backup.runs.extend(newest.map(|(_, run)| Some(run)));
        Ok(serde_json::to_string(&backup).expect("texts and numbers are JSON"))
    }

    /// Takes a restore for the history if it has ended.
    fn restore(&mut self, at: &ObjectKey, body: &str, history: &mut Vec<HistoryRow>) -> Result<(), Status> {
        let restore: RestoreReport = read(body)?;
        if restore.completed.is_some() && self.is_news(&restore.uid, body) {
            history.push(HistoryRow {
                key: at.clone(),
                run: restore.uid.clone(),
                uid: restore.uid,
                started: restore.started.unwrap_or(Timestamp::UNIX_EPOCH),
                result: restore.phase,
                body: body.to_owned(),
            });
        }
        Ok(())
    }

    /// Whether the session has not written that yet.
    fn is_news(&mut self, uid: &str, body: &str) -> bool {
        if self.0.len() >= REMEMBERED {
            self.0.clear();
        }
        let mut hasher = DefaultHasher::new();
        (uid, body).hash(&mut hasher);
        self.0.insert(hasher.finish())
    }
}

/// When a run began.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Started {
    started: Timestamp,
}

fn key(key: link::ObjectKey) -> ObjectKey {
    ObjectKey { kind: key.kind, namespace: key.namespace, name: key.name }
}

fn read<'a, T: Deserialize<'a>>(json: &'a str) -> Result<T, Status> {
    serde_json::from_str(json).map_err(|_| bad())
}

fn bad() -> Status {
    Status::invalid_argument("an object of a status cannot be read")
}
