// SPDX-License-Identifier: MIT OR Apache-2.0
//! A container of the program, and the devices in other processes that it has.
//!
//! The container answers every ioctl itself. What it maps and unmaps, and whether it tracks,
//! goes to these devices too. What they wrote is marked in the container before it answers, so
//! its bitmaps have it. The order loses nothing: a device gets a mapping when the container has
//! it, and loses it before the container does; its log is on before the container's tracking.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use adapter_user::uapi::*;
use adapter_user::{host_options, Container, Errno, Error, Prot};

use crate::mappings::{Mapping, Mappings};
use crate::remote::Remote;
use crate::trace::trace;
use crate::user::words;

/// A container, and what the program has mapped in it.
pub(crate) struct Held {
    pub(crate) container: Container,
    pub(crate) mappings: Arc<Mappings>,
    remotes: RwLock<Vec<Weak<Remote>>>,
    /// Held by an ioctl that concerns devices in other processes.
    turn: Mutex<()>,
    is_tracking: AtomicBool,
}

impl Held {
    pub(crate) fn new() -> Self {
        Held {
            container: Container::new(host_options()),
            mappings: Arc::default(),
            remotes: RwLock::default(),
            turn: Mutex::default(),
            is_tracking: AtomicBool::new(false),
        }
    }

    /// Gives a device what the container has mapped, and from now on what it will map.
    pub(crate) fn attach(&self, remote: &Arc<Remote>) -> Result<(), Errno> {
        // It waits for all ioctls.
        let mut remotes = self.remotes.write().unwrap_or_else(PoisonError::into_inner);
        if self.is_tracking.load(Ordering::Relaxed) {
            remote.log.start()?;
        }
        for mapping in self.mappings.touched(0, u64::MAX) {
            remote.map(&mapping)?;
        }
        remotes.retain(|remote| remote.strong_count() != 0);
        remotes.push(Arc::downgrade(remote));
        Ok(())
    }

    /// Answers an ioctl, whose answer by the container alone is `call`.
    pub(crate) fn ioctl(
        &self,
        nr: u32,
        arg: u64,
        call: impl FnOnce() -> Result<u32, Error>,
    ) -> Result<i32, Errno> {
        let call = || call().map(|value| value as i32).map_err(Error::errno);
        if !matches!(
            nr,
            VFIO_IOMMU_MAP_DMA | VFIO_IOMMU_UNMAP_DMA | VFIO_IOMMU_DIRTY_PAGES
        ) {
            return call();
        }
        let remotes = self.remotes.read().unwrap_or_else(PoisonError::into_inner);
        let remotes: &Vec<Arc<Remote>> = &remotes.iter().filter_map(Weak::upgrade).collect();
        let turn = || self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let _turn = (!remotes.is_empty()).then(turn);
        match nr {
            VFIO_IOMMU_MAP_DMA => self.map(remotes, arg, call),
            VFIO_IOMMU_UNMAP_DMA => self.unmap(remotes, arg, call),
            _ => self.dirty_pages(remotes, arg, call),
        }
    }

    fn map(
        &self,
        remotes: &[Arc<Remote>],
        arg: u64,
        call: impl FnOnce() -> Result<i32, Errno>,
    ) -> Result<i32, Errno> {
        let [_, vaddr, iova, size] = words(arg);
        let flags = flags(arg);
        let done = call()?;
        if flags & VFIO_DMA_MAP_FLAG_VADDR != 0 {
            self.mappings.move_to(iova, vaddr);
            return Ok(done);
        }
        let prot = Prot(flags & (VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE));
        let mapping = Mapping {
            iova,
            size,
            vaddr,
            prot,
        };
        for (k, remote) in remotes.iter().enumerate() {
            if let Err(errno) = remote.map(&mapping) {
                for remote in &remotes[..k] {
                    back("unmap", remote.unmap(&mapping));
                }
                let unmapped = self.container.unmap(iova, size);
                back("unmap", unmapped.map(|_| ()).map_err(Error::errno));
                return Err(errno);
            }
        }
        self.mappings.insert(mapping);
        Ok(done)
    }

    fn unmap(
        &self,
        remotes: &[Arc<Remote>],
        arg: u64,
        call: impl FnOnce() -> Result<i32, Errno>,
    ) -> Result<i32, Errno> {
        let [_, iova, size] = words(arg);
        let flags = flags(arg);
        if flags & VFIO_DMA_UNMAP_FLAG_VADDR != 0 {
            return call(); // the mappings stay
        }
        let gone = self.inside(flags, iova, size);
        let mut unmapped = Vec::new();
        let mut all = remotes
            .iter()
            .flat_map(|remote| gone.iter().map(move |mapping| (remote, mapping)));
        let done = all.try_for_each(|(remote, mapping)| {
            remote.unmap(mapping)?;
            unmapped.push((remote, mapping));
            Ok(())
        });
        let done = done.and_then(|()| call()).inspect_err(|_| {
            for (remote, mapping) in unmapped {
                back("map", remote.map(mapping));
            }
        })?;
        self.mappings.remove(&gone);
        Ok(done)
    }

    /// The mappings that an UNMAP removes. There is none if the range begins inside one: a
    /// container of version 2 refuses that, and one of version 1 unmaps nothing.
    fn inside(&self, flags: u32, iova: u64, size: u64) -> Vec<Mapping> {
        if flags & VFIO_DMA_UNMAP_FLAG_ALL != 0 {
            return self.mappings.touched(0, u64::MAX);
        }
        let last = size.checked_sub(1).and_then(|more| iova.checked_add(more));
        let touched = last.map(|last| self.mappings.touched(iova, last));
        let touched = touched.unwrap_or_default();
        match touched.first() {
            Some(first) if first.iova < iova => Vec::new(),
            _ => touched,
        }
    }

    fn dirty_pages(
        &self,
        remotes: &[Arc<Remote>],
        arg: u64,
        call: impl FnOnce() -> Result<i32, Errno>,
    ) -> Result<i32, Errno> {
        let was_tracking = self.is_tracking.load(Ordering::Relaxed);
        match flags(arg) {
            VFIO_IOMMU_DIRTY_PAGES_FLAG_START if !was_tracking => {
                let mut started = Vec::new();
                let all = remotes.iter().try_for_each(|remote| {
                    remote.log.start()?;
                    started.push(remote);
                    Ok(())
                });
                let done = all.and_then(|()| call());
                let done =
                    done.inspect_err(|_| started.iter().for_each(|remote| remote.log.stop()))?;
                self.is_tracking.store(true, Ordering::Relaxed);
                Ok(done)
            }
            VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP => {
                let done = call()?;
                self.is_tracking.store(false, Ordering::Relaxed);
                remotes.iter().for_each(|remote| remote.log.stop());
                Ok(done)
            }
            VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP => {
                let [iova, size] = words(arg.wrapping_add(8));
                let more = size.checked_sub(1);
                if let Some(last) = more.and_then(|more| iova.checked_add(more)) {
                    let mut all = remotes.iter();
                    all.try_for_each(|remote| remote.log.collect(iova, last))?;
                }
                call()
            }
            _ => call(),
        }
    }
}

/// The flags of an ioctl's structure.
fn flags(arg: u64) -> u32 {
    (words::<1>(arg)[0] >> 32) as u32
}

/// Says if what an ioctl had done could not be taken back after an error.
fn back(what: &str, done: Result<(), Errno>) {
    if let Err(errno) = done {
        trace!("not taken back: {what} {errno}");
    }
}
