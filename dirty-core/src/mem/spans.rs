// SPDX-License-Identifier: MIT OR Apache-2.0
//! An ordered map from spans, none of which overlap, to values.
//!
//! The spans lie in chunks of up to `ROOM`, so that a search reads few cache
//! lines. A tree orders the chunks. It is intrusive: `intrusive-collections` links
//! them, and this module owns them, so that the rest of the core sees only
//! references. Values stay at their places.
//!
//! Nobody can make the map slow or large by the order in which spans come and go. Two
//! neighbouring chunks have more than `FEW` spans together. So n spans take at most
//! 2 n / 33 + 1 chunks, and each operation takes O(log n) steps.
#![allow(unsafe_code)]

use core::hint;
use core::iter;
use core::mem::MaybeUninit;
use core::ptr::{self, NonNull};

use intrusive_collections::{intrusive_adapter, Bound, KeyAdapter, RBTree, RBTreeLink, UnsafeRef};

use crate::error::NoMemory;
use crate::host::Memory;
use crate::mem::own::Own;
use crate::mem::slots::{Slot, Slots, ROOM};
use crate::span::Span;

/// Two neighbouring chunks have more than so many spans together.
const FEW: usize = ROOM / 2;
/// How many spans stay in a full chunk when another one comes behind all of them. The
/// room is for spans that come between them later.
const MOST: usize = ROOM / 8 * 5;

#[repr(C)] // A search of the tree reads one line: the link, and the slots' end.
struct Chunk<T, M: Memory> {
    link: RBTreeLink,
    /// INVARIANT: not empty between operations.
    slots: Slots<T, M>,
}

impl<T, M: Memory> Chunk<T, M> {
    /// Makes a chunk without spans. It is written where it stays, because it is large
    /// for a kernel's stack.
    fn new(mem: &M) -> Result<NonNull<Self>, NoMemory> {
        let place = Own::new(mem, MaybeUninit::<Self>::uninit)?.into_raw();
        let chunk = place.cast::<Self>();
        // SAFETY: in bounds of its memory.
        let link = unsafe { ptr::addr_of_mut!((*chunk.as_ptr()).link) };
        // SAFETY: valid for writes, and nobody else has it.
        unsafe { link.write(RBTreeLink::new()) };
        // SAFETY: in bounds of its memory.
        let slots = unsafe { ptr::addr_of_mut!((*chunk.as_ptr()).slots) };
        // SAFETY: valid for writes, and nobody else has it.
        unsafe { Slots::init(slots) };
        Ok(chunk)
    }
}

intrusive_adapter!(
    ChunkAdapter<T, M> = UnsafeRef<Chunk<T, M>>: Chunk<T, M> { link => RBTreeLink } where M: Memory
);

impl<'a, T, M: Memory> KeyAdapter<'a> for ChunkAdapter<T, M> {
    type Key = u64;

    #[inline]
    fn get_key(&self, chunk: &'a Chunk<T, M>) -> u64 {
        chunk.slots.end()
    }
}

/// INVARIANT: every chunk in `tree` came from `Chunk::new` with `mem`, is in no
/// other tree and is reachable through this `Spans` only.
pub(crate) struct Spans<T, M: Memory> {
    /// In ascending order. INVARIANT: two neighbours have more than `FEW` spans
    /// together.
    tree: RBTree<ChunkAdapter<T, M>>,
    /// What the last exclusive call found. A call looks at one place several times.
    /// Shared calls do not write to it, because they may run at the same time.
    near: Option<Near<T, M>>,
    mem: M,
}

/// A place: a span, or that behind all spans.
struct Place<T, M: Memory> {
    /// INVARIANT: a chunk in the tree, while the tree is borrowed.
    chunk: NonNull<Chunk<T, M>>,
    index: usize,
}

/// INVARIANT: for each address in `from..=to`, `place` is that of the first span that
/// does not end below it.
struct Near<T, M: Memory> {
    from: u64,
    to: u64,
    place: Place<T, M>,
}

impl<T, M: Memory> Clone for Place<T, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, M: Memory> Copy for Place<T, M> {}

// SAFETY: owns its chunks like a map of boxes.
unsafe impl<T: Send, M: Memory + Send> Send for Spans<T, M> {}
// SAFETY: through `&Spans` chunks are only read, and values are given out as `&T`.
unsafe impl<T: Sync, M: Memory + Sync> Sync for Spans<T, M> {}

impl<T, M: Memory> Spans<T, M> {
    pub(crate) fn new(mem: &M) -> Self {
        Spans {
            tree: RBTree::new(ChunkAdapter::new()),
            near: None,
            mem: mem.clone(),
        }
    }

    /// Remembers where `iova` is, so that the calls that follow need not search.
    #[inline]
    pub(crate) fn seek(&mut self, iova: u64) {
        self.seek_place(iova);
    }

    #[inline]
    fn seek_place(&mut self, iova: u64) -> Option<Place<T, M>> {
        match self.near_place(iova) {
            Some(place) => Some(place),
            None => self.seek_far(iova),
        }
    }

    #[inline(never)]
    fn seek_far(&mut self, iova: u64) -> Option<Place<T, M>> {
        let place = self.search(iova)?;
        let (from, to) = match self.slot(place) {
            Some(slot) => (iova.min(slot.first), slot.last),
            None => (iova, u64::MAX),
        };
        self.near = Some(Near { from, to, place });
        Some(place)
    }

    /// The value of the span that `iova` is in.
    #[inline]
    pub(crate) fn find(&self, iova: u64) -> Option<&T> {
        self.slot_of(iova).map(|slot| &**slot.value)
    }

    /// As [`find`](Spans::find), to change it.
    #[inline]
    pub(crate) fn find_mut(&mut self, iova: u64) -> Option<&mut T> {
        let place = self.seek_place(iova)?;
        let slot = self.slot(place).filter(|slot| slot.first <= iova)?;
        let mut value = slot.value.as_ptr();
        // SAFETY: `&mut self` is borrowed by the result.
        Some(unsafe { value.as_mut() })
    }

    /// The values of the spans that overlap `span`, in ascending order.
    #[inline]
    pub(crate) fn range(&self, span: Span) -> impl Iterator<Item = &T> {
        let mut walk = self.walk(span);
        iter::from_fn(move || walk.next().map(|slot| &**slot.value))
    }

    /// As [`range`](Spans::range), to change them.
    #[inline]
    pub(crate) fn range_mut(&mut self, span: Span) -> impl Iterator<Item = &mut T> {
        let mut walk = self.walk(span);
        iter::from_fn(move || {
            let mut value = walk.next()?.value.as_ptr();
            // SAFETY: `&mut self` is borrowed by the iterator, which gives each
            // value out once, and itself reads only slots.
            Some(unsafe { value.as_mut() })
        })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.range(Span::ALL)
    }

    /// As [`iter`](Spans::iter), to change them.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.range_mut(Span::ALL)
    }

    /// Whether any span overlaps `span`.
    #[inline]
    pub(crate) fn overlaps(&self, span: Span) -> bool {
        self.walk(span).next().is_some()
    }

    /// Whether `span` starts or ends inside another.
    #[inline]
    pub(crate) fn bisects(&self, span: Span) -> bool {
        let Some(first) = self.walk(span).next() else {
            return false;
        };
        let last = match first.last >= span.last() {
            true => Some(first.last), // most often
            false => self.slot_of(span.last()).map(|slot| slot.last),
        };
        first.first < span.first() || last.is_some_and(|last| last > span.last())
    }

    /// Inserts a value for a span that overlaps none. `value` makes it in its place.
    /// Nothing changes without memory.
    pub(crate) fn insert(
        &mut self,
        span: Span,
        value: impl FnOnce() -> T,
    ) -> Result<&mut T, NoMemory> {
        debug_assert!(!self.overlaps(span));
        let place = self.place(span.first());
        let value = Own::new(&self.mem, value)?;
        let place = match place {
            // SAFETY: it is in the tree.
            Some(place) if unsafe { place.chunk.as_ref() }.slots.len() < ROOM => place,
            _ => self.make_room(place, span.first())?,
        };
        self.near = Some(Near {
            from: span.first(),
            to: span.last(),
            place,
        });
        // SAFETY: in the tree, and `&mut self` is borrowed by the result.
        let slots = unsafe { slots_mut(place.chunk) };
        let inserted = slots.insert(place.index, span, value);
        inserted.ok_or(NoMemory) // unreachable: there is room
    }

    /// Adds a chunk, and moves some spans there from the chunk of `place`, which is
    /// full. Returns the new place for `iova`.
    #[inline(never)]
    fn make_room(
        &mut self,
        place: Option<Place<T, M>>,
        iova: u64,
    ) -> Result<Place<T, M>, NoMemory> {
        let added = Chunk::new(&self.mem)?;
        let mut cursor = match place {
            // SAFETY: it is in the tree.
            Some(place) => unsafe { self.tree.cursor_mut_from_ptr(place.chunk.as_ptr()) },
            None => self.tree.cursor_mut(),
        };
        // SAFETY: the chunk was just made.
        let linked = unsafe { added.as_ref() }.link.is_linked();
        // SAFETY: its link is new. This lets the compiler drop the check in
        // `insert_after`, which would panic.
        unsafe { hint::assert_unchecked(!linked) };
        // SAFETY: the chunk lives until this tree removes it.
        cursor.insert_after(unsafe { UnsafeRef::from_raw(added.as_ptr()) });
        let Some(Place { mut chunk, .. }) = place else {
            return Ok(Place {
                chunk: added,
                index: 0,
            });
        };
        // SAFETY: in the tree, which is borrowed exclusively.
        let lower = unsafe { slots_mut(chunk) };
        let stay = if iova > lower.end() { MOST } else { FEW };
        // SAFETY: as above, and another chunk.
        lower.give(stay, unsafe { slots_mut(added) });
        if iova > lower.end() {
            chunk = added;
        }
        // SAFETY: as above.
        let index = unsafe { chunk.as_ref() }.slots.below(iova);
        Ok(Place { chunk, index })
    }

    /// Takes out the first span that overlaps `span`. This takes no memory.
    pub(crate) fn remove_first(&mut self, span: Span) -> Option<Own<T, M>> {
        let place = self.place(span.first())?;
        self.slot(place).filter(|slot| slot.first <= span.last())?;
        // SAFETY: in the tree, which is borrowed exclusively.
        let slots = unsafe { slots_mut(place.chunk) };
        let removed = slots.remove(place.index);
        self.near = slots.get(place.index).map(|next| Near {
            from: span.first(),
            to: next.last,
            place,
        });
        if slots.len() < FEW {
            self.merge(place.chunk);
        }
        removed
    }

    /// Restores the invariants after `chunk` has lost a span.
    #[inline(never)]
    fn merge(&mut self, chunk: NonNull<Chunk<T, M>>) {
        // SAFETY: it is in the tree.
        let cursor = unsafe { self.tree.cursor_from_ptr(chunk.as_ptr()) };
        let before = cursor.peek_prev().get_ptr();
        let after = cursor.peek_next().get_ptr();
        // SAFETY: it is in the tree.
        if unsafe { chunk.as_ref() }.slots.len() == 0 {
            return self.free(chunk);
        }
        let pairs = [
            before.map(|before| (before, chunk)),
            after.map(|after| (chunk, after)),
        ];
        for (lower, upper) in pairs.into_iter().flatten() {
            // SAFETY: in the tree, which is borrowed exclusively.
            let lower = unsafe { slots_mut(lower) };
            // SAFETY: as above, and another chunk.
            let slots = unsafe { slots_mut(upper) };
            if slots.len().saturating_add(lower.len()) <= FEW {
                slots.give(0, lower);
                return self.free(upper);
            }
        }
    }

    /// Frees a chunk without spans.
    fn free(&mut self, chunk: NonNull<Chunk<T, M>>) {
        self.near = None;
        // SAFETY: it is in the tree.
        let mut cursor = unsafe { self.tree.cursor_mut_from_ptr(chunk.as_ptr()) };
        if let Some(chunk) = cursor.remove() {
            self.drop_chunk(chunk);
        }
    }

    /// Frees a chunk that has left the tree.
    fn drop_chunk(&self, chunk: UnsafeRef<Chunk<T, M>>) {
        if let Some(chunk) = NonNull::new(UnsafeRef::into_raw(chunk)) {
            // SAFETY: by the invariant, and nothing points to it any more.
            drop(unsafe { Own::from_raw(chunk, &self.mem) });
        }
    }

    /// The place of the first span that does not end below `iova`; `None` without
    /// spans.
    #[inline]
    fn place(&self, iova: u64) -> Option<Place<T, M>> {
        self.near_place(iova).or_else(|| self.search(iova))
    }

    #[inline]
    fn near_place(&self, iova: u64) -> Option<Place<T, M>> {
        let near = self.near.as_ref();
        let near = near.filter(|near| near.from <= iova && iova <= near.to)?;
        Some(near.place)
    }

    #[inline]
    fn search(&self, iova: u64) -> Option<Place<T, M>> {
        let cursor = self.tree.lower_bound(Bound::Included(&iova));
        let chunk = cursor.get_ptr().or_else(|| self.tree.back().get_ptr())?;
        // SAFETY: in the tree, which is borrowed as long.
        let index = unsafe { chunk.as_ref() }.slots.below(iova);
        Some(Place { chunk, index })
    }

    /// The span at a place; `None` if that is behind all.
    #[inline]
    fn slot(&self, place: Place<T, M>) -> Option<Slot<'_, T, M>> {
        // SAFETY: in the tree, which is borrowed as long as the result.
        unsafe { place.chunk.as_ref() }.slots.get(place.index)
    }

    /// The span that `iova` is in.
    #[inline]
    fn slot_of(&self, iova: u64) -> Option<Slot<'_, T, M>> {
        let slot = self.slot(self.place(iova)?)?;
        (slot.first <= iova).then_some(slot)
    }

    #[inline]
    fn walk(&self, span: Span) -> Walk<'_, T, M> {
        Walk {
            spans: self,
            place: self.place(span.first()),
            last: span.last(),
        }
    }

    /// The place of the first span in the chunk after that of `place`.
    #[inline(never)]
    fn next_chunk(&self, place: Place<T, M>) -> Option<Place<T, M>> {
        // SAFETY: it is in the tree.
        let cursor = unsafe { self.tree.cursor_from_ptr(place.chunk.as_ptr()) };
        let chunk = cursor.peek_next().get_ptr()?;
        Some(Place { chunk, index: 0 })
    }
}

impl<T, M: Memory> Drop for Spans<T, M> {
    fn drop(&mut self) {
        while let Some(chunk) = self.tree.front_mut().remove() {
            self.drop_chunk(chunk);
        }
    }
}

/// The spans from `place` on that do not start after `last`.
struct Walk<'a, T, M: Memory> {
    spans: &'a Spans<T, M>,
    /// `None` at the end.
    place: Option<Place<T, M>>,
    last: u64,
}

impl<'a, T, M: Memory> Walk<'a, T, M> {
    /// The next span. Nothing behind the last is read.
    #[inline]
    fn next(&mut self) -> Option<Slot<'a, T, M>> {
        let mut place = self.place?;
        let slot = match self.spans.slot(place) {
            Some(slot) => slot,
            None => {
                self.place = self.spans.next_chunk(place);
                place = self.place?;
                self.spans.slot(place)?
            }
        };
        place.index = place.index.saturating_add(1);
        self.place = Some(place).filter(|_| slot.last < self.last);
        (slot.first <= self.last).then_some(slot)
    }
}

/// # Safety
///
/// `chunk` is in a tree that is borrowed exclusively for `'a`, and no other
/// reference to its slots exists. (Its link stays shared with its neighbours.)
unsafe fn slots_mut<'a, T, M: Memory>(chunk: NonNull<Chunk<T, M>>) -> &'a mut Slots<T, M> {
    // SAFETY: in bounds of a live chunk; no reference is made.
    let slots = unsafe { ptr::addr_of_mut!((*chunk.as_ptr()).slots) };
    // SAFETY: the caller's promise.
    unsafe { &mut *slots }
}
