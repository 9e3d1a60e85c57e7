// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pinned pages and their memory, which threads reach without a lock.

use std::ops::Range;
use std::thread;
use std::time::Duration;

use dirty_core::host::{Mm, Prot};
use dirty_core::{Error, PageSize};

use super::access::Access;
use super::place::{own_mm, Place};
use crate::process_memory::{read_process, write_process};

/// Gets the first IOVA and the length in bytes of what a device wrote or marked.
///
/// The call that wrote does not return before this function does, and until then an
/// unmap waits. So it must not call the container or the device, nor wait for somebody
/// who does.
pub type OnMark = Box<dyn Fn(u64, u64) -> Result<(), Error> + Send + Sync>;

/// Pages whose memory is contiguous.
struct Part {
    /// The first and the last byte, counted from the first page of all.
    first: u64,
    last: u64,
    place: Place,
}

/// The pages of one pin.
pub(super) struct Pages {
    /// The bytes that were asked for.
    pub(super) iova: u64,
    pub(super) size: u64,
    pub(super) prot: Prot,
    page: PageSize,
    /// In order, without a gap: all pages that the bytes touch.
    parts: Vec<Part>,
    /// The process that pinned them.
    process: Mm,
    access: Access,
}

impl Pages {
    pub(super) fn new(page: PageSize, iova: u64, size: u64, prot: Prot) -> Self {
        Pages {
            iova,
            size,
            prot,
            page,
            parts: Vec::new(),
            process: own_mm(),
            access: Access::new(),
        }
    }

    /// Where the first page starts.
    pub(super) fn first(&self) -> u64 {
        self.iova - self.iova % self.page.bytes()
    }

    /// Where the last page ends: its last byte.
    pub(super) fn last(&self) -> u64 {
        self.last_asked() | (self.page.bytes() - 1)
    }

    /// The last byte that was asked for.
    fn last_asked(&self) -> u64 {
        self.iova + (self.size - 1)
    }

    pub(super) fn npages(&self) -> u64 {
        self.page.pages(self.last_asked()) - self.page.pages(self.iova) + 1
    }

    /// Appends pages, whose memory is at `place`.
    pub(super) fn push(&mut self, npages: u64, place: Place) {
        let first = self.parts.last().map_or(0, |part| part.last + 1);
        let last = first + (npages << self.page.shift()) - 1;
        self.parts.push(Part { first, last, place });
    }

    /// Lets nobody access the pages from now on, and waits until nobody does.
    pub(super) fn revoke(&self) {
        self.access.close();
        let mut tries = 0u32;
        while !self.access.is_empty() {
            tries += 1;
            if tries < 100 {
                thread::yield_now();
            } else {
                thread::sleep(Duration::from_micros(50)); // it may be preempted
            }
        }
    }

    /// Fills `data` from byte `offset` of the pin on.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.check(Prot::READ, offset, data.len())?;
        let _access = self.access.enter().ok_or(Error::Unmapped)?;
        self.each(offset, data.len(), |place, at, range| match place {
            Place::Memory(memory, start) => {
                let read = memory.read(start + at, &mut data[range]);
                read.map_err(|_| Error::BadAddress) // unreachable: it is inside
            }
            Place::Process(start) => {
                let read = read_process(start + at, &mut data[range]);
                read.map_err(|_| Error::BadAddress)
            }
        })
    }

    /// Copies `data` to byte `offset` of the pin, then tells `on_mark`.
    pub(super) fn write(
        &self,
        offset: u64,
        data: &[u8],
        on_mark: Option<&OnMark>,
    ) -> Result<(), Error> {
        self.check(Prot::WRITE, offset, data.len())?;
        let _access = self.access.enter().ok_or(Error::Unmapped)?;
        let written = self.each(offset, data.len(), |place, at, range| match place {
            Place::Memory(memory, start) => {
                let written = memory.write(start + at, &data[range]);
                written.map_err(|_| Error::BadAddress) // unreachable: it is inside
            }
            Place::Process(start) => {
                let written = write_process(start + at, &data[range]);
                written.map_err(|_| Error::BadAddress)
            }
        });
        match on_mark {
            Some(on_mark) if !data.is_empty() => {
                let told = on_mark(self.iova + offset, data.len() as u64);
                written.and(told)
            }
            _ => written,
        }
    }

    fn check(&self, prot: Prot, offset: u64, len: usize) -> Result<(), Error> {
        if !self.prot.contains(prot) {
            return Err(Error::Denied);
        }
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(Error::Unmapped),
        }
    }

    /// Calls `copy` for each part of the `len` bytes from byte `offset` on: with its
    /// place, the offset in that place, and the range of the bytes that it has.
    fn each(
        &self,
        offset: u64,
        len: usize,
        mut copy: impl FnMut(&Place, u64, Range<usize>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut at = offset + self.iova % self.page.bytes();
        let end = at + len as u64;
        let mut k = self.parts.partition_point(|part| part.last < at);
        let mut done = 0;
        while at < end {
            let part = self.parts.get(k).ok_or(Error::Unmapped)?; // unreachable: checked
            let n = (end - at).min(part.last - at + 1);
            if matches!(part.place, Place::Process(_)) && self.process != own_mm() {
                return Err(Error::OtherMm); // this is a fork of the process that pinned
            }
            copy(&part.place, at - part.first, done..done + n as usize)?;
            (at, done, k) = (at + n, done + n as usize, k + 1);
        }
        Ok(())
    }
}
