// SPDX-License-Identifier: MIT OR Apache-2.0
//! The groups of devices that a container is made of.

use dirty_core::host::GroupId;

use super::iommu::IommuSpec;

/// A group of devices, to add to a container.
#[derive(Clone, Debug)]
pub struct Group {
    pub(super) id: GroupId,
    pub(super) iommu: Option<IommuSpec>,
}

impl Group {
    /// Creates a group of emulated devices. There is no IOMMU behind it: its devices
    /// pin pages, or read and write through the container.
    #[must_use]
    pub fn emulated(id: GroupId) -> Self {
        Group { id, iommu: None }
    }

    pub(crate) fn id(&self) -> GroupId {
        self.id
    }

    /// Creates a group behind a simulated IOMMU, as of a real device. The container
    /// pins all of every mapping, and every page is dirty in every report (without
    /// those of read-only mappings, if [`Options::skip_read_only`] says so). The
    /// simulated IOMMU tracks no dirty pages.
    ///
    /// [`Options::skip_read_only`]: dirty_core::Options::skip_read_only
    #[must_use]
    pub fn iommu(id: GroupId, spec: IommuSpec) -> Self {
        Group {
            id,
            iommu: Some(spec),
        }
    }
}
