// SPDX-License-Identifier: MIT OR Apache-2.0
//! VFIO_MIG_GET_PRECOPY_INFO, the ioctl of a data file (M6).

use crate::error::Error;
use crate::host::Fault;
use crate::migration::uapi::*;

/// How much of a device's state is left to read in pre-copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Precopy {
    /// Bytes of the first pass. A user should not stop the device before they are
    /// 0.
    pub initial_bytes: u64,
    /// Bytes that have changed since they were read.
    pub dirty_bytes: u64,
    /// The first pass has begun anew. Only a user that has asked for version 2
    /// learns it.
    pub reinit: bool,
}

/// A VFIO_MIG_GET_PRECOPY_INFO whose argument was read.
/// [`Migration::precopy_info`](super::Migration::precopy_info) answers it.
#[derive(Clone, Copy, Debug)]
pub struct PrecopyInfo {
    pub(super) addr: u64,
    arg: vfio_precopy_info,
}

impl PrecopyInfo {
    /// Reads the argument of ioctl `nr` of a data file, at address `arg`.
    /// `copy_from_user` copies as many bytes as its second argument has from an
    /// address of the caller.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::UnknownIoctl`] for another number.
    /// - [`Error::BadAddress`] if the argument cannot be read.
    /// - [`Error::ShortArgsz`] if `argsz` is below 24.
    pub fn read(
        nr: u32,
        arg: u64,
        mut copy_from_user: impl FnMut(u64, &mut [u8]) -> Result<(), Fault>,
    ) -> Result<PrecopyInfo, Error> {
        if nr != VFIO_MIG_GET_PRECOPY_INFO {
            return Err(Error::UnknownIoctl);
        }
        let mut bytes = [0; 24];
        copy_from_user(arg, &mut bytes).map_err(|_| Error::BadAddress)?;
        let info = vfio_precopy_info::from_bytes(&bytes);
        if info.argsz < 24 {
            return Err(Error::ShortArgsz);
        }
        Ok(PrecopyInfo {
            addr: arg,
            arg: info,
        })
    }

    /// The structure that the caller gets back. Without version 2 its flags are
    /// what the caller wrote there.
    pub(super) fn answer(&self, precopy: Precopy, v2: bool) -> vfio_precopy_info {
        let flags = match (v2, precopy.reinit) {
            (false, _) => self.arg.flags,
            (true, false) => 0,
            (true, true) => VFIO_PRECOPY_INFO_REINIT,
        };
        vfio_precopy_info {
            argsz: self.arg.argsz,
            flags,
            initial_bytes: precopy.initial_bytes,
            dirty_bytes: precopy.dirty_bytes,
        }
    }
}
