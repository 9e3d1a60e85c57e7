// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty bits that some threads set while another takes them, without a lock.
//!
//! No write is lost as long as four steps keep their order: write, mark, take,
//! copy. A mark is an atomic OR with release order, and a take is an atomic swap
//! or AND with acquire order. So a take that finds a mark also sees the write
//! that came before the mark, and a copy made after the take has that write. A
//! mark that comes too late for one take is in the next one.
//!
//! Bits that a tracker owns are off while the tracker is: a mark costs one relaxed
//! load then. [`start`] says why no write is lost when they go on.

mod words;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use dirty_core::{Error, PageSize};

use self::words::{zeroed, Words};
use crate::atomic::{available, fence, heavy, light, AtomicU64, Ordering};
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
/// New bits are on. Once they belong to a slot of a
/// [`Tracker`](crate::guest::Tracker), they are on while the tracker is, and off
/// otherwise: then a mark does nothing and returns `Ok`.
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
    /// INVARIANT: there are at least as many words as the pages of `len` bytes
    /// need, and no bit beyond the last page is set.
    words: Words,
    /// Only ever grows.
    len: AtomicU64,
    pgsize: PageSize,
    /// [`ON`], [`OFF`] or [`CLOSED`].
    state: AtomicU64,
    /// The number of the tracker that has these bits in a slot, or 0.
    owner: AtomicU64,
    /// Held while the words grow.
    growing: Mutex<()>,
}

/// Marks are taken.
const ON: u64 = 0;
/// Marks do nothing.
const OFF: u64 = 1;
/// Marks are taken, and refused: perhaps nobody asks for them any more.
const CLOSED: u64 = 2;

impl DirtyBits {
    /// Creates clean bits for `len` bytes of memory, one bit per page of `pgsize`.
    ///
    /// # Errors
    ///
    /// [`TrackError::NoMemory`] if the allocator has no room for the bits.
    pub fn new(len: u64, pgsize: PageSize) -> Result<Self, TrackError> {
        let words = zeroed(Self::bytes(len, pgsize) / 8)?;
        Ok(Self::from_words(words, len, pgsize))
    }

    /// Creates bits whose words the caller allocated: exactly as many as `len`
    /// bytes need, and all zero.
    pub(crate) fn from_words(words: Box<[AtomicU64]>, len: u64, pgsize: PageSize) -> Self {
        DirtyBits {
            inner: Arc::new(Inner {
                words: Words::new(words),
                len: AtomicU64::new(len),
                pgsize,
                state: AtomicU64::new(ON),
                owner: AtomicU64::new(0),
                growing: Mutex::default(),
            }),
        }
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
        self.inner.len.load(Ordering::Acquire)
    }

    /// Returns whether the bits stand for no memory at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
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
        (Self::bytes(self.len(), self.pgsize()) / 8) as usize
    }

    /// Returns whether both are handles to the same bits.
    #[must_use]
    pub fn same(&self, other: &DirtyBits) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// What distinguishes these bits from all others that exist.
    pub(crate) fn key(&self) -> usize {
        Arc::as_ptr(&self.inner).cast::<()>() as usize
    }

    /// Lets the bits stand for `len` bytes of memory, which are not fewer than
    /// before. The new pages are clean, and every handle has them.
    ///
    /// The bits of a slot grow with
    /// [`Tracker::grow_slot`](crate::guest::Tracker::grow_slot).
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`TrackError::BitsInUse`] if the bits belong to a slot.
    /// - [`TrackError::Shrinks`] if `len` is less than before.
    /// - [`TrackError::NoMemory`].
    pub fn grow(&self, len: u64) -> Result<(), TrackError> {
        match self.inner.owner.load(Ordering::SeqCst) {
            0 => self.grow_owned(len),
            _ => Err(TrackError::BitsInUse),
        }
    }

    /// As [`grow`](DirtyBits::grow), for the tracker that has the bits.
    pub(crate) fn grow_owned(&self, len: u64) -> Result<(), TrackError> {
        let growing = self.inner.growing.lock();
        let _growing = growing.unwrap_or_else(PoisonError::into_inner);
        if len < self.len() {
            return Err(TrackError::Shrinks);
        }
        self.inner.words.grow(Self::bytes(len, self.pgsize()) / 8)?;
        // Whoever loads this length sees the words.
        self.inner.len.store(len, Ordering::SeqCst);
        Ok(())
    }

    /// Marks as dirty every page that the `len` bytes at `offset` touch. `offset`
    /// counts bytes from the start of the memory; no bytes mark nothing.
    ///
    /// Call it *after* the write, and before you tell anybody that the write is
    /// done.
    ///
    /// # Errors
    ///
    /// None while the bits are off. In this order; the pages inside the memory are
    /// marked in any case:
    ///
    /// - [`Error::NotTracking`] after [`close`](DirtyBits::close): perhaps no take
    ///   reports this mark.
    /// - [`Error::Unmapped`] if some of the bytes are beyond the end of the memory.
    #[inline]
    pub fn mark(&self, offset: u64, len: u64) -> Result<(), Error> {
        match self.is_off() {
            true => Ok(()),
            false => self.mark_on(offset, len),
        }
    }

    /// Whether a mark of what was written before this call may be left out.
    #[inline]
    pub(crate) fn is_off(&self) -> bool {
        // The write comes before the load: see `start`.
        light();
        self.inner.state.load(Ordering::Relaxed) == OFF
    }

    fn mark_on(&self, offset: u64, len: u64) -> Result<(), Error> {
        let Some(more) = len.checked_sub(1) else {
            return Ok(());
        };
        let (end, pgsize) = (self.len(), self.pgsize());
        let last = offset.saturating_add(more);
        if offset < end {
            let last = last.min(end - 1);
            self.inner
                .words
                .set(pgsize.pages(offset), pgsize.pages(last));
        }
        // This load must come after the bits are set: see `close`.
        if self.inner.state.load(Ordering::SeqCst) == CLOSED {
            return Err(Error::NotTracking);
        }
        match last < end {
            true => Ok(()),
            false => Err(Error::Unmapped),
        }
    }

    /// Marks the pages whose bits are set in `words`: bit k % 64 of word k / 64 is
    /// page k, as in [`take`](DirtyBits::take). Bits beyond the last page are
    /// ignored.
    ///
    /// It takes in a log that ends between two takes, such as KVM's of a slot that
    /// is about to be deleted. KVM's log has pages of the host's size:
    /// [`normalise`](crate::normalise) gives bits of this size.
    ///
    /// # Errors
    ///
    /// In this order; nothing is marked then:
    ///
    /// - [`Error::BitmapSize`] unless `words` has as many words as the pages need: the
    ///   bits are of other memory, or of another page size.
    /// - [`Error::NotTracking`] as [`mark`](DirtyBits::mark).
    pub fn mark_bitmap(&self, words: &[u64]) -> Result<(), Error> {
        match words.len() as u64 == self.npages().div_ceil(64) {
            true => self.mark_words(words),
            false => Err(Error::BitmapSize),
        }
    }

    /// As [`mark_bitmap`](DirtyBits::mark_bitmap), for the first pages only if there are
    /// fewer words.
    pub(crate) fn mark_words(&self, words: &[u64]) -> Result<(), Error> {
        if self.is_off() {
            return Ok(());
        }
        let npages = self.npages();
        self.inner
            .words
            .zip(0, (0..).zip(words), |word, (at, more)| {
                let more = match npages.saturating_sub(at * 64) {
                    rest @ 0..64 => more & ((1 << rest) - 1),
                    _ => *more,
                };
                if more != 0 {
                    word.fetch_or(more, Ordering::SeqCst);
                }
            });
        match self.inner.state.load(Ordering::SeqCst) {
            CLOSED => Err(Error::NotTracking),
            _ => Ok(()),
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
        self.take_counting(out).map(drop)
    }

    /// As [`take`](DirtyBits::take), and returns how many pages it has taken.
    pub(crate) fn take_counting(&self, out: &mut [u64]) -> Result<u64, Error> {
        if out.len() < self.words() {
            return Err(Error::BitmapSize);
        }
        let mut npages = 0;
        self.inner.words.zip(0, out.iter_mut(), |word, out| {
            // Most words are clean. A load leaves their cache lines shared, where
            // a swap would take them from the threads that mark.
            if word.load(Ordering::Relaxed) != 0 {
                let taken = word.swap(0, Ordering::SeqCst);
                npages += u64::from(taken.count_ones());
                *out |= taken;
            }
        });
        Ok(npages)
    }

    /// ORs the dirty pages into `out`, and leaves them dirty here. The format is
    /// that of [`take`](DirtyBits::take).
    ///
    /// It makes a round in two steps, as KVM's manual clear does: read all pages,
    /// then [`discard`](DirtyBits::discard) a few at a time, each before its copy.
    ///
    /// # Errors
    ///
    /// [`Error::BitmapSize`] as [`take`](DirtyBits::take).
    pub fn read(&self, out: &mut [u64]) -> Result<(), Error> {
        if out.len() < self.words() {
            return Err(Error::BitmapSize);
        }
        self.peek(0, out);
        Ok(())
    }

    /// Makes clean every page that lies wholly in the `len` bytes at `offset`; the
    /// end of the memory ends its last page. Pages of which only a part is in the
    /// range stay as they are.
    ///
    /// A mark that came before this call is forgotten, one that comes after it
    /// stays, and one at the same time does either. So:
    ///
    /// - A page that you copy is copied *after* this call.
    /// - A page that the guest gave away (balloon, free-page hint, virtio-mem) is
    ///   discarded *before* the guest is told that it may use the page again.
    pub fn discard(&self, offset: u64, len: u64) {
        if let Some((first, last)) = self.whole_pages(offset, len) {
            self.inner.words.clear(first, last);
        }
    }

    /// As [`discard`](DirtyBits::discard), for the pages whose bits are set in
    /// `words`: bit k % 64 of word k / 64 is page k.
    pub fn discard_bitmap(&self, words: &[u64]) {
        self.clear(0, words);
    }

    /// The first and the last page that lie wholly in the `len` bytes at `offset`.
    pub(crate) fn whole_pages(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let pgsize = self.pgsize();
        let end = offset.saturating_add(len);
        let first = offset.div_ceil(pgsize.bytes());
        let end = match end >= self.len() {
            true => self.npages(),
            false => pgsize.pages(end),
        };
        let last = end.checked_sub(1)?;
        (first <= last).then_some((first, last))
    }

    /// ORs the words from word `first` on into `out`, as many as `out` has, and
    /// clears nothing.
    pub(crate) fn peek(&self, first: usize, out: &mut [u64]) {
        self.inner.words.zip(first, out.iter_mut(), |word, out| {
            *out |= word.load(Ordering::SeqCst);
        });
    }

    /// Clears, from word `first` on, the bits that are set in `reported`. Copy
    /// their pages after this call: it also clears a mark made since `peek`.
    pub(crate) fn clear(&self, first: usize, reported: &[u64]) {
        self.inner
            .words
            .zip(first, reported.iter(), |word, reported| {
                if *reported != 0 {
                    word.fetch_and(!reported, Ordering::SeqCst);
                }
            });
    }

    /// Clears every bit. What was marked so far is forgotten, so copy all of the
    /// memory after this call.
    pub fn reset(&self) {
        self.inner.words.zip(0, std::iter::repeat(()), |word, ()| {
            if word.load(Ordering::Relaxed) != 0 {
                word.swap(0, Ordering::SeqCst);
            }
        });
    }

    /// Ends the bits: every later mark is refused with
    /// [`Error::NotTracking`]. A take made after this call has every mark that
    /// returned `Ok` and that no earlier take had.
    pub fn close(&self) {
        // A mark sets its bit first and loads the state second, and the last take
        // comes after this store. All these operations have one total order. So a
        // mark that still loads `ON` has set its bit before the last take.
        self.inner.state.store(CLOSED, Ordering::SeqCst);
        // A take loads each word with relaxed order before it swaps. The fence
        // orders those loads after the store.
        fence(Ordering::SeqCst);
    }

    /// Makes the bits those of a slot of tracker `owner`, a number other than 0.
    /// Returns whether no slot had them.
    pub(crate) fn claim(&self, owner: u64) -> bool {
        let was = &self.inner.owner;
        was.compare_exchange(0, owner, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    /// Ends what [`claim`](DirtyBits::claim) began.
    pub(crate) fn disown(&self) {
        self.inner.owner.store(0, Ordering::SeqCst);
    }

    /// The number of the tracker that has the bits in a slot, or 0.
    pub(crate) fn owner(&self) -> u64 {
        self.inner.owner.load(Ordering::SeqCst)
    }

    /// Lets marks do nothing. Where they could not be switched on again without
    /// losing one, they stay on.
    pub(crate) fn turn_off(&self) {
        let state = if available() { OFF } else { ON };
        self.inner.state.store(state, Ordering::SeqCst);
    }
}

/// Lets all of `bits` take marks, and forgets what was marked so far if `forget`
/// is set. All memory that was written before must be copied after this call.
///
/// No write is lost, though a mark does not even have a fence while it is off. A
/// writer writes (W), then loads the state (L), with a light barrier between. This
/// function stores `ON` (S), has the heavy barrier, and whoever called it copies
/// (C). The two barriers are in one order, as two fences would be:
///
/// - If the writer's comes first, C sees W.
/// - If ours comes first, L sees S, so the write is marked. `forget` may clear that
///   mark, with a swap that acquires it, so C sees W; or the mark stays.
///
/// # Errors
///
/// [`TrackError::Barrier`]; those that were off are off then, and nothing is
/// forgotten.
pub(crate) fn start<'a>(
    bits: impl Iterator<Item = &'a DirtyBits> + Clone,
    forget: bool,
) -> Result<(), TrackError> {
    let mut were_off = Vec::new();
    for bits in bits.clone() {
        if bits.inner.state.swap(ON, Ordering::SeqCst) == OFF {
            were_off.push(bits);
        }
    }
    if !were_off.is_empty() {
        heavy().inspect_err(|_| were_off.iter().for_each(|bits| bits.turn_off()))?;
    }
    if forget {
        bits.for_each(DirtyBits::reset);
    }
    Ok(())
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
        // unreachable: no words need no memory
        DirtyBits::new(0, BASE_PAGE).unwrap_or_else(|cause| panic!("{cause}"))
    }
}

/// The page size that guest memory is tracked in, on every host: 4 KiB.
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
