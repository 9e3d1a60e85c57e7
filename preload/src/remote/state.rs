// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device's state in a migration.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use adapter_user::vfio_user::Client;
use adapter_user::{Errno, Error};
use dirty_core::migration::{
    Device, Failure, Features, Migration, MigrationCall, PrecopyInfo, State, Transfer, Transition,
};

use super::{is_gone, said};
use crate::user;

/// What MIG_DATA_SIZE answers, in bytes. The protocol cannot ask the server, and QEMU allocates
/// a buffer of this size to read with.
const DATA_SIZE: u64 = 1 << 20;

/// Gives a data file a descriptor of the program.
pub(crate) type InstallState = dyn Fn(StateFile) -> Result<i32, Errno>;

/// The file that the program reads the device's state from, or writes it to. A clone is the
/// same file.
#[derive(Clone)]
pub(crate) struct StateFile {
    client: Client,
    /// Whether the program writes.
    loads: bool,
    /// Whether the device has left the states in which its state is transferred.
    is_over: Arc<AtomicBool>,
}

impl StateFile {
    fn check(&self, loads: bool) -> Result<(), Errno> {
        if self.loads != loads {
            return Err(Errno(libc::EBADF));
        }
        match self.is_over.load(Ordering::Acquire) {
            true => Err(Errno::ENODEV),
            false => Ok(()),
        }
    }

    /// As read(2): 0 at the end of the state.
    pub(crate) fn read(&self, data: &mut [u8]) -> Result<usize, Errno> {
        self.check(false)?;
        self.client.read_state(data).map_err(said)
    }

    /// As write(2).
    pub(crate) fn write(&self, data: &[u8]) -> Result<usize, Errno> {
        self.check(true)?;
        self.client.write_state(data).map_err(said)?;
        Ok(data.len())
    }

    /// Answers VFIO_MIG_GET_PRECOPY_INFO with EINVAL, as outside of the pre-copy phase, and any
    /// other ioctl with ENOTTY.
    pub(crate) fn ioctl(&self, nr: u32, arg: u64) -> Result<i32, Errno> {
        PrecopyInfo::read(nr, arg, user::fetch).map_err(Error::errno)?;
        Err(Errno::EINVAL)
    }
}

/// The machine of migration, and the device that it drives.
pub(super) struct Migrating {
    machine: Migration,
    remote: Transferring,
}

/// The device, and the data file of the transfer that it is in.
struct Transferring {
    client: Client,
    file: Option<StateFile>,
}

impl Migrating {
    pub(super) fn new(client: Client, features: Option<Features>) -> Self {
        Migrating {
            machine: Migration::new(features.unwrap_or_default()),
            remote: Transferring { client, file: None },
        }
    }

    pub(super) fn end(&mut self) {
        self.remote.end();
    }

    /// The device was reset.
    pub(super) fn reset(&mut self) {
        self.remote.end();
        self.machine.reset();
    }

    pub(super) fn answer(
        &mut self,
        call: MigrationCall,
        install: &InstallState,
    ) -> Result<(), Errno> {
        let mut installed = Ok(-1);
        let give = |file: &StateFile| {
            installed = install(file.clone());
            installed.unwrap_or(-1)
        };
        let done = self.machine.run(&mut self.remote, call, give, user::store);
        done.map_err(Error::errno)?;
        installed.map(|_| ())
    }
}

impl Transferring {
    fn end(&mut self) {
        if let Some(file) = self.file.take() {
            file.is_over.store(true, Ordering::Release);
        }
    }

    fn go(&mut self, transition: Transition) -> Result<(), Failure> {
        let Err(cause) = self.client.set_state(transition.to) else {
            return Ok(());
        };
        let errno = said(cause);
        // A device that has gone writes nothing, so it is in each state in which nothing of it
        // is transferred.
        let transfers = !matches!(transition.transfer(), Transfer::None | Transfer::EndSave);
        if is_gone(cause) && !transfers {
            return Ok(());
        }
        match self.client.state() {
            Ok(state) if state == transition.from => Err(Failure::Unchanged(errno)),
            _ => {
                self.end();
                Err(Failure::Broken(errno))
            }
        }
    }
}

impl Device for Transferring {
    type File = StateFile;

    fn begin(&mut self, transition: Transition) -> Result<StateFile, Failure> {
        self.go(transition)?;
        let file = StateFile {
            client: self.client.clone(),
            loads: transition.to == State::Resuming,
            is_over: Arc::default(),
        };
        self.file = Some(file.clone());
        Ok(file)
    }

    fn step(&mut self, transition: Transition) -> Result<(), Failure> {
        self.go(transition)?;
        if matches!(transition.transfer(), Transfer::EndSave | Transfer::EndLoad) {
            self.end();
        }
        Ok(())
    }

    fn stop_copy_length(&mut self) -> Result<u64, Errno> {
        Ok(DATA_SIZE)
    }
}
