// SPDX-License-Identifier: MIT OR Apache-2.0
//! Another process goes on with what the tracker saves.

use adapter_user::guest::{Slot, Tracker};
use adapter_user::{DirtyBits, PageSize};

use super::compare::{add_kvm, expect, Run, LOGS};
use super::ops::{IOVAS, MEMORIES, PAGE, VIEWS};
use super::world::Target;

impl Run {
    /// Another process goes on with what the tracker saves. Devices and KVM keep their
    /// logs; slots and mappings are made anew, as the guest has them.
    pub(super) fn upgrade(&mut self) -> Result<(), String> {
        let fails = self.allow_sources();
        let saved = self.tracker.save(&self.report);
        let saved = saved.map_err(|cause| cause.to_string())?;
        if !fails {
            self.world.departed.clear();
        }
        self.remapped();
        let world = &mut self.world;
        // A report that was not delivered becomes marks, which no discard reaches.
        world.since.extend(&world.written);

        let tracker = Tracker::new(None);
        self.handles.clear();
        for memory in 0..MEMORIES {
            let size = world.pages[memory] * PAGE;
            let pgsize = PageSize::new(PAGE).ok_or("no page size")?;
            let bits = DirtyBits::new(size, pgsize).map_err(|cause| cause.to_string())?;
            self.bits[memory] = bits.clone();
            // What is pending in memory that is no slot is not saved, so if it comes back,
            // all of it is dirty.
            self.unknown[memory] |= world.place[memory].is_none();
            if let Some(place) = world.place[memory] {
                let mut slot = Slot::new(memory as u32, place * PAGE, size, bits);
                slot.host = Some((memory as u64 + 1) << 40);
                tracker.add(slot).map_err(|cause| cause.to_string())?;
            }
        }
        let restored = tracker.restore(&saved);
        let restored = restored.map_err(|cause| cause.to_string())?;
        self.report = tracker.report();
        self.tracker = tracker;
        add_kvm(&self.tracker, &self.logs);
        for (view, name) in LOGS.into_iter().enumerate() {
            let logged = self.sources[view].is_some() && self.world.on;
            let restored = restored.view(name);
            expect("a view for each log", restored.is_some() == logged)?;
            let new = || self.tracker.iova_view();
            self.views[view] = restored.cloned().unwrap_or_else(new);
            if let Some((_, keeper)) = self.sources[view].take() {
                self.add_log(view, keeper)?;
            }
        }
        for view in 0..VIEWS {
            for iova in 0..IOVAS {
                self.map_anew(view, iova)?;
            }
        }
        Ok(())
    }

    /// The new process maps a page that the devices see, at its guest address. What the
    /// device wrote before may still be in its log.
    fn map_anew(&mut self, view: usize, iova: u64) -> Result<(), String> {
        let world = &mut self.world;
        let Some(old) = world.views[view].live[iova as usize] else {
            return Ok(());
        };
        world.unmap(view, iova, 1);
        let mapping = self.views[view].map(iova * PAGE, old.gpa * PAGE, PAGE);
        let mapping = mapping.map_err(|cause| cause.to_string())?;
        let bound = world.at(old.gpa);
        let target = Target {
            gpa: old.gpa,
            bound,
        };
        world.views[view].live[iova as usize] = Some(target);
        self.handles.push((mapping, vec![target]));
        Ok(())
    }
}
