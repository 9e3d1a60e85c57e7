// SPDX-License-Identifier: MIT OR Apache-2.0
//! The client of vfio-user servers: first beside a scripted one, which also does what no
//! server may do.

mod calls; // each call, and what a right server answers
mod hostile; // servers that break the protocol, fall silent, or die
mod log; // the device's log as a tracker's
mod peer;
