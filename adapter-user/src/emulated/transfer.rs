// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device as the machine of version 2 of migration drives it.

use std::sync::{Arc, Mutex};

use dirty_core::migration::{Device, Failure, Migration, State, Transfer, Transition};
use dirty_core::Errno;

use super::data::{self, DataFile};
use super::model::DeviceModel;

/// A model, and the data file of the transfer that it is in.
pub(super) struct Migrating {
    model: Arc<dyn DeviceModel>,
    machine: Arc<Mutex<Migration>>,
    file: Option<DataFile>,
}

impl Migrating {
    pub(super) fn new(model: Arc<dyn DeviceModel>, machine: Arc<Mutex<Migration>>) -> Self {
        Migrating {
            model,
            machine,
            file: None,
        }
    }

    /// Ends the transfer, if there is one.
    pub(super) fn end(&mut self) {
        if let Some(file) = self.file.take() {
            file.end();
        }
    }
}

impl Device for Migrating {
    type File = DataFile;

    fn begin(&mut self, transition: Transition) -> Result<DataFile, Failure> {
        let (model, machine) = (&self.model, &self.machine);
        let file = match transition.to {
            State::Resuming => Ok(DataFile::resuming(model, machine)),
            State::StopCopy => DataFile::stop_copy(model, machine),
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
                let file = self.file.as_ref();
                let file = file.ok_or(Failure::Unchanged(Errno::EIO))?; // unreachable: it saves
                file.device_stopped().map_err(|errno| {
                    self.model.resume();
                    Failure::Unchanged(errno)
                })?;
            }
            Transfer::EndLoad => {
                let file = self.file.take();
                let file = file.ok_or(Failure::Unchanged(Errno::EIO))?; // unreachable: it loads
                                                                        // A part may be loaded already, so there is no way back.
                file.load().map_err(Failure::Broken)?;
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
