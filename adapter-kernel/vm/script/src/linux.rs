// SPDX-License-Identifier: GPL-2.0-only
//! Computes what the real driver answers: the model's answers, and exactly the bits
//! that its defects U1 and U8 add.
//!
//! For a report that driver shifts a mapping's bitmap in place to the mapping's bit in
//! the user's words, ORs the whole first user word into it, and copies it out. Then it
//! clears only as many bits as the mapping has pages. Bits beyond stay, and come back
//! in the next report.

use std::collections::BTreeMap;

use dirty_core::uapi::VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP;
use dirty_model::Naive;
use dirty_script::op::*;
use dirty_script::{Reply, System};

use crate::expected::Expected;

/// A mapping: first address and bytes.
type Range = (u64, u64);

/// The model, and the bits that the real driver's bitmaps have beyond the model's.
pub(crate) struct Linux {
    expected: Expected,
    stale: BTreeMap<Range, Vec<u64>>,
}

/// Shifts a bitmap up by `by` bits, 1 to 63.
fn shift_up(words: &mut [u64], by: u32) {
    let mut below = 0;
    for word in words {
        let shifted = *word << by | below >> (64 - by);
        below = std::mem::replace(word, shifted);
    }
}

impl Linux {
    pub(crate) fn new(entry_limit: u32) -> Self {
        Linux {
            expected: Expected::new(entry_limit),
            stale: BTreeMap::new(),
        }
    }

    /// Runs an operation; what a driver without defects answers, and the real one.
    pub(crate) fn step(&mut self, op: &Op) -> (Reply, Reply) {
        let report = match op {
            Op::Get(g) => Some((g.iova, g.size, g.bitmap)),
            Op::Unmap(u) if u.flags & VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP != 0 => {
                Some((u.iova, u.size, u.bitmap))
            }
            _ => None,
        };
        // Reports to other addresses are in the tables, whose differences are listed.
        let report = report.filter(|(_, _, b)| b.data == BUF);
        let before = report.map(|_| self.expected.model.clone());
        let ideal = self.expected.step(op);
        let mut real = ideal.clone();
        if let (Some((iova, size, bitmap)), Some(mut before)) = (report, before) {
            let words = match &mut real {
                Reply::Get(Ok(_), words) | Reply::Unmap(Ok(_), _, Some(words)) => Some(words),
                _ => None,
            };
            if let Some(shown) = words {
                let image = self.report(&mut before, iova, size, bitmap);
                for (word, real) in shown.words.iter_mut().zip(image) {
                    *word = real;
                }
            }
        }
        let mappings = self.expected.model.mappings();
        let tracking = self.expected.model.tracking().is_some();
        let fresh = matches!(op, Op::New(_));
        self.stale
            .retain(|range, _| tracking && !fresh && mappings.contains(range));
        (ideal, real)
    }

    /// The user's words after a report of the mappings that `before` has from
    /// `iova` on, `size` bytes.
    fn report(&mut self, before: &mut Naive, iova: u64, size: u64, bitmap: Bitmap) -> Vec<u64> {
        let fill = u64::from(bitmap.fill) * 0x0101_0101_0101_0101;
        let mut image = vec![fill; BUF_SIZE as usize / 8];
        let last = iova.wrapping_add(size).wrapping_sub(1);
        let pgsize = before.tracking().unwrap_or(PAGE);
        for range in before.mappings() {
            if range.0 < iova || range.0 > last {
                continue;
            }
            let npages = range.1 / pgsize;
            let arg = ReportArg {
                iova: range.0,
                size: range.1,
                pgsize,
                words: npages.div_ceil(64),
                fill: Some(0),
            };
            let mut words = vec![0; arg.words as usize];
            // A whole mapping is a valid range, so this cannot fail.
            let _ = before.report(&arg, &mut words);
            words.push(0); // the spare word
            if let Some(stale) = self.stale.get(&range) {
                words.iter_mut().zip(stale).for_each(|(w, s)| *w |= s);
            }
            let bit = (range.0 - iova) / pgsize;
            let (at, shift) = ((bit / 64) as usize, (bit % 64) as u32);
            let copied = (npages + u64::from(shift)).div_ceil(64) as usize;
            if at + copied > image.len() {
                continue; // the answer is a fault
            }
            if shift != 0 {
                shift_up(&mut words[..copied], shift);
                words[0] |= image[at];
            }
            image[at..at + copied].copy_from_slice(&words[..copied]);
            for page in 0..npages {
                words[(page / 64) as usize] &= !(1 << (page % 64));
            }
            self.stale.insert(range, words);
        }
        image
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The recordings' example: maps of 5, 3 and 100 pages, of which the second
    /// has a pin; a bit more in each report.
    #[test]
    fn stale_bits_come_back() {
        let script = "new devs=emu0\nmap size=5p\nmap iova=5p size=3p\nmap iova=8p size=100p\n\
                      start\nrw iova=5p\nrw iova=7p\n\
                      get size=108p bsize=16\nget size=108p bsize=16\nrw iova=5p\nget size=108p bsize=16\n";
        let cases = dirty_script::parse(script, &mut 65535).expect("script");
        let mut linux = Linux::new(65535);
        let shown: Vec<String> = cases[0]
            .lines
            .iter()
            .map(|line| linux.step(&line.op))
            .filter(|(_, real)| matches!(real, Reply::Get(..)))
            .map(|(ideal, real)| format!("{ideal} /{real}"))
            .collect();
        assert_eq!(
            shown,
            [
                " => 0 ok bm=a0,0,0 / => 0 ok bm=a0,0,0",
                " => 0 ok bm=0,0,0 / => 0 ok bm=1400,0,0",
                " => 0 ok bm=20,0,0 / => 0 ok bm=28020,0,0",
            ]
        );
    }
}
