// SPDX-License-Identifier: MIT OR Apache-2.0
//! A domain with all its parts, and what the tests ask of them.
#![allow(dead_code)] // no test file uses all of it

pub(crate) use std::collections::BTreeSet;

pub(crate) use adapter_user::device_log::DeviceLog;
pub(crate) use adapter_user::guest::{Report, Tracker};
pub(crate) use adapter_user::{Container, Domain, Group, GroupId, IommuType, Options, Prot};

#[path = "../support/page.rs"]
mod page;

pub(crate) use page::PAGE;

pub(crate) const RW: Prot = Prot::READ_WRITE;
pub(crate) const GROUP: GroupId = GroupId(1);

/// Memory of this process, which lives as long as the test runs.
pub(crate) fn leaked(npages: u64) -> u64 {
    let words = Box::leak(vec![0u64; ((npages + 1) * PAGE / 8) as usize].into_boxed_slice());
    (words.as_mut_ptr() as u64).next_multiple_of(PAGE)
}

pub(crate) fn container() -> Container {
    container_with(page::options())
}

pub(crate) fn container_with(options: Options) -> Container {
    let container = Container::new(options);
    container.add_group(Group::emulated(GROUP)).unwrap();
    container.set_iommu(IommuType::Type1v2).unwrap();
    container
}

/// A domain over a view of `tracker`, whose slots are all memory that is leaked.
pub(crate) fn domain(
    tracker: &Tracker,
    log: Option<&DeviceLog>,
    container: Option<&Container>,
) -> Domain {
    let mut domain = Domain::new(tracker.iova_view());
    if let Some(log) = log {
        domain = domain.with_log(log.clone());
    }
    if let Some(container) = container {
        // SAFETY: the slots' memory is leaked, and nobody has a reference to it.
        domain = unsafe { domain.with_container(container.clone()) };
    }
    domain
}

/// A tracker of `npages` pages of memory at guest address 0.
pub(crate) fn tracker(npages: u64) -> Tracker {
    let tracker = Tracker::new(None);
    let host = Some(leaked(npages));
    tracker.add_slot(0, 0, host, npages * PAGE).unwrap();
    tracker
}

/// The dirty pages of the next report.
pub(crate) fn take(tracker: &Tracker) -> BTreeSet<u64> {
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    dirty(&report)
}

pub(crate) fn dirty(report: &Report) -> BTreeSet<u64> {
    let ranges = report.ranges(PAGE).unwrap();
    ranges
        .flat_map(|range| range.gpa / PAGE..(range.gpa + range.size) / PAGE)
        .collect()
}

pub(crate) fn set<const N: usize>(pages: [u64; N]) -> BTreeSet<u64> {
    pages.into()
}
