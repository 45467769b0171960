//! Real clusters and what tests need on them: the [`harness`] that makes clusters, the test [`csi`] driver
//! that runs in them, and the test [`kit`].

pub mod csi;
pub mod harness;
pub mod kit;
