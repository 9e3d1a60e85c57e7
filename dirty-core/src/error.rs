// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a call failed, by cause. The errno is made at the edge.

use core::fmt;

/// A Linux error number, positive.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident = $value:literal),* $(,)?) => {
        impl Errno {
            $(#[doc = concat!("`", stringify!($name), "`")] pub const $name: Errno = Errno($value);)*

            /// The symbolic name, for a number that the core or its hosts use.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    EPERM = 1, ENOENT = 2, ESRCH = 3, EINTR = 4, EIO = 5, ENXIO = 6, E2BIG = 7, EBADF = 9,
    EAGAIN = 11, ENOMEM = 12, EACCES = 13, EFAULT = 14, EBUSY = 16, EEXIST = 17, ENODEV = 19,
    EINVAL = 22, ENOTTY = 25, ENOSPC = 28, ERANGE = 34, EOVERFLOW = 75, EOPNOTSUPP = 95,
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "E{}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! errors {
    ($($(#[$doc:meta])* $name:ident => $errno:ident, $text:literal;)*) => {
        /// Why a call failed. [`Error::errno`] is what Linux answers.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Error {
            $(#[doc = $text] #[doc = ""] #[doc = concat!("`", stringify!($errno), "`")] $(#[$doc])* $name,)*
            /// The host could not pin a page.
            Pin(Errno),
            /// The host refused to account locked memory.
            Charge(Errno),
            /// The IOMMU driver failed.
            Iommu(Errno),
            /// The host has no address space for a mapping.
            Mm(Errno),
            /// A device that migrates failed.
            Device(Errno),
        }

        impl Error {
            /// Every cause whose errno does not come from the host.
            pub const ALL: &'static [Error] = &[$(Error::$name,)*];

            /// What Linux answers for this cause.
            #[must_use]
            pub const fn errno(self) -> Errno {
                match self {
                    $(Error::$name => Errno::$errno,)*
                    Error::Pin(e)
                    | Error::Charge(e)
                    | Error::Iommu(e)
                    | Error::Mm(e)
                    | Error::Device(e) => e,
                }
            }
        }

        impl fmt::Display for Error {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Error::$name => f.write_str($text),)*
                    Error::Pin(e) => write!(f, "a page could not be pinned ({e})"),
                    Error::Charge(e) => write!(f, "locked memory could not be charged ({e})"),
                    Error::Iommu(e) => write!(f, "the IOMMU driver failed ({e})"),
                    Error::Mm(e) => write!(f, "no address space to map ({e})"),
                    Error::Device(e) => write!(f, "the device failed ({e})"),
                }
            }
        }
    };
}

errors! {
    BadAddress => EFAULT, "an argument or the bitmap lies at a bad address";
    ShortArgsz => EINVAL, "argsz is smaller than the structure";
    UnknownFlags => EINVAL, "a flag is unknown";
    FlagCombination => EINVAL, "these flags do not go together";
    AllTakesNoRange => EINVAL, "unmapping everything takes no iova and no size";
    ZeroSize => EINVAL, "the size is zero";
    Wraps => EOVERFLOW, "the range wraps around the end of the address space";
    Misaligned => EINVAL, "an address or size is not a multiple of the page size";
    NoMapping => ENOENT, "no mapping is there";
    VaddrMismatch => EINVAL, "the mapping has a valid vaddr, or another range";
    Overlap => EEXIST, "the range overlaps a mapping";
    MappingLimit => ENOSPC, "the container holds as many mappings as it may";
    ForbiddenIova => EINVAL, "the range is not inside one valid iova range";
    NoMemory => ENOMEM, "out of memory";
    BitmapBudget => ENOMEM, "the bitmaps would exceed the container's budget";
    TooManyPages => EINVAL, "a mapping has more than 2^31-1 pages, too many for a bitmap";
    NotUserRange => EINVAL, "the bitmap is not in the range of user addresses";
    BitmapSize => EINVAL, "the bitmap's size does not fit the range";
    WrongPageSize => EINVAL, "the page size is not the container's";
    NotTracking => EINVAL, "dirty-page tracking is off";
    Bisects => EINVAL, "the range starts or ends inside a mapping";
    EmulatedGroup => EBUSY, "an emulated group needs every vaddr to stay valid";
    VaddrInvalid => EBUSY, "a mapping's vaddr is invalid at present";
    StillPinned => EBUSY, "a device keeps pages of the range pinned";
    NotV2 => EACCES, "a version 1 container has no dirty pages and no pins";
    NoIommu => EINVAL, "no IOMMU type is set";
    IommuAlreadySet => EINVAL, "an IOMMU type is set already";
    NoGroup => EINVAL, "the container has no group";
    NoSuchIommu => ENODEV, "no backend offers this IOMMU type";
    ExtensionAsIommu => EINVAL, "this number is an extension, not an IOMMU type";
    UnknownIoctl => ENOTTY, "the ioctl number is unknown";
    DuplicateGroup => EINVAL, "the group is attached already";
    UnknownGroup => EINVAL, "the group is not in the container";
    GroupBusy => EBUSY, "a device of the group is open";
    UnknownDevice => EINVAL, "the device is not open";
    DuplicateDevice => EBUSY, "the device is open already";
    NoDmaUnmap => EINVAL, "a device without a dma_unmap callback may not pin";
    NoPages => EINVAL, "no pages asked for";
    TooManyPins => E2BIG, "more pages than one pin call may take";
    PinCount => EOVERFLOW, "a page is pinned as often as can be counted";
    Unmapped => EINVAL, "an address is not mapped";
    Denied => EPERM, "the mapping does not allow this access";
    MmGone => EPERM, "the mapping's process has ended";
    OtherMm => EFAULT, "the mapping belongs to another process";
    NoStructPage => EINVAL, "the page is device memory";
    ReservedRegion => EINVAL, "a mapping lies in a reserved region of the group";
    Aperture => EINVAL, "the group's addresses do not cover the mappings";
    NoPageSize => EINVAL, "the domains have no page size in common that fits the mappings";
    UnsafeInterrupts => EPERM, "the group's interrupts are not isolated";
    UnknownFeature => ENOTTY, "the device does not have this feature";
    UnknownState => EINVAL, "the device does not have this migration state";
    NoTransition => EINVAL, "no way leads from this migration state to that one";
    DeviceFailed => EINVAL, "the device failed and must be reset";
    NotPreCopy => EINVAL, "the device is not in pre-copy, or does not have it";
    RegionAccess => EINVAL, "the migration region has no register or data of this size there";
    RegionOrder => EINVAL, "the migration region does not take this access at this point";
}

impl core::error::Error for Error {}

/// An allocation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory;

impl From<NoMemory> for Error {
    fn from(_: NoMemory) -> Error {
        Error::NoMemory
    }
}
