// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scripts that drive a VFIO type1 container.
//!
//! A script is text, one operation a line, in the format in which the Linux
//! driver was recorded; `docs/scripts.md` describes it. [`parse()`] turns text
//! into [`Op`](op::Op)s. [`run`] runs one operation on a [`System`] and returns
//! a [`Reply`]. Operations and replies print as text again. The program's
//! `replay`, the property tests and the fuzz targets share these types.
//!
//! ```
//! use dirty_script::{parse, run, sim::Sim};
//!
//! let script = "new devs=emu0\nmap size=4p\nstart\nrw iova=0x1fff len=2\nget size=4p";
//! let cases = parse(script, &mut 65535)?;
//! let mut sim = Sim::default();
//! let mut answers = Vec::new();
//! for line in &cases[0].lines {
//!     answers.push(run(&mut sim, &line.op).to_string());
//! }
//! assert_eq!(answers.last().unwrap(), " => 0 ok bm=6,0");
//! # Ok::<(), dirty_script::BadLine>(())
//! ```

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
