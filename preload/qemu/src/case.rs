// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a case is: which QEMUs, which device, what happens, and what must come of it.

use crate::qemu::Version;

/// Who knows which pages are dirty.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tracking {
    Container,
    Device,
}

/// What happens in a case.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Story {
    /// One migration, in which the guest works.
    Migrate,
    /// One is cancelled, the guest goes on, and the next one arrives.
    CancelAndAgain,
    /// The next ioctl of this name fails with this errno; the guest goes on, and the next
    /// migration arrives.
    FailAndAgain(&'static str, i32),
    /// QEMU refuses: the error has these words.
    Refused(&'static str),
    /// Every other page is pinned while the guest works.
    ScatteredPins,
    /// The engine writes a page and marks nothing.
    Unmarked,
}

/// What must come of a case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Expected {
    Same,
    Stale,
    Refused,
}

impl Expected {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Expected::Same => "same",
            Expected::Stale => "stale",
            Expected::Refused => "refused",
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) quick: bool,
    pub(crate) from: Version,
    pub(crate) to: Version,
    pub(crate) tracking: Tracking,
    /// `VFIO_PRELOAD_MIGRATION`.
    pub(crate) migration: &'static str,
    /// `VFIO_PRELOAD_GROUP`.
    pub(crate) group: &'static str,
    pub(crate) devices: usize,
    /// The answers whose dirty bits are lost.
    pub(crate) lose: Option<&'static str>,
    /// Words for the guest.
    pub(crate) guest: &'static str,
    /// More arguments of both QEMUs.
    pub(crate) arguments: &'static [&'static str],
    /// Capabilities of the migration, on both sides.
    pub(crate) capabilities: &'static [&'static str],
    pub(crate) story: Story,
    pub(crate) expected: Expected,
}

impl Case {
    pub(crate) fn viommu(&self) -> bool {
        self.guest.contains("viommu")
    }
}

const fn case(name: &'static str) -> Case {
    Case {
        name,
        quick: false,
        from: Version::V11,
        to: Version::V11,
        tracking: Tracking::Container,
        migration: "v2",
        group: "emulated",
        devices: 1,
        lose: None,
        guest: "stream",
        arguments: &[],
        capabilities: &[],
        story: Story::Migrate,
        expected: Expected::Same,
    }
}

const VTD: &[&str] = &["-device", "intel-iommu,caching-mode=on"];

/// Every case.
pub(crate) const CASES: &[Case] = &[
    Case {
        quick: true,
        ..case("container tracking")
    },
    Case {
        quick: true,
        lose: Some("get"),
        expected: Expected::Stale,
        ..case("container tracking, bits of GET lost")
    },
    Case {
        quick: true,
        tracking: Tracking::Device,
        ..case("device log")
    },
    Case {
        quick: true,
        tracking: Tracking::Device,
        lose: Some("log"),
        expected: Expected::Stale,
        ..case("device log, bits of REPORT lost")
    },
    Case {
        quick: true,
        story: Story::CancelAndAgain,
        ..case("cancel, and again")
    },
    Case {
        quick: true,
        story: Story::CancelAndAgain,
        lose: Some("get"),
        expected: Expected::Stale,
        ..case("cancel, and again, bits of GET lost")
    },
    Case {
        quick: true,
        guest: "viommu",
        arguments: VTD,
        ..case("virtual IOMMU, bitmaps of UNMAP")
    },
    Case {
        quick: true,
        guest: "viommu",
        arguments: VTD,
        lose: Some("unmap"),
        expected: Expected::Stale,
        ..case("virtual IOMMU, bits of UNMAP lost")
    },
    Case {
        story: Story::Unmarked,
        expected: Expected::Stale,
        ..case("a write that marks nothing")
    },
    Case {
        migration: "v2+precopy",
        ..case("PRE_COPY")
    },
    Case {
        migration: "v2+precopy+p2p",
        devices: 2,
        ..case("two devices, PRE_COPY and P2P")
    },
    Case {
        devices: 2,
        story: Story::Refused("P2P"),
        expected: Expected::Refused,
        ..case("two devices without P2P")
    },
    Case {
        migration: "v2+precopy",
        capabilities: &["return-path", "switchover-ack"],
        ..case("PRE_COPY, switchover-ack")
    },
    Case {
        capabilities: &["multifd"],
        ..case("multifd")
    },
    Case {
        arguments: &[
            "-object",
            "memory-backend-memfd,id=m,size=32M,share=on",
            "-machine",
            "memory-backend=m",
        ],
        ..case("memory of a memfd, shared")
    },
    Case {
        arguments: &[
            "-object",
            "memory-backend-memfd,id=m,size=32M,share=off",
            "-machine",
            "memory-backend=m",
        ],
        ..case("memory of a memfd, private")
    },
    Case {
        arguments: &["-overcommit", "mem-lock=on"],
        ..case("mem-lock=on")
    },
    Case {
        arguments: &[
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        ],
        ..case("-sandbox on")
    },
    Case {
        group: "iommu",
        ..case("group behind a simulated IOMMU")
    },
    Case {
        story: Story::ScatteredPins,
        ..case("scattered pins")
    },
    Case {
        story: Story::FailAndAgain("start", 12),
        ..case("START fails with ENOMEM, and again")
    },
    Case {
        story: Story::FailAndAgain("get", 14),
        ..case("GET fails with EFAULT, and again")
    },
    Case {
        story: Story::FailAndAgain("stop", 22),
        ..case("STOP fails with EINVAL, and again")
    },
    Case {
        capabilities: &["postcopy-ram"],
        story: Story::Refused("postcopy"),
        expected: Expected::Refused,
        ..case("post-copy")
    },
    Case {
        from: Version::V10,
        to: Version::V10,
        ..case("container tracking")
    },
    Case {
        from: Version::V10,
        to: Version::V10,
        tracking: Tracking::Device,
        ..case("device log")
    },
    Case {
        from: Version::V10,
        ..case("10.0 to 11.1")
    },
    Case {
        guest: "viommu zero",
        arguments: VTD,
        expected: Expected::Stale,
        ..case("virtual IOMMU, entries are zeroed (a bug of QEMU)")
    },
];
