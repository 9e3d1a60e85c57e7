// SPDX-License-Identifier: MIT OR Apache-2.0
//! The operations of scripts, and the memory and devices that they name.

/// `mem`: memory that can be read and written.
pub const MEM: u64 = 0x1_0000_0000;
/// Bytes at [`MEM`].
pub const MEM_SIZE: u64 = 64 << 20;
/// `buf`: where bitmaps go by default. `end` is the first address after it.
pub const BUF: u64 = 0x2_0000_0000;
/// Bytes at [`BUF`].
pub const BUF_SIZE: u64 = 64 << 10;
/// `ro`: memory that can only be read.
pub const RO: u64 = 0x2_1000_0000;
/// Bytes at [`RO`].
pub const RO_SIZE: u64 = 64 << 10;
/// `hole`: an address where nothing is mapped.
pub const HOLE: u64 = 0x2_2000_0000;
/// Where the arguments of ioctls are put. Scripts have no name for it.
pub const ARG: u64 = 0x2_3000_0000;
/// Bytes at [`ARG`].
pub const ARG_SIZE: u64 = 8 << 10;
/// `huge`: where `hugemem` maps memory.
pub const HUGE: u64 = 0x3_0000_0000;
/// `bigb`: where `bigbuf` maps memory.
pub const BIGB: u64 = 0x4_0000_0000;

/// Bytes of a CPU page.
pub const PAGE: u64 = 4096;

/// A device that scripts can name.
#[derive(Debug)]
pub struct DeviceSpec {
    /// Its name in scripts.
    pub name: &'static str,
    /// The page sizes of its group's IOMMU, bit k for 2^k bytes; `None` for an
    /// emulated group.
    pub pgsizes: Option<u64>,
    /// First and last address that its IOMMU translates.
    pub aperture: (u64, u64),
    /// First and last address of each region that its IOMMU reserves.
    pub reserved: &'static [(u64, u64)],
    /// Whether its IOMMU can tell which pages were written by DMA.
    pub dirty_tracking: bool,
    /// Whether its driver has a dma_unmap callback.
    pub dma_unmap: bool,
    /// Whether its driver is the test driver of the recordings, which can be
    /// told to pin, read and write.
    pub pins: bool,
}

/// The page sizes of an x86 IOMMU: 4K, 2M and 1G.
const X86: Option<u64> = Some(1 << 12 | 1 << 21 | 1 << 30);

const fn spec(name: &'static str, pgsizes: Option<u64>, dma_unmap: bool, pins: bool) -> DeviceSpec {
    DeviceSpec {
        name,
        pgsizes,
        aperture: APERTURE,
        reserved: &[MSI],
        dirty_tracking: pgsizes.is_some() && pins,
        dma_unmap,
        pins,
    }
}

/// The devices, each alone in its group. Groups whose IOMMUs have the same page
/// sizes and apertures can share a domain. The IOMMU of `big0` has no page below 64K. That of
/// `low0` translates a narrow range, in which a part is reserved. That of `four0`
/// has pages of 4K only, and reserves the ends of its range and not [`MSI`].
pub const DEVICES: [DeviceSpec; 10] = [
    spec("pci0", X86, false, false),
    spec("pci1", X86, false, false),
    spec("xpci0", X86, true, true),
    spec("xpci1", X86, true, true),
    spec("emu0", None, true, true),
    spec("emu1", None, true, true),
    spec("emu2", None, false, true),
    spec("big0", Some(1 << 16 | 1 << 21), true, true),
    DeviceSpec {
        aperture: (0x4000, (1 << 36) - 1),
        reserved: &[(0xc_8000, 0xc_ffff), MSI],
        ..spec("low0", Some(1 << 12 | 1 << 16 | 1 << 21), true, true)
    },
    DeviceSpec {
        reserved: &[(0, 0xfff), (APERTURE.1 - 0xffff, APERTURE.1)],
        ..spec("four0", Some(1 << 12), true, true)
    },
];

/// A device, as an index into [`DEVICES`].
pub type DeviceIndex = usize;

/// `pci0`.
pub const PCI0: DeviceIndex = 0;
/// `pci1`.
pub const PCI1: DeviceIndex = 1;
/// `xpci0`.
pub const XPCI0: DeviceIndex = 2;
/// `xpci1`.
pub const XPCI1: DeviceIndex = 3;
/// `emu0`.
pub const EMU0: DeviceIndex = 4;
/// `emu1`.
pub const EMU1: DeviceIndex = 5;
/// `emu2`.
pub const EMU2: DeviceIndex = 6;
/// `big0`.
pub const BIG0: DeviceIndex = 7;
/// `low0`.
pub const LOW0: DeviceIndex = 8;
/// `four0`.
pub const FOUR0: DeviceIndex = 9;

/// First and last address that most IOMMUs translate.
pub const APERTURE: (u64, u64) = (0, (1 << 48) - 1);
/// First and last address of the region that most IOMMUs reserve for
/// interrupts.
pub const MSI: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);
/// The end of user addresses: the first address that is none.
pub const USER_END: u64 = (1 << 56) - PAGE;

/// The bitmap of a GET_BITMAP or UNMAP_DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Bytes of the page that a bit stands for.
    pub pgsize: u64,
    /// Bytes of the bitmap.
    pub bsize: u64,
    /// Its address.
    pub data: u64,
    /// The byte that [`BUF`] is filled with before the call.
    pub fill: u8,
    /// How many words the reply shows; 0 stands for the bitmap's words and one
    /// more, at most 6.
    pub dump: u64,
}

/// The container that `new` opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct New {
    /// Groups to attach, in order.
    pub devices: Vec<DeviceIndex>,
    /// IOMMU type to set after the first; `None`: set no type, open no device.
    pub kind: Option<u64>,
    /// Most bytes of bitmaps (rule D5); `None` for any amount.
    pub budget: Option<u64>,
    /// Leave read-only mappings out of the all-dirty rule (rule D10).
    pub skip_read_only: bool,
    /// Ask IOMMUs that track for dirty pages (rule D12).
    pub iommu_dirty_tracking: bool,
}

/// Who calls dma_rw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// The script's process.
    Process,
    /// A kernel thread.
    KernelThread,
    /// A child of the script's process, which has another address space.
    Child,
}

/// What fails during the next operation, counted from 1, and its errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The n-th allocation: ENOMEM.
    Alloc,
    /// The n-th byte that is copied to the user or to a mapping: EFAULT.
    Copy,
    /// The n-th page that is pinned: EFAULT.
    Pin,
    /// The n-th call that maps pages in an IOMMU: EIO.
    Map,
    /// The n-th charge of locked memory: EINTR.
    Charge,
    /// The n-th domain whose dirty tracking is switched on: EIO.
    Track,
}

/// An action of a device's dma_unmap callback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Unpins what the device has pinned in the range.
    Unpin,
    /// Starts dirty tracking.
    Start,
    /// Stops dirty tracking.
    Stop,
    /// Pins the first page of the range, for reading.
    Pin,
}

/// An operation. Its numbers go to the interface as they are, right or wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // fields are the arguments of the interface
pub enum Op {
    New(New),
    SetIommu(u64),
    Attach {
        device: DeviceIndex,
        open: bool,
    },
    Detach(DeviceIndex),
    CloseDevice(DeviceIndex),
    GetDevice(DeviceIndex),
    Info {
        argsz: u32,
        null: bool,
    },
    Ext(u64),
    Raw {
        nr: u32,
        arg: u64,
    },
    Map(MapArg),
    Unmap(UnmapArg),
    /// DIRTY_PAGES without the payload of GET_BITMAP: START, STOP or any flags.
    Dirty {
        argsz: u32,
        flags: u32,
        ptr: Option<u64>,
    },
    Get(GetArg),
    /// GET_BITMAP as a typed call: any page size.
    Report(ReportArg),
    /// UNMAP_DMA with bitmap as a typed call.
    Harvest(ReportArg),
    Pin {
        device: DeviceIndex,
        iova: u64,
        n: i32,
        prot: u32,
    },
    Unpin {
        device: DeviceIndex,
        iova: u64,
        n: i32,
    },
    Rw {
        device: DeviceIndex,
        iova: u64,
        len: u64,
        write: bool,
        caller: Caller,
    },
    /// A device says that it has written a range by itself.
    Mark {
        iova: u64,
        len: u64,
    },
    /// A device writes by DMA, by way of its IOMMU. If `late` is set, it does so
    /// during the next operation, just before each unmap in its IOMMU.
    Dma {
        device: DeviceIndex,
        iova: u64,
        len: u64,
        late: bool,
    },
    OnUnmap {
        device: DeviceIndex,
        actions: Vec<Action>,
    },
    Fault {
        kind: FaultKind,
        n: u64,
    },
    Stat(DeviceIndex),
    MemLock {
        limit: u64,
        keep_cap: bool,
    },
    VmLck,
    EntryLimit(u32),
    HugeMem,
    BigBuf(u64),
    Peek {
        addr: u64,
        n: u32,
    },
    Poke {
        addr: u64,
        bytes: Vec<u8>,
    },
    /// `n` mappings of one page, `stride` bytes apart.
    MapN {
        n: u64,
        stride: u64,
        iova: u64,
    },
}

/// MAP_DMA. With `ptr` the argument is read from that address, and the other
/// fields are not put there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct MapArg {
    pub argsz: u32,
    pub flags: u32,
    pub vaddr: u64,
    pub iova: u64,
    pub size: u64,
    pub ptr: Option<u64>,
}

/// UNMAP_DMA; `ptr` as in [`MapArg`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct UnmapArg {
    pub argsz: u32,
    pub flags: u32,
    pub iova: u64,
    pub size: u64,
    pub bitmap: Bitmap,
    pub ptr: Option<u64>,
}

/// DIRTY_PAGES with the payload of GET_BITMAP; `ptr` as in [`MapArg`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct GetArg {
    pub argsz: u32,
    pub flags: u32,
    pub iova: u64,
    pub size: u64,
    pub bitmap: Bitmap,
    pub ptr: Option<u64>,
    /// Puts so many bytes of the argument at the very end of [`BUF`], and has
    /// the ioctl read it there.
    pub hdrend: Option<u64>,
}

/// A report, or an unmap with a report, as a typed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ReportArg {
    pub iova: u64,
    pub size: u64,
    pub pgsize: u64,
    /// Words of the bitmap.
    pub words: u64,
    /// The byte that they are filled with; `None`: they are zero and the callee
    /// is told so.
    pub fill: Option<u8>,
}

impl MapArg {
    /// Maps `size` bytes at `iova` to `vaddr`.
    #[must_use]
    pub fn new(iova: u64, size: u64, vaddr: u64, flags: u32) -> Self {
        MapArg {
            argsz: 32,
            flags,
            vaddr,
            iova,
            size,
            ptr: None,
        }
    }
}
