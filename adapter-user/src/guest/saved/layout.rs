// SPDX-License-Identifier: MIT OR Apache-2.0
//! The bytes of a saved tracker. docs/live-upgrade.md describes them for others.
//!
//! They are 64-bit words, little-endian. Whatever the bytes are, [`Saved::parse`] does
//! not panic, and what it allocates is in proportion to the bytes that it has read.

use dirty_core::PageSize;

use super::error::RestoreError;
use crate::dirty_bits::{DirtyBits, BASE_PAGE};
use crate::error::TrackError;
use crate::guest::slots::Slot;

/// The first word: "vfdirty" and a zero.
const MAGIC: u64 = u64::from_le_bytes(*b"vfdirty\0");
/// The second word. It changes with every change of the format.
const VERSION: u64 = 1;
/// How many words come before the checksum: magic, version, length.
const BEFORE_CHECKSUM: usize = 3;
const CHECKSUM: usize = BEFORE_CHECKSUM * 8;

/// The most bytes that a saved tracker has beside the slots' bitmaps.
const MOST_BESIDE: u64 = 16 << 20;
/// How many mappings are saved, of all views together, and how many parts they have.
pub(super) const MOST_MAPPINGS: usize = 1 << 17;
pub(super) const MOST_PARTS: usize = 1 << 18;

/// A tracker that was on. A slot is named by its place in `slots`, and a view by its
/// place in `views`.
#[derive(Debug, Default)]
pub(super) struct Saved<'a> {
    pub(super) slots: Vec<SavedSlot<'a>>,
    /// Where slots were before they moved.
    pub(super) departed: Vec<Departed>,
    pub(super) sources: Vec<SavedSource<'a>>,
    /// The mappings that a log may report, of each view that has a log.
    pub(super) views: Vec<Vec<SavedMapping>>,
}

#[derive(Debug)]
pub(super) struct SavedSlot<'a> {
    pub(super) id: u32,
    pub(super) gpa: u64,
    pub(super) size: u64,
    pub(super) pgsize: PageSize,
    /// A multiple of 8 bytes.
    words: &'a [u8],
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Departed {
    pub(super) slot: usize,
    pub(super) gpa: u64,
    /// Not more than the slot has.
    pub(super) size: u64,
}

/// A mapping. Neither its IOVAs nor its guest addresses wrap, and it is not empty.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SavedMapping {
    pub(super) iova: u64,
    pub(super) gpa: u64,
    pub(super) size: u64,
    /// Ascending and disjoint, inside the mapping and inside the slots.
    pub(super) parts: Vec<SavedPart>,
}

/// The bytes `first` to `last` of a mapping are those of a slot from `at` on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SavedPart {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) slot: usize,
    pub(super) at: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct SavedSource<'a> {
    pub(super) name: &'a str,
    /// The view of a log by IOVA.
    pub(super) view: Option<usize>,
}

impl SavedSlot<'_> {
    /// The dirty bits.
    pub(super) fn words(&self) -> impl Iterator<Item = u64> + '_ {
        let words = self.words.chunks_exact(8);
        words.map(|word| word.try_into().map_or(0, u64::from_le_bytes)) // it has 8 bytes
    }
}

/// Writes a saved tracker.
pub(super) struct Writer(Vec<u8>);

impl Writer {
    /// Begins a saved tracker that is on or off.
    pub(super) fn new(on: bool) -> Writer {
        let mut out = Writer(Vec::new());
        for word in [MAGIC, VERSION, 0, 0, u64::from(on)] {
            out.word(word);
        }
        out
    }

    pub(super) fn word(&mut self, word: u64) {
        self.0.extend_from_slice(&word.to_le_bytes());
    }

    /// The number of the slots, mappings, parts or sources that come now.
    pub(super) fn count(&mut self, n: usize) {
        self.word(n as u64);
    }

    /// Makes room for bitmaps of so many bytes, and for the rest.
    pub(super) fn reserve(&mut self, bitmaps: u64) -> Result<(), TrackError> {
        let wanted = bitmaps.saturating_add(MOST_BESIDE);
        let room = usize::try_from(wanted).ok();
        let room = room.and_then(|room| self.0.try_reserve_exact(room).ok());
        room.ok_or(TrackError::NoMemory { wanted })
    }

    pub(super) fn slot(&mut self, slot: &Slot, words: &[u64]) {
        let pgsize = slot.bits.pgsize().bytes();
        for word in [u64::from(slot.id), slot.gpa, slot.size, pgsize] {
            self.word(word);
        }
        words.iter().for_each(|word| self.word(*word));
    }

    pub(super) fn departed(&mut self, Departed { slot, gpa, size }: &Departed) {
        self.count(*slot);
        self.word(*gpa);
        self.word(*size);
    }

    pub(super) fn mapping(&mut self, mapping: &SavedMapping) {
        for word in [mapping.iova, mapping.gpa, mapping.size] {
            self.word(word);
        }
        self.count(mapping.parts.len());
        for part in &mapping.parts {
            self.word(part.first);
            self.word(part.last);
            self.count(part.slot);
            self.word(part.at);
        }
    }

    pub(super) fn source(&mut self, source: &SavedSource<'_>) {
        self.count(source.view.map_or(0, |view| view + 1));
        self.count(source.name.len());
        self.0.extend_from_slice(source.name.as_bytes());
        self.0.resize(self.0.len().next_multiple_of(8), 0);
    }

    /// Fills in the length and the checksum. Fails if there is more beside bitmaps of so
    /// many bytes than may be.
    pub(super) fn finish(self, bitmaps: u64) -> Result<Vec<u8>, TrackError> {
        let mut bytes = self.0;
        bytes.shrink_to_fit();
        let wanted = bytes.len() as u64;
        if wanted > bitmaps.saturating_add(MOST_BESIDE) {
            return Err(TrackError::NoMemory { wanted });
        }
        let length = bytes.len() as u64;
        put(&mut bytes, CHECKSUM - 8, length);
        let sum = checksum(&bytes);
        put(&mut bytes, CHECKSUM, sum);
        Ok(bytes)
    }
}

fn put(bytes: &mut [u8], at: usize, word: u64) {
    if let Some(place) = bytes.get_mut(at..at + 8) {
        place.copy_from_slice(&word.to_le_bytes());
    }
}

/// The checksum of all words but its own. Each step maps different words to different
/// sums, and different sums to different sums. So a change inside one word is always
/// seen, and others by chance of all but one in 2^64. It is no defence against somebody
/// who wants another sum.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks(8).enumerate();
    let others = words.filter(|(at, _)| *at != BEFORE_CHECKSUM);
    others.fold(0x9e37_79b9_7f4a_7c15, |sum, (_, word)| {
        let mut whole = [0; 8];
        whole.iter_mut().zip(word).for_each(|(a, b)| *a = *b);
        let mixed = (sum ^ u64::from_le_bytes(whole)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        mixed.rotate_left(29)
    })
}

impl<'a> Saved<'a> {
    /// Reads a saved tracker, or `None` if it was off. `bitmaps` is how many bytes the
    /// bitmaps take of the slots that it is for.
    pub(super) fn parse(bytes: &'a [u8], bitmaps: u64) -> Result<Option<Self>, RestoreError> {
        let mut words = Reader(bytes);
        if words.word()? != MAGIC {
            return Err(RestoreError::Damaged);
        }
        match words.word()? {
            VERSION => {}
            found => return Err(RestoreError::Version { found }),
        }
        let length = bytes.len() as u64;
        let too_long = length > bitmaps.saturating_add(MOST_BESIDE);
        if words.word()? != length || length % 8 != 0 || too_long {
            return Err(RestoreError::Damaged);
        }
        if words.word()? != checksum(bytes) {
            return Err(RestoreError::Damaged);
        }
        let saved = match words.word()? {
            0 => None,
            1 => Some(Self::read(&mut words)?),
            _ => return Err(RestoreError::Damaged),
        };
        match words.0.is_empty() {
            true => Ok(saved),
            false => Err(RestoreError::Damaged),
        }
    }

    fn read(words: &mut Reader<'a>) -> Result<Self, RestoreError> {
        let mut saved = Saved::default();
        for _ in 0..words.count(4)? {
            saved.slots.push(words.slot()?);
        }
        for _ in 0..words.count(3)? {
            let departed = words.departed(&saved.slots)?;
            saved.departed.push(departed);
        }
        let sources = words.count(2)?;
        for _ in 0..sources {
            saved.sources.push(words.source(sources)?);
        }
        // Each view is that of a source.
        let views = words.count(1)?;
        let known = |source: &SavedSource<'_>| source.view.is_none_or(|view| view < views);
        if views > sources || !saved.sources.iter().all(known) {
            return Err(RestoreError::Damaged);
        }
        let mut left = (MOST_MAPPINGS, MOST_PARTS);
        for _ in 0..views {
            let n = words.count(4)?;
            left.0 = left.0.checked_sub(n).ok_or(RestoreError::Damaged)?;
            let mut view = Vec::new();
            for _ in 0..n {
                let mapping = words.mapping(&saved.slots)?;
                let parts = left.1.checked_sub(mapping.parts.len());
                left.1 = parts.ok_or(RestoreError::Damaged)?;
                view.push(mapping);
            }
            saved.views.push(view);
        }
        Ok(saved)
    }
}

/// What is still to be read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: u64) -> Result<&'a [u8], RestoreError> {
        let n = usize::try_from(n).map_err(|_| RestoreError::Damaged)?;
        let (bytes, rest) = self.0.split_at_checked(n).ok_or(RestoreError::Damaged)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn word(&mut self) -> Result<u64, RestoreError> {
        let word = self.bytes(8)?.try_into();
        word.map(u64::from_le_bytes)
            .map_err(|_| RestoreError::Damaged)
    }

    /// A number of things that take at least `words` words each, all of which must be
    /// there.
    fn count(&mut self, words: u64) -> Result<usize, RestoreError> {
        let n = self.word()?;
        let bytes = n.checked_mul(words * 8).ok_or(RestoreError::Damaged)?;
        match bytes <= self.0.len() as u64 {
            true => Ok(n as usize),
            false => Err(RestoreError::Damaged),
        }
    }

    /// The place of one of `n` things.
    fn place(&mut self, n: usize) -> Result<usize, RestoreError> {
        let place = usize::try_from(self.word()?).ok();
        place.filter(|at| *at < n).ok_or(RestoreError::Damaged)
    }

    fn slot(&mut self) -> Result<SavedSlot<'a>, RestoreError> {
        let id = u32::try_from(self.word()?).map_err(|_| RestoreError::Damaged)?;
        let (gpa, size) = (self.word()?, self.word()?);
        let pgsize = PageSize::new(self.word()?).ok_or(RestoreError::Damaged)?;
        let words = self.bytes(DirtyBits::bytes(size, pgsize))?;
        Ok(SavedSlot {
            id,
            gpa,
            size,
            pgsize,
            words,
        })
    }

    fn departed(&mut self, slots: &[SavedSlot<'_>]) -> Result<Departed, RestoreError> {
        let slot = self.place(slots.len())?;
        let (gpa, size) = (self.word()?, self.word()?);
        let fits = size <= slots[slot].size;
        match size.checked_sub(1).and_then(|more| gpa.checked_add(more)) {
            Some(_) if fits => Ok(Departed { slot, gpa, size }),
            _ => Err(RestoreError::Damaged),
        }
    }

    fn mapping(&mut self, slots: &[SavedSlot<'_>]) -> Result<SavedMapping, RestoreError> {
        let (iova, gpa, size) = (self.word()?, self.word()?, self.word()?);
        let more = size.checked_sub(1).filter(|more| {
            let fits = iova.checked_add(*more).and(gpa.checked_add(*more));
            fits.is_some() && BASE_PAGE.aligns(iova | gpa | size)
        });
        let more = more.ok_or(RestoreError::Damaged)?;
        let mut parts = Vec::new();
        let mut next = Some(0); // the first byte that the next part may have
        for _ in 0..self.count(4)? {
            let (first, last) = (self.word()?, self.word()?);
            let slot = self.place(slots.len())?;
            let at = self.word()?;
            let inside = next.is_some_and(|next| next <= first) && first <= last && last <= more;
            let end = last.checked_sub(first).and_then(|len| at.checked_add(len));
            if !inside || end.is_none_or(|end| end >= slots[slot].size) {
                return Err(RestoreError::Damaged);
            }
            next = last.checked_add(1);
            parts.push(SavedPart {
                first,
                last,
                slot,
                at,
            });
        }
        Ok(SavedMapping {
            iova,
            gpa,
            size,
            parts,
        })
    }

    fn source(&mut self, views: usize) -> Result<SavedSource<'a>, RestoreError> {
        let view = self.place(views.saturating_add(1))?.checked_sub(1);
        let length = self.word()?;
        let padded = length.checked_next_multiple_of(8);
        let bytes = self.bytes(padded.ok_or(RestoreError::Damaged)?)?;
        // It has `length` bytes and then fewer than 8.
        let name = bytes.get(..length as usize).map(std::str::from_utf8);
        match name {
            Some(Ok(name)) => Ok(SavedSource { name, view }),
            _ => Err(RestoreError::Damaged),
        }
    }
}
