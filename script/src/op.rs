// SPDX-License-Identifier: MIT OR Apache-2.0
//! The operations of scripts, and the world that they name.

/// 64 MiB that can be read and written: `mem`.
pub const MEM: u64 = 0x1_0000_0000;
/// Bytes at [`MEM`].
pub const MEM_SIZE: u64 = 64 << 20;
/// Where bitmaps go unless said otherwise: `buf`; `end` is its end.
pub const BUF: u64 = 0x2_0000_0000;
/// Bytes at [`BUF`].
pub const BUF_SIZE: u64 = 64 << 10;
/// Memory that can only be read: `ro`.
pub const RO: u64 = 0x2_1000_0000;
/// Bytes at [`RO`].
pub const RO_SIZE: u64 = 64 << 10;
/// Where nothing is: `hole`.
pub const HOLE: u64 = 0x2_2000_0000;
/// Where the arguments of ioctls go; no script names it.
pub const ARG: u64 = 0x2_3000_0000;
/// Bytes at [`ARG`].
pub const ARG_SIZE: u64 = 8 << 10;
/// Where `hugemem` maps: `huge`.
pub const HUGE: u64 = 0x3_0000_0000;
/// Where `bigbuf` maps: `bigb`.
pub const BIGB: u64 = 0x4_0000_0000;

/// A page of the CPU.
pub const PAGE: u64 = 4096;

/// What a device of the scripts is.
#[derive(Debug)]
pub struct DeviceSpec {
    /// What scripts call it.
    pub name: &'static str,
    /// Its group has an IOMMU whose page sizes these are; none: it is emulated.
    pub pgsizes: Option<u64>,
    /// Its driver has a dma_unmap callback.
    pub dma_unmap: bool,
    /// Its driver is the recorder's own, which can be told to pin.
    pub pins: bool,
}

const X86: Option<u64> = Some(1 << 12 | 1 << 21 | 1 << 30);

const fn spec(name: &'static str, pgsizes: Option<u64>, dma_unmap: bool, pins: bool) -> DeviceSpec {
    DeviceSpec {
        name,
        pgsizes,
        dma_unmap,
        pins,
    }
}

/// The devices, each in a group of its own. `big0` is behind an IOMMU that
/// knows no page below 64K.
pub const DEVICES: [DeviceSpec; 8] = [
    spec("pci0", X86, false, false),
    spec("pci1", X86, false, false),
    spec("xpci0", X86, true, true),
    spec("xpci1", X86, true, true),
    spec("emu0", None, true, true),
    spec("emu1", None, true, true),
    spec("emu2", None, false, true),
    spec("big0", Some(1 << 16 | 1 << 21), true, true),
];

/// A device, as an index into [`DEVICES`].
pub type DeviceIndex = usize;

/// First and last address that the IOMMUs translate.
pub const APERTURE: (u64, u64) = (0, (1 << 48) - 1);
/// The region that the IOMMUs keep for interrupts.
pub const MSI: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);
/// The first address that is no user address.
pub const USER_END: u64 = (1 << 56) - PAGE;

/// Where a GET or UNMAP wants its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Bytes of a page.
    pub pgsize: u64,
    /// Bytes of the bitmap.
    pub bsize: u64,
    /// Its address.
    pub data: u64,
    /// What [`BUF`] is filled with before.
    pub fill: u8,
    /// Words to show; 0: the bitmap and one more, at most 6.
    pub dump: u64,
}

/// How a container is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct New {
    /// Groups to attach, in order.
    pub devices: Vec<DeviceIndex>,
    /// IOMMU type to set after the first.
    pub kind: Option<u64>,
    /// Most bytes of bitmaps.
    pub budget: Option<u64>,
    /// Leave read-only mappings out of the all-dirty rule.
    pub skip_read_only: bool,
}

/// How dma_rw is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// By the script's process.
    Process,
    /// By a kernel thread.
    KernelThread,
    /// By a child of the script's process.
    Child,
}

/// What fails during the next operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The n-th allocation.
    Alloc,
    /// The n-th byte that is copied to a user or to a mapping.
    Copy,
    /// The n-th page that is pinned.
    Pin,
    /// The n-th call that maps pages in an IOMMU.
    Map,
    /// The n-th charge of locked memory.
    Charge,
}

/// What a device's dma_unmap callback does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Unpins what the device pinned in the range.
    Unpin,
    /// START.
    Start,
    /// STOP.
    Stop,
    /// Pins the first page of the range.
    Pin,
}

/// An operation. Numbers are what the interface takes, however wrong.
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
    /// START, STOP or any flags.
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
    /// A device says what it has written by itself.
    Mark {
        iova: u64,
        len: u64,
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
    /// `n` mappings of one page.
    MapN {
        n: u64,
        stride: u64,
        iova: u64,
    },
}

/// MAP_DMA; `ptr`: the argument is there, and not written before.
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

/// UNMAP_DMA.
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

/// DIRTY_PAGES with the payload of GET_BITMAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct GetArg {
    pub argsz: u32,
    pub flags: u32,
    pub iova: u64,
    pub size: u64,
    pub bitmap: Bitmap,
    pub ptr: Option<u64>,
    /// Put so many bytes of the argument at the very end of the buffer.
    pub hdrend: Option<u64>,
}

/// A typed report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ReportArg {
    pub iova: u64,
    pub size: u64,
    pub pgsize: u64,
    /// Words of the bitmap.
    pub words: u64,
    /// What they hold before; `None`: the callee is told that they are zero.
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
