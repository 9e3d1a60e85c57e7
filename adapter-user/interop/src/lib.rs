// SPDX-License-Identifier: MIT OR Apache-2.0
//! A stand-in for libvfio-user's shared library, so that libvfio-user's own Python tests
//! run against the server of adapter-user.
//!
//! The tests are one thread: they send a message, call `vfu_run_ctx`, and read the reply.
//! So the stand-in is between the test's socket and the server, and passes on one message
//! and its reply for each call. Callbacks become a device model: what the server tells its
//! model the stand-in tells the test.
//!
//! What libvfio-user has and the server does not (a device that is busy, limits of its own,
//! capabilities of PCI, memory that a client maps) answers as if it had been set up.
//! `expected.txt` lists the tests that fail because of that, and why.

mod api; // the functions of libvfio-user.h that the tests call
mod context; // a device, its socket and its client

mod model; // the test's callbacks as a device model
mod relay; // one message and its reply
