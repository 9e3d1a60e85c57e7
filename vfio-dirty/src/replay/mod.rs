// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vfio-dirty replay`: runs scripts against the core. The answers have the form
//! in which those of the Linux driver were recorded.

mod arena;
mod compare;
mod machine;
mod process;

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use compare::Comparison;
use dirty_script::op::Op;
use dirty_script::sim::Sim;
use dirty_script::{Case, System};
use machine::Machine;

use crate::failure::Failure;

/// Run scripts against the core and print its answers
///
/// A script has one operation on each line (`map iova=0 size=4p`). A line `case NAME` starts a
/// case, which runs in a process of its own. The transcript has the form in which the Linux driver
/// was recorded, so that `diff` works. With --expect it is compared instead of printed. If a line
/// is wrong, nothing runs.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  printf '%s\\n' 'new devs=emu0' 'map size=8p' start 'rw iova=0x1fff len=2' \\
    'get size=8p' | vfio-dirty replay -

Exit status: 0 everything ran, and nothing differs; 1 something differs;
2 bad usage, or a wrong line.")]
pub(crate) struct Args {
    /// Scripts to run, in this order; `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    scripts: Vec<PathBuf>,

    /// Compare with these transcripts, in this order, and print the first lines that differ
    #[arg(long, value_name = "FILE")]
    expect: Vec<PathBuf>,

    /// Run on a simulated host instead of real memory
    ///
    /// Only there, `fault` lines make allocations, pins, copies and mappings fail. The scripts that
    /// fuzz targets and property tests print need it.
    #[arg(long)]
    simulate: bool,
}

fn read(path: &Path) -> Result<String, Failure> {
    let text = if path == Path::new("-") {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        fs::read_to_string(path)
    };
    text.map_err(|e| {
        Failure::Usage(format!(
            "{} cannot be read ({e}); name a script, or - for standard input",
            path.display()
        ))
    })
}

/// Runs the lines of one case in this process.
fn run_case(case: &Case, simulate: bool, out: &mut impl Write) -> io::Result<()> {
    let mut run = |system: &mut dyn System| {
        for line in &case.lines {
            let reply = dirty_script::run(system, &line.op);
            writeln!(out, "  {}{reply}", line.echo)?;
        }
        out.flush()
    };
    if simulate {
        let mut sim = Sim::default();
        sim.set_entry_limit(case.entry_limit);
        run(&mut sim)?;
        sim.close();
    } else {
        let mut machine = Machine::new(case.entry_limit);
        run(&mut machine)?;
        machine.close();
    }
    Ok(())
}

/// Runs the cases, each in a process of its own. Returns whether all processes ended well.
fn run_cases(
    cases: &[Case],
    simulate: bool,
    out: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<bool, Failure> {
    let mut sound = true;
    for case in cases {
        let mut step = || -> io::Result<()> {
            if let Some(title) = &case.title {
                out(format!("{title}\n").as_bytes())?;
            }
            if case.lines.is_empty() {
                return Ok(());
            }
            let work = |pipe| match run_case(case, simulate, &mut io::BufWriter::new(pipe)) {
                Ok(()) => 0,
                Err(_) => 1,
            };
            match process::piped(work, out)? {
                process::End::Exited(0) => {}
                process::End::Exited(code) => {
                    sound = false;
                    out(format!("  CHILD DIED status={code}\n").as_bytes())?;
                }
                process::End::Died(how) => {
                    sound = false;
                    out(format!("  CHILD DIED {how}\n").as_bytes())?;
                }
            }
            Ok(())
        };
        step().map_err(|e| Failure::Runtime(format!("the transcript cannot be written ({e})")))?;
    }
    Ok(sound)
}

pub(crate) fn run(args: &Args) -> Result<ExitCode, Failure> {
    let mut cases = Vec::new();
    let mut entry_limit = 65535;
    for path in &args.scripts {
        let parsed = dirty_script::parse(&read(path)?, &mut entry_limit);
        cases.extend(parsed.map_err(|e| Failure::Usage(format!("{}, {e}", path.display())))?);
    }
    if !args.simulate {
        let mut lines = cases.iter().flat_map(|case| &case.lines);
        if let Some(line) = lines.find(|line| matches!(line.op, Op::Fault { .. })) {
            return Err(Failure::Usage(format!(
                "`{}` needs a simulated host, because real memory does not fail on demand: run the \
                 script with --simulate",
                line.echo
            )));
        }
        arena::map_all().map_err(Failure::Runtime)?;
    }
    let mut stdout = io::stdout().lock();
    let equal = if args.expect.is_empty() {
        run_cases(&cases, args.simulate, &mut |bytes| stdout.write_all(bytes))?
    } else {
        let expected = args.expect.iter().map(|path| read(path));
        let expected = expected.collect::<Result<String, Failure>>()?;
        let mut comparison = Comparison::new(&expected);
        let sound = run_cases(&cases, args.simulate, &mut |bytes| {
            comparison.take(bytes);
            Ok(())
        })?;
        let (text, equal) = comparison.finish();
        let written = stdout.write_all(text.as_bytes());
        written.map_err(|e| Failure::Runtime(format!("the result cannot be written ({e})")))?;
        equal && sound
    };
    let flushed = stdout.flush();
    flushed.map_err(|e| Failure::Runtime(format!("the transcript cannot be written ({e})")))?;
    Ok(if equal {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
