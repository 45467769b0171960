//! What agent, hub and end-to-end tests share: the types of the Kubernetes objects they exchange and the
//! pure meaning of those types. Nothing here does IO or asks a clock.

pub mod snapshot;
