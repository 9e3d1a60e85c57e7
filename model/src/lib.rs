// SPDX-License-Identifier: MIT OR Apache-2.0
//! A naive model of a whole VFIO container, and the comparison of the core with
//! it: whatever the script, both must give the same answers.
//!
//! [`Naive`] is the model. It keeps sets of pages and applies the rules of
//! `docs/rules.md` one by one. It shares no code with the core but the errnos,
//! and it answers the recordings of Linux, but for the differences D1 to D13.
//! [`compare()`] runs a script on the model and on the core over the simulated
//! host of `dirty-script`, where faults can be ordered. [`Script`] and
//! [`RawScript`] make scripts out of random bytes, for property tests and
//! fuzzing.
//!
//! [`tracked`] does the same for a VMM's tracker: slots, mappings and logs that come
//! and go. [`migration`] does it for the migration of a device's own state, and
//! [`vfio_user`] for a vfio-user server.
//!
//! ```
//! let script = "new devs=emu0\nmap size=4p\nstart\nfault copy=3\nget size=4p";
//! let cases = dirty_script::parse(script, &mut 65535)?;
//! let ops: Vec<_> = cases[0].lines.iter().map(|line| line.op.clone()).collect();
//! assert_eq!(dirty_model::compare(&ops), Ok(()));
//! # Ok::<(), dirty_script::BadLine>(())
//! ```

mod compare;
mod gen;
pub mod migration;
mod naive;
mod raw;
pub mod tracked;
mod unreported;
pub mod vfio_user;

pub use compare::compare;
pub use gen::Script;
pub use naive::Naive;
pub use raw::RawScript;
