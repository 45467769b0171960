//! The restore controller.

#![allow(dead_code, reason = "TEMP")]
mod decide;
mod exchange;
mod facts;
#[cfg(test)]
mod model;
mod perform;
mod plan;
mod prepare;
mod status;
mod survey;
#[cfg(test)]
mod tests;
mod view;
