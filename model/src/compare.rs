// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compares the core with the model, operation by operation, with faults.
//!
//! Without a fault both must give the same reply. An operation that met a fault
//! must fail with the fault's errno and leave the core as if it had not been
//! called. So the model is not called, except for what a failed operation may
//! leave behind: see [`Pair::after_fault`].

use std::fmt::Write as _;

use dirty_core::Errno;
use dirty_script::op::{FaultKind, Op, ReportArg};
use dirty_script::sim::Sim;
use dirty_script::{run, Reply, System};

use crate::unreported::Unreported;
use crate::Naive;

/// The core and the model, and the script that both have run.
#[derive(Default)]
struct Pair {
    sim: Sim,
    model: Naive,
    unreported: Unreported,
    /// Whether a device writes during the next operation.
    late: bool,
    /// The operations so far, which a disagreement prints.
    script: Vec<Op>,
}

/// Runs a whole script on the core and on the model.
///
/// Half of the lengths that a script may have choose a host whose user memory is
/// absent under the container's lock. The answers are the same.
///
/// # Errors
///
/// The first disagreement, and the operations up to it as a `.vt` script, which
/// `vfio-dirty replay --simulate` runs.
///
/// # Panics
///
/// If the core gives back to its host what it has not taken, or leaves
/// something with it at the end.
pub fn compare(ops: &[Op]) -> Result<(), String> {
    let mut pair = Pair::default();
    if ops.len() / 8 % 2 == 1 {
        pair.sim = Sim::with_absent_pages();
    }
    ops.iter().try_for_each(|op| pair.step(op))?;
    pair.sim.close();
    Ok(())
}

/// The errno that a fault gives to the operation that meets it.
fn errno_of(kind: FaultKind) -> Errno {
    match kind {
        FaultKind::Alloc => Errno::ENOMEM,
        FaultKind::Copy | FaultKind::Pin => Errno::EFAULT,
        FaultKind::Map | FaultKind::Track => Errno::EIO,
        FaultKind::Charge => Errno::EINTR,
    }
}

/// Whether a reply says that the operation failed with `errno`.
fn failed_with(reply: &Reply, errno: Errno) -> bool {
    match reply {
        Reply::Text(text) => text.ends_with(&format!("={errno}")),
        Reply::Answer(answer) | Reply::Unmap(answer, ..) | Reply::Get(answer, _) => {
            *answer == Err(errno)
        }
        Reply::Report(answer, _) => *answer == Err(errno),
        Reply::Returned(returned) | Reply::Child(returned) => *returned == Ok(-errno.0),
        Reply::Bytes(_) | Reply::Stat(_) => false,
    }
}

/// Whether an operation may meet faults. Those that make several calls, or that
/// go on when something fails, may not: it would be unclear what must be
/// undone.
fn meets_faults(op: &Op) -> bool {
    !matches!(
        op,
        Op::New(_) | Op::Detach(_) | Op::MapN { .. } | Op::Info { .. } | Op::CloseDevice(_)
    )
}

impl Pair {
    /// Runs one operation on both.
    ///
    /// # Errors
    ///
    /// How the two disagree, and the script.
    fn step(&mut self, op: &Op) -> Result<(), String> {
        self.script.push(op.clone());
        if let Op::Fault { .. } = op {
            // A fault after a late write may leave a mapping without its domains.
            if !self.sim.has_callback_actions() && !self.late {
                run(&mut self.sim, op);
            }
            return Ok(());
        }
        let late = matches!(op, Op::Dma { late: true, .. });
        let was_late = std::mem::replace(&mut self.late, late);
        if !was_late && (late || !meets_faults(op)) {
            self.sim.end_faults();
        }
        let core = run(&mut self.sim, op);
        match self.sim.take_fired() {
            None => {
                let model = run(&mut self.model, op);
                if core != model {
                    return Err(self.disagree(&format!("core  {op}{core}\nmodel {op}{model}")));
                }
            }
            Some(kind) => {
                if !failed_with(&core, errno_of(kind)) {
                    return Err(self.disagree(&format!("{kind:?} fault ignored: {op}{core}")));
                }
                self.after_fault(op, &core)?;
                // Bytes that were copied before a fault stay in the user's
                // memory.
                self.model.memory().clone_from(self.sim.memory());
            }
        }
        self.keeps_promise(op, &core)?;
        self.balance()
    }

    /// Checks that no page that a device may have written is missing in a
    /// report.
    fn keeps_promise(&mut self, op: &Op, core: &Reply) -> Result<(), String> {
        let (written, actions) = (self.sim.bytes_written(), self.sim.has_callback_actions());
        let kept = self.unreported.after(op, core, written, actions);
        kept.map_err(|lost| self.disagree(&lost))?;
        let mappings = self.model.mappings();
        let tracking = self.model.tracking().is_some();
        self.unreported.keep(tracking, |at| {
            let mapped = |(iova, size): &(u64, u64)| at >= *iova && at - iova < *size;
            mappings.iter().any(mapped)
        });
        Ok(())
    }

    /// Brings the model to what the operation may leave behind when it fails.
    fn after_fault(&mut self, op: &Op, core: &Reply) -> Result<(), String> {
        match op {
            // The group was attached; only the open of its device failed.
            Op::Attach { device, .. } if core.to_string().contains("get_device_fd") => {
                let (device, open) = (*device, false);
                run(&mut self.model, &Op::Attach { device, open });
            }
            // Bytes before the fault were written and are marked (rule D4).
            Op::Rw {
                iova, write: true, ..
            } => self.model.rw_partial(*iova, self.sim.bytes_written()),
            // The devices have dropped their pins (rule D3).
            Op::Unmap(_) | Op::Harvest(_) => self.model.unmap_callbacks_only(op),
            // Pages that were pinned for a moment may be dirty (rule V22).
            Op::Pin { iova, n, .. } => {
                let n = u64::try_from(*n).unwrap_or(0);
                let last = iova.wrapping_add(n << 12);
                self.model.pin_fails(*iova, n);
                self.unreported.reported();
                return self.settle(*iova, last);
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes a report of every mapping from both. The core may report pages
    /// from `first` to `last` that the model does not; otherwise the two must
    /// agree.
    fn settle(&mut self, first: u64, last: u64) -> Result<(), String> {
        let Some(pgsize) = self.model.tracking() else {
            return Ok(());
        };
        for (iova, size) in self.model.mappings() {
            let words = (size / pgsize).div_ceil(64);
            if words > 1 << 16 {
                continue; // too large to compare; scripts pin few of its pages
            }
            let arg = ReportArg {
                iova,
                size,
                pgsize,
                words,
                fill: Some(0),
            };
            let (core, model) = (self.report(&arg, true), self.report(&arg, false));
            for (k, (core, model)) in (0u64..).zip(core.iter().zip(&model)) {
                for bit in 0..64 {
                    let page = iova.wrapping_add((k * 64 + bit).wrapping_mul(pgsize));
                    let touched = page.wrapping_add(pgsize - 1) >= first && page <= last;
                    let (core, model) = (core >> bit & 1, model >> bit & 1);
                    if core < model || (core > model && !touched) {
                        let text = format!("page {page:#x} after a failed pin: {core}, {model}");
                        return Err(self.disagree(&text));
                    }
                }
            }
        }
        Ok(())
    }

    fn report(&mut self, arg: &ReportArg, core: bool) -> Vec<u64> {
        let system: &mut dyn System = match core {
            true => &mut self.sim,
            false => &mut self.model,
        };
        let mut words = vec![0; arg.words as usize];
        // This cannot fail: a whole mapping is a valid range.
        let _ = system.report(arg, &mut words);
        words
    }

    /// Checks that both have the same numbers of pins and locked pages.
    fn balance(&mut self) -> Result<(), String> {
        let core = (self.sim.pinned_pages(), self.sim.locked_pages());
        let model = (self.model.pinned_pages(), self.model.locked_pages());
        if core != model {
            let text = format!("(pinned, locked) pages: core {core:?}, model {model:?}");
            return Err(self.disagree(&text));
        }
        Ok(())
    }

    fn disagree(&self, what: &str) -> String {
        let mut text = format!("{what}\nafter this script:\n");
        for op in &self.script {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{op}");
        }
        text
    }
}
