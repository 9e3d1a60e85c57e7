// SPDX-License-Identifier: MIT OR Apache-2.0
//! The emulated devices for which an IOVA is the guest-physical address.

use std::sync::Arc;

use adapter_user::{Container, Device, GroupId, Prot};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

use super::guest::{Guest, Writer, BLOCK, PAGE};
use super::writers::{Work, Written};
use crate::failure::{cannot, Failure};

/// The group of all emulated devices here.
pub(super) const GROUP: GroupId = GroupId(1);

const FULL_PAGE: usize = PAGE as usize;

/// Opens a device that may pin, and that unpins what is about to be unmapped.
pub(super) fn open(container: &Container) -> Result<Arc<Device>, Failure> {
    container
        .open_device(GROUP, Some(Box::new(Device::unpin_range)))
        .map_err(cannot("open a device"))
}

/// Pins up to a block of pages.
pub(super) fn pin(device: &Device, iova: u64, pages: u64) -> Result<(), Failure> {
    let mut pfns = [0; BLOCK as usize];
    device
        .pin_pages(iova, Prot::READ_WRITE, &mut pfns[..pages as usize])
        .map_err(|cause| {
            Failure::Runtime(format!(
                "a device cannot pin guest pages ({cause}): if the limit of locked memory is the \
                 cause, raise it with `ulimit -l`"
            ))
        })
}

/// Keeps blocks of pages pinned and writes to them at any time.
pub(super) struct LongPins {
    guest: Arc<Guest>,
    device: Arc<Device>,
    /// The first page of each pinned block.
    blocks: Vec<u64>,
    random: SmallRng,
}

impl LongPins {
    pub(super) fn new(guest: &Arc<Guest>, container: &Container) -> Result<Self, Failure> {
        let mut this = Self {
            guest: Arc::clone(guest),
            device: open(container)?,
            blocks: Vec::new(),
            random: SmallRng::from_os_rng(),
        };
        for _ in 0..(guest.blocks() / 4).clamp(1, 64) {
            this.pin_a_block()?;
        }
        Ok(this)
    }

    fn pin_a_block(&mut self) -> Result<(), Failure> {
        let first = self.guest.any_block(Writer::Pinned, &mut self.random).start;
        pin(&self.device, first * PAGE, BLOCK)?;
        self.blocks.push(first);
        Ok(())
    }
}

impl Work for LongPins {
    fn step(&mut self) -> Result<Written, Failure> {
        if self.random.random_ratio(1, 500) {
            let oldest = self.blocks.remove(0);
            self.device.unpin_pages(oldest * PAGE, BLOCK);
            self.pin_a_block()?;
        }
        let block = self.blocks[self.random.random_range(0..self.blocks.len())];
        let page = block + self.random.random_range(0..BLOCK);
        let mut bytes = [0; FULL_PAGE];
        self.random.fill_bytes(&mut bytes);
        self.guest
            .write_by_dma(Writer::Pinned, page * PAGE, &bytes)
            .map_err(cannot("write to a pinned page"))?;
        Ok(Written::pages(1))
    }
}

/// Pins pages for each write and unpins them right after.
pub(super) struct ShortPins {
    guest: Arc<Guest>,
    device: Arc<Device>,
    random: SmallRng,
}

impl ShortPins {
    pub(super) fn new(guest: &Arc<Guest>, container: &Container) -> Result<Self, Failure> {
        Ok(Self {
            guest: Arc::clone(guest),
            device: open(container)?,
            random: SmallRng::from_os_rng(),
        })
    }
}

impl Work for ShortPins {
    fn step(&mut self) -> Result<Written, Failure> {
        let block = self.guest.any_block(Writer::ShortPins, &mut self.random);
        let pages = self.random.random_range(1..=4);
        let iova = self.random.random_range(block.start..=block.end - pages) * PAGE;
        let mut bytes = [0; 4 * FULL_PAGE];
        let bytes = &mut bytes[..pages as usize * FULL_PAGE];
        self.random.fill_bytes(bytes);

        pin(&self.device, iova, pages)?;
        self.guest
            .write_by_dma(Writer::ShortPins, iova, bytes)
            .map_err(cannot("write to a pinned page"))?;
        self.device.unpin_pages(iova, pages);
        Ok(Written::pages(pages))
    }
}

/// Writes by `dma_rw` at odd offsets and lengths. One write in four goes to memory directly and is
/// marked after.
pub(super) struct Messages {
    guest: Arc<Guest>,
    device: Arc<Device>,
    random: SmallRng,
}

impl Messages {
    pub(super) fn new(guest: &Arc<Guest>, container: &Container) -> Result<Self, Failure> {
        Ok(Self {
            guest: Arc::clone(guest),
            device: container
                .open_device(GROUP, None)
                .map_err(cannot("open a device"))?,
            random: SmallRng::from_os_rng(),
        })
    }
}

impl Work for Messages {
    fn step(&mut self) -> Result<Written, Failure> {
        let block = self.guest.any_block(Writer::Messages, &mut self.random);
        let mut bytes = [0; 3 * FULL_PAGE];
        let len = self.random.random_range(9..bytes.len());
        let bytes = &mut bytes[..len];
        self.random.fill_bytes(bytes);
        let iova = self
            .random
            .random_range(block.start * PAGE..=block.end * PAGE - len as u64);

        if self.random.random_ratio(1, 4) {
            self.guest
                .write_by_dma(Writer::Messages, iova, bytes)
                .map_err(cannot("write guest memory"))?;
            self.device
                .mark(iova, len as u64)
                .map_err(cannot("mark the writes of a device"))?;
        } else {
            self.guest.note(Writer::Messages, iova, len);
            self.device
                .write(iova, bytes)
                .map_err(cannot("write by dma_rw"))?;
        }
        let pages = (iova + len as u64).div_ceil(PAGE) - iova / PAGE;
        Ok(Written::pages(pages))
    }
}
