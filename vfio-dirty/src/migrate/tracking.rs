// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tracker of guest memory and its sources: what a VMM would link.
//!
//! CPUs are tracked by the kernel, devices by the container. [`Tracking::take`] asks all of them
//! with one call of [`Tracker::take`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use adapter_user::guest::{DirtyIovas, IovaRange, IovaView, Report, Tracker};
use adapter_user::vfio_user::Client;
use adapter_user::{Container, Extent, PageSize};

use super::cpu_tracker::CpuTracker;
use super::guest::{Guest, PAGE};
use super::outcome::Found;
use crate::failure::{cannot, Failure};

/// The number of the slot that holds all guest RAM.
const RAM: u32 = 0;

pub(super) struct Tracking {
    tracker: Tracker,
    counts: Arc<Counts>,
}

/// Pages that the sources have reported since [`Tracking::found`] was last called.
#[derive(Default)]
pub(super) struct Counts {
    cpu: AtomicU64,
    device: AtomicU64,
    windows: AtomicU64,
    unmaps: AtomicU64,
    vfio_user: AtomicU64,
}

impl Counts {
    /// Counts the pages of an unmap's bitmap.
    pub(super) fn add_unmap(&self, words: &[u64]) {
        self.unmaps.fetch_add(ones(words), Ordering::Relaxed);
    }
}

fn ones(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

impl Tracking {
    /// Tracks the memory of `guest`, as one slot at guest-physical address 0. It has no sources
    /// yet.
    pub(super) fn new(guest: &Guest) -> Result<Self, Failure> {
        let tracker = Tracker::new(None);
        tracker
            .add_slot(RAM, 0, Some(guest.cpu.addr()), guest.len())
            .map_err(cannot("track guest memory"))?;
        Ok(Self {
            tracker,
            counts: Arc::default(),
        })
    }

    /// What a device behind a virtual IOMMU sees of the memory.
    pub(super) fn iova_view(&self) -> IovaView {
        self.tracker.iova_view()
    }

    pub(super) fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }

    /// Adds the CPUs as a source. If `lost`, their pages are counted and thrown away.
    pub(super) fn add_cpus(&self, mut cpus: CpuTracker, lost: bool) {
        let counts = Arc::clone(&self.counts);
        self.tracker.add_source("PAGEMAP_SCAN", move |report| {
            cpus.scan(|addr, size| {
                counts.cpu.fetch_add(size / PAGE, Ordering::Relaxed);
                match lost {
                    true => Ok(()),
                    false => Ok(report.or_host(addr, size)?),
                }
            })
        });
    }

    /// Adds the devices that see `size` bytes of guest RAM at IOVA 0. If `lost`, their pages are
    /// counted and thrown away.
    pub(super) fn add_ram(&self, container: &Container, size: u64, lost: bool) {
        let (container, counts) = (container.clone(), Arc::clone(&self.counts));
        let mut words = vec![0; (size / PAGE).div_ceil(64) as usize];
        self.tracker.add_source("GET_BITMAP", move |report| {
            container.dirty_bitmap(0, size, PAGE, &mut words)?;
            counts.device.fetch_add(ones(&words), Ordering::Relaxed);
            match lost {
                true => Ok(()),
                false => Ok(report.or_bitmap(&words, pages(0, size).ok_or("no page size")?)?),
            }
        });
    }

    /// Adds a device that sees `view` in the windows between `iova` and `iova + size`.
    pub(super) fn add_windows(
        &self,
        container: &Container,
        view: &IovaView,
        iova: u64,
        size: u64,
    ) -> Result<(), Failure> {
        let (container, counts) = (container.clone(), Arc::clone(&self.counts));
        let mut words = vec![0; (size / PAGE).div_ceil(64) as usize];
        // One call for all windows takes less than one for each.
        let read = move |_: &[IovaRange], dirty: &mut DirtyIovas| {
            container.dirty_bitmap(iova, size, PAGE, &mut words)?;
            counts.windows.fetch_add(ones(&words), Ordering::Relaxed);
            Ok(dirty.or_bitmap(&words, pages(iova, size).ok_or("no page size")?)?)
        };
        self.tracker
            .add_log("GET_BITMAP of windows", view, 0, read)
            .map(drop)
            .map_err(cannot("add the log of a device"))
    }

    /// Adds a device in another process that sees `size` bytes of guest RAM at IOVA 0, and whose
    /// log is on. If `lost`, its pages are counted and thrown away.
    pub(super) fn add_remote(&self, client: &Client, size: u64, lost: bool) -> Result<(), Failure> {
        let view = self.tracker.iova_view();
        view.map(0, 0, size)
            .map_err(cannot("map guest memory in the view"))?;
        let (client, counts) = (client.clone(), Arc::clone(&self.counts));
        // `client.log()` would be all, but for the counts.
        let read = move |ask: &[IovaRange], dirty: &mut DirtyIovas| {
            for range in ask {
                let extent = pages(range.iova, range.size).ok_or("no page size")?;
                let mut words = vec![0; extent.npages.div_ceil(64) as usize];
                client.read_log(range.iova, range.size, extent.pgsize, &mut words)?;
                counts.vfio_user.fetch_add(ones(&words), Ordering::Relaxed);
                if !lost {
                    dirty.or_bitmap(&words, extent)?;
                }
            }
            Ok(())
        };
        self.tracker
            .add_log("vfio-user", &view, 0, read)
            .map(drop)
            .map_err(cannot("add the log of a device"))
    }

    /// Forgets all marks. Copy all memory after this call.
    pub(super) fn start(&self) -> Result<(), Failure> {
        self.tracker.start().map_err(cannot("start tracking"))
    }

    /// Adds the pages that were written since the last call to `report`.
    pub(super) fn take(&self, report: &mut Report) -> Result<(), Failure> {
        let taken = self.tracker.take(report);
        taken.map_err(|failed| Failure::Runtime(format!("{failed}: {}", failed.cause)))
    }

    /// How many pages each source has reported since the last call.
    pub(super) fn found(&self) -> Found {
        let take = |count: &AtomicU64| count.swap(0, Ordering::Relaxed);
        Found {
            cpu: take(&self.counts.cpu),
            device: take(&self.counts.device),
            windows: take(&self.counts.windows),
            unmaps: take(&self.counts.unmaps),
            vfio_user: take(&self.counts.vfio_user),
        }
    }
}

/// The pages from `iova` on, one bit each.
pub(super) fn pages(iova: u64, size: u64) -> Option<Extent> {
    Some(Extent {
        bit: 0,
        iova,
        npages: size / PAGE,
        pgsize: PageSize::new(PAGE)?,
    })
}
