// SPDX-License-Identifier: MIT OR Apache-2.0
//! The C interface of [`adapter_user`]: what `include/vfio_dirty.h` declares.
//!
//! The header is made from this crate by cbindgen, so the documentation of each function
//! is written for its callers in C. A function is three steps: it checks the pointers
//! (`pointer`), calls `adapter_user`, and turns the result into 0 or `-errno`
//! (`border`). No panic leaves `border`.
//!
//! `unsafe` is in `pointer`, which reads what C points to, in `callback`, which calls
//! C, and in one block of each function, which says that its caller keeps its contract.

#[cfg(not(panic = "unwind"))]
compile_error!(
    "build vfio-dirty-capi with panic = \"unwind\": a panic must not end its user's process"
);

// In the order that the header has.
pub mod tracker;

pub mod report;

pub mod source;

pub mod sink;

pub mod view;

pub mod device_log;

pub mod container;

pub mod saved;

pub mod stats;

pub mod rate;

// What these need.
mod callback;
mod range;
mod turn;

mod border;
mod failure;
mod pointer;

pub use border::{vfio_dirty_error, vfio_dirty_version};
pub use callback::{LogRead, SourceRead};
pub use range::Range;
