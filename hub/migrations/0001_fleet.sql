-- Times are milliseconds since 1970.

CREATE TABLE meta (
  key TEXT PRIMARY KEY,
  value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE clusters (
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  -- A JSON object.
  labels TEXT NOT NULL,
  added_ms INTEGER NOT NULL,
  revoked_ms INTEGER,
  -- Of what is placed on it.
  revision INTEGER NOT NULL DEFAULT 0,
  -- The revision up to which somebody has confirmed what agents hold back.
  confirmed INTEGER NOT NULL DEFAULT 0,
  -- What its agent said last: of itself, and of what it has applied. JSON objects.
  hello TEXT,
  applied TEXT,
  seen_ms INTEGER
) STRICT, WITHOUT ROWID;

-- Bodies of policies, by their hash: a bad set of files after a restart leaves the last good one.
CREATE TABLE bodies (
  hash BLOB PRIMARY KEY,
  body BLOB NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE placed (
  cluster TEXT NOT NULL REFERENCES clusters (id) ON DELETE CASCADE,
  name TEXT NOT NULL,
  -- NULL: a tombstone. Only what has one is removed from the cluster.
  hash BLOB REFERENCES bodies (hash),
  PRIMARY KEY (cluster, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX placed_hash ON placed (hash);

-- What clusters report, by object: the newest word on each.
CREATE TABLE objects (
  cluster TEXT NOT NULL REFERENCES clusters (id) ON DELETE CASCADE,
  kind TEXT NOT NULL,
  namespace TEXT NOT NULL,
  name TEXT NOT NULL,
  body TEXT NOT NULL,
  PRIMARY KEY (cluster, kind, namespace, name)
) STRICT, WITHOUT ROWID;

-- What has ended, once each, also when its object is long gone.
CREATE TABLE history (
  cluster TEXT NOT NULL REFERENCES clusters (id) ON DELETE CASCADE,
  -- Of the object that it belongs to.
  uid TEXT NOT NULL,
  run TEXT NOT NULL,
  kind TEXT NOT NULL,
  namespace TEXT NOT NULL,
  name TEXT NOT NULL,
  started_ms INTEGER NOT NULL,
  result TEXT NOT NULL,
  body TEXT NOT NULL,
  PRIMARY KEY (cluster, uid, run)
) STRICT, WITHOUT ROWID;
CREATE INDEX history_started ON history (started_ms);

CREATE TABLE audit (
  at_ms INTEGER NOT NULL,
  action TEXT NOT NULL,
  object TEXT NOT NULL,
  detail TEXT NOT NULL
) STRICT;
CREATE INDEX audit_at ON audit (at_ms);
