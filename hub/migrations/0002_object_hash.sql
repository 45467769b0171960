-- Of what the cluster told of it. Empty: it is asked to tell it again.
ALTER TABLE objects ADD COLUMN hash BLOB NOT NULL DEFAULT x'';
