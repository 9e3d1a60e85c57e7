// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the handles to a container and its devices share: the core and its lock,
//! the host's state, and the devices' callbacks.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ptr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirty_core::host::Prot;
use dirty_core::uapi::{DIRTY_BITMAP_SIZE_MAX, VFIO_SET_IOMMU};
use dirty_core::{Command, Error, Options, Outcome, Progress, Type1};

use super::core_lock::{Lock, Writer};
use super::heap::Heap;
use super::host::{Call, Caller, State};
use super::memory::LARGEST_PAGE;
use super::resident;
use crate::host_page::host_page;
use crate::process_memory::read_process;

pub(super) type Core = dirty_core::Container<Heap>;

/// Tells a device to unpin a range: first IOVA and bytes. If the device is about to
/// close, it waits for that.
pub(super) type Notify = Arc<dyn Fn(u64, u64) + Send + Sync>;

pub(super) struct Shared {
    core: Lock<Core>,
    pub(super) state: State,
    /// The open devices that have a callback, by their number.
    notify: Mutex<BTreeMap<u64, Notify>>,
    pub(super) next_device: AtomicU64,
    /// The limit that the bitmaps have, for whoever looks.
    pub(super) bitmap_budget: Option<u64>,
}

impl Shared {
    pub(super) fn new(options: Options, lock_pins: bool) -> Self {
        Shared {
            core: Lock::new(Core::new(Heap, options)),
            state: State::new(options.page_size, lock_pins),
            notify: Mutex::default(),
            next_device: AtomicU64::new(0),
            bitmap_budget: options.bitmap_budget,
        }
    }

    #[inline]
    pub(super) fn read<R>(&self, act: impl FnOnce(&Core) -> R) -> R {
        self.core.read(act)
    }

    pub(super) fn write(&self) -> Writer<'_, Core> {
        self.core.write()
    }

    /// The devices' callbacks.
    pub(super) fn callbacks(&self) -> MutexGuard<'_, BTreeMap<u64, Notify>> {
        self.notify.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses an IOMMU type if pages of the container cannot be made of the host's.
    pub(super) fn check_page(&self) -> Result<(), Error> {
        let (page, host) = (self.state.page, host_page());
        if page == host || (host..=LARGEST_PAGE).contains(&page) {
            Ok(())
        } else {
            Err(Error::WrongPageSize)
        }
    }

    /// Tells every device to unpin a range. No lock is held during a callback, so a
    /// callback may call the container, and another thread may call the device.
    ///
    /// # Errors
    ///
    /// `StillPinned` in a callback of this container: callbacks that call each other
    /// would have no end.
    fn notify(&self, iova: u64, size: u64) -> Result<(), Error> {
        let _telling = Telling::start(self).ok_or(Error::StillPinned)?;
        let callbacks: Vec<Notify> = self.callbacks().values().cloned().collect();
        for callback in callbacks {
            callback(iova, size);
        }
        Ok(())
    }

    fn call(&self) -> Call<'_> {
        Call::new(&self.state, Caller::Process)
    }

    /// Repeats a step of an unmap, and tells the devices to unpin in between, until
    /// the unmap is done. Returns how many bytes it unmapped.
    pub(super) fn unmap(
        &self,
        mut step: impl FnMut(&mut Type1<Heap>, &mut Call<'_>) -> Result<Progress, Error>,
    ) -> Result<u64, Error> {
        loop {
            let progress = step(self.write().backend_mut()?, &mut self.call())?;
            match progress {
                Progress::Done(size) => return Ok(size),
                Progress::Notify { iova, size } => self.notify(iova, size)?,
            }
        }
    }

    /// Answers an ioctl, and tells the devices to unpin where it needs that.
    ///
    /// The argument is read, and the pages of a bitmap are made resident, without the
    /// lock: so another thread does not wait for a page of the caller's memory.
    pub(super) fn ioctl(&self, nr: u32, arg: u64) -> Result<u32, Error> {
        if nr == VFIO_SET_IOMMU {
            self.check_page()?;
        }
        let iommu = self.read(Core::iommu_type);
        let mut command = Command::read(iommu, nr, arg, read_process)?;
        loop {
            if let Some((addr, bytes)) = command.bitmap() {
                make_resident(addr, bytes);
            }
            let outcome = self.write().run(&mut self.call(), &mut command)?;
            match outcome {
                Outcome::Done(value) => return Ok(value),
                Outcome::Notify { iova, size } => self.notify(iova, size)?,
            }
        }
    }
}

/// Makes a bitmap resident as far as it can be. The command tells what cannot.
fn make_resident(addr: u64, bytes: u64) {
    let bytes = bytes.min(DIRTY_BITMAP_SIZE_MAX); // a longer one is refused
    if let Some(end) = addr.checked_add(bytes) {
        let first = addr - addr % host_page().bytes();
        let _ = resident::populate(first, end - first, Prot::WRITE); // the kernel rounds up
    }
}

thread_local! {
    /// The addresses of the containers whose callbacks this thread is in.
    static TELLING: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// While this lives, this thread calls the callbacks of a container.
struct Telling;

impl Telling {
    /// `None` if this thread does so already.
    fn start(shared: &Shared) -> Option<Telling> {
        let address = ptr::from_ref(shared) as usize;
        TELLING.with_borrow_mut(|telling| {
            let new = !telling.contains(&address);
            new.then(|| telling.push(address))
        })?;
        Some(Telling)
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        TELLING.with_borrow_mut(|telling| telling.pop()); // they end in reverse order
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut call = Call::new(&self.state, Caller::KernelThread);
        self.core.get_mut().close(&mut call);
    }
}
