// SPDX-License-Identifier: GPL-2.0-only
//! What a container answers by the model when the test IOMMU may refuse maps.

use std::collections::BTreeSet;

use dirty_core::Errno;
use dirty_model::Naive;
use dirty_script::op::*;
use dirty_script::{run, Reply, System};

use crate::tiommu;

/// The model, and what it does not know of the test IOMMU.
#[derive(Clone)]
pub(crate) struct Expected {
    pub(crate) model: Naive,
    /// The attached devices.
    attached: BTreeSet<DeviceIndex>,
    /// Which 4K that the next operation maps is refused; 0 for none.
    refused: u64,
}

impl Expected {
    pub(crate) fn new(entry_limit: u32) -> Self {
        let mut model = Naive::default();
        model.set_entry_limit(entry_limit);
        Expected {
            model,
            attached: BTreeSet::new(),
            refused: 0,
        }
    }

    /// The attached devices behind the test IOMMU.
    pub(crate) fn behind_tiommu(&self) -> impl Iterator<Item = DeviceIndex> + '_ {
        let attached = self.attached.iter().copied();
        attached.filter(|device| tiommu::number(*device).is_some())
    }

    /// The page sizes that all attached IOMMUs have.
    fn pgsizes(&self) -> u64 {
        let sizes = self.attached.iter().filter_map(|d| DEVICES[*d].pgsizes);
        sizes.fold(!(PAGE - 1), |all, sizes| all & sizes)
    }

    /// Whether the real driver can survive an operation. It counts on a page size that
    /// all IOMMUs have, and on one that stays while tracking is on: if that changes, it
    /// writes beyond its bitmaps (U4, D6).
    pub(crate) fn is_sound(&self, op: &Op) -> bool {
        let mut after = self.clone();
        match op {
            Op::Attach { device, .. } => after.attached.insert(*device),
            Op::Detach(device) => after.attached.remove(device),
            _ => return true,
        };
        let smallest = |pgsizes: u64| pgsizes.trailing_zeros();
        let changes = smallest(after.pgsizes()) != smallest(self.pgsizes());
        after.pgsizes() != 0 && !(changes && self.model.tracking().is_some())
    }

    /// Runs an operation.
    pub(crate) fn step(&mut self, op: &Op) -> Reply {
        if let Op::Fault { n, .. } = op {
            self.refused = *n;
            return Reply::Answer(Ok(0));
        }
        let refused = std::mem::take(&mut self.refused);
        if refused != 0 && self.maps(op) >= refused {
            return match op {
                Op::Attach { device, .. } => {
                    let name = DEVICES[*device].name;
                    Reply::Text(format!(" {name}:set_container=EIO"))
                }
                _ => Reply::Answer(Err(Errno::EIO)),
            };
        }
        let reply = run(&mut self.model, op);
        self.follow(op, &reply);
        reply
    }

    /// Notes which devices an operation has attached.
    fn follow(&mut self, op: &Op, reply: &Reply) {
        let text = reply.to_string();
        let came = |device: &DeviceIndex| {
            let failed = |step| text.contains(&format!("{}:{step}=", DEVICES[*device].name));
            !failed("open") && !failed("set_container")
        };
        match op {
            Op::New(new) => {
                let came = new.devices.iter().copied().filter(came);
                self.attached = came.collect();
            }
            Op::Attach { device, .. } if came(device) => {
                self.attached.insert(*device);
            }
            Op::Detach(device) => {
                self.attached.remove(device);
            }
            _ => {}
        }
    }

    /// How many 4K a map or an attach maps in the test IOMMU; 0 if it fails, since it
    /// may fail before it maps or after.
    pub(crate) fn maps(&self, op: &Op) -> u64 {
        let bytes = |model: &Naive| model.mappings().iter().map(|(_, size)| size).sum::<u64>();
        let domains = match op {
            Op::Map(_) => self.behind_tiommu().count() as u64,
            Op::Attach { device, .. } => u64::from(tiommu::number(*device).is_some()),
            _ => 0,
        };
        if domains == 0 {
            return 0;
        }
        let mut after = self.clone();
        let reply = run(&mut after.model, op);
        after.follow(op, &reply);
        let more = match (op, &reply) {
            (Op::Map(_), Reply::Answer(Ok(_))) => bytes(&after.model) - bytes(&self.model),
            (Op::Attach { device, .. }, _)
                if after.attached.contains(device) && !self.attached.contains(device) =>
            {
                bytes(&self.model)
            }
            _ => 0,
        };
        more / PAGE * domains
    }
}
