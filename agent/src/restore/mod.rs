//! The restore controller.

#![allow(dead_code, reason = "wired by the loop")]

mod candidates;
mod checks;
mod choose;
mod claims;
mod plan;
#[cfg(test)]
mod scene;
mod survey;
mod volumes;
