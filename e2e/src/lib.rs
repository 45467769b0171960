//! Real clusters and what tests need on them: the [`harness`] that makes clusters, the test [`csi`] driver that runs
//! in them, the test [`kit`], and [`simulated`] agents for fleets that no machine can run. For people there are the [`demo`], the benches of [`bench`](crate::bench), and [`dev`] for those who change
//! the product. Harness and kit share how to reach a cluster ([`kubeconfig`]) and how to wait for its states
//! ([`condition`]).

pub mod bench;
pub mod condition;
pub mod csi;
pub mod demo;
pub mod dev;
pub mod harness;
pub mod kit;
pub mod kubeconfig;
pub mod simulated;
