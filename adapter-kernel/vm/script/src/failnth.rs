// SPDX-License-Identifier: GPL-2.0-only
//! Lets each allocation of an operation fail in turn, by the kernel's fault injection.
//! The operation must fail and change nothing, or succeed.

use crate::ask::{ask, expect, text};
use crate::faults::{pins, settled};
use crate::real::Real;

/// More allocations than any operation makes.
const MOST: u32 = 3000;

/// An operation whose allocations fail.
struct Step {
    line: &'static str,
    /// The end of its answer when it succeeds.
    good: &'static str,
    /// Lines that undo it, and clear what that has marked.
    undo: &'static [&'static str],
    /// A line, and the end of its answer if a failure has changed nothing.
    still: Option<(&'static str, &'static str)>,
    /// Whether later steps need it.
    keep: bool,
}

const STEPS: [Step; 7] = [
    Step {
        line: "map iova=0 size=64p vaddr=mem",
        good: "0 ok",
        undo: &["unmap iova=0 size=64p"],
        still: Some(("unmap iova=0 size=64p", "0 ok size=0")),
        keep: true,
    },
    Step {
        line: "start",
        good: "0 ok",
        undo: &["stop"],
        still: Some(("get size=64p", "-1 EINVAL bm=0,0")),
        keep: true,
    },
    Step {
        line: "map iova=1M size=200p vaddr=mem+1M",
        good: "0 ok",
        undo: &["unmap iova=1M size=200p flags=1 bsize=32"],
        still: Some(("unmap iova=1M size=200p", "0 ok size=0")),
        keep: false,
    },
    Step {
        line: "pin dev=emu0 iova=2p n=20",
        good: "ret=20",
        undo: &["unpin dev=emu0 iova=2p n=20"],
        still: None,
        keep: false,
    },
    Step {
        line: "get size=64p",
        good: "0 ok bm=3ffffc,0",
        undo: &["rw dev=emu0 iova=2p len=81920"],
        still: Some(("get size=64p", "0 ok bm=3ffffc,0")),
        keep: true,
    },
    Step {
        line: "info argsz=4096",
        good: "}",
        undo: &[],
        still: None,
        keep: false,
    },
    // Here the IOMMU's own allocations fail too.
    Step {
        line: "attach dev=pci0 nodev=1",
        good: "ok",
        undo: &["detach dev=pci0", "get size=64p"],
        still: Some(("get size=64p", "0 ok bm=0,0")),
        keep: true,
    },
];

/// Runs one step once for each allocation, which fails; how many allocations it has.
fn each(real: &mut Real, step: &Step) -> Result<u32, String> {
    for n in 1..MOST {
        real.fail.set(Some(n));
        real.failed.set(false);
        let answer = ask(real, step.line)?;
        let good = answer.ends_with(step.good);
        if !good && !real.failed.get() {
            return Err(format!("{answer}, though nothing failed"));
        }
        if good {
            for line in step.undo {
                ask(real, line)?;
            }
        } else if let Some((line, end)) = step.still {
            expect(real, line, end).map_err(|e| format!("{answer}; then {e}"))?;
        }
        if !real.failed.get() {
            return Ok(n - 1);
        }
    }
    Err(format!("{}: more than {MOST} allocations", step.line))
}

pub(crate) fn run() -> Result<(), String> {
    let before = pins()?;
    let mut real = Real::new(65535).map_err(text)?;
    expect(&mut real, "new devs=emu0", "set_iommu(3)=ok")?;
    let mut all = 0;
    for step in &STEPS {
        let failures = each(&mut real, step)?;
        all += failures;
        println!("failnth: {failures:>3} failures of {}", step.line);
        if step.keep {
            expect(&mut real, step.line, step.good)?;
        }
    }
    drop(real);
    settled(before)?;
    if all == 0 {
        return Err("no allocation failed: is fault injection on?".into());
    }
    println!("failnth: no pin is left");
    Ok(())
}
