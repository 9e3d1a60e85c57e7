// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device behind a virtual IOMMU: windows of IOVA come and go, each onto other guest pages.
//!
//! The container reports by IOVA. What a window means is known only while it is mapped, so its
//! bits are translated under the lock that also guards mapping and unmapping, and what an unmap
//! harvests waits here until the next round fetches it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adapter_user::{pages, Container, Device, Prot};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

use super::devices;
use super::guest::{Guest, Writer, BLOCK, PAGE};
use super::page_set::PageSet;
use super::writers::Work;
use crate::failure::{cannot, Failure};

/// How far apart windows start; none is larger.
const STRIDE: u64 = BLOCK * PAGE;

pub(super) struct Viommu {
    guest: Arc<Guest>,
    container: Container,
    device: Arc<Device>,
    /// The IOVA of the first window.
    base: u64,
    state: Mutex<State>,
}

struct State {
    tracking: bool,
    slots: Vec<Option<Window>>,
    harvested: PageSet,
    unmaps: u64,
}

/// What a slot of IOVA maps at the moment.
#[derive(Clone, Copy)]
struct Window {
    iova: u64,
    /// The first guest page.
    page: u64,
    pages: u64,
    pinned: bool,
}

impl Viommu {
    pub(super) fn new(guest: &Arc<Guest>, container: &Container) -> Result<Arc<Self>, Failure> {
        let slots = (guest.blocks() / 4).clamp(4, 64);
        Ok(Arc::new(Self {
            guest: Arc::clone(guest),
            container: container.clone(),
            device: devices::open(container)?,
            base: guest.len().next_multiple_of(1 << 32),
            state: Mutex::new(State {
                tracking: false,
                slots: vec![None; slots as usize],
                harvested: PageSet::new(guest.pages()),
                unmaps: 0,
            }),
        }))
    }

    /// Starts dirty tracking of the container: unmaps from now on harvest.
    pub(super) fn start_tracking(&self) -> Result<(), Failure> {
        let mut state = self.state();
        self.container.start().map_err(cannot("start tracking"))?;
        state.tracking = true;
        Ok(())
    }

    pub(super) fn stop_tracking(&self) -> Result<(), Failure> {
        let mut state = self.state();
        state.tracking = false;
        self.container.stop().map_err(cannot("stop tracking"))
    }

    /// Adds the guest pages that the windows mapped now report dirty to `dirty`.
    pub(super) fn collect_windows(&self, dirty: &mut PageSet) -> Result<(), Failure> {
        let state = self.state();
        let size = state.slots.len() as u64 * STRIDE;
        let mut bitmap = vec![0; (size / PAGE).div_ceil(64) as usize];
        self.container
            .dirty_bitmap(self.base, size, PAGE, &mut bitmap)
            .map_err(cannot("get the dirty pages of the windows"))?;
        for bit in pages(&bitmap) {
            let window = state.slots.get((bit / BLOCK) as usize).copied().flatten();
            insert(window, bit % BLOCK, dirty)?;
        }
        Ok(())
    }

    /// Adds the guest pages that unmaps harvested since the last call to `dirty`.
    pub(super) fn collect_harvest(&self, dirty: &mut PageSet) {
        let mut state = self.state();
        dirty.union(&state.harvested);
        state.harvested.clear();
    }

    /// How many windows have been unmapped under tracking.
    pub(super) fn unmaps(&self) -> u64 {
        self.state().unmaps
    }

    fn map(&self, slot: usize, random: &mut SmallRng) -> Result<Window, Failure> {
        // Windows of even slots share no block with those of odd slots, see `drain`.
        let pair = random.random_range(0..self.guest.blocks() / 2);
        let mut block = self
            .guest
            .own_block(Writer::Viommu, pair * 2 + slot as u64 % 2);
        if random.random_ratio(1, 8) {
            block = self.guest.any_block(Writer::Viommu, random);
        }
        let pages = random.random_range(1..=BLOCK);
        let window = Window {
            iova: self.base + slot as u64 * STRIDE,
            page: random.random_range(block.start..=block.end - pages),
            pages,
            pinned: random.random(),
        };
        let mut state = self.state();
        let (iova, size) = (window.iova, pages * PAGE);
        self.container
            .map(
                iova,
                &self.guest.dma,
                window.page * PAGE,
                size,
                Prot::READ_WRITE,
            )
            .map_err(cannot("map a window"))?;
        state.slots[slot] = Some(window);
        drop(state);
        if window.pinned {
            devices::pin(&self.device, iova, pages)?;
        }
        Ok(window)
    }

    /// Unmaps a window. Pins in it go by way of the device's callback.
    fn unmap(&self, slot: usize) -> Result<(), Failure> {
        let mut state = self.state();
        let Some(window) = state.slots[slot].take() else {
            return Ok(());
        };
        let size = window.pages * PAGE;
        let mut bitmap = [0];
        let unmapped = if state.tracking {
            state.unmaps += 1;
            self.container
                .unmap_dirty(window.iova, size, PAGE, &mut bitmap)
        } else {
            self.container.unmap(window.iova, size)
        };
        if unmapped.map_err(cannot("unmap a window"))? != size {
            return Err(Failure::Runtime(
                "an unmap left a part of its window".into(),
            ));
        }
        for bit in pages(&bitmap) {
            insert(Some(window), bit, &mut state.harvested)?;
        }
        Ok(())
    }

    fn write(&self, window: Window, random: &mut SmallRng) -> Result<u64, Failure> {
        let mut bytes = [0; 2 * PAGE as usize];
        let len = random.random_range(9..=bytes.len().min((window.pages * PAGE) as usize));
        let bytes = &mut bytes[..len];
        random.fill_bytes(bytes);
        let offset = random.random_range(0..=window.pages * PAGE - len as u64);
        let gpa = window.page * PAGE + offset;
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

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Translates a dirty page of a window into the guest's.
fn insert(window: Option<Window>, nth: u64, dirty: &mut PageSet) -> Result<(), Failure> {
    match window {
        Some(window) if nth < window.pages => {
            dirty.insert(window.page + nth..window.page + nth + 1);
            Ok(())
        }
        _ => Err(Failure::Runtime(
            "the container reports a dirty page where nothing is mapped".into(),
        )),
    }
}

/// The device at work: it alone maps and unmaps, so it may look at a window without the lock.
pub(super) struct Churn {
    viommu: Arc<Viommu>,
    random: SmallRng,
}

impl Churn {
    pub(super) fn new(viommu: &Arc<Viommu>) -> Self {
        Self {
            viommu: Arc::clone(viommu),
            random: SmallRng::from_os_rng(),
        }
    }

    fn window(&self, slot: usize) -> Option<Window> {
        self.viommu.state().slots[slot]
    }
}

impl Work for Churn {
    fn step(&mut self) -> Result<u64, Failure> {
        let slots = self.viommu.state().slots.len();
        let slot = self.random.random_range(0..slots);
        if self.random.random() {
            self.viommu.unmap(slot)?;
        }
        let window = match self.window(slot) {
            Some(window) => window,
            None => self.viommu.map(slot, &mut self.random)?,
        };
        self.viommu.write(window, &mut self.random)
    }

    /// Half of the windows are unmapped right after their last write, so that only the harvest
    /// knows of it; the other half stays and is reported in the last round.
    fn drain(&mut self) -> Result<u64, Failure> {
        let slots = self.viommu.state().slots.len();
        let mut pages = 0;
        for slot in 0..slots {
            let window = match self.window(slot) {
                Some(window) => window,
                None => self.viommu.map(slot, &mut self.random)?,
            };
            pages += self.viommu.write(window, &mut self.random)?;
            if slot % 2 == 0 {
                self.viommu.unmap(slot)?;
            }
        }
        Ok(pages)
    }
}
