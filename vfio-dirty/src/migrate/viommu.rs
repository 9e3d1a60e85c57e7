// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device behind a virtual IOMMU: windows of IOVA come and go, each onto other guest pages.
//!
//! The container reports by IOVA; the tracker's [`IovaView`] knows which guest pages that means.
//! The view maps before the container and unmaps after it, so that whatever the container reports
//! can be translated.

use std::sync::Arc;

use adapter_user::guest::IovaView;
use adapter_user::{Container, Device, Error, Prot};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

use super::devices;
use super::guest::{Guest, Writer, BLOCK, PAGE};
use super::tracking::{pages, Counts, Tracking};
use super::writers::{Work, Written};
use crate::failure::{cannot, Failure};

/// The distance between the IOVAs of two windows; no window is larger.
const STRIDE: u64 = BLOCK * PAGE;

/// The device at work. No other thread maps or unmaps its windows.
pub(super) struct Churn {
    guest: Arc<Guest>,
    container: Container,
    device: Arc<Device>,
    view: IovaView,
    counts: Arc<Counts>,
    /// Whether the bitmaps of unmaps are thrown away.
    lost: bool,
    /// The IOVA of the first window.
    base: u64,
    windows: Vec<Option<Window>>,
    random: SmallRng,
}

/// A window that is mapped.
#[derive(Clone, Copy)]
struct Window {
    iova: u64,
    gpa: u64,
    size: u64,
    pinned: bool,
}

impl Churn {
    /// Opens the device and adds it to `tracking`. If `lost`, what unmaps report is counted and
    /// thrown away.
    pub(super) fn new(
        guest: &Arc<Guest>,
        container: &Container,
        tracking: &Tracking,
        lost: bool,
    ) -> Result<Self, Failure> {
        let windows = (guest.blocks() / 4).clamp(4, 64);
        let base = guest.len().next_multiple_of(1 << 32);
        let view = tracking.iova_view();
        tracking.add_windows(container, &view, base, windows * STRIDE)?;
        Ok(Self {
            guest: Arc::clone(guest),
            container: container.clone(),
            device: devices::open(container)?,
            view,
            counts: Arc::clone(tracking.counts()),
            lost,
            base,
            windows: vec![None; windows as usize],
            random: SmallRng::from_os_rng(),
        })
    }

    /// The window at `number`, which is mapped to a random place if it is not mapped.
    fn window(&mut self, number: usize) -> Result<Window, Failure> {
        match self.windows[number] {
            Some(window) => Ok(window),
            None => self.map(number),
        }
    }

    fn map(&mut self, number: usize) -> Result<Window, Failure> {
        let random = &mut self.random;
        // Even and odd windows share no block, so that `drain` can tell them apart.
        let pair = random.random_range(0..self.guest.blocks() / 2);
        let mut block = self
            .guest
            .own_block(Writer::Viommu, pair * 2 + number as u64 % 2);
        if random.random_ratio(1, 8) {
            block = self.guest.any_block(Writer::Viommu, random);
        }
        let npages = random.random_range(1..=BLOCK);
        let window = Window {
            iova: self.base + number as u64 * STRIDE,
            gpa: random.random_range(block.start..=block.end - npages) * PAGE,
            size: npages * PAGE,
            pinned: random.random(),
        };
        let Window {
            iova, gpa, size, ..
        } = window;
        self.view
            .map(iova, gpa, size)
            .map_err(cannot("map a window in the view"))?;
        self.container
            .map(iova, &self.guest.dma, gpa, size, Prot::READ_WRITE)
            .map_err(cannot("map a window"))?;
        self.windows[number] = Some(window);
        if window.pinned {
            devices::pin(&self.device, iova, npages)?;
        }
        Ok(window)
    }

    /// Unmaps a window. The device's callback releases the pins in it. Returns whether the
    /// container was tracking.
    fn unmap(&mut self, number: usize) -> Result<bool, Failure> {
        let Some(Window { iova, size, .. }) = self.windows[number].take() else {
            return Ok(false);
        };
        let mut words = [0];
        let harvested = self.container.unmap_dirty(iova, size, PAGE, &mut words);
        let tracked = harvested != Err(Error::NotTracking);
        let unmapped = match tracked {
            true => harvested,
            false => self.container.unmap(iova, size),
        };
        if unmapped.map_err(cannot("unmap a window"))? != size {
            return Err(Failure::Runtime(
                "an unmap left a part of its window mapped".into(),
            ));
        }
        let gone = match pages(iova, size) {
            Some(extent) if tracked && !self.lost => {
                self.view.unmap_dirty(iova, size, &words, extent)
            }
            _ => self.view.unmap(iova, size),
        };
        gone.map_err(cannot("unmap a window in the view"))?;
        if tracked {
            self.counts.add_unmap(&words);
        }
        Ok(tracked)
    }

    /// Writes somewhere in a window and returns how many pages that touched.
    fn write(&mut self, window: Window) -> Result<u64, Failure> {
        let mut bytes = [0; 2 * PAGE as usize];
        let len = self
            .random
            .random_range(9..=bytes.len().min(window.size as usize));
        let bytes = &mut bytes[..len];
        self.random.fill_bytes(bytes);
        let offset = self.random.random_range(0..=window.size - len as u64);
        let gpa = window.gpa + offset;
        if window.pinned {
            self.guest
                .write_by_dma(Writer::Viommu, gpa, bytes)
                .map_err(cannot("write to a pinned window"))?;
        } else {
            self.guest.note(Writer::Viommu, gpa, len);
            self.device
                .write(window.iova + offset, bytes)
                .map_err(cannot("write to a window"))?;
        }
        Ok((gpa + len as u64).div_ceil(PAGE) - gpa / PAGE)
    }
}

impl Work for Churn {
    fn step(&mut self) -> Result<Written, Failure> {
        let number = self.random.random_range(0..self.windows.len());
        let tracked = self.random.random() && self.unmap(number)?;
        let window = self.window(number)?;
        Ok(Written {
            pages: self.write(window)?,
            unmaps: tracked.into(),
        })
    }

    /// Unmaps every second window right after its last write, so that only the unmap can report
    /// it. The other windows stay, and the last round reports them.
    fn drain(&mut self) -> Result<Written, Failure> {
        let mut written = Written::default();
        for number in 0..self.windows.len() {
            let window = self.window(number)?;
            written.pages += self.write(window)?;
            if number % 2 == 0 {
                written.unmaps += u64::from(self.unmap(number)?);
            }
        }
        Ok(written)
    }
}
