//! What the agent and the hub have in common as programs, so that people who know one know the other.
//!
//! [`config`] lays flags over the environment over a file over defaults, [`telemetry`] is the log, [`files`] tells of changed
//! directories, [`http`] serves health
//! and metrics, [`signals`] end a process in order, [`mod@table`] prints as kubectl
//! does, and [`clock`] is the only place that asks for the time. Nothing here
//! knows of backups, of clusters or of the link.

pub mod clock;
pub mod config;
pub mod files;
pub mod http;
pub mod signals;
pub mod table;
pub mod telemetry;
