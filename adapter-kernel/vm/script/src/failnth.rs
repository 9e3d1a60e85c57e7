// SPDX-License-Identifier: GPL-2.0-only
//! Each allocation of an operation fails in turn (the kernel's fault
//! injection): the operation must fail and change nothing, or succeed.

use std::fs;

use crate::ask::{ask, expect, text};
use crate::faults::{pins, settled};
use crate::real::Real;

/// The file by which a task makes its own n-th allocation fail.
const FAIL_NTH: &str = "/proc/thread-self/fail-nth";
/// More allocations than any operation makes.
const MOST: u32 = 3000;

/// An operation, what undoes it, and what shows that nothing has changed.
struct Step {
    line: &'static str,
    /// How the answer ends when it succeeds.
    good: &'static str,
    undo: Option<&'static str>,
    /// A line and its answer's end, after a failure.
    still: Option<(&'static str, &'static str)>,
}

const STEPS: [Step; 8] = [
    Step {
        line: "map iova=0 size=64p vaddr=mem",
        good: "0 ok",
        undo: Some("unmap iova=0 size=64p"),
        still: Some(("unmap iova=0 size=64p", "0 ok size=0")),
    },
    Step {
        line: "map iova=0 size=64p vaddr=mem",
        good: "0 ok",
        undo: None,
        still: None,
    },
    Step {
        line: "start",
        good: "0 ok",
        undo: Some("stop"),
        still: Some(("get size=64p", "-1 EINVAL bm=0,0")),
    },
    Step {
        line: "start",
        good: "0 ok",
        undo: None,
        still: None,
    },
    Step {
        line: "map iova=1M size=200p vaddr=mem+1M",
        good: "0 ok",
        undo: Some("unmap iova=1M size=200p flags=1 bsize=32"),
        still: Some(("unmap iova=1M size=200p", "0 ok size=0")),
    },
    Step {
        line: "pin dev=emu0 iova=2p n=20",
        good: "ret=20",
        undo: Some("unpin dev=emu0 iova=2p n=20"),
        still: None,
    },
    Step {
        line: "get size=64p",
        good: "0 ok",
        undo: None,
        still: None,
    },
    Step {
        line: "info argsz=4096",
        good: "}",
        undo: None,
        still: None,
    },
];

/// Steps of a container with a group behind an IOMMU besides: there the IOMMU's
/// own allocations fail too.
const ATTACH: Step = Step {
    line: "attach dev=pci0",
    good: "ok",
    undo: Some("detach dev=pci0"),
    still: Some(("get size=64p", "0 ok bm=0,0")),
};

/// Runs one step with each allocation failing; how many could fail.
fn each(real: &mut Real, step: &Step) -> Result<u32, String> {
    let mut failed = 0;
    for n in 1..MOST {
        fs::write(FAIL_NTH, n.to_string()).map_err(text)?;
        let answer = ask(real, step.line)?;
        // What is left of the count: 0 if the n-th allocation was there to fail.
        let left = fs::read_to_string(FAIL_NTH).map_err(text)?;
        fs::write(FAIL_NTH, "0").map_err(text)?;
        let good = answer.ends_with(step.good);
        if good {
            if let Some(undo) = step.undo {
                ask(real, undo)?;
            }
        } else {
            failed += 1;
            if let Some((line, end)) = step.still {
                expect(real, line, end)?;
            }
        }
        if left.trim() != "0" {
            return match good {
                true => Ok(failed),
                false => Err(format!("{answer}, though nothing failed")),
            };
        }
        // A group that was opened and not attached is closed by the next `new`.
        if !good && step.line.starts_with("attach") {
            ask(real, "detach dev=pci0")?;
        }
    }
    Err(format!("{}: more than {MOST} allocations", step.line))
}

pub(crate) fn run() -> Result<(), String> {
    let before = pins()?;
    let mut real = Real::new(65535).map_err(text)?;
    expect(&mut real, "new devs=emu0", "set_iommu(3)=ok")?;
    for step in &STEPS {
        let failed = each(&mut real, step)?;
        println!("failnth: {failed:>3} failures of {}", step.line);
    }
    // Clean, so that a report shows what a failed attach would have marked.
    expect(&mut real, "get size=64p", "0 ok bm=0,0").or_else(|_| {
        expect(&mut real, "get size=64p", "0 ok bm=0,0")
    })?;
    let failed = each(&mut real, &ATTACH)?;
    println!("failnth: {failed:>3} failures of {}", ATTACH.line);
    drop(real);
    settled(before)?;
    println!("failnth: no pin is left");
    Ok(())
}
