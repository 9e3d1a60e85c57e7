// SPDX-License-Identifier: MIT OR Apache-2.0
//! Walks over the bits that are set in words, and over runs of them.
#![allow(clippy::arithmetic_side_effects)] // bit numbers stay far below 2^63

use core::ops::Range;

use crate::bits;

/// The numbers of the bits that are set in `words`, ascending: bit k is bit
/// k % 64 of word k / 64.
///
/// ```
/// let report = [0b110, 1 << 63];
/// assert!(dirty_core::pages(&report).eq([1, 2, 127]));
/// ```
pub fn pages(words: &[u64]) -> impl Iterator<Item = u64> + '_ {
    Pages::new(numbered(words))
}

/// The runs of bits that are set in `words`, ascending. No run ends where the
/// next one starts.
///
/// ```
/// let report = [1 << 63 | 0b110, 1];
/// assert!(dirty_core::runs(&report).eq([1..3, 63..65]));
/// ```
pub fn runs(words: &[u64]) -> impl Iterator<Item = Range<u64>> + '_ {
    Runs::new(Turns::new(words))
}

/// The parts of the runs in `words` that lie in `among`.
pub(crate) fn runs_among(
    words: &[u64],
    among: Range<u64>,
) -> impl Iterator<Item = Range<u64>> + '_ {
    let start = bits::word(among.start).min(words.len());
    let end = bits::word(among.end.saturating_add(63)).min(words.len());
    let skipped = start as u64 * 64;
    runs(words.get(start..end).unwrap_or_default())
        .map(move |run| run.start + skipped..run.end + skipped)
        .map(move |run| run.start.max(among.start)..run.end.min(among.end))
        .filter(|run| !run.is_empty())
}

/// The words that are not 0.
fn numbered(words: &[u64]) -> impl Iterator<Item = Part> + '_ {
    let words = (0..).step_by(64).zip(words.iter());
    let words = words.filter(|(_, word)| **word != 0);
    words.map(|(first, word)| Part {
        bits: first..first + 64,
        word: *word,
    })
}

/// A part of a walk. Parts come in ascending order, and the bits between them are
/// clear.
pub(crate) struct Part {
    /// The numbers of its bits: at least 64.
    pub(crate) bits: Range<u64>,
    /// The first 64 of them. Those behind are as the last of these.
    pub(crate) word: u64,
}

/// The words that a walk over runs has to look at: those with a bit that is not as
/// the bit before it, and the first word of each chunk. In long runs and gaps, they
/// are few.
struct Turns<'a> {
    words: &'a [u64],
    /// At least one word, and at most 64.
    chunk: Range<usize>,
    /// A bit for each word of the chunk that is left.
    left: u64,
}

impl<'a> Turns<'a> {
    /// The first chunk is one word, which has none before it.
    fn new(words: &'a [u64]) -> Self {
        Turns {
            words,
            chunk: 0..1,
            left: words.len().min(1) as u64,
        }
    }

    /// Goes to the next chunk, if there is one.
    #[inline]
    fn enter_chunk(&mut self) -> Option<()> {
        let start = self.chunk.end;
        let words = self.words.get(start..).filter(|words| !words.is_empty())?;
        let words = words.get(..64).unwrap_or(words);
        let before = self.words.get(start - 1..)?;
        self.chunk = start..start + words.len();
        self.left = 1;
        // In sparse words, most chunks have no more than that one: 0.5 x the time.
        let same = filled(*before.first()?);
        if words.iter().fold(0, |any, word| any | (word ^ same)) != 0 {
            let words = words.iter().zip(before).rev();
            self.left |= words.fold(0, |left, (word, before)| {
                left << 1 | u64::from(*word != filled(*before))
            });
        }
        Some(())
    }
}

/// The word whose bits are all as the last one of `word`.
const fn filled(word: u64) -> u64 {
    (word as i64 >> 63) as u64
}

impl Iterator for Turns<'_> {
    type Item = Part;

    #[inline]
    fn next(&mut self) -> Option<Part> {
        if self.left == 0 {
            self.enter_chunk()?;
        }
        let at = self.chunk.start + self.left.trailing_zeros() as usize;
        self.left &= self.left - 1;
        let next = match self.left {
            0 => self.chunk.end,
            left => self.chunk.start + left.trailing_zeros() as usize,
        };
        Some(Part {
            bits: at as u64 * 64..next as u64 * 64,
            word: self.words.get(at).copied().unwrap_or(0),
        })
    }
}

/// The bits that are set, in ascending order.
pub(crate) struct Pages<I> {
    parts: I,
    /// Bits left of a run.
    run: Range<u64>,
    /// Bits left of the word whose first bit is `first`. INVARIANT: none if there
    /// is a run.
    left: u64,
    first: u64,
}

impl<I: Iterator<Item = Part>> Pages<I> {
    /// Of parts that have more than 64 bits only if all of them are set.
    pub(crate) fn new(parts: I) -> Self {
        Pages {
            parts,
            run: 0..0,
            left: 0,
            first: 0,
        }
    }
}

impl<I: Iterator<Item = Part>> Iterator for Pages<I> {
    type Item = u64;

    #[inline]
    fn next(&mut self) -> Option<u64> {
        while self.left == 0 {
            if let Some(bit) = self.run.next() {
                return Some(bit);
            }
            let Part { bits, word } = self.parts.next()?;
            match word {
                u64::MAX => self.run = bits,
                word => (self.first, self.left) = (bits.start, word),
            }
        }
        let bit = u64::from(self.left.trailing_zeros());
        self.left &= self.left - 1;
        Some(self.first + bit)
    }

    /// Counts words at once.
    #[inline]
    fn count(self) -> usize {
        let left = (self.run.end - self.run.start) as usize + self.left.count_ones() as usize;
        self.parts.fold(left, |n, Part { bits, word }| match word {
            u64::MAX => n + (bits.end - bits.start) as usize,
            word => n + word.count_ones() as usize,
        })
    }

    /// A word of all ones is one range: 0.4 x the time where most bits are set.
    /// The bits of a word with four in a row are counted first, so that the
    /// processor knows early where the loop ends: 0.75 x the time where half the
    /// bits are set. Where few are, counting takes longer than it saves.
    #[inline]
    fn fold<B, F: FnMut(B, u64) -> B>(self, init: B, mut f: F) -> B {
        let mut step = |mut all, Part { bits, mut word }| {
            let pairs = word & word >> 1;
            // A word of one bit needs no second look.
            if word & word.wrapping_sub(1) != 0 && pairs & pairs >> 2 != 0 {
                if word == !0 {
                    return bits.fold(all, &mut f);
                }
                for _ in 0..word.count_ones() {
                    all = f(all, bits.start + u64::from(word.trailing_zeros()));
                    word &= word.wrapping_sub(1);
                }
                return all;
            }
            while word != 0 {
                all = f(all, bits.start + u64::from(word.trailing_zeros()));
                word &= word - 1;
            }
            all
        };
        let left = match self.left {
            0 => Part {
                bits: self.run,
                word: !0,
            },
            word => Part {
                bits: self.first..self.first + 64,
                word,
            },
        };
        let all = step(init, left);
        self.parts.fold(all, step)
    }
}

/// The runs of bits that are set.
pub(crate) struct Runs<I> {
    parts: I,
    /// A part of which the bits that were walked over are cleared.
    left: Part,
}

impl<I: Iterator<Item = Part>> Runs<I> {
    pub(crate) fn new(parts: I) -> Self {
        let left = Part {
            bits: 0..0,
            word: 0,
        };
        Runs { parts, left }
    }
}

impl<I: Iterator<Item = Part>> Iterator for Runs<I> {
    type Item = Range<u64>;

    #[inline]
    fn next(&mut self) -> Option<Range<u64>> {
        let mut run = 0..0; // may go on in the next part, or none
        loop {
            let Part { bits, word } = &mut self.left;
            if *word != 0 {
                let start = bits.start + u64::from(word.trailing_zeros());
                if run.is_empty() {
                    run.start = start;
                } else if run.end != start {
                    return Some(run);
                }
                // Ones up to the end of the run, and below its start.
                let ones = *word | (*word - 1);
                *word &= ones.wrapping_add(1);
                if ones != !0 {
                    run.end = bits.start + u64::from(ones.trailing_ones());
                    return Some(run);
                }
                run.end = bits.end;
            }
            match self.parts.next() {
                Some(part) => self.left = part,
                None => return (!run.is_empty()).then_some(run),
            }
        }
    }

    /// Counts the starts of a word at once.
    #[inline]
    fn count(self) -> usize {
        let (mut open, mut end) = (0, 0);
        let mut starts = |n, Part { bits, word }: Part| {
            let before = word << 1 | if end == bits.start { open } else { 0 };
            (open, end) = (word >> 63, bits.end);
            n + (word & !before).count_ones() as usize
        };
        let n = starts(0, self.left);
        self.parts.fold(n, starts)
    }

    /// Starts and ends are the bits that are not as the one before them. They
    /// alternate, so one loop over the ends of a word takes a start with each.
    #[inline]
    fn fold<B, F: FnMut(B, Range<u64>) -> B>(self, init: B, mut f: F) -> B {
        // Whether (0 or 1) a run from `start` on may go on at `end`. If not, `end`
        // means nothing.
        let (mut open, mut start, mut end) = (0, 0, 0);
        let mut step = |mut all, Part { bits, word }: Part| {
            if open != 0 && end != bits.start {
                all = f(all, start..end);
                open = 0;
            }
            let before = word << 1 | open;
            let (mut starts, mut ends) = (word & !before, !word & before);
            // Takes the lowest bit. There may be no start after the last end; the
            // number is not used then.
            let take = |left: &mut u64| {
                let bit = bits.start + u64::from(left.trailing_zeros());
                *left &= left.wrapping_sub(1);
                bit
            };
            if open == 0 {
                start = take(&mut starts);
            }
            while ends != 0 {
                all = f(all, start..take(&mut ends));
                start = take(&mut starts);
            }
            (open, end) = (word >> 63, bits.end);
            all
        };
        let all = step(init, self.left);
        let all = self.parts.fold(all, step);
        match open {
            0 => all,
            _ => f(all, start..end),
        }
    }
}
