// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the handles to a container and its devices share: the core and its lock,
//! the host's state, and the devices' callbacks.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dirty_core::{Error, Options, Progress, Type1};

use super::heap::Heap;
use super::host::{Call, Caller, State};

pub(super) type Core = dirty_core::Container<Heap>;

/// Tells a device to unpin a range: first IOVA and bytes. It does nothing if the
/// device has closed.
pub(super) type Notify = Arc<dyn Fn(u64, u64) + Send + Sync>;

pub(super) struct Shared {
    core: RwLock<Core>,
    pub(super) state: State,
    /// The open devices that have a callback, by their number.
    notify: Mutex<BTreeMap<u64, Notify>>,
    pub(super) next_device: AtomicU64,
}

impl Shared {
    pub(super) fn new(options: Options) -> Self {
        Shared {
            core: RwLock::new(Core::new(Heap, options)),
            state: State::default(),
            notify: Mutex::default(),
            next_device: AtomicU64::new(0),
        }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Core> {
        self.core.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Core> {
        self.core.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The devices' callbacks.
    pub(super) fn callbacks(&self) -> MutexGuard<'_, BTreeMap<u64, Notify>> {
        self.notify.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells every device to unpin a range. No lock is held during a callback, so a
    /// callback may call the container, and another thread may call the device.
    pub(super) fn notify(&self, iova: u64, size: u64) {
        let callbacks: Vec<Notify> = self.callbacks().values().cloned().collect();
        for callback in callbacks {
            callback(iova, size);
        }
    }

    /// Repeats a step of an unmap, and tells the devices to unpin in between, until
    /// the unmap is done. Returns how many bytes it unmapped.
    pub(super) fn unmap(
        &self,
        mut step: impl FnMut(&mut Type1<Heap>, &mut Call<'_>) -> Result<Progress, Error>,
    ) -> Result<u64, Error> {
        let mut call = Call::new(&self.state, Caller::Process);
        loop {
            let progress = step(self.write().backend_mut()?, &mut call)?;
            match progress {
                Progress::Done(size) => return Ok(size),
                Progress::Notify { iova, size } => self.notify(iova, size),
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut call = Call::new(&self.state, Caller::KernelThread);
        let core = self.core.get_mut();
        core.unwrap_or_else(PoisonError::into_inner)
            .close(&mut call);
    }
}
