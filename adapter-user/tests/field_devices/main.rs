// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a hostile review and the field found in the container and its devices, each as
//! a test with the name of the finding.

mod callbacks;
mod container;
mod guards;
mod iommu;
mod pins;

use std::sync::Arc;

use adapter_user::{Container, Device, Group, GroupId, GuestMemory, IommuType, Prot};

#[path = "../support/page.rs"]
mod page;

use page::PAGE;

const GROUP: GroupId = GroupId(1);
const RW: Prot = Prot::READ_WRITE;

fn emulated() -> Container {
    let container = Container::new(page::options());
    container.add_group(Group::emulated(GROUP)).expect("group");
    container.set_iommu(IommuType::Type1v2).expect("type1v2");
    container
}

fn memory(pages: u64) -> Arc<GuestMemory> {
    Arc::new(GuestMemory::new(pages * PAGE).expect("memory"))
}

/// A device that unpins what it is told to.
fn device(container: &Container) -> Arc<Device> {
    let device = container.open_device(GROUP, Some(Box::new(Device::unpin_range)));
    device.expect("device")
}

/// The dirty pages of the first 64.
fn dirty(container: &Container) -> u64 {
    let mut words = [0];
    let reported = container.dirty_bitmap(0, 64 * PAGE, PAGE, &mut words);
    reported.expect("report");
    words[0]
}
