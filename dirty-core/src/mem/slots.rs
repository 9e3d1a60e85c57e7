// SPDX-License-Identifier: MIT OR Apache-2.0
//! Room for a few spans in ascending order, each with a value.
#![allow(unsafe_code)]
#![allow(clippy::arithmetic_side_effects)] // indices and lengths, at most `ROOM`

use core::mem::MaybeUninit;
use core::{ptr, slice};

use crate::host::Memory;
use crate::mem::own::Own;
use crate::span::Span;

/// The most spans.
pub(crate) const ROOM: usize = GROUPS * GROUP;
const GROUPS: usize = 8;
const GROUP: usize = 8;

/// A span and its value.
pub(crate) struct Slot<'a, T, M: Memory> {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) value: &'a Own<T, M>,
}

/// What is behind the last address of a span.
struct Rest<T, M: Memory> {
    first: u64,
    value: Own<T, M>,
}

#[repr(C)] // the head is in front
pub(crate) struct Slots<T, M: Memory> {
    head: Head,
    /// INVARIANT: the first `head.len` are initialised; there are so many.
    rests: [MaybeUninit<Rest<T, M>>; ROOM],
}

#[repr(C)] // `end` is in front
struct Head {
    /// The last address of the last span, if there is one.
    end: u64,
    len: usize,
    /// The last address of each span, in ascending order; then `u64::MAX`.
    lasts: [[u64; GROUP]; GROUPS],
}

impl<T, M: Memory> Slots<T, M> {
    /// Makes empty slots in their place, because they are large for a kernel's stack.
    ///
    /// # Safety
    ///
    /// `slots` is valid for writes.
    pub(crate) unsafe fn init(slots: *mut Self) {
        // SAFETY: in bounds, by the caller's promise.
        let head = unsafe { ptr::addr_of_mut!((*slots).head) };
        let empty = Head {
            end: 0,
            len: 0,
            lasts: [[u64::MAX; GROUP]; GROUPS],
        };
        // SAFETY: by the caller's promise. The rests need not be initialised.
        unsafe { head.write(empty) };
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.head.len
    }

    /// The last address of all; any for no spans.
    #[inline]
    pub(crate) fn end(&self) -> u64 {
        self.head.end
    }

    /// The number of spans that end below `iova`: the index of the first that does
    /// not, if there is one.
    ///
    /// The search reads the ends of groups, and then one group. Within each of the
    /// two steps, cache misses happen at the same time.
    #[inline]
    pub(crate) fn below(&self, iova: u64) -> usize {
        let below = |last: &u64| usize::from(*last < iova);
        let [groups @ .., _] = &self.head.lasts;
        let group: usize = groups.iter().map(|[.., last]| below(last)).sum();
        let lasts = self.head.lasts.get(group);
        let inside: usize = lasts.map_or(0, |lasts| lasts.iter().map(below).sum());
        group * GROUP + inside
    }

    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<Slot<'_, T, M>> {
        // SAFETY: `len` of them are initialised.
        let rests = unsafe { slice::from_raw_parts(self.rests.as_ptr().cast(), self.head.len) };
        let Rest { first, value } = rests.get(index)?;
        let last = self.head.lasts.as_flattened().get(index)?;
        Some(Slot {
            first: *first,
            last: *last,
            value,
        })
    }

    /// Inserts a span before the one at `index`; `None` if there is no room.
    #[inline]
    pub(crate) fn insert(&mut self, index: usize, span: Span, value: Own<T, M>) -> Option<&mut T> {
        if self.head.len >= ROOM {
            return None;
        }
        let lasts = self
            .head
            .lasts
            .as_flattened_mut()
            .get_mut(index..=self.head.len)?;
        let moved = lasts.len().checked_sub(1)?;
        lasts.copy_within(..moved, 1);
        *lasts.first_mut()? = span.last();
        // SAFETY: `index` is at most `len`, which is less than `ROOM`.
        let rest = unsafe { self.rests.as_mut_ptr().add(index) };
        // SAFETY: as above; the place behind it may be the end of all.
        let after = unsafe { rest.add(1) };
        // SAFETY: there is room for those behind `index` to move on by one.
        unsafe { ptr::copy(rest, after, moved) };
        // SAFETY: in bounds and borrowed exclusively. What was there has moved.
        let rest = unsafe { &mut *rest }.write(Rest {
            first: span.first(),
            value,
        });
        self.head.len += 1;
        self.head.end = self.head.end.max(span.last());
        Some(&mut rest.value)
    }

    /// Removes the span at `index`.
    #[inline]
    pub(crate) fn remove(&mut self, index: usize) -> Option<Own<T, M>> {
        let lasts = self
            .head
            .lasts
            .as_flattened_mut()
            .get_mut(index..self.head.len)?;
        let moved = lasts.len().checked_sub(1)?;
        lasts.copy_within(1.., 0);
        *lasts.last_mut()? = u64::MAX;
        // SAFETY: `index` is below `len`.
        let rest = unsafe { self.rests.as_mut_ptr().add(index) };
        // SAFETY: as above; the place behind it may be the end of all.
        let after = unsafe { rest.add(1) };
        // SAFETY: initialised; it counts no more when those behind it have moved.
        let removed = unsafe { rest.cast::<Rest<T, M>>().read() };
        // SAFETY: so many are behind it.
        unsafe { ptr::copy(after, rest, moved) };
        self.head.len -= 1;
        self.find_end();
        Some(removed.value)
    }

    /// Moves the spans from `index` on behind those of `to`, all of which are lower,
    /// if there is room for them.
    pub(crate) fn give(&mut self, index: usize, to: &mut Self) {
        let (len, to_len) = (self.head.len, to.head.len);
        let lasts = self.head.lasts.as_flattened_mut().get_mut(index..len);
        let lasts = lasts.unwrap_or_default();
        let n = lasts.len();
        let to_lasts = to.head.lasts.as_flattened_mut().get_mut(to_len..to_len + n);
        let Some(to_lasts) = to_lasts else {
            return;
        };
        to_lasts.swap_with_slice(lasts); // those after the last are `u64::MAX`
        let from = self.rests.get(index..).unwrap_or_default().as_ptr();
        let end = to.rests.get_mut(to_len..).unwrap_or_default().as_mut_ptr();
        // SAFETY: there are so many from `index` on, and room for so many in `to`.
        unsafe { ptr::copy_nonoverlapping(from, end, n) };
        self.head.len -= n;
        to.head.len += n;
        self.find_end();
        to.find_end();
    }

    #[inline]
    fn find_end(&mut self) {
        let last = self
            .head
            .lasts
            .as_flattened()
            .get(self.head.len.wrapping_sub(1));
        self.head.end = last.copied().unwrap_or(self.head.end);
    }
}

impl<T, M: Memory> Drop for Slots<T, M> {
    fn drop(&mut self) {
        let rests = self.rests.as_mut_ptr().cast::<Rest<T, M>>();
        let rests = ptr::slice_from_raw_parts_mut(rests, self.head.len);
        // SAFETY: `len` of them are initialised, and dropped once.
        unsafe { rests.drop_in_place() };
    }
}
