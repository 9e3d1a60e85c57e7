// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core beside its peers and the limits of the machine.
//!
//! `cargo bench -p dirty-benches` measures everything; with `-- mark`, only what
//! has `mark` in its name. It measures in three rounds, and the shortest time of
//! each candidate counts. At the end it prints a table and the targets that are
//! missed, and writes to `target/bench`: the table, a picture for each of its groups,
//! and, after a whole run, the README's rows. `benches/publish` puts these into the
//! repository. For a profiler, `-- --profile-time 5 NAME` runs one benchmark for five
//! seconds.

use std::env;
use std::error::Error;
use std::fs;
use std::path::Path;

mod data;
mod flag;
mod guest;
mod harness;
mod host;
mod limits;
mod machine;
mod report;
mod rows;
mod sets;

use report::{chart, speed, summary, table};

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
    let results = dir.join("results");
    if results.exists() {
        fs::remove_dir_all(&results)?; // an earlier run's
    }
    fs::create_dir_all(&results)?;
    fs::write(results.join("table.md"), table::markdown(&rows))?;
    chart::draw(&rows, &results)?;
    print!("{}", table::text(&rows));
    // Cargo adds an argument of its own.
    if env::args().skip(1).all(|argument| argument == "--bench") {
        for target in summary::unmeasured(&rows) {
            println!("NOT MEASURED {target}");
        }
        fs::write(results.join("speed.md"), speed::markdown(&rows)?)?;
    }
    println!("{}", results.display());
    Ok(())
}
