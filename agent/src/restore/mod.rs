//! The restore controller.

#![allow(dead_code, reason = "wired by the loop")]

mod checks;
mod choose;
mod claims;
mod plan;
mod survey;
mod volumes;
