// SPDX-License-Identifier: MIT OR Apache-2.0
//! The first half of VFIO_DEVICE_FEATURE: the bytes of the caller's argument
//! become a typed call. No lock is needed for it (M4, M5, M7).

#![allow(non_upper_case_globals)] // a name of linux/vfio.h

use crate::error::Error;
use crate::host::Fault;
use crate::migration::state::Features;
use crate::migration::uapi::*;

const GET: u32 = VFIO_DEVICE_FEATURE_GET;
const SET: u32 = VFIO_DEVICE_FEATURE_SET;
const PROBE: u32 = VFIO_DEVICE_FEATURE_PROBE;

/// Bytes before the feature's data.
const HEAD: u32 = 8;

/// The features of VFIO_DEVICE_FEATURE that a device offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offers {
    /// The device migrates, and what it can do then.
    pub migration: Option<Features>,
    /// The device logs its DMA.
    pub logging: bool,
}

/// A VFIO_DEVICE_FEATURE whose argument was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFeature {
    /// A PROBE of a feature that the device offers: the answer is 0.
    Probe,
    /// For [`Migration::run`](super::Migration::run).
    Migration(MigrationCall),
    /// For the device's log.
    Logging(LoggingCall),
}

/// A call of a feature of migration. `addr` is where the feature's data are in the
/// caller's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationCall {
    /// GET of MIGRATION: what the device can do.
    GetFeatures {
        /// Where the answer goes.
        addr: u64,
    },
    /// GET of MIG_DEVICE_STATE: which state the device is in.
    GetState {
        /// Where the answer goes.
        addr: u64,
    },
    /// SET of MIG_DEVICE_STATE: take the device to another state.
    SetState {
        /// Where the answer goes.
        addr: u64,
        /// The number of the state.
        state: u32,
    },
    /// GET of MIG_DATA_SIZE: how many bytes STOP_COPY would give.
    GetDataSize {
        /// Where the answer goes.
        addr: u64,
    },
    /// SET of MIG_PRECOPY_INFOv2: pre-copy info tells its flags from now on.
    SetPrecopyInfoV2,
}

/// A call of a feature of DMA logging. Ranges, page sizes and addresses are as the
/// caller has them; the log checks them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoggingCall {
    /// SET of DMA_LOGGING_START.
    Start {
        /// Where `control` was, and where it goes with the page size of the log.
        addr: u64,
        /// The ranges and the page size that the caller would like.
        control: vfio_device_feature_dma_logging_control,
    },
    /// SET of DMA_LOGGING_STOP.
    Stop,
    /// GET of DMA_LOGGING_REPORT.
    Report(vfio_device_feature_dma_logging_report),
}

impl DeviceFeature {
    /// Reads the argument of VFIO_DEVICE_FEATURE, at address `arg`, for a device
    /// that has the features `offers`. `copy_from_user` copies as many bytes as its
    /// second argument has from an address of the caller.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::BadAddress`] if the head of the argument cannot be read.
    /// - [`Error::ShortArgsz`] if `argsz` is below 8.
    /// - [`Error::UnknownFlags`].
    /// - [`Error::FlagCombination`] for GET with SET but without PROBE.
    /// - [`Error::UnknownFeature`] for a feature that the device does not offer.
    ///   MIG_PRECOPY_INFOv2 of a device without pre-copy is
    ///   [`Error::NotPreCopy`].
    /// - [`Error::FlagCombination`] for a GET or SET that the feature does not
    ///   have, and for none of GET, SET and PROBE.
    /// - [`Error::ShortArgsz`] if the feature's data do not fit. A PROBE needs no
    ///   data.
    /// - [`Error::BadAddress`] if the feature's data cannot be read.
    pub fn read(
        offers: Offers,
        arg: u64,
        mut copy_from_user: impl FnMut(u64, &mut [u8]) -> Result<(), Fault>,
    ) -> Result<DeviceFeature, Error> {
        let mut get =
            |addr, bytes: &mut [u8]| copy_from_user(addr, bytes).map_err(|_| Error::BadAddress);
        let mut head = [0; HEAD as usize];
        get(arg, &mut head)?;
        let vfio_device_feature { argsz, flags } = vfio_device_feature::from_bytes(&head);
        let room = argsz.checked_sub(HEAD).ok_or(Error::ShortArgsz)?;
        if flags & !(VFIO_DEVICE_FEATURE_MASK | GET | SET | PROBE) != 0 {
            return Err(Error::UnknownFlags);
        }
        if flags & (GET | SET | PROBE) == GET | SET {
            return Err(Error::FlagCombination);
        }
        let feature = flags & VFIO_DEVICE_FEATURE_MASK;
        let known = known(offers, feature)?;
        if flags & (GET | SET) & !known.operations != 0 {
            return Err(Error::FlagCombination);
        }
        if flags & PROBE != 0 {
            return Ok(DeviceFeature::Probe);
        }
        if flags & (GET | SET) == 0 {
            return Err(Error::FlagCombination);
        }
        if room < known.size {
            return Err(Error::ShortArgsz);
        }
        let addr = arg.checked_add(HEAD.into());
        let is_set = flags & SET != 0;
        // A feature without data does not look at the address of its data.
        let addr = match known.size {
            0 => 0,
            _ => addr.ok_or(Error::BadAddress)?,
        };
        use DeviceFeature::{Logging, Migration};
        Ok(match feature {
            VFIO_DEVICE_FEATURE_MIGRATION => Migration(MigrationCall::GetFeatures { addr }),
            VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE => {
                // Linux reads the structure for a GET too.
                let mut bytes = [0; 8];
                get(addr, &mut bytes)?;
                let state = vfio_device_feature_mig_state::from_bytes(&bytes).device_state;
                Migration(match is_set {
                    true => MigrationCall::SetState { addr, state },
                    false => MigrationCall::GetState { addr },
                })
            }
            VFIO_DEVICE_FEATURE_MIG_DATA_SIZE => Migration(MigrationCall::GetDataSize { addr }),
            VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 => Migration(MigrationCall::SetPrecopyInfoV2),
            VFIO_DEVICE_FEATURE_DMA_LOGGING_START => {
                let mut bytes = [0; 24];
                get(addr, &mut bytes)?;
                let control = vfio_device_feature_dma_logging_control::from_bytes(&bytes);
                Logging(LoggingCall::Start { addr, control })
            }
            VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP => Logging(LoggingCall::Stop),
            VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT => {
                let mut bytes = [0; 32];
                get(addr, &mut bytes)?;
                let report = vfio_device_feature_dma_logging_report::from_bytes(&bytes);
                Logging(LoggingCall::Report(report))
            }
            _ => return Err(Error::UnknownFeature), // unreachable: `known` refuses it
        })
    }
}

/// What a feature takes.
struct Known {
    /// GET and SET, as far as it has them.
    operations: u32,
    /// Bytes of its data.
    size: u32,
}

fn known(offers: Offers, feature: u32) -> Result<Known, Error> {
    let (offered, operations, size) = match feature {
        VFIO_DEVICE_FEATURE_MIGRATION => (offers.migration.is_some(), GET, 8),
        VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE => (offers.migration.is_some(), GET | SET, 8),
        VFIO_DEVICE_FEATURE_MIG_DATA_SIZE => (offers.migration.is_some(), GET, 8),
        VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 => match offers.migration {
            Some(Features { pre_copy: true, .. }) => (true, SET, 0),
            // Linux looks at the pre-copy flag alone, so this is not ENOTTY.
            _ => return Err(Error::NotPreCopy),
        },
        VFIO_DEVICE_FEATURE_DMA_LOGGING_START => (offers.logging, SET, 24),
        VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP => (offers.logging, SET, 0),
        VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT => (offers.logging, GET, 32),
        _ => (false, 0, 0),
    };
    match offered {
        true => Ok(Known { operations, size }),
        false => Err(Error::UnknownFeature),
    }
}
