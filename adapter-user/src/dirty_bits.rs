// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty bits that threads set while another takes them, without a lock.
//!
//! No write is lost as long as four steps keep their order: write, mark, take,
//! copy. A mark is an atomic OR with release order, a take is an atomic AND or
//! a swap with acquire order: a take that finds a mark sees the write before
//! it, and whoever copies the page after the take copies the write. A mark that
//! comes too late for one take is in the next.

use std::fmt;
use std::sync::Arc;

use dirty_core::{Error, PageSize};

use crate::atomic::{fence, AtomicBool, AtomicU64, Ordering};
use crate::error::TrackError;

/// The dirty pages of a piece of memory: one bit a page, set by any thread.
///
/// A clone is another handle to the same bits. Bits end with
/// [`close`](DirtyBits::close): each mark that says `Ok` is in a take made
/// after the close at the latest, and each later one is refused.
///
/// ```
/// use adapter_user::{DirtyBits, PageSize};
///
/// let bits = DirtyBits::new(1 << 20, PageSize::new(4096).unwrap())?;
/// let device = bits.clone();
/// std::thread::spawn(move || {
///     // ... the device writes 2 bytes at 0x1fff, and then:
///     device.mark(0x1fff, 2)
/// })
/// .join()
/// .unwrap()?;
/// let mut dirty = vec![0; bits.words()];
/// bits.take(&mut dirty)?;
/// assert_eq!(dirty[0], 0b110);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct DirtyBits {
    inner: Arc<Inner>,
}

struct Inner {
    /// INVARIANT: as many words as `len` has pages, in 64s; no bit beyond.
    words: Box<[AtomicU64]>,
    len: u64,
    pgsize: PageSize,
    closed: AtomicBool,
}

impl DirtyBits {
    /// Clean bits for `len` bytes of memory, in pages of `pgsize`.
    ///
    /// # Errors
    ///
    /// [`TrackError::NoMemory`], with the bytes wanted.
    pub fn new(len: u64, pgsize: PageSize) -> Result<Self, TrackError> {
        let wanted = Self::bytes(len, pgsize);
        let no_memory = TrackError::NoMemory { wanted };
        let count = usize::try_from(wanted / 8).map_err(|_| no_memory)?;
        let mut words = Vec::new();
        words.try_reserve_exact(count).map_err(|_| no_memory)?;
        words.resize_with(count, || AtomicU64::new(0));
        Ok(DirtyBits {
            inner: Arc::new(Inner {
                words: words.into_boxed_slice(),
                len,
                pgsize,
                closed: AtomicBool::new(false),
            }),
        })
    }

    /// Bytes that the bits for `len` bytes of memory take.
    #[must_use]
    pub fn bytes(len: u64, pgsize: PageSize) -> u64 {
        len.div_ceil(pgsize.bytes()).div_ceil(64) * 8
    }

    /// Bytes of memory that the bits stand for.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.inner.len
    }

    /// Whether they stand for no memory at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inner.len == 0
    }

    /// The size of a page.
    #[must_use]
    pub fn pgsize(&self) -> PageSize {
        self.inner.pgsize
    }

    /// Number of pages; the last may be cut short by the end of the memory.
    #[must_use]
    pub fn npages(&self) -> u64 {
        self.len().div_ceil(self.pgsize().bytes())
    }

    /// Number of 64-bit words that hold the bits.
    #[must_use]
    pub fn words(&self) -> usize {
        self.inner.words.len()
    }

    /// Whether both are handles to the same bits.
    #[must_use]
    pub fn same(&self, other: &DirtyBits) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Marks the pages of `len` bytes from `offset` on: *after* the write, and
    /// before telling anybody that it is done.
    ///
    /// # Errors
    ///
    /// `Unmapped` if a part is beyond the end, `NotTracking` after
    /// [`close`](DirtyBits::close): no take need tell of that. What is inside
    /// is marked in any case.
    pub fn mark(&self, offset: u64, len: u64) -> Result<(), Error> {
        let Some(more) = len.checked_sub(1) else {
            return Ok(());
        };
        let (end, pgsize) = (self.len(), self.pgsize());
        let last = offset.saturating_add(more);
        if offset < end {
            self.set(pgsize.pages(offset), pgsize.pages(last.min(end - 1)));
        }
        // After the bits are set, see `close`.
        if self.inner.closed.load(Ordering::SeqCst) {
            return Err(Error::NotTracking);
        }
        match last < end {
            true => Ok(()),
            false => Err(Error::Unmapped),
        }
    }

    fn set(&self, first: u64, last: u64) {
        let (from, to) = (!0 << (first % 64), !0 >> (63 - last % 64));
        match &self.inner.words[(first / 64) as usize..=(last / 64) as usize] {
            [only] => drop(only.fetch_or(from & to, Ordering::SeqCst)),
            [head, middle @ .., tail] => {
                head.fetch_or(from, Ordering::SeqCst);
                for word in middle {
                    word.fetch_or(!0, Ordering::SeqCst);
                }
                tail.fetch_or(to, Ordering::SeqCst);
            }
            [] => {}
        }
    }

    /// Whether the page at `offset` is dirty; memory beyond the end never is.
    #[must_use]
    pub fn is_dirty(&self, offset: u64) -> bool {
        let page = self.pgsize().pages(offset);
        let word = usize::try_from(page / 64).ok();
        let word = word.and_then(|at| self.inner.words.get(at));
        offset < self.len()
            && word.is_some_and(|w| w.load(Ordering::Acquire) >> (page % 64) & 1 != 0)
    }

    /// ORs the dirty pages into `out`, bit k for page k, and clears them; copy
    /// the pages after this call.
    ///
    /// # Errors
    ///
    /// `BitmapSize` if `out` is too short; nothing is taken then.
    pub fn take(&self, out: &mut [u64]) -> Result<(), Error> {
        if out.len() < self.words() {
            return Err(Error::BitmapSize);
        }
        for (out, word) in out.iter_mut().zip(&self.inner.words) {
            // Most words are clean: leave their cache lines to the others.
            if word.load(Ordering::Relaxed) != 0 {
                *out |= word.swap(0, Ordering::SeqCst);
            }
        }
        Ok(())
    }

    /// ORs words `first..` into `out` and leaves them as they are.
    pub(crate) fn image(&self, first: usize, out: &mut [u64]) {
        let words = self.inner.words.get(first..).unwrap_or_default();
        for (out, word) in out.iter_mut().zip(words) {
            *out |= word.load(Ordering::SeqCst);
        }
    }

    /// Clears the bits that are set in `gone` in words `first..`. Copy their
    /// pages after this call: a mark made since `image` is cleared too.
    pub(crate) fn clear(&self, first: usize, gone: &[u64]) {
        let words = self.inner.words.get(first..).unwrap_or_default();
        for (gone, word) in gone.iter().zip(words) {
            if *gone != 0 {
                word.fetch_and(!gone, Ordering::SeqCst);
            }
        }
    }

    /// Clears every bit.
    pub fn reset(&self) {
        for word in &self.inner.words {
            if word.load(Ordering::Relaxed) != 0 {
                word.swap(0, Ordering::SeqCst);
            }
        }
    }

    /// Ends the bits: from now on each mark is refused. A take made after this
    /// call has every mark that was not.
    pub fn close(&self) {
        // A mark sets its bit first and looks here second; a take comes after
        // this. In the one order of all these operations a mark that still
        // finds `false` has its bit set before the take.
        self.inner.closed.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst); // a take looks at words by relaxed loads first
    }
}

impl fmt::Debug for DirtyBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBits")
            .field("len", &self.len())
            .field("pgsize", &self.pgsize().bytes())
            .finish_non_exhaustive()
    }
}

impl Default for DirtyBits {
    /// Bits for no memory.
    fn default() -> Self {
        let inner = Inner {
            words: Box::default(),
            len: 0,
            pgsize: BASE_PAGE,
            closed: AtomicBool::new(false),
        };
        DirtyBits {
            inner: Arc::new(inner),
        }
    }
}

/// The page that guest memory is tracked in: 4 KiB, as KVM's log.
pub(crate) const BASE_PAGE: PageSize = match PageSize::new(4096) {
    Some(pgsize) => pgsize,
    None => unreachable!(),
};
