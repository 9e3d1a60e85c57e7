// SPDX-License-Identifier: MIT OR Apache-2.0
//! A container on the test host, with short ways to call it.

use dirty_core::host::{DeviceId, GroupId, Prot, UserMemory};
use dirty_core::uapi::*;
use dirty_core::{Command, Outcome};
use dirty_core::{Container, Dest, Errno, Error, Map, Options, PageSize, Progress};
use dirty_core::{Target, Type1, Unmap};

use super::host::Books;
use super::{words, Spec, TestHost, TestMemory};

/// Bytes of a CPU page.
pub(crate) const PAGE: u64 = 4096;
/// Where arguments of ioctls are put: one page, then a hole.
pub(crate) const ARG: u64 = 0x1000_0000;
/// Where ioctls write bitmaps.
pub(crate) const BITMAP: u64 = 0x2000_0000;
/// Bytes at [`BITMAP`]; then a hole.
pub(crate) const BITMAP_BYTES: u64 = 0x10000;
/// The user address behind iova 0; see [`vaddr`].
const VADDR: u64 = 1 << 44;

/// The user address that [`Rig::map`] puts behind an iova.
pub(crate) fn vaddr(iova: u64) -> u64 {
    VADDR + iova % (1 << 40)
}

/// A page size.
pub(crate) fn pgsize(bytes: u64) -> PageSize {
    PageSize::new(bytes).expect("a power of two")
}

/// The errno of a result; 0 for success.
pub(crate) fn errno<T>(result: Result<T, impl Into<Error>>) -> Errno {
    result.err().map_or(Errno(0), |e| e.into().errno())
}

/// The bytes of a structure: its 32-bit fields, then its 64-bit fields.
pub(crate) fn pack(u32s: &[u32], u64s: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    u32s.iter().for_each(|v| bytes.extend(v.to_ne_bytes()));
    u64s.iter().for_each(|v| bytes.extend(v.to_ne_bytes()));
    bytes
}

/// The three ways to get a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Via {
    Ioctl,
    Words,
    Zeroed,
}

impl Via {
    pub(crate) const ALL: [Via; 3] = [Via::Ioctl, Via::Words, Via::Zeroed];
}

/// Everything that a failed call must not change, except dirty bits, which a
/// snapshot would clear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    books: Books,
    info: Vec<u8>,
    tracking: Option<PageSize>,
}

/// A container, its host and its allocator. When it is dropped, nothing may be
/// left in the host or the allocator.
pub(crate) struct Rig {
    pub(crate) container: Container<TestMemory>,
    pub(crate) host: TestHost,
    pub(crate) mem: TestMemory,
}

impl Rig {
    /// A container without groups.
    pub(crate) fn empty(options: Options) -> Rig {
        let mem = TestMemory::default();
        let mut host = TestHost::default();
        host.page = options.page_size.bytes();
        host.add_memory(ARG, PAGE);
        host.add_memory(BITMAP, BITMAP_BYTES);
        Rig {
            container: Container::new(mem.clone(), options),
            host,
            mem,
        }
    }

    /// A container of type `kind` with groups 0, 1, ..., each with an open
    /// device that may pin. A group without a spec is emulated.
    pub(crate) fn new(options: Options, kind: u64, groups: &[Option<Spec>]) -> Rig {
        let mut rig = Rig::empty(options);
        for (group, spec) in (0..).zip(groups) {
            rig.attach(group, spec.clone()).expect("attach");
        }
        rig.container.set_iommu(&mut rig.host, kind).expect("type");
        (0..groups.len() as u64).for_each(|group| rig.open(group).expect("open"));
        rig
    }

    /// A version 2 container with these groups.
    pub(crate) fn with(groups: &[Option<Spec>]) -> Rig {
        Rig::new(Options::default(), VFIO_TYPE1v2_IOMMU, groups)
    }

    /// A version 2 container with one emulated group.
    pub(crate) fn emulated() -> Rig {
        Rig::with(&[None])
    }

    /// Adds a group.
    pub(crate) fn attach(&mut self, group: u64, spec: Option<Spec>) -> Result<(), Error> {
        let emulated = spec.is_none();
        if let Some(spec) = spec {
            self.host.specs.insert(group, spec);
        }
        self.container
            .attach_group(&mut self.host, GroupId(group), emulated)
    }

    /// Opens a device that may pin, with the number of its group.
    pub(crate) fn open(&mut self, group: u64) -> Result<(), Error> {
        self.container
            .open_device(DeviceId(group), GroupId(group), true)
    }

    /// Closes the device of a group and removes the group.
    pub(crate) fn detach(&mut self, group: u64) {
        self.container.close_device(DeviceId(group));
        let detached = self.container.detach_group(&mut self.host, GroupId(group));
        detached.expect("detach");
    }

    /// The backend, which must be set.
    pub(crate) fn backend(&self) -> &Type1<TestMemory> {
        self.container.backend().expect("an IOMMU type")
    }

    pub(crate) fn backend_mut(&mut self) -> &mut Type1<TestMemory> {
        self.container.backend_mut().expect("an IOMMU type")
    }

    /// The page size of the bitmaps, if the container tracks.
    pub(crate) fn tracking(&self) -> Option<PageSize> {
        self.container.backend().ok()?.tracking()
    }

    pub(crate) fn try_start(&mut self) -> Result<(), Error> {
        self.container.backend_mut()?.start(&mut self.host)
    }

    pub(crate) fn try_map(&mut self, map: &Map) -> Result<(), Error> {
        self.container.backend_mut()?.map(&mut self.host, map)
    }

    pub(crate) fn unmap_step(&mut self, unmap: &mut Unmap) -> Result<Progress, Error> {
        self.container.backend_mut()?.unmap(&mut self.host, unmap)
    }

    /// Maps a range to a user address of its own, for reading and writing.
    pub(crate) fn map(&mut self, iova: u64, size: u64) -> Result<(), Error> {
        self.map_prot(iova, size, Prot::READ_WRITE)
    }

    /// As [`map`](Rig::map), with the protection `prot`.
    pub(crate) fn map_prot(&mut self, iova: u64, size: u64, prot: Prot) -> Result<(), Error> {
        let map = Map {
            iova,
            vaddr: vaddr(iova),
            size,
            prot: Some(prot),
        };
        self.try_map(&map)
    }

    /// Maps a range, and adds the memory behind it to the process.
    pub(crate) fn map_memory(&mut self, iova: u64, size: u64) {
        self.host.add_memory(vaddr(iova), size);
        self.map(iova, size).expect("map");
    }

    /// Pins `n` pages for the device of group 0. Returns their pfns.
    pub(crate) fn pin(&mut self, iova: u64, n: usize) -> Result<Vec<u64>, Error> {
        self.pin_by(0, iova, n)
    }

    /// Pins `n` pages for the device of a group.
    pub(crate) fn pin_by(&mut self, group: u64, iova: u64, n: usize) -> Result<Vec<u64>, Error> {
        let mut pfns = vec![0; n];
        let device = DeviceId(group);
        self.container
            .pin_pages(&mut self.host, device, iova, Prot::READ, &mut pfns)?;
        Ok(pfns)
    }

    pub(crate) fn unpin(&mut self, iova: u64, n: u64) {
        let unpinned = self
            .container
            .unpin_pages(&mut self.host, DeviceId(0), iova, n);
        unpinned.expect("unpin");
    }

    pub(crate) fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), Error> {
        let written = self
            .container
            .write(&mut self.host, DeviceId(0), iova, data);
        written.map_err(Error::from)
    }

    pub(crate) fn start(&mut self) {
        self.try_start().expect("start");
    }

    pub(crate) fn stop(&mut self) {
        let backend = self.container.backend_mut().expect("an IOMMU type");
        backend.stop(&mut self.host).expect("stop");
    }

    /// Marks one page.
    pub(crate) fn mark(&mut self, iova: u64) {
        self.backend().mark(iova, 1).expect("mark");
    }

    /// Puts an argument at [`ARG`].
    pub(crate) fn put(&mut self, arg: &[u8]) {
        self.host.copy_to_user(ARG, arg).expect("argument");
    }

    /// Makes an ioctl with `arg` as its argument. Devices unpin in their
    /// callback.
    pub(crate) fn ioctl(&mut self, nr: u32, arg: &[u8]) -> Result<u32, Error> {
        self.put(arg);
        self.ioctl_at(nr, ARG, |rig, iova, size| rig.unpin(iova, size / PAGE))
    }

    /// Makes an ioctl whose argument is at `addr`. `dma_unmap` is what devices
    /// do in their callback.
    pub(crate) fn ioctl_at(
        &mut self,
        nr: u32,
        addr: u64,
        mut dma_unmap: impl FnMut(&mut Rig, u64, u64),
    ) -> Result<u32, Error> {
        let iommu = self.container.iommu_type();
        let mut command = Command::read(iommu, nr, addr, |addr, buf| {
            self.host.copy_from_user(addr, buf)
        })?;
        loop {
            match self.container.run(&mut self.host, &mut command)? {
                Outcome::Done(value) => return Ok(value),
                Outcome::Notify { iova, size } => dma_unmap(self, iova, size),
            }
        }
    }

    /// Removes the mappings of a range. Devices unpin in their callback.
    pub(crate) fn unmap(&mut self, iova: u64, size: u64) -> Result<u64, Error> {
        let target = Target::Range { iova, size };
        self.unmap_with(target, |rig, iova, size| rig.unpin(iova, size / PAGE))
    }

    /// Removes mappings. `dma_unmap` is what devices do in their callback.
    pub(crate) fn unmap_with(
        &mut self,
        target: Target,
        mut dma_unmap: impl FnMut(&mut Rig, u64, u64),
    ) -> Result<u64, Error> {
        let mut unmap = Unmap::new(target);
        loop {
            match self.unmap_step(&mut unmap)? {
                Progress::Done(size) => return Ok(size),
                Progress::Notify { iova, size } => dma_unmap(self, iova, size),
            }
        }
    }

    /// The argument of GET_BITMAP.
    pub(crate) fn get_arg(iova: u64, size: u64, page: u64, bytes: u64) -> Vec<u8> {
        pack(&[48, 4], &[iova, size, page, bytes, BITMAP])
    }

    /// The argument of UNMAP_DMA with a bitmap.
    pub(crate) fn unmap_arg(iova: u64, size: u64, page: u64, bytes: u64) -> Vec<u8> {
        pack(&[48, 1], &[iova, size, page, bytes, BITMAP])
    }

    /// GET_BITMAP into `words`.
    pub(crate) fn get(
        &mut self,
        via: Via,
        iova: u64,
        size: u64,
        page: u64,
        words: &mut [u64],
    ) -> Result<(), Error> {
        let report = match via {
            Via::Ioctl => {
                let arg = Rig::get_arg(iova, size, page, words.len() as u64 * 8);
                return self.through_user(words, |rig| {
                    rig.ioctl(VFIO_IOMMU_DIRTY_PAGES, &arg).map(|_| ())
                });
            }
            Via::Words => Dest::Words(words),
            Via::Zeroed => Dest::Zeroed(words),
        };
        let host = &mut self.host;
        self.container
            .backend_mut()?
            .get_bitmap(host, iova, size, pgsize(page), report)
    }

    /// UNMAP_DMA with a bitmap into `words`. Returns the bytes unmapped.
    pub(crate) fn harvest(
        &mut self,
        via: Via,
        iova: u64,
        size: u64,
        page: u64,
        words: &mut [u64],
    ) -> Result<u64, Error> {
        if via == Via::Ioctl {
            let arg = Rig::unmap_arg(iova, size, page, words.len() as u64 * 8);
            return self.through_user(words, |rig| {
                rig.ioctl(VFIO_IOMMU_UNMAP_DMA, &arg)?;
                Ok(rig.read_u64(ARG + 16))
            });
        }
        let mut unmap = Unmap::new(Target::Range { iova, size });
        loop {
            let report = match via {
                Via::Zeroed => Dest::Zeroed(words),
                _ => Dest::Words(words),
            };
            let step = self.container.backend_mut()?.unmap_dirty(
                &mut self.host,
                &mut unmap,
                pgsize(page),
                report,
            )?;
            match step {
                Progress::Done(size) => return Ok(size),
                Progress::Notify { iova, size } => self.unpin(iova, size / PAGE),
            }
        }
    }

    fn through_user<T>(
        &mut self,
        words: &mut [u64],
        call: impl FnOnce(&mut Rig) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let no_write = self.host.no_write.take();
        self.write_words(words);
        self.host.no_write = no_write;
        let result = call(self);
        words.copy_from_slice(&self.read_words(words.len()));
        result
    }

    /// Reports a range by the ioctl, at the granularity of tracking. Returns
    /// the pages that were dirty; they are clean afterwards.
    pub(crate) fn dirty(&mut self, iova: u64, size: u64) -> Vec<u64> {
        let page = self.tracking().expect("tracking").bytes();
        let mut words = vec![0; (size / page).div_ceil(64) as usize];
        let got = self.get(Via::Ioctl, iova, size, page, &mut words);
        got.expect("get");
        words::bits(&words)
    }

    /// The first `n` words of the user's bitmap.
    pub(crate) fn read_words(&mut self, n: usize) -> Vec<u64> {
        let at = (BITMAP..).step_by(8).take(n);
        at.map(|addr| self.read_u64(addr)).collect()
    }

    pub(crate) fn write_words(&mut self, words: &[u64]) {
        let bytes = pack(&[], words);
        self.host.copy_to_user(BITMAP, &bytes).expect("bitmap");
    }

    pub(crate) fn read_u64(&mut self, addr: u64) -> u64 {
        let mut bytes = [0; 8];
        self.host.copy_from_user(addr, &mut bytes).expect("user");
        u64::from_ne_bytes(bytes)
    }

    /// The answer of GET_INFO with room for everything; zeros if no type is
    /// set.
    pub(crate) fn info(&mut self) -> Vec<u8> {
        let got = self.ioctl(VFIO_IOMMU_GET_INFO, &pack(&[1024, 0], &[0; 127]));
        let mut bytes = vec![0; 1024];
        match got {
            Ok(_) => self.host.copy_from_user(ARG, &mut bytes).expect("info"),
            Err(e) => assert_eq!(e, Error::NoIommu),
        }
        bytes
    }

    /// How many more mappings are possible, as capability 3 says.
    pub(crate) fn dma_avail(&mut self) -> u32 {
        let info = self.info();
        let avail = info[64..68].try_into().expect("4 bytes");
        u32::from_ne_bytes(avail)
    }

    /// Everything that can be seen of container and host without changing them.
    pub(crate) fn snapshot(&mut self) -> Snapshot {
        Snapshot {
            books: self.host.books.clone(),
            info: self.info(),
            tracking: self.tracking(),
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return; // a second panic would hide the first
        }
        self.container.close(&mut self.host);
        assert_eq!(self.host.books, Books::default(), "left after close");
        let empty = Container::new(self.mem.clone(), Options::default());
        drop(std::mem::replace(&mut self.container, empty));
        assert_eq!(self.mem.live(), 0, "memory left after drop");
    }
}
