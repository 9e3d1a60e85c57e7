// SPDX-License-Identifier: MIT OR Apache-2.0
//! The verdict: whether the two memories are equal, byte by byte.

use adapter_user::GuestMemory;

use super::guest::{Guest, Writer, PAGE};
use crate::failure::{cannot, Failure};

/// How many differing pages are listed.
const SHOWN: usize = 10;

/// How many bytes are compared at once.
const CHUNK: usize = 64 * PAGE as usize;

#[derive(Default)]
pub(super) struct Verdict {
    pub(super) differing: u64,
    /// The guest-physical address and last writer of the first of them.
    pub(super) first: Vec<(u64, Writer)>,
}

impl Verdict {
    /// Compares all memory. Calls `progress` with the number of pages after each step.
    pub(super) fn compare(
        guest: &Guest,
        destination: &GuestMemory,
        mut progress: impl FnMut(u64),
    ) -> Result<Self, Failure> {
        let mut verdict = Self::default();
        let mut ours = vec![0; CHUNK];
        let mut theirs = vec![0; CHUNK];
        for start in (0..guest.len()).step_by(CHUNK) {
            let len = CHUNK.min((guest.len() - start) as usize);
            let (ours, theirs) = (&mut ours[..len], &mut theirs[..len]);
            for (memory, bytes) in [(&*guest.cpu, &mut *ours), (destination, &mut *theirs)] {
                memory
                    .read(start, bytes)
                    .map_err(cannot("compare the memories"))?;
            }
            if ours != theirs {
                verdict.compare_pages(guest, start / PAGE, ours, theirs);
            }
            progress(len as u64 / PAGE);
        }
        Ok(verdict)
    }

    pub(super) fn is_equal(&self) -> bool {
        self.differing == 0
    }

    fn compare_pages(&mut self, guest: &Guest, first: u64, ours: &[u8], theirs: &[u8]) {
        let pairs = ours.chunks(PAGE as usize).zip(theirs.chunks(PAGE as usize));
        for (page, (ours, theirs)) in (first..).zip(pairs) {
            if ours != theirs {
                self.differing += 1;
                if self.first.len() < SHOWN {
                    self.first.push((page * PAGE, guest.last_writer(page)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_differing_page_is_counted() {
        let guest = Guest::boot(16 << 20, || {}).unwrap();
        let same = guest.cpu.second_view().unwrap();
        assert!(Verdict::compare(&guest, &same, |_| {}).unwrap().is_equal());

        let other = GuestMemory::new(16 << 20).unwrap();
        let mut bytes = vec![0; 16 << 20];
        same.read(0, &mut bytes).unwrap();
        other.write(0, &bytes).unwrap();
        let at = 3 * PAGE as usize - 1;
        let changed = [!bytes[at], !bytes[at + 1]];
        other.write(at as u64, &changed).unwrap();
        let last = (16 << 20) - 1;
        guest
            .write_by_dma(Writer::Pinned, last, &[!bytes[last as usize]])
            .unwrap();
        let verdict = Verdict::compare(&guest, &other, |_| {}).unwrap();
        let boot = Writer::Boot;
        let expected = [
            (2 * PAGE, boot),
            (3 * PAGE, boot),
            (last / PAGE * PAGE, Writer::Pinned),
        ];
        assert_eq!(verdict.differing, 3);
        assert_eq!(verdict.first, expected);
    }
}
