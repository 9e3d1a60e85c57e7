// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scripts that drive a VFIO type1 container.
//!
//! A script is text, one operation a line, in the format in which the Linux
//! driver was recorded. [`parse()`] makes [`Op`](op::Op)s of it, [`run`] runs
//! one on a [`System`] and gives a [`Reply`], and both print as text again. The
//! program's `replay`, the property tests and the fuzzer all use this one type
//! of operation and this one runner.

mod driver;
pub mod op;
mod parse;
mod print;
mod reply;
mod runner;
pub mod sim;
mod system;

pub use driver::Driver;
pub use parse::{parse, BadLine, Case, Line};
pub use reply::{Reply, Words};
pub use runner::run;
pub use system::{returned, Answer, AttachError, Stat, System};
