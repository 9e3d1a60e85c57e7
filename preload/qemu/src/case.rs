// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a case is: which QEMUs, which device, what happens, and what must come of it.

use crate::qemu::Version;

/// Who knows which pages are dirty.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tracking {
    Container,
    Device,
}

/// Where the device is, and how QEMU reaches it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In QEMU's own process: the preloaded library has it.
    Library,
    /// In a server of vfio-user, whose client is the preloaded library.
    Server,
    /// In such a server. The client is QEMU's own, and nothing is preloaded.
    Stock,
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
    /// Every other page of 544 MiB is pinned while the guest works: more pins than a process
    /// may have VMAs.
    ScatteredPins,
    /// Memory is plugged into both QEMUs before, and the engine writes it.
    PlugMemory,
    /// The device is unplugged while it has pins, three times.
    Unplug,
    /// The engine writes a page and marks nothing.
    Unmarked,
    /// The guest works, and nothing migrates.
    Work,
    /// The process with the device is killed while QEMU copies. The migration must fail, and
    /// QEMU go on.
    ServerDies,
}

/// What must come of a case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Expected {
    Same,
    Stale,
    Refused,
    /// The device has gone, and nothing of it is left.
    Gone,
    /// The migration has failed.
    Failed,
}

impl Expected {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Expected::Same => "same",
            Expected::Stale => "stale",
            Expected::Refused => "refused",
            Expected::Gone => "gone",
            Expected::Failed => "failed",
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) quick: bool,
    pub(crate) from: Version,
    pub(crate) to: Version,
    pub(crate) place: Place,
    pub(crate) tracking: Tracking,
    /// `VFIO_PRELOAD_MIGRATION`.
    pub(crate) migration: &'static str,
    /// `VFIO_PRELOAD_GROUP`.
    pub(crate) group: &'static str,
    pub(crate) devices: usize,
    /// MiB of guest memory.
    pub(crate) memory: u64,
    /// The answers whose dirty bits are lost.
    pub(crate) lose: Option<&'static str>,
    /// Words for the guest. With "linux" first it runs in a Linux.
    pub(crate) guest: &'static str,
    /// Whether guest memory is a file that is mapped shared.
    pub(crate) shared: bool,
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

    /// Whether the guest may work only while QEMU does not look for dirty pages.
    ///
    /// With a virtual IOMMU, QEMU skips an UNMAP if it looks between the moments when the
    /// guest clears an entry and when it invalidates it. QEMU 7.2 with TCG loses writes of the
    /// processor if it looks while a device of VFIO works.
    pub(crate) fn quiet(&self) -> bool {
        self.viommu() || self.from == Version::V7
    }
}

const fn case(name: &'static str) -> Case {
    Case {
        name,
        quick: false,
        from: Version::V11,
        to: Version::V11,
        place: Place::Library,
        tracking: Tracking::Container,
        migration: "v2",
        group: "emulated",
        devices: 1,
        memory: 32,
        lose: None,
        guest: "stream",
        shared: false,
        arguments: &[],
        capabilities: &[],
        story: Story::Migrate,
        expected: Expected::Same,
    }
}

/// A device in another process, whose memory is a file that the server can map.
const fn server(name: &'static str) -> Case {
    Case {
        place: Place::Server,
        shared: true,
        ..case(name)
    }
}

/// QEMU's own client.
const fn stock(name: &'static str) -> Case {
    Case {
        place: Place::Stock,
        ..server(name)
    }
}

/// The engine is plugged in here.
const PORT: &[&str] = &[
    "-global",
    "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
    "-device",
    "pcie-root-port,id=root0,slot=3,chassis=3",
];
const SANDBOX: &[&str] = &[
    "-sandbox",
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
];
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
        quick: true,
        ..server("vfio-user, container tracking")
    },
    Case {
        quick: true,
        lose: Some("device"),
        expected: Expected::Stale,
        ..server("vfio-user, container tracking, unmarked")
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
        shared: true,
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
        arguments: SANDBOX,
        ..case("-sandbox on")
    },
    Case {
        group: "iommu",
        ..case("group behind a simulated IOMMU")
    },
    Case {
        memory: 576,
        story: Story::ScatteredPins,
        ..case("scattered pins")
    },
    Case {
        guest: "linux stream",
        memory: 160,
        ..case("a Linux guest")
    },
    Case {
        guest: "linux stream",
        memory: 160,
        lose: Some("get"),
        expected: Expected::Stale,
        ..case("a Linux guest, bits of GET lost")
    },
    Case {
        // With 32 MiB an assertion of QEMU under TCG fails.
        memory: 128,
        arguments: &["-m", "size=128M,slots=2,maxmem=1G"],
        story: Story::PlugMemory,
        ..case("memory plugged in before")
    },
    Case {
        arguments: PORT,
        story: Story::Unplug,
        expected: Expected::Gone,
        ..case("the device is unplugged")
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
        from: Version::V7,
        to: Version::V7,
        migration: "v1",
        ..case("region of version 1")
    },
    Case {
        from: Version::V7,
        to: Version::V7,
        migration: "v1",
        guest: "viommu",
        arguments: VTD,
        ..case("region of version 1, virtual IOMMU")
    },
    Case {
        guest: "viommu zero",
        arguments: VTD,
        expected: Expected::Stale,
        ..case("virtual IOMMU, entries are zeroed (a bug of QEMU)")
    },
    Case {
        tracking: Tracking::Device,
        ..server("vfio-user, device log")
    },
    Case {
        tracking: Tracking::Device,
        lose: Some("device"),
        expected: Expected::Stale,
        ..server("vfio-user, device log, unmarked")
    },
    Case {
        story: Story::CancelAndAgain,
        ..server("vfio-user, cancel, and again")
    },
    Case {
        story: Story::CancelAndAgain,
        lose: Some("device"),
        expected: Expected::Stale,
        ..server("vfio-user, cancel, and again, unmarked")
    },
    Case {
        guest: "viommu",
        arguments: VTD,
        ..server("vfio-user, virtual IOMMU")
    },
    Case {
        guest: "viommu",
        arguments: VTD,
        lose: Some("device"),
        expected: Expected::Stale,
        ..server("vfio-user, virtual IOMMU, unmarked")
    },
    Case {
        guest: "stream nopin",
        shared: false,
        ..server("vfio-user, DMA by messages")
    },
    Case {
        guest: "stream nopin",
        shared: false,
        tracking: Tracking::Device,
        ..server("vfio-user, DMA by messages, device log")
    },
    Case {
        devices: 2,
        ..server("vfio-user, two devices, P2P")
    },
    Case {
        arguments: SANDBOX,
        ..server("vfio-user, -sandbox on")
    },
    Case {
        guest: "linux stream",
        memory: 160,
        ..server("vfio-user, a Linux guest")
    },
    Case {
        arguments: PORT,
        story: Story::Unplug,
        expected: Expected::Gone,
        ..server("vfio-user, the device is unplugged")
    },
    Case {
        story: Story::ServerDies,
        expected: Expected::Failed,
        ..server("vfio-user, the server is killed")
    },
    Case {
        story: Story::ServerDies,
        tracking: Tracking::Device,
        expected: Expected::Failed,
        ..server("vfio-user, device log, the server is killed")
    },
    Case {
        story: Story::Work,
        ..stock("vfio-user-pci of QEMU, mapped DMA")
    },
    Case {
        story: Story::Work,
        guest: "nopin background",
        shared: false,
        ..stock("vfio-user-pci of QEMU, DMA by messages")
    },
    Case {
        expected: Expected::Stale,
        ..stock("vfio-user-pci of QEMU migrates (it loses writes)")
    },
];
