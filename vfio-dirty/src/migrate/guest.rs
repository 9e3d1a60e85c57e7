// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest: its memory as CPUs and devices see it, and the last writer of each page.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::Arc;

use adapter_user::GuestMemory;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

pub(super) const PAGE: u64 = 4096;

/// Pages of a kind lie together in blocks of this size, so that an access to several pages stays
/// within its kind.
pub(super) const BLOCK: u64 = 16;

/// The kinds of blocks, in the order in which they repeat through the memory. If a kind has one
/// writer, its pages arrive only if the tracker of this writer works. Shared pages have all writers.
const KINDS: [Kind; 8] = [
    Kind::Of(Writer::Cpu),
    Kind::Of(Writer::Pinned),
    Kind::Of(Writer::ShortPins),
    Kind::Of(Writer::Messages),
    Kind::Of(Writer::Viommu),
    Kind::Shared,
    Kind::Of(Writer::Boot),
    Kind::Of(Writer::Nobody),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Of(Writer),
    Shared,
}

/// What writes a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Writer {
    Nobody,
    /// The start of the guest, which filled the memory.
    Boot,
    Cpu,
    Pinned,
    ShortPins,
    Messages,
    Viommu,
    /// A device in another process, if there is one.
    VfioUser,
}

impl Writer {
    const ALL: [Self; 8] = [
        Self::Nobody,
        Self::Boot,
        Self::Cpu,
        Self::Pinned,
        Self::ShortPins,
        Self::Messages,
        Self::Viommu,
        Self::VfioUser,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nobody",
            Self::Boot => "boot",
            Self::Cpu => "cpu",
            Self::Pinned => "device with long pins",
            Self::ShortPins => "device with short pins",
            Self::Messages => "device that writes by dma_rw",
            Self::Viommu => "device behind the virtual IOMMU",
            Self::VfioUser => "vfio-user device",
        }
    }
}

pub(super) struct Guest {
    /// The mapping that the guest's CPUs write, which the kernel can watch.
    pub(super) cpu: Arc<GuestMemory>,
    /// The mapping that devices write. As with DMA, the page tables of `cpu` show none of it.
    pub(super) dma: Arc<GuestMemory>,
    last_writers: Vec<AtomicU8>,
}

impl Guest {
    /// Makes a guest whose memory is filled, except the pages that nobody writes. Calls `progress`
    /// after each page.
    pub(super) fn boot(len: u64, mut progress: impl FnMut()) -> io::Result<Self> {
        let cpu = Arc::new(GuestMemory::new(len)?);
        let dma = Arc::new(cpu.second_view()?);
        let last_writers = (0..len / PAGE).map(|_| AtomicU8::new(0)).collect();
        let guest = Self {
            cpu,
            dma,
            last_writers,
        };
        let mut random = SmallRng::from_os_rng();
        let mut bytes = [0; PAGE as usize];
        for page in 0..guest.pages() {
            if kind(page) != Kind::Of(Writer::Nobody) {
                random.fill_bytes(&mut bytes);
                guest.write_by_cpu(Writer::Boot, page * PAGE, &bytes)?;
            }
            progress();
        }
        for view in [&guest.cpu, &guest.dma] {
            view.populate()?; // so that no writer meets a page fault later
        }
        Ok(guest)
    }

    pub(super) fn len(&self) -> u64 {
        self.cpu.len()
    }

    pub(super) fn pages(&self) -> u64 {
        self.len() / PAGE
    }

    /// The number of blocks of each kind.
    pub(super) fn blocks(&self) -> u64 {
        self.pages() / BLOCK / KINDS.len() as u64
    }

    /// The pages of a block that only `writer` writes.
    pub(super) fn own_block(&self, writer: Writer, number: u64) -> Range<u64> {
        block(Kind::Of(writer), number % self.blocks())
    }

    /// The pages of a block that only a device in another process writes. These are every second
    /// one of the blocks that nobody writes after the start.
    pub(super) fn remote_block(&self, number: u64) -> Range<u64> {
        self.own_block(Writer::Boot, 2 * (number % self.remote_blocks()))
    }

    /// How many there are.
    pub(super) fn remote_blocks(&self) -> u64 {
        self.blocks() / 2
    }

    /// The bytes from one of them to the next.
    pub(super) const REMOTE_STRIDE: u64 = 2 * KINDS.len() as u64 * BLOCK * PAGE;

    /// The pages of a random block that `writer` may write; every eighth one is shared.
    pub(super) fn any_block(&self, writer: Writer, random: &mut SmallRng) -> Range<u64> {
        let kind = match random.random_ratio(1, 8) {
            true => Kind::Shared,
            false => Kind::Of(writer),
        };
        block(kind, random.random_range(0..self.blocks()))
    }

    pub(super) fn write_by_cpu(&self, writer: Writer, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        self.note(writer, gpa, bytes.len());
        self.cpu.write(gpa, bytes).map_err(io::Error::other)
    }

    pub(super) fn write_by_dma(&self, writer: Writer, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        self.note(writer, gpa, bytes.len());
        self.dma.write(gpa, bytes).map_err(io::Error::other)
    }

    /// Notes that `writer` writes `len` bytes from `gpa` on.
    pub(super) fn note(&self, writer: Writer, gpa: u64, len: usize) {
        let pages = gpa / PAGE..(gpa + len as u64).div_ceil(PAGE);
        for last in &self.last_writers[pages.start as usize..pages.end as usize] {
            last.store(writer as u8, Ordering::Relaxed);
        }
    }

    pub(super) fn last_writer(&self, page: u64) -> Writer {
        let last = self.last_writers[page as usize].load(Ordering::Relaxed);
        Writer::ALL[usize::from(last)]
    }
}

fn kind(page: u64) -> Kind {
    KINDS[(page / BLOCK) as usize % KINDS.len()]
}

fn block(kind: Kind, number: u64) -> Range<u64> {
    let kinds = KINDS.len() as u64;
    let place = (0..kinds).find(|place| KINDS[*place as usize] == kind);
    let first = (number * kinds + place.unwrap_or_default()) * BLOCK;
    first..first + BLOCK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_do_not_overlap_and_writers_are_remembered() {
        let guest = Guest::boot(16 << 20, || {}).unwrap();
        for number in 0..guest.blocks() {
            for page in guest.own_block(Writer::Pinned, number) {
                assert!(kind(page) == Kind::Of(Writer::Pinned));
            }
        }
        let last = guest.own_block(Writer::Nobody, guest.blocks() - 1);
        assert_eq!(last.end, guest.pages());
        assert_eq!(guest.last_writer(last.start), Writer::Nobody);
        assert_eq!(guest.last_writer(0), Writer::Boot);
        for number in 1..guest.remote_blocks() {
            let (before, block) = (guest.remote_block(number - 1), guest.remote_block(number));
            assert!(block
                .clone()
                .all(|page| kind(page) == Kind::Of(Writer::Boot)));
            assert_eq!((block.start - before.start) * PAGE, Guest::REMOTE_STRIDE);
        }
        for writer in Writer::ALL {
            guest.write_by_dma(writer, PAGE - 1, &[1, 2]).unwrap();
            assert_eq!(guest.last_writer(0), writer);
            assert_eq!(guest.last_writer(1), writer);
        }
    }
}
