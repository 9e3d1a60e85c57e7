// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pinned pages of one mapping.
//!
//! A pin is kept by the iova that it was made at, in a window of neighbouring
//! pages. That iova need not be a multiple of the page size: pins at different
//! offsets inside a page are different pins. Pins that are not at the start of a
//! page are rare. A tree holds them, and the pins that a window refuses.
#![allow(clippy::arithmetic_side_effects)] // lengths, and offsets in a mapping

mod table;
pub(crate) mod window;

use crate::error::NoMemory;
use crate::host::Memory;
use crate::mem::tree::Tree;
use crate::mem::List;
use crate::pgsize::PageSize;
use crate::pins::window::Window;

pub(crate) use crate::pins::window::{NotRepinned, Unpinned};

/// No page from this one on is in a window.
const PAGES: u64 = 1 << 31;

/// A pin in the tree.
struct Pin {
    iova: u64,
    pfn: u64,
    refs: u32,
}

pub(crate) struct Pins<M: Memory> {
    /// Where the mapping starts.
    base: u64,
    page: PageSize,
    /// One for each 2^[`window::SHIFT`] pages, up to the last that had a pin.
    windows: List<Window<M>, M>,
    /// The number of pins in windows. INVARIANT: without pins there are no
    /// windows.
    len: usize,
    /// The pins that are in no window.
    others: Tree<Pin, M>,
    mem: M,
}

impl<M: Memory> Pins<M> {
    /// No pins, in a mapping that starts at `base`.
    pub(crate) fn new(mem: &M, base: u64, page: PageSize) -> Self {
        Pins {
            base,
            page,
            windows: List::new(mem),
            len: 0,
            others: Tree::new(mem),
            mem: mem.clone(),
        }
    }

    /// Where they allocate.
    pub(crate) fn mem(&self) -> &M {
        &self.mem
    }

    /// The number of pins, each of which may be taken several times.
    pub(crate) fn count(&self) -> u64 {
        (self.len as u64).saturating_add(self.others.from(0).count() as u64)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0 && self.others.is_empty()
    }

    /// The number of the page that starts at `iova`, if one does, and a window
    /// can hold it.
    #[inline]
    fn page(&self, iova: u64) -> Option<u32> {
        // The rotation turns an offset inside a page into a number that is too
        // large.
        let page = iova.wrapping_sub(self.base).rotate_right(self.page.shift());
        (page < PAGES).then_some(page as u32)
    }

    #[inline]
    fn window(&self, page: u32) -> Option<&Window<M>> {
        self.windows.get((page >> window::SHIFT) as usize)
    }

    #[inline]
    fn window_mut(&mut self, page: u32) -> Option<&mut Window<M>> {
        let windows = self.windows.as_mut_slice();
        windows.get_mut((page >> window::SHIFT) as usize)
    }

    /// The pfn pinned at `iova`.
    pub(crate) fn get(&self, iova: u64) -> Option<u64> {
        let page = self.page(iova);
        let pfn = page.and_then(|page| self.window(page)?.get(page));
        pfn.or_else(|| Some(self.others.get(iova)?.pfn))
    }

    /// Takes one more pin of a page that is pinned at `iova`, and returns its
    /// pfn.
    #[inline]
    pub(crate) fn repin(&mut self, iova: u64) -> Result<u64, NotRepinned> {
        if let Some(page) = self.page(iova) {
            if let Some(window) = self.window_mut(page) {
                let repinned = window.repin(page);
                if repinned != Err(NotRepinned::NotPinned) {
                    return repinned;
                }
            }
        }
        let pin = self.others.get_mut(iova).ok_or(NotRepinned::NotPinned)?;
        pin.refs = pin.refs.checked_add(1).ok_or(NotRepinned::Full)?;
        Ok(pin.pfn)
    }

    /// Keeps the first pin at `iova`.
    #[inline]
    pub(crate) fn insert(&mut self, iova: u64, pfn: u64) -> Result<(), NoMemory> {
        if let Some(page) = self.page(iova) {
            let inserted = self.insert_page(page, pfn);
            if self.len == 0 {
                self.windows.reset();
            }
            if inserted? {
                return Ok(());
            }
        }
        let refs = 1;
        self.others.insert(iova, || Pin { iova, pfn, refs })?;
        Ok(())
    }

    /// As `insert`, in the page's window; false if the window refuses it.
    #[inline]
    fn insert_page(&mut self, page: u32, pfn: u64) -> Result<bool, NoMemory> {
        while self.window(page).is_none() {
            self.windows.push(Window::new(&self.mem))?;
        }
        let windows = self.windows.as_mut_slice();
        let window = windows.get_mut((page >> window::SHIFT) as usize);
        let Some(window) = window else {
            return Ok(false); // unreachable: it was pushed above
        };
        let kept = window.insert(&self.mem, page, pfn)?;
        self.len += usize::from(kept);
        Ok(kept)
    }

    /// Drops one pin of the page at `iova`.
    #[inline]
    pub(crate) fn remove(&mut self, iova: u64) -> Unpinned {
        if let Some(page) = self.page(iova) {
            if let Some(window) = self.window_mut(page) {
                let unpinned = window.remove(page);
                if matches!(unpinned, Unpinned::Last(_)) {
                    self.len -= 1;
                    if self.len == 0 {
                        self.windows.reset();
                    }
                }
                if unpinned != Unpinned::NotPinned {
                    return unpinned;
                }
            }
        }
        let Some(pin) = self.others.get_mut(iova) else {
            return Unpinned::NotPinned;
        };
        if pin.refs > 1 {
            pin.refs -= 1;
            return Unpinned::Shared;
        }
        let pfn = pin.pfn;
        self.others.remove(iova);
        Unpinned::Last(pfn)
    }

    /// Whether there is a pin at any iova from `first`, where a page starts, to
    /// `last`. There is none at `iova`, whose pin has just gone.
    #[inline]
    pub(crate) fn any_beside(&self, iova: u64, first: u64, last: u64) -> bool {
        let other = self.others.from(first).next();
        if other.is_some_and(|pin| pin.iova <= last) {
            return true;
        }
        if last == first | self.page.mask() && iova == first {
            return false; // the range is just the page that has no pin any more
        }
        let Some(first) = self.page(first) else {
            return false;
        };
        let last = self.page.pages(last.wrapping_sub(self.base)).min(PAGES - 1) as u32;
        let numbers = first >> window::SHIFT..=last >> window::SHIFT;
        let mut windows = numbers.map_while(|number| self.windows.get(number as usize));
        windows.any(|window| window.any_in(first, last))
    }

    /// The iova and the pfn of every pin, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let pages = self.windows.iter().flat_map(Window::iter);
        let iova = |page| self.base.wrapping_add(u64::from(page) << self.page.shift());
        let pages = pages.map(move |(page, pfn)| (iova(page), pfn));
        let others = self.others.from(0);
        pages.chain(others.map(|pin| (pin.iova, pin.pfn)))
    }
}
