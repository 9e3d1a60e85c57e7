// SPDX-License-Identifier: MIT OR Apache-2.0
//! A container as a log of the tracker, and unmaps that lose nothing.

use dirty_core::{Dest, Error, Extent, Target, Type1, Unmap};

use super::heap::Heap;
use super::host::Call;
use super::Container;
use crate::guest::{DirtyIovas, DirtyLog, IovaRange, SourceError};

/// How many words of a mapping are given to the tracker at a time.
const CHUNK: usize = 4096;

/// A clone of the container can be [added](crate::guest::Tracker::add_log) to a tracker,
/// with the view of its devices' mappings. Each take then has the dirty pages of every
/// mapping that overlaps the IOVAs that it asks for, and makes them clean; pinned pages
/// stay dirty. Nobody else should read the container meanwhile. Start it before the
/// tracker, and stop it after the tracker.
///
/// What [`Container::unmap`] forgets is lost for the tracker too. Unmap with
/// [`Domain::unmap`](crate::Domain::unmap), or give the bitmap of
/// [`Container::unmap_dirty`] to
/// [`IovaView::unmap_dirty`](crate::guest::IovaView::unmap_dirty).
///
/// # Errors
///
/// In this order; all memory behind the view counts as dirty then:
///
/// - [`Error::NoIommu`].
/// - [`Error::NotTracking`] if tracking is off.
impl DirtyLog for Container {
    fn read(&mut self, ask: &[IovaRange], dirty: &mut DirtyIovas) -> Result<(), SourceError> {
        // Its mappings may be larger than those of the view.
        dirty.allow_beside();
        let mut call = self.call();
        let mut core = self.shared.write();
        let type1 = core.backend_mut()?;
        type1.tracking().ok_or(Error::NotTracking)?;
        for range in ask {
            take(type1, &mut call, range.iova, range.last(), dirty)?;
        }
        Ok(())
    }
}

impl Container {
    /// As [`unmap`](Container::unmap), and puts the dirty pages of what it unmaps into
    /// `dirty` if tracking is on. If it fails, the pages that are in `dirty` are clean
    /// in the container all the same.
    pub(crate) fn unmap_taking(
        &self,
        iova: u64,
        size: u64,
        dirty: &mut DirtyIovas,
    ) -> Result<u64, Error> {
        let mut unmap = Unmap::new(Target::Range { iova, size });
        self.shared.unmap(|type1, call| {
            // Devices may write and unpin between two steps, so each step takes anew.
            if let (Some(_), Some(more)) = (type1.tracking(), size.checked_sub(1)) {
                take(type1, call, iova, iova.saturating_add(more), dirty)?;
            }
            type1.unmap(call, &mut unmap)
        })
    }
}

/// Takes the dirty pages of the mappings that overlap the IOVAs from `first` to `last`.
fn take(
    type1: &mut Type1<Heap>,
    call: &mut Call<'_>,
    first: u64,
    last: u64,
    dirty: &mut DirtyIovas,
) -> Result<(), Error> {
    let pgsize = type1.tracking().ok_or(Error::NotTracking)?;
    let mappings: Vec<(u64, u64)> = type1.mappings(first, last).collect();
    for (iova, size) in mappings {
        let npages = pgsize.pages(size - 1) + 1;
        // Only words that have dirty pages take memory.
        let mut words = vec![0; npages.div_ceil(64) as usize];
        type1.get_bitmap(call, iova, size, pgsize, Dest::Zeroed(&mut words))?;
        for (at, words) in (0..).step_by(CHUNK * 64).zip(words.chunks(CHUNK)) {
            let pages = Extent {
                bit: 0,
                iova: iova + (at << pgsize.shift()),
                npages: (npages - at).min(CHUNK as u64 * 64),
                pgsize,
            };
            dirty.or(words, pages)?;
        }
    }
    Ok(())
}
