// SPDX-License-Identifier: MIT OR Apache-2.0
//! Checks the promise of dirty tracking without the model: a page that a device
//! may have written while tracking is on is in the next report of its range.
//!
//! Where a script does not say what happened (callbacks that call the
//! container, raw ioctls), nothing is checked.

use std::collections::{BTreeMap, BTreeSet};

use dirty_script::op::{Op, DEVICES, PAGE};
use dirty_script::Reply;

/// The pages that devices may have written and that no report has shown yet.
#[derive(Default)]
pub(crate) struct Unreported {
    /// The iovas of these pages.
    pages: BTreeSet<u64>,
    /// Iovas that are pinned, and how often. A device may write them at any
    /// time.
    pins: BTreeMap<u64, u32>,
    /// Whether the container asks IOMMUs for dirty pages.
    iommus_tell: bool,
}

/// The bitmap of a report.
struct Shown<'a> {
    iova: u64,
    size: u64,
    pgsize: u64,
    words: &'a [u64],
}

impl Shown<'_> {
    /// Whether a page is dirty in it; `None` if the bitmap does not show the
    /// page.
    fn has(&self, page: u64) -> Option<bool> {
        let offset = page.checked_sub(self.iova).filter(|o| *o < self.size)?;
        let bit = offset / self.pgsize;
        let word = self.words.get(usize::try_from(bit / 64).ok()?)?;
        Some(word >> (bit % 64) & 1 != 0)
    }
}

/// The bitmap that an operation has reported, if it has.
fn shown<'a>(op: &Op, reply: &'a Reply) -> Option<Shown<'a>> {
    let (iova, size, pgsize, words) = match (op, reply) {
        (Op::Get(g), Reply::Get(Ok(_), w)) => (g.iova, g.size, g.bitmap.pgsize, w),
        (Op::Unmap(u), Reply::Unmap(Ok(_), _, Some(w))) => (u.iova, u.size, u.bitmap.pgsize, w),
        (Op::Report(r) | Op::Harvest(r), Reply::Report(Ok(_), w)) => (r.iova, r.size, r.pgsize, w),
        _ => return None,
    };
    Some(Shown {
        iova,
        size,
        pgsize,
        words: &words.words,
    })
}

/// Whether an operation does what its fields say. One that reads its argument
/// from elsewhere may do anything.
fn is_plain(op: &Op) -> bool {
    match op {
        Op::Raw { .. } => false,
        Op::Get(g) => g.ptr.is_none() && g.hdrend.is_none(),
        Op::Unmap(u) => u.ptr.is_none(),
        _ => true,
    }
}

impl Unreported {
    /// Takes in an operation and its reply. `written` is how many bytes of a
    /// device's write were copied; `actions` says whether callbacks may call
    /// the container.
    ///
    /// # Errors
    ///
    /// The page that is missing in a report.
    pub(crate) fn after(
        &mut self,
        op: &Op,
        reply: &Reply,
        written: u64,
        actions: bool,
    ) -> Result<(), String> {
        // A callback may stop and start tracking, which forgets what was dirty.
        let unmap = matches!(op, Op::Unmap(_) | Op::Harvest(_));
        if !is_plain(op) || unmap && actions {
            *self = Self {
                iommus_tell: self.iommus_tell,
                ..Self::default()
            };
        }
        if let Op::New(new) = op {
            self.iommus_tell = new.iommu_dirty_tracking;
        }
        if let Some(shown) = shown(op, reply) {
            let pinned = self.pins.keys().map(|pin| pin / PAGE * PAGE);
            for page in self.pages.iter().copied().chain(pinned) {
                if shown.has(page) == Some(false) {
                    return Err(format!("page {page:#x} is not in its report: {op}{reply}"));
                }
            }
            let end = shown.iova.wrapping_add(shown.size - 1);
            self.pages.retain(|page| !(shown.iova..=end).contains(page));
        }
        match *op {
            Op::Rw {
                iova, write: true, ..
            } => self.write(iova, written),
            Op::Dma {
                device,
                iova,
                len,
                late: false,
            } if self.iommus_tell
                && DEVICES[device].dirty_tracking
                && *reply == Reply::Answer(Ok(0)) =>
            {
                self.write(iova, len);
            }
            Op::Mark { iova, len } if *reply == Reply::Answer(Ok(0)) => self.write(iova, len),
            Op::Pin { iova, n, .. } if *reply == Reply::Returned(Ok(n)) => {
                for k in 0..n as u64 {
                    *self.pins.entry(iova + k * PAGE).or_default() += 1;
                }
            }
            Op::Unpin { iova, n, .. } => {
                for k in 0..u64::try_from(n).unwrap_or(0) {
                    self.unpin(iova.wrapping_add(k * PAGE));
                }
            }
            // These may drop pins, whose pages are dirty once more.
            Op::Unmap(_) | Op::Harvest(_) | Op::CloseDevice(_) | Op::Detach(_) | Op::New(_) => {
                let pins = std::mem::take(&mut self.pins);
                self.pages.extend(pins.keys().map(|pin| pin / PAGE * PAGE));
            }
            _ => {}
        }
        Ok(())
    }

    /// Notes that everything was reported.
    pub(crate) fn reported(&mut self) {
        self.pages.clear();
    }

    /// Forgets pages and pins that are not mapped and, without tracking, every
    /// page.
    pub(crate) fn keep(&mut self, tracking: bool, mapped: impl Fn(u64) -> bool) {
        self.pages.retain(|page| tracking && mapped(*page));
        self.pins.retain(|pin, _| mapped(*pin));
    }

    fn write(&mut self, iova: u64, len: u64) {
        // Of a giant write only the first part is checked here; the model
        // checks the rest.
        let len = len.min(1 << 24);
        if len != 0 {
            let last = iova.saturating_add(len - 1);
            let pages = iova / PAGE..=last / PAGE;
            self.pages.extend(pages.map(|page| page * PAGE));
        }
    }

    fn unpin(&mut self, iova: u64) {
        if let Some(count) = self.pins.get_mut(&iova) {
            *count -= 1;
            if *count == 0 {
                self.pins.remove(&iova);
                self.pages.insert(iova / PAGE * PAGE);
            }
        }
    }
}
