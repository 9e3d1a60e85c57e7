// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two systems for scripts: a naive model of the whole container, and the core
//! on a simulated host with faults. Whatever the script, they must agree.

mod compare;
mod gen;
mod host;
mod naive;
mod pages;
mod raw;
mod sim;
mod user;

pub use compare::{compare, Pair};
pub use gen::script;
pub use naive::Naive;
pub use raw::{compare_raw, RawCall};
pub use sim::Sim;
pub use user::User;
