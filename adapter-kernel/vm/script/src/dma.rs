// SPDX-License-Identifier: GPL-2.0-only
//! Checks with DMA, after each operation of a script, that the test IOMMU maps what
//! the container maps and nothing else.

use std::collections::BTreeMap;

use dirty_core::Errno;
use dirty_script::op::*;
use dirty_script::{Case, System};

use crate::expected::Expected;
use crate::real::Real;
use crate::tiommu::{self, Counters, Tiommu};

/// Mappings that are tried after each operation.
const TRIED: usize = 6;
/// Bytes of a write.
const WORD: u64 = 8;

/// What the device reaches at a mapping.
#[derive(Clone, Copy)]
struct Target {
    size: u64,
    vaddr: u64,
    /// The flags of MAP: 1 to read, 2 to write.
    flags: u32,
}

/// A write that may still be under way.
struct Delayed {
    iova: u64,
    vaddr: u64,
    value: u64,
}

/// Follows a case by the model.
struct Follower {
    tiommu: Tiommu,
    /// What it had counted before the case.
    before: Counters,
    expected: Expected,
    /// The mappings; `None` if their memory is not known, because MAP changed it.
    targets: BTreeMap<u64, Option<Target>>,
    delayed: Vec<Delayed>,
    /// How often writes were delayed. Each time they have a place of their own in their
    /// pages, because those of two domains may arrive in any order.
    rounds: u64,
    /// The last value that was written.
    value: u64,
}

/// Checks a case if it has a device behind the test IOMMU.
pub(crate) struct Checker(Option<Follower>);

fn names_tiommu(op: &Op) -> bool {
    match op {
        Op::New(new) => new.devices.iter().any(|d| tiommu::number(*d).is_some()),
        Op::Attach { device, .. } => tiommu::number(*device).is_some(),
        _ => false,
    }
}

impl Checker {
    pub(crate) fn new(case: &Case) -> Result<Self, String> {
        if !case.lines.iter().any(|line| names_tiommu(&line.op)) {
            return Ok(Checker(None));
        }
        let tiommu = Tiommu::open().map_err(|e| format!("/dev/tiommu: {e}"))?;
        let before = tiommu.counters().map_err(|e| e.to_string())?;
        Ok(Checker(Some(Follower {
            tiommu,
            before,
            expected: Expected::new(case.entry_limit),
            targets: BTreeMap::new(),
            delayed: Vec::new(),
            rounds: 0,
            value: 0,
        })))
    }

    /// Starts writes that an unmap must wait for.
    pub(crate) fn before(&mut self, op: &Op) {
        if let (Some(follower), Op::Unmap(_) | Op::Detach(_) | Op::New(_)) = (&mut self.0, op) {
            follower.write_delayed();
        }
    }

    /// What is wrong after an operation; nothing, if all is well.
    pub(crate) fn after(&mut self, real: &mut Real, op: &Op) -> String {
        let checked = match &mut self.0 {
            Some(follower) => follower.after(real, op),
            None => Ok(()),
        };
        checked.map_or_else(|wrong| format!(" DMA: {wrong}"), |()| String::new())
    }
}

impl Follower {
    fn next_value(&mut self) -> u64 {
        self.value += 0x0101_0101_0101;
        self.value
    }

    fn numbers(&self) -> Vec<u32> {
        let attached = self.expected.behind_tiommu();
        attached.filter_map(tiommu::number).collect()
    }

    fn write_delayed(&mut self) {
        let Some(&device) = self.numbers().first() else {
            return;
        };
        self.rounds += 1;
        // The first word of a page is for other writes.
        let place = WORD * (1 + self.rounds % (PAGE / WORD - 1));
        let targets: Vec<(u64, Option<Target>)> =
            self.targets.iter().map(|(k, v)| (*k, *v)).collect();
        for (iova, target) in targets {
            let Some(target) = target.filter(|t| t.flags & 2 != 0) else {
                continue;
            };
            let value = self.next_value();
            let offset = target.size - PAGE + place;
            let bytes = value.to_ne_bytes();
            let written = self.tiommu.write_delayed(device, iova + offset, &bytes);
            if written.is_ok() {
                // Of two writes to the same place only the last can be checked.
                let vaddr = target.vaddr + offset;
                self.delayed.retain(|d| d.vaddr != vaddr);
                self.delayed.push(Delayed { iova, vaddr, value });
            }
        }
    }

    fn after(&mut self, real: &mut Real, op: &Op) -> Result<(), String> {
        self.expected.step(op);
        self.follow(op);
        if matches!(op, Op::Rw { .. }) {
            self.delayed.clear(); // it may have written the same memory
        }
        if !matches!(
            op,
            Op::New(_)
                | Op::Map(_)
                | Op::Unmap(_)
                | Op::Attach { .. }
                | Op::Detach(_)
                | Op::SetIommu(_)
        ) {
            return Ok(());
        }
        self.landed(real)?;
        self.counted()?;
        for device in self.numbers() {
            let start = self.value as usize;
            let all: Vec<(u64, Option<Target>)> =
                self.targets.iter().map(|(k, v)| (*k, *v)).collect();
            for k in 0..all.len().min(TRIED) {
                let (iova, target) = all[(start + k) % all.len()];
                if let Some(target) = target {
                    self.reaches(real, device, iova, target)?;
                }
            }
        }
        Ok(())
    }

    /// Brings the targets to the mappings that the model has.
    fn follow(&mut self, op: &Op) {
        let mappings: BTreeMap<u64, u64> = self.expected.model.mappings().into_iter().collect();
        if matches!(op, Op::New(_)) {
            self.targets.clear();
        }
        self.targets.retain(|iova, _| mappings.contains_key(iova));
        for (iova, size) in mappings {
            let known = self.targets.contains_key(&iova);
            match op {
                Op::Map(m) if !known && m.iova == iova && m.size == size => {
                    let (vaddr, flags) = (m.vaddr, m.flags);
                    let target = Target { size, vaddr, flags };
                    self.targets.insert(iova, Some(target));
                }
                // New memory for a mapping. The IOMMU still has the old.
                Op::Map(m) if known && m.iova == iova && m.flags & 4 != 0 => {
                    self.targets.insert(iova, None);
                }
                _ if !known => {
                    self.targets.insert(iova, None);
                }
                _ => {}
            }
        }
    }

    /// A write that was under way is in memory once its mapping is gone.
    fn landed(&mut self, real: &mut Real) -> Result<(), String> {
        let mut delayed = std::mem::take(&mut self.delayed);
        let gone = |d: &Delayed| !self.targets.contains_key(&d.iova);
        let (done, left) = delayed.drain(..).partition(gone);
        self.delayed = left;
        let done: Vec<Delayed> = done;
        for Delayed { iova, vaddr, value } in done {
            let mut bytes = [0; 8];
            real.peek(vaddr, &mut bytes);
            if bytes != value.to_ne_bytes() {
                return Err(format!("a write to {iova:#x} was lost by its unmap"));
            }
        }
        Ok(())
    }

    fn counted(&self) -> Result<(), String> {
        let counters = self.tiommu.counters().map_err(|e| e.to_string())?;
        let domains = self.expected.behind_tiommu().count() as u64;
        let mapped: u64 = self.expected.model.mappings().iter().map(|m| m.1).sum();
        if counters.bytes != mapped * domains {
            return Err(format!(
                "{:#x} bytes are mapped in {domains} domains, not {mapped:#x}",
                counters.bytes
            ));
        }
        if counters.split != self.before.split {
            return Err("an unmap ended inside a page of the IOMMU".into());
        }
        if counters.late != self.before.late {
            return Err("memory was unpinned before the IOTLB sync".into());
        }
        Ok(())
    }

    /// The device reaches the memory of a mapping as its flags allow, and nothing
    /// beside it.
    fn reaches(
        &mut self,
        real: &mut Real,
        device: u32,
        iova: u64,
        target: Target,
    ) -> Result<(), String> {
        let value = self.next_value();
        let page = value % (target.size / PAGE);
        let (at, vaddr) = (iova + page * PAGE, target.vaddr + page * PAGE);
        let written = self.tiommu.write(device, at, &value.to_ne_bytes());
        let mut memory = [0; 8];
        real.peek(vaddr, &mut memory);
        match (written, target.flags & 2 != 0) {
            (Ok(_), true) if memory == value.to_ne_bytes() => {}
            (Err(Errno::EFAULT), false) => {}
            other => return Err(format!("a write to {at:#x}: {other:?}, {memory:x?}")),
        }
        let mut seen = [0; 8];
        let read = self.tiommu.read(device, at, &mut seen);
        match (read, target.flags & 1 != 0) {
            (Ok(_), true) if memory == seen => {}
            (Err(Errno::EFAULT), false) => {}
            other => return Err(format!("a read of {at:#x}: {other:?}, {seen:x?}")),
        }
        for beside in [iova.wrapping_sub(8), iova.wrapping_add(target.size)] {
            let inside = |(iova, size): &(u64, u64)| beside >= *iova && beside - iova < *size;
            let mapped = self.expected.model.mappings().iter().any(inside);
            let read = self.tiommu.read(device, beside, &mut seen);
            if !mapped && read != Err(Errno::EFAULT) {
                return Err(format!(
                    "a read of {beside:#x}, which is not mapped: {read:?}"
                ));
            }
        }
        Ok(())
    }
}
