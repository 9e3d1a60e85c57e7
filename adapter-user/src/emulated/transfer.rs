// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device as the machines of migration drive it.

use std::sync::{Arc, Mutex};

use dirty_core::migration::v1::DataSection;
use dirty_core::migration::{Device, Failure, Migration, State, Transfer, Transition};
use dirty_core::Errno;

use super::data::{self, DataFile};
use super::dma::Dma;
use super::model::DeviceModel;

/// A model, and the data file of the transfer that it is in.
pub(super) struct Migrating {
    model: Arc<dyn DeviceModel>,
    dma: Dma,
    machine: Arc<Mutex<Migration>>,
    file: Option<DataFile>,
    /// Of version 1: what is in the data section of the region.
    section: Vec<u8>,
}

impl Migrating {
    pub(super) fn new(
        model: Arc<dyn DeviceModel>,
        dma: Dma,
        machine: Arc<Mutex<Migration>>,
    ) -> Self {
        Migrating {
            model,
            dma,
            machine,
            file: None,
            section: Vec::new(),
        }
    }

    /// Ends the transfer, if there is one.
    pub(super) fn end(&mut self) {
        if let Some(file) = self.file.take() {
            file.end();
        }
        self.section = Vec::new();
    }

    /// Follows the command register, which may have changed.
    pub(super) fn follow_bus_master(&self, running: bool) {
        self.dma.follow_bus_master(&*self.model, running);
    }

    fn file(&self) -> Result<&DataFile, Errno> {
        self.file.as_ref().ok_or(Errno::EIO) // unreachable: a transfer is under way
    }
}

impl Device for Migrating {
    type File = DataFile;

    fn begin(&mut self, transition: Transition) -> Result<DataFile, Failure> {
        let (model, machine) = (&self.model, &self.machine);
        let file = match transition.to {
            State::Resuming => Ok(DataFile::resuming(model, machine)),
            State::StopCopy => {
                let memory = self.dma.save();
                memory.and_then(|memory| DataFile::stop_copy(model, machine, memory))
            }
            _ => DataFile::pre_copy(model, machine),
        };
        let file = file.map_err(Failure::Unchanged)?;
        self.file = Some(file.clone());
        Ok(file)
    }

    fn step(&mut self, transition: Transition) -> Result<(), Failure> {
        let (from, to) = (transition.from, transition.to);
        if from.may_write_memory() && !to.may_write_memory() {
            self.model.quiesce();
        }
        match transition.transfer() {
            Transfer::SaveRest => {
                let memory = self.dma.save();
                let stopped = memory.and_then(|memory| self.file()?.device_stopped(memory));
                stopped.map_err(|errno| {
                    self.model.resume();
                    Failure::Unchanged(errno)
                })?;
            }
            Transfer::EndLoad => {
                let file = self.file.take();
                let file = file.ok_or(Failure::Unchanged(Errno::EIO))?; // unreachable: it loads
                                                                        // A part may be loaded already, so there is no way back.
                let memory = |bytes: &[u8]| self.dma.load(bytes);
                file.load(memory).map_err(Failure::Broken)?;
                self.follow_bus_master(false);
            }
            Transfer::EndSave => self.end(),
            _ => {}
        }
        if !from.may_write_memory() && to.may_write_memory() {
            self.model.resume();
        }
        Ok(())
    }

    fn stop_copy_length(&mut self) -> Result<u64, Errno> {
        Ok(data::size(&*self.model))
    }
}

impl DataSection for Migrating {
    fn pending(&mut self) -> Result<u64, Errno> {
        Ok(self.file()?.unread())
    }

    fn stage(&mut self, room: u64) -> Result<u64, Errno> {
        let room = usize::try_from(room).map_err(|_| Errno::EINVAL)?;
        let mut section = vec![0; room];
        let staged = match self.file()?.read(&mut section) {
            Ok(staged) => staged,
            Err(Errno(libc::ENOMSG)) => 0, // nothing more before the device stops
            Err(errno) => return Err(errno),
        };
        section.truncate(staged);
        self.section = section;
        Ok(staged as u64)
    }

    fn load(&mut self, size: u64) -> Result<(), Errno> {
        let section = std::mem::take(&mut self.section);
        let size = usize::try_from(size).map_err(|_| Errno::EINVAL)?;
        let bytes = section.get(..size).ok_or(Errno::EINVAL)?;
        self.file()?.write(bytes).map(|_| ())
    }

    fn read(&mut self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        let at = usize::try_from(at).map_err(|_| Errno::EINVAL)?;
        let bytes = self.section.get(at..).and_then(|rest| rest.get(..to.len()));
        to.copy_from_slice(bytes.ok_or(Errno::EINVAL)?);
        Ok(())
    }

    fn write(&mut self, at: u64, from: &[u8]) -> Result<(), Errno> {
        let at = usize::try_from(at).map_err(|_| Errno::EINVAL)?;
        let end = at.checked_add(from.len()).ok_or(Errno::EINVAL)?;
        if self.section.len() < end {
            self.section.resize(end, 0);
        }
        self.section[at..end].copy_from_slice(from);
        Ok(())
    }
}
