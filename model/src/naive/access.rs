// SPDX-License-Identifier: MIT OR Apache-2.0
//! What devices' drivers do (rule A9): pin, unpin, read, write and mark.

use dirty_core::Errno;
use dirty_script::op::{DeviceIndex, DEVICES, PAGE};

use super::backend::Backend;
use super::mapping::{READ, WRITE};
use super::process::{Process, Result};

impl Backend {
    /// Marks a range that a device has written by itself. The parts that are
    /// mapped are marked even if others are not.
    pub(super) fn mark(&mut self, iova: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Err(Errno::EINVAL);
        }
        let last = iova.checked_add(len - 1).ok_or(Errno::EOVERFLOW)?;
        let mut mapped = 0;
        for key in self.mappings.overlapping(iova, last) {
            if let Some(m) = self.mappings.0.get_mut(&key) {
                let (a, b) = (m.iova.max(iova), m.last().min(last));
                mapped += u128::from(b - a) + 1;
                if let Some(granule) = self.granule {
                    m.mark(granule, a, b);
                }
            }
        }
        match mapped == u128::from(len) {
            true => Ok(()),
            false => Err(Errno::EINVAL),
        }
    }

    /// vfio_pin_pages: pins every page or none.
    pub(super) fn pin(
        &mut self,
        process: &mut Process,
        device: DeviceIndex,
        iova: u64,
        n: i32,
        prot: u32,
    ) -> Result<()> {
        if n == 0 || !DEVICES[device].dma_unmap {
            return Err(Errno::EINVAL);
        }
        if !(0..=512).contains(&n) {
            return Err(Errno::E2BIG);
        }
        if !self.v2 {
            return Err(Errno::EACCES);
        }
        let n = n as u64;
        iova.checked_add(n * PAGE - 1).ok_or(Errno::EOVERFLOW)?;
        if self.any_vaddr_invalid() {
            return Err(Errno::EBUSY);
        }
        for k in 0..n {
            if let Err(e) = self.pin_page(process, iova + k * PAGE, prot) {
                for k in 0..k {
                    self.unpin_page(process, iova + k * PAGE);
                }
                self.drop_pinned_bits(iova, n);
                return Err(e);
            }
        }
        let group = self.groups.iter_mut().find(|g| g.device == device);
        if let Some(group) = group.filter(|g| !g.pinned_only) {
            group.pinned_only = true;
            self.mark_everything();
        }
        Ok(())
    }

    fn pin_page(&mut self, process: &mut Process, iova: u64, prot: u32) -> Result<()> {
        let charged = self.domains().is_empty();
        let granule = self.granule;
        let m = self.mappings.find_mut(iova).ok_or(Errno::EINVAL)?;
        if m.prot & prot != prot {
            return Err(Errno::EPERM);
        }
        if let Some(count) = m.pins.get_mut(&iova) {
            *count += 1;
            return Ok(());
        }
        let key = m.iova;
        self.add_pinned_bits(key)?;
        let m = self.mappings.find_mut(iova).ok_or(Errno::EINVAL)?;
        let page = (m.vaddr + (iova - m.iova)) / PAGE * PAGE;
        if process.accessible(page, PAGE, m.writable()) < PAGE {
            return Err(Errno::EFAULT);
        }
        if charged {
            process.charge(1, m.lock_cap)?;
            m.charged += 1;
        }
        m.pins.insert(iova, 1);
        if let Some(granule) = granule {
            m.mark(granule, iova, iova);
        }
        Ok(())
    }

    /// Drops one pin of a page, if it has one.
    fn unpin_page(&mut self, process: &mut Process, iova: u64) {
        let charged = self.domains().is_empty();
        let Some(m) = self.mappings.find_mut(iova) else {
            return;
        };
        let Some(count) = m.pins.get_mut(&iova) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            m.pins.remove(&iova);
            if charged && m.charged > 0 {
                m.charged -= 1;
                process.locked -= 1;
            }
        }
    }

    /// vfio_unpin_pages: stops at the first page that is not mapped.
    pub(super) fn unpin(&mut self, process: &mut Process, iova: u64, n: i32) {
        let Ok(n @ 1..) = u64::try_from(n) else {
            return;
        };
        let n = n.min((u64::MAX - iova) / PAGE + 1); // up to the last address
        let mut k = 0;
        while k < n {
            let at = iova + k * PAGE;
            let overlapping = self.mappings.overlapping(at, at.saturating_add(PAGE - 1));
            let Some(m) = overlapping.first().map(|key| &self.mappings.0[key]) else {
                return;
            };
            if at < m.iova {
                k += 1;
                continue;
            }
            // Unpins all the pages of this mapping at once.
            let here = ((m.last() - at) / PAGE + 1).min(n - k);
            let pins = m.pins.range(at..=at + (here - 1) * PAGE);
            let pins: Vec<u64> = pins.map(|(pin, _)| *pin).collect();
            for pin in pins.into_iter().filter(|pin| (pin - at) % PAGE == 0) {
                self.unpin_page(process, pin);
            }
            k += here;
        }
    }

    /// vfio_dma_rw: reads or writes through the mappings. A caller from another
    /// process cannot reach their memory.
    pub(super) fn rw(
        &mut self,
        process: &mut Process,
        iova: u64,
        len: u64,
        write: bool,
        other_process: bool,
    ) -> Result<()> {
        if len == 0 {
            return Err(Errno::EINVAL);
        }
        if self.any_vaddr_invalid() {
            return Err(Errno::EBUSY);
        }
        let (mut at, mut left) = (iova, len);
        while left > 0 {
            let m = self.mappings.find(at).ok_or(Errno::EINVAL)?;
            if m.prot & READ == 0 || write && m.prot & WRITE == 0 {
                return Err(Errno::EPERM);
            }
            if other_process {
                return Err(Errno::EFAULT);
            }
            let len = left.min(m.size - (at - m.iova));
            let vaddr = m.vaddr + (at - m.iova);
            let done = match write {
                true => self.write_chunk(process, at, len),
                false => process.accessible(vaddr, len, false),
            };
            if done < len {
                return Err(Errno::EFAULT);
            }
            at = at.wrapping_add(len);
            left -= len;
        }
        Ok(())
    }

    /// Writes inside one mapping and marks what was written. Returns how many
    /// bytes were.
    pub(super) fn write_chunk(&mut self, process: &mut Process, iova: u64, len: u64) -> u64 {
        let granule = self.granule;
        let Some(m) = self.mappings.find_mut(iova) else {
            return 0;
        };
        let len = len.min(m.size - (iova - m.iova));
        let done = process.write_bytes(m.vaddr + (iova - m.iova), len);
        if let Some(granule) = granule.filter(|_| done > 0) {
            m.mark(granule, iova, iova + (done - 1));
        }
        done
    }
}
