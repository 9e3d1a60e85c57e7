// SPDX-License-Identifier: MIT OR Apache-2.0
//! The promise itself, whatever keeps it: a page that a device may have
//! written while tracking is in the next report of it.
//!
//! Where a script leaves open what happened (callbacks that call back, raw
//! ioctls), nothing is demanded.

use std::collections::{BTreeMap, BTreeSet};

use dirty_script::op::{Op, PAGE};
use dirty_script::Reply;

/// What devices may have written and no report has shown.
#[derive(Default)]
pub(crate) struct Unreported {
    /// Pages, by iova.
    pages: BTreeSet<u64>,
    /// Iovas that are pinned, and how often: writable at any time.
    pins: BTreeMap<u64, u32>,
}

/// A bitmap as a report gave it.
struct Shown<'a> {
    iova: u64,
    size: u64,
    pgsize: u64,
    words: &'a [u64],
}

impl Shown<'_> {
    /// Whether a page is in it; none for one that it does not show.
    fn has(&self, page: u64) -> Option<bool> {
        let offset = page.checked_sub(self.iova).filter(|o| *o < self.size)?;
        let bit = offset / self.pgsize;
        let word = self.words.get(usize::try_from(bit / 64).ok()?)?;
        Some(word >> (bit % 64) & 1 != 0)
    }
}

/// The bitmap that an operation has reported.
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

/// Whether an operation does what its fields say, and not what lies somewhere
/// in memory.
fn is_plain(op: &Op) -> bool {
    match op {
        Op::Raw { .. } => false,
        Op::Get(g) => g.ptr.is_none() && g.hdrend.is_none(),
        Op::Unmap(u) => u.ptr.is_none(),
        _ => true,
    }
}

impl Unreported {
    /// After an operation: `written` bytes of a device's write were copied,
    /// `actions` says whether callbacks may do anything.
    ///
    /// # Errors
    ///
    /// The page that a report has lost.
    pub(crate) fn after(
        &mut self,
        op: &Op,
        reply: &Reply,
        written: u64,
        actions: bool,
    ) -> Result<(), String> {
        // A callback may stop and start in the middle: what was dirty is gone.
        let unmap = matches!(op, Op::Unmap(_) | Op::Harvest(_));
        if !is_plain(op) || unmap && actions {
            *self = Self::default();
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
            // Pins may be gone, and are dirty once more then.
            Op::Unmap(_) | Op::Harvest(_) | Op::CloseDevice(_) | Op::Detach(_) | Op::New(_) => {
                let pins = std::mem::take(&mut self.pins);
                self.pages.extend(pins.keys().map(|pin| pin / PAGE * PAGE));
            }
            _ => {}
        }
        Ok(())
    }

    /// Everything was reported.
    pub(crate) fn reported(&mut self) {
        self.pages.clear();
    }

    /// Forgets what is not mapped; and without tracking, all but the pins.
    pub(crate) fn keep(&mut self, tracking: bool, mapped: impl Fn(u64) -> bool) {
        self.pages.retain(|page| tracking && mapped(*page));
        self.pins.retain(|pin, _| mapped(*pin));
    }

    fn write(&mut self, iova: u64, len: u64) {
        // The rest of a giant is demanded from the model only.
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
