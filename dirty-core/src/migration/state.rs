// SPDX-License-Identifier: MIT OR Apache-2.0
//! The states of a device, and the way from one to another (M1, M2).

use crate::error::Error;
use crate::migration::uapi::*;

/// A state of a device in migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum State {
    /// The device failed and must be reset. No other state can be reached.
    Error = VFIO_DEVICE_STATE_ERROR,
    /// The device is stopped: it changes neither memory nor its own state.
    Stop = VFIO_DEVICE_STATE_STOP,
    /// The device runs.
    Running = VFIO_DEVICE_STATE_RUNNING,
    /// The device is stopped, and its state can be read from the data file.
    StopCopy = VFIO_DEVICE_STATE_STOP_COPY,
    /// The device is stopped, and its new state is written to the data file.
    Resuming = VFIO_DEVICE_STATE_RESUMING,
    /// The device runs, but starts no DMA to other devices.
    RunningP2p = VFIO_DEVICE_STATE_RUNNING_P2P,
    /// The device runs, and the data file already gives parts of its state.
    PreCopy = VFIO_DEVICE_STATE_PRE_COPY,
    /// As `PreCopy`, but the device starts no DMA to other devices.
    PreCopyP2p = VFIO_DEVICE_STATE_PRE_COPY_P2P,
}

impl State {
    /// Every state, in the order of their numbers.
    pub const ALL: [State; 8] = [
        State::Error,
        State::Stop,
        State::Running,
        State::StopCopy,
        State::Resuming,
        State::RunningP2p,
        State::PreCopy,
        State::PreCopyP2p,
    ];

    /// The state with this number in `enum vfio_device_mig_state`.
    #[must_use]
    pub const fn from_raw(raw: u32) -> Option<State> {
        Some(match raw {
            VFIO_DEVICE_STATE_ERROR => State::Error,
            VFIO_DEVICE_STATE_STOP => State::Stop,
            VFIO_DEVICE_STATE_RUNNING => State::Running,
            VFIO_DEVICE_STATE_STOP_COPY => State::StopCopy,
            VFIO_DEVICE_STATE_RESUMING => State::Resuming,
            VFIO_DEVICE_STATE_RUNNING_P2P => State::RunningP2p,
            VFIO_DEVICE_STATE_PRE_COPY => State::PreCopy,
            VFIO_DEVICE_STATE_PRE_COPY_P2P => State::PreCopyP2p,
            _ => return None,
        })
    }

    /// The number in `enum vfio_device_mig_state`.
    #[must_use]
    pub const fn raw(self) -> u32 {
        self as u32
    }

    /// Whether a device in this state may write memory. It may do so in RUNNING,
    /// RUNNING_P2P, PRE_COPY and PRE_COPY_P2P.
    ///
    /// A device that is on its way into such a state may write before it is there,
    /// and one that leaves it may write until it is in the next.
    #[must_use]
    pub const fn may_write_memory(self) -> bool {
        matches!(self, State::RunningP2p | State::PreCopyP2p) || self.may_access_devices()
    }

    /// Whether a device in this state may start DMA to other devices. It may do so
    /// in RUNNING and PRE_COPY.
    #[must_use]
    pub const fn may_access_devices(self) -> bool {
        matches!(self, State::Running | State::PreCopy)
    }

    /// Whether a data file gives the device's state: STOP_COPY, PRE_COPY and
    /// PRE_COPY_P2P.
    #[must_use]
    pub const fn is_saving(self) -> bool {
        matches!(self, State::StopCopy | State::PreCopy | State::PreCopyP2p)
    }
}

/// What a device can do beyond STOP_COPY, which every device that migrates can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// VFIO_MIGRATION_P2P: the device has the state RUNNING_P2P. Several devices
    /// of a guest can be migrated only if all have it.
    pub p2p: bool,
    /// VFIO_MIGRATION_PRE_COPY: the device has the state PRE_COPY.
    pub pre_copy: bool,
}

impl Features {
    /// From the bits `VFIO_MIGRATION_*`. `None` without STOP_COPY, and for an
    /// unknown bit.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Option<Features> {
        let features = Features {
            p2p: bits & VFIO_MIGRATION_P2P != 0,
            pre_copy: bits & VFIO_MIGRATION_PRE_COPY != 0,
        };
        if features.bits() == bits {
            Some(features)
        } else {
            None
        }
    }

    /// The bits `VFIO_MIGRATION_*`.
    #[must_use]
    pub const fn bits(self) -> u64 {
        let p2p = if self.p2p { VFIO_MIGRATION_P2P } else { 0 };
        let pre_copy = if self.pre_copy {
            VFIO_MIGRATION_PRE_COPY
        } else {
            0
        };
        VFIO_MIGRATION_STOP_COPY | p2p | pre_copy
    }

    /// Whether a device with these features has a state that can be asked for.
    /// Nobody can ask for ERROR.
    #[must_use]
    pub const fn has(self, state: State) -> bool {
        match state {
            State::Error => false,
            State::Stop | State::Running | State::StopCopy | State::Resuming => true,
            State::RunningP2p => self.p2p,
            State::PreCopy => self.pre_copy,
            State::PreCopyP2p => self.p2p && self.pre_copy,
        }
    }

    /// The next state on the way from `from` to `to`, which is `to` itself if one
    /// transition leads there or if the device is there already.
    ///
    /// The way is the shortest that saves and loads nothing in between. States that
    /// the device does not have are left out of it.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::DeviceFailed`] from ERROR, which only a reset leaves.
    /// - [`Error::UnknownState`] if the device does not have one of the states, and
    ///   to ERROR.
    /// - [`Error::NoTransition`] from STOP_COPY to PRE_COPY and PRE_COPY_P2P.
    pub fn next(self, from: State, to: State) -> Result<State, Error> {
        if from == State::Error {
            return Err(Error::DeviceFailed);
        }
        if !self.has(from) || !self.has(to) {
            return Err(Error::UnknownState);
        }
        let mut at = from;
        // A way of all states has seven transitions at most.
        for _ in State::ALL {
            at = hop(at, to).ok_or(Error::NoTransition)?;
            if self.has(at) {
                return Ok(at);
            }
        }
        // unreachable: each hop is one nearer to `to`, which the device has.
        Err(Error::NoTransition)
    }
}

/// The next state from `from` to `to` on a device that has every state. `None` if
/// there is no way.
const fn hop(from: State, to: State) -> Option<State> {
    use State::*;
    Some(match from {
        _ if from as u32 == to as u32 => to,
        Error => return None,
        // Transfers end in STOP, and a save that is over cannot go back to pre-copy.
        StopCopy if matches!(to, PreCopy | PreCopyP2p) => return None,
        StopCopy | Resuming => Stop,
        // Down from RUNNING by RUNNING_P2P to STOP, and up the same way.
        Stop => match to {
            StopCopy | Resuming => to,
            _ => RunningP2p,
        },
        Running => match to {
            PreCopy => to,
            _ => RunningP2p,
        },
        RunningP2p => match to {
            PreCopyP2p => to,
            Running | PreCopy => Running,
            _ => Stop,
        },
        // Within a save no transfer ends. All else leaves it at the same level.
        PreCopy => match to {
            PreCopyP2p | StopCopy => PreCopyP2p,
            _ => Running,
        },
        PreCopyP2p => match to {
            PreCopy | StopCopy => to,
            _ => RunningP2p,
        },
    })
}

/// One step of a device from a state to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Transition {
    /// The state that the device is in.
    pub from: State,
    /// The state that it goes to.
    pub to: State,
}

/// What a transition does to the transfer of a device's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transfer {
    /// Nothing.
    None,
    /// A save begins, with a new data file: RUNNING to PRE_COPY, RUNNING_P2P to
    /// PRE_COPY_P2P, STOP to STOP_COPY.
    BeginSave,
    /// From PRE_COPY or PRE_COPY_P2P to STOP_COPY: the data file goes on with the
    /// rest of the state, and then ends.
    SaveRest,
    /// A save ends, and its data file gives nothing more.
    EndSave,
    /// STOP to RESUMING: a load begins, with a new data file.
    BeginLoad,
    /// RESUMING to STOP: the device takes what was written to the data file, and
    /// the file takes nothing more.
    EndLoad,
}

impl Transition {
    /// What it does to the transfer of the device's state.
    #[must_use]
    pub const fn transfer(self) -> Transfer {
        match (self.from.is_saving(), self.to.is_saving()) {
            _ if matches!(self.to, State::Resuming) => Transfer::BeginLoad,
            _ if matches!(self.from, State::Resuming) => Transfer::EndLoad,
            (false, true) => Transfer::BeginSave,
            (true, false) => Transfer::EndSave,
            (true, true) if matches!(self.to, State::StopCopy) => Transfer::SaveRest,
            _ => Transfer::None,
        }
    }
}
