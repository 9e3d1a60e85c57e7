// SPDX-License-Identifier: MIT OR Apache-2.0
//! The machine that drives a device, and answers the ioctls of migration (M3, M5,
//! M6).

use crate::error::{Errno, Error};
use crate::host::Fault;
use crate::migration::feature::MigrationCall;
use crate::migration::precopy::{Precopy, PrecopyInfo};
use crate::migration::state::{Features, State, Transfer, Transition};
use crate::migration::uapi::*;

/// A device that [`Migration`] drives.
///
/// Which transitions it is asked for depends on its features (M2 in
/// docs/rules.md has them all). For each, [`Transition::transfer`] says what it
/// does to the transfer, and [`State::may_write_memory`] of its two states whether
/// the device must stop or may go on. A device that is to stop has finished all of
/// its DMA, and marked it, before the call returns.
pub trait Device {
    /// What carries the device's state: a file that a user reads or writes.
    type File;

    /// Does a transition that begins a transfer ([`Transfer::BeginSave`],
    /// [`Transfer::BeginLoad`]), and opens its data file.
    ///
    /// # Errors
    ///
    /// Any [`Failure`].
    fn begin(&mut self, transition: Transition) -> Result<Self::File, Failure>;

    /// Does any other transition.
    ///
    /// # Errors
    ///
    /// Any [`Failure`]. A device that cannot use what it was given to load fails
    /// the transition from RESUMING to STOP.
    fn step(&mut self, transition: Transition) -> Result<(), Failure>;

    /// An estimate of the bytes that STOP_COPY would give, for
    /// VFIO_DEVICE_FEATURE_MIG_DATA_SIZE. QEMU never ends its migration without
    /// it, and refuses 0.
    ///
    /// # Errors
    ///
    /// Any errno.
    fn stop_copy_length(&mut self) -> Result<u64, Errno>;
}

/// Why a device did not do a transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The device is as it was before the transition.
    Unchanged(Errno),
    /// The device cannot go back either. It has stopped its DMA, and goes into
    /// ERROR.
    Broken(Errno),
}

/// The migration state of a device, which is RUNNING at first.
///
/// The methods need `&mut`, so a device that runs on several threads keeps its
/// machine behind a lock: shared for each access to memory, exclusive for a change
/// of state. [`State::may_write_memory`] of [`state`](Migration::state) says under
/// the shared lock whether an access is allowed.
#[derive(Clone, Debug)]
pub struct Migration {
    features: Features,
    state: State,
    /// Whether the user asked for version 2 of pre-copy info.
    precopy_info_v2: bool,
}

impl Migration {
    /// The machine of a device with these features, in RUNNING.
    #[must_use]
    pub const fn new(features: Features) -> Self {
        Migration {
            features,
            state: State::Running,
            precopy_info_v2: false,
        }
    }

    /// What the device can do.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// The state that the device is in.
    #[must_use]
    pub const fn state(&self) -> State {
        self.state
    }

    /// Takes the device to the state with the number `to`, by one transition after
    /// the other. If the last one began a transfer, its data file is returned.
    ///
    /// A device that is in the state already is not asked for anything.
    ///
    /// # Errors
    ///
    /// Transitions that were done before the error stay done:
    /// [`state`](Migration::state) says how far the device came.
    ///
    /// - [`Error::UnknownState`] for a number that is no state; nothing was done.
    /// - Those of [`Features::next`]; nothing was done.
    /// - [`Error::Device`] if the device fails a transition. Its state is the one
    ///   before that transition, or ERROR if the device says that it is broken.
    pub fn set_state<D: Device>(
        &mut self,
        device: &mut D,
        to: u32,
    ) -> Result<Option<D::File>, Error> {
        let to = State::from_raw(to).ok_or(Error::UnknownState)?;
        let mut file = None;
        while self.state != to {
            let next = self.features.next(self.state, to)?;
            let transition = Transition {
                from: self.state,
                to: next,
            };
            let done = match transition.transfer() {
                Transfer::BeginSave | Transfer::BeginLoad => device.begin(transition).map(Some),
                _ => device.step(transition).map(|()| None),
            };
            match done {
                Ok(begun) => file = begun,
                Err(Failure::Unchanged(errno)) => return Err(Error::Device(errno)),
                Err(Failure::Broken(errno)) => {
                    self.state = State::Error;
                    return Err(Error::Device(errno));
                }
            }
            self.state = next;
        }
        Ok(file)
    }

    /// Follows a reset of the device, which ends every transfer: the state is
    /// RUNNING. The caller resets the device itself and its data files.
    pub fn reset(&mut self) {
        self.state = State::Running;
    }

    /// Follows the last close of the device's file. The next user has not asked for
    /// version 2 of pre-copy info.
    pub fn close(&mut self) {
        self.reset();
        self.precopy_info_v2 = false;
    }

    /// Answers a VFIO_DEVICE_FEATURE of migration.
    ///
    /// `fd` gives the number that a data file has for the caller. A file that is
    /// returned stays open under it; a file that is not returned was dropped.
    /// `copy_to_user` copies bytes to an address of the caller.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::Device`] if the device cannot tell its data size.
    /// - [`Error::BadAddress`] if the answer cannot be written. The state has
    ///   changed nevertheless if it could, and the data file is lost.
    /// - Those of [`set_state`](Migration::set_state).
    pub fn run<D: Device>(
        &mut self,
        device: &mut D,
        call: MigrationCall,
        fd: impl FnOnce(&D::File) -> i32,
        mut copy_to_user: impl FnMut(u64, &[u8]) -> Result<(), Fault>,
    ) -> Result<Option<D::File>, Error> {
        let mut put = |addr, bytes: &[u8]| copy_to_user(addr, bytes).map_err(|_| Error::BadAddress);
        match call {
            MigrationCall::GetFeatures { addr } => {
                put(addr, &self.features.bits().to_ne_bytes())?;
            }
            MigrationCall::GetState { addr } => {
                let device_state = self.state.raw();
                let data_fd = -1;
                let answer = vfio_device_feature_mig_state {
                    device_state,
                    data_fd,
                };
                put(addr, &answer.to_bytes())?;
            }
            MigrationCall::SetState { addr, state } => {
                let done = self.set_state(device, state);
                let device_state = state;
                let data_fd = match &done {
                    Ok(Some(file)) => fd(file),
                    _ => -1,
                };
                let answer = vfio_device_feature_mig_state {
                    device_state,
                    data_fd,
                };
                // Linux answers EFAULT even if the transition failed.
                put(addr, &answer.to_bytes())?;
                return done;
            }
            MigrationCall::GetDataSize { addr } => {
                let length = device.stop_copy_length().map_err(Error::Device)?;
                put(addr, &length.to_ne_bytes())?;
            }
            MigrationCall::SetPrecopyInfoV2 => self.precopy_info_v2 = true,
        }
        Ok(None)
    }

    /// Answers a VFIO_MIG_GET_PRECOPY_INFO of a data file. `estimate` says how much
    /// of it is left, and `copy_to_user` copies bytes to an address of the caller.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::NotPreCopy`] outside of PRE_COPY and PRE_COPY_P2P.
    /// - [`Error::Device`] if `estimate` fails. It answers ENODEV for the file of a
    ///   transfer that has ended.
    /// - [`Error::BadAddress`] if the answer cannot be written.
    pub fn precopy_info(
        &self,
        info: PrecopyInfo,
        estimate: impl FnOnce() -> Result<Precopy, Errno>,
        mut copy_to_user: impl FnMut(u64, &[u8]) -> Result<(), Fault>,
    ) -> Result<(), Error> {
        if !matches!(self.state, State::PreCopy | State::PreCopyP2p) {
            return Err(Error::NotPreCopy);
        }
        let precopy = estimate().map_err(Error::Device)?;
        let answer = info.answer(precopy, self.precopy_info_v2);
        copy_to_user(info.addr, &answer.to_bytes()).map_err(|_| Error::BadAddress)
    }
}
