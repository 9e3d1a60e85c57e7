// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core beside its peers and the limits of the machine.
//!
//! `cargo bench -p dirty-benches` measures everything; with `-- mark`, only what
//! has `mark` in its name. It measures in three rounds, and the shortest time of
//! each candidate counts. At the end it prints a table, and writes it to
//! `target/bench/table.md` and as bars to `target/bench/bars.svg`. For a profiler,
//! `-- --profile-time 5 NAME` runs one benchmark for five seconds.

use std::error::Error;
use std::fs;
use std::path::Path;

mod data;
mod flag;
mod guest;
mod harness;
mod host;
mod machine;
mod report;
mod rows;
mod sets;

use report::{chart, table};

fn main() -> Result<(), Box<dyn Error>> {
    // Cargo gives target/tmp.
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("bench");
    let mut bench = harness::Bench::new(&dir);
    while bench.next_round() {
        rows::run(&mut bench);
    }

    let rows = bench.finish();
    if rows.is_empty() {
        return Ok(()); // the command line asks for a list or a test
    }
    println!("{}", table::text(&rows));
    fs::write(dir.join("table.md"), table::markdown(&rows))?;
    chart::draw(&rows, &dir.join("bars.svg"))?;
    println!("{}", dir.join("table.md").display());
    println!("{}", dir.join("bars.svg").display());
    Ok(())
}
