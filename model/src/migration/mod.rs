// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device that migrates, in three forms that take the same operations: the core's
//! machine, a naive model of it, and, in a virtual machine, a real kernel driver.
//!
//! [`Op`] is an operation, which prints as a line of text and is read from one.
//! [`Core`] and [`Naive`] run operations on a device whose saved state has the shape
//! of that of Linux's sample driver `mtty`; [`compare()`] runs them on both.
//! [`compare_region`] does so for the region of the first interface.

mod compare;
mod core;
mod gen;
mod memory;
mod naive;
mod op;
mod region;
mod text;
mod uart;

pub use self::compare::{compare, run};
pub use self::core::Core;
pub use self::gen::{random, Sequence};
pub use self::memory::Place;
pub use self::naive::{next, Naive};
pub use self::op::{Op, PATTERN};
pub use self::region::{compare_region, RegionSequence};
pub use self::uart::{HEADER, TOTAL};
