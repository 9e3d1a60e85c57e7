// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty bits that some threads set while another takes them, without a lock.
//!
//! No write is lost as long as four steps keep their order: write, mark, take,
//! copy. A mark is an atomic OR with release order, and a take is an atomic swap
//! or AND with acquire order. So a take that finds a mark also sees the write
//! that came before the mark, and a copy made after the take has that write. A
//! mark that comes too late for one take is in the next one.

use std::fmt;
use std::sync::Arc;

use dirty_core::{Error, PageSize};

use crate::atomic::{fence, AtomicBool, AtomicU64, Ordering};
use crate::error::TrackError;

/// The dirty pages of a piece of memory: one bit per page.
///
/// Any number of threads may call any method at the same time; no method takes a
/// lock. A clone is another handle to the same bits.
///
/// Write to the memory first and [`mark`](DirtyBits::mark) it second;
/// [`take`](DirtyBits::take) the bits first and copy the pages second. After
/// [`close`](DirtyBits::close) every mark is refused, so each mark that returned
/// `Ok` is in a take made after the close, or in an earlier one.
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
    /// Bit k % 64 of word k / 64 stands for page k.
    ///
    /// INVARIANT: there are exactly as many words as the pages of `len` bytes
    /// need, and no bit beyond the last page is set.
    words: Box<[AtomicU64]>,
    len: u64,
    pgsize: PageSize,
    closed: AtomicBool,
}

impl DirtyBits {
    /// Creates clean bits for `len` bytes of memory, one bit per page of `pgsize`.
    ///
    /// # Errors
    ///
    /// [`TrackError::NoMemory`] if the allocator has no room for the bits.
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

    /// Returns how many bytes the bits for `len` bytes of memory take: whole words
    /// of 8 bytes.
    #[must_use]
    pub fn bytes(len: u64, pgsize: PageSize) -> u64 {
        len.div_ceil(pgsize.bytes()).div_ceil(64) * 8
    }

    /// Returns how many bytes of memory the bits stand for.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.inner.len
    }

    /// Returns whether the bits stand for no memory at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inner.len == 0
    }

    /// Returns the size of the page that one bit stands for.
    #[must_use]
    pub fn pgsize(&self) -> PageSize {
        self.inner.pgsize
    }

    /// Returns the number of pages. The end of the memory may cut the last one
    /// short.
    #[must_use]
    pub fn npages(&self) -> u64 {
        self.len().div_ceil(self.pgsize().bytes())
    }

    /// Returns the number of 64-bit words that hold the bits: the length of a
    /// buffer for [`take`](DirtyBits::take).
    #[must_use]
    pub fn words(&self) -> usize {
        self.inner.words.len()
    }

    /// Returns whether both are handles to the same bits.
    #[must_use]
    pub fn same(&self, other: &DirtyBits) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Marks as dirty every page that the `len` bytes at `offset` touch. `offset`
    /// counts bytes from the start of the memory; no bytes mark nothing.
    ///
    /// Call it *after* the write, and before you tell anybody that the write is
    /// done.
    ///
    /// # Errors
    ///
    /// In this order; the pages inside the memory are marked in any case:
    ///
    /// - [`Error::NotTracking`] after [`close`](DirtyBits::close): perhaps no take
    ///   reports this mark.
    /// - [`Error::Unmapped`] if some of the bytes are beyond the end of the memory.
    pub fn mark(&self, offset: u64, len: u64) -> Result<(), Error> {
        let Some(more) = len.checked_sub(1) else {
            return Ok(());
        };
        let (end, pgsize) = (self.len(), self.pgsize());
        let last = offset.saturating_add(more);
        if offset < end {
            self.set(pgsize.pages(offset), pgsize.pages(last.min(end - 1)));
        }
        // This load must come after the bits are set: see `close`.
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

    /// Returns whether the page that holds byte `offset` is dirty. Memory beyond
    /// the end is never dirty.
    #[must_use]
    pub fn is_dirty(&self, offset: u64) -> bool {
        let page = self.pgsize().pages(offset);
        let word = usize::try_from(page / 64).ok();
        let word = word.and_then(|at| self.inner.words.get(at));
        offset < self.len()
            && word.is_some_and(|w| w.load(Ordering::Acquire) >> (page % 64) & 1 != 0)
    }

    /// Takes the dirty pages: ORs them into `out` and clears them here. Bit k % 64
    /// of word k / 64 stands for page k; bits that `out` already has stay set.
    ///
    /// Copy the pages *after* this call.
    ///
    /// # Errors
    ///
    /// [`Error::BitmapSize`] if `out` has fewer than [`words`](DirtyBits::words)
    /// words; nothing is taken then.
    pub fn take(&self, out: &mut [u64]) -> Result<(), Error> {
        if out.len() < self.words() {
            return Err(Error::BitmapSize);
        }
        for (out, word) in out.iter_mut().zip(&self.inner.words) {
            // Most words are clean. A load leaves their cache lines shared, where
            // a swap would take them from the threads that mark.
            if word.load(Ordering::Relaxed) != 0 {
                *out |= word.swap(0, Ordering::SeqCst);
            }
        }
        Ok(())
    }

    /// ORs the words from word `first` on into `out`, as many as `out` has, and
    /// clears nothing.
    pub(crate) fn peek(&self, first: usize, out: &mut [u64]) {
        let words = self.inner.words.get(first..).unwrap_or_default();
        for (out, word) in out.iter_mut().zip(words) {
            *out |= word.load(Ordering::SeqCst);
        }
    }

    /// Clears, from word `first` on, the bits that are set in `reported`. Copy
    /// their pages after this call: it also clears a mark made since `peek`.
    pub(crate) fn clear(&self, first: usize, reported: &[u64]) {
        let words = self.inner.words.get(first..).unwrap_or_default();
        for (reported, word) in reported.iter().zip(words) {
            if *reported != 0 {
                word.fetch_and(!reported, Ordering::SeqCst);
            }
        }
    }

    /// Clears every bit. What was marked so far is forgotten, so copy all of the
    /// memory after this call.
    pub fn reset(&self) {
        for word in &self.inner.words {
            if word.load(Ordering::Relaxed) != 0 {
                word.swap(0, Ordering::SeqCst);
            }
        }
    }

    /// Ends the bits: every later mark is refused with
    /// [`Error::NotTracking`]. A take made after this call has every mark that
    /// returned `Ok` and that no earlier take had.
    pub fn close(&self) {
        // A mark sets its bit first and loads `closed` second, and the last take
        // comes after this store. All these operations have one total order. So a
        // mark that still loads `false` has set its bit before the last take.
        self.inner.closed.store(true, Ordering::SeqCst);
        // A take loads each word with relaxed order before it swaps. The fence
        // orders those loads after the store.
        fence(Ordering::SeqCst);
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
    /// Creates bits for no memory.
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

/// The page size that guest memory is tracked in: 4 KiB, as in KVM's log.
pub(crate) const BASE_PAGE: PageSize = match PageSize::new(4096) {
    Some(pgsize) => pgsize,
    None => unreachable!(),
};

/// Checks that a budget, of which bitmaps of `used` bytes are taken, has room for
/// `wanted` bytes more. `None` is a budget without limit.
pub(crate) fn check_budget(budget: Option<u64>, used: u64, wanted: u64) -> Result<(), TrackError> {
    let left = budget.unwrap_or(u64::MAX).saturating_sub(used);
    if wanted > left {
        return Err(TrackError::Budget { wanted, left });
    }
    Ok(())
}
