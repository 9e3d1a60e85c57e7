// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two systems for scripts: a naive model of the whole container, and the core
//! on a simulated host with faults. Whatever the script, they must agree.

mod compare;
mod gen;
mod naive;
mod raw;
mod unreported;

pub use compare::compare;
pub use gen::Script;
pub use naive::Naive;
pub use raw::RawScript;
