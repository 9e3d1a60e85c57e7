// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vfio-user server and its client: a naive model of the memory, of what is dirty, and of the
//! error numbers, and the comparison of the server with it.
//!
//! Messages go to a session without a socket, so that one run takes no thread. The promises that
//! are checked: each reply is the one that the model gives; what a device wrote is where it
//! belongs; each page that was written since it was last told is in the next report that has it,
//! and no page is that was not; and the device's state carries what nobody told.

mod compare;
mod device;
mod naive;
mod ops;

pub use compare::run;
pub use ops::{decode, Op};
