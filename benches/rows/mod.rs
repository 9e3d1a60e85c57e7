// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is measured, a file for each kind of work.

use crate::harness::Bench;

mod books;
mod churn;
mod get;
mod harvest;
mod mappings;
mod mark;
mod pins;
mod ranges;
mod rescale;
mod round;
mod shared;
mod slots;
mod start;
mod vfio_user;
mod vmm;
mod walk;
mod writes;

/// Measures every row once.
pub(crate) fn run(bench: &mut Bench) {
    mark::run(bench);
    get::run(bench);
    pins::run(bench);
    rescale::run(bench);
    walk::run(bench);
    mappings::run(bench);
    ranges::run(bench);
    churn::run(bench);
    harvest::run(bench);
    slots::run(bench);
    writes::run(bench);
    shared::run(bench);
    start::run(bench);
    vmm::run(bench);
    round::run(bench);
    vfio_user::run(bench);
}
