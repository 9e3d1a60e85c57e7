// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest whose memory, mappings and logs change while they are tracked: a naive
//! model of it, and the comparison of the tracker with the model.
//!
//! The promise that is checked after each take: a page that was written since it was
//! last delivered is in the report, at the address where its memory is now, and no
//! page is that the documentation does not allow.

mod compare;
mod logs;
mod ops;
mod upgrade;
mod world;

pub use compare::run;
pub use ops::{decode, LogKind, Op};
