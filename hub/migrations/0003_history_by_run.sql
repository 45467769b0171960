-- Ids of runs begin with their time: what a cluster's backups have just run lies side by side, and a report of many writes
-- few pages.
CREATE TABLE history_by_run (
  cluster TEXT NOT NULL REFERENCES clusters (id) ON DELETE CASCADE,
  run TEXT NOT NULL,
  -- Of the object that it belongs to.
  uid TEXT NOT NULL,
  kind TEXT NOT NULL,
  namespace TEXT NOT NULL,
  name TEXT NOT NULL,
  started_ms INTEGER NOT NULL,
  result TEXT NOT NULL,
  body TEXT NOT NULL,
  PRIMARY KEY (cluster, run, uid)
) STRICT, WITHOUT ROWID;
INSERT INTO history_by_run SELECT cluster, run, uid, kind, namespace, name, started_ms, result, body FROM history;
DROP TABLE history;
ALTER TABLE history_by_run RENAME TO history;
CREATE INDEX history_started ON history (started_ms);
