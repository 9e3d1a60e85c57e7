// SPDX-License-Identifier: MIT OR Apache-2.0
//! The migration region: the first interface for a device's state, of patch 1/7 of
//! the series that introduced dirty tracking (M8, M9).
//!
//! A device has it as a region with four registers and a data section. QEMU up to
//! 7.2 uses it. Linux calls it deprecated, and no driver of Linux ever had it.
//!
//! The device behind a [`Region`] is the [`Device`] of the current interface. It
//! needs a [`DataSection`] besides.

#![allow(non_camel_case_types, non_upper_case_globals)]

use static_assertions::const_assert_eq;

use crate::error::{Errno, Error};
use crate::migration::machine::{Device, Migration};
use crate::migration::state::{Features, State, Transfer, Transition};

/// The region's type, in its capability of type `VFIO_REGION_INFO_CAP_TYPE`.
pub const VFIO_REGION_TYPE_MIGRATION_DEPRECATED: u32 = 3;
/// The region's subtype.
pub const VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED: u32 = 1;

/// No bit of `device_state`: the device is stopped.
pub const VFIO_DEVICE_STATE_V1_STOP: u32 = 0;
/// A bit of `device_state`: the device runs.
pub const VFIO_DEVICE_STATE_V1_RUNNING: u32 = 1;
/// A bit of `device_state`: the device's state can be read. With RUNNING this is
/// pre-copy.
pub const VFIO_DEVICE_STATE_V1_SAVING: u32 = 2;
/// A bit of `device_state`: the device's state is written.
pub const VFIO_DEVICE_STATE_V1_RESUMING: u32 = 4;

/// SAVING with RESUMING says that the device failed.
const FAILED: u32 = VFIO_DEVICE_STATE_V1_SAVING | VFIO_DEVICE_STATE_V1_RESUMING;
/// SAVING with RUNNING.
const PRE_COPY: u32 = VFIO_DEVICE_STATE_V1_SAVING | VFIO_DEVICE_STATE_V1_RUNNING;

/// The registers, at the start of the region.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_migration_info {
    /// `VFIO_DEVICE_STATE_V1_*`.
    pub device_state: u32,
    /// Reads as 0.
    pub reserved: u32,
    /// Bytes that are left to save.
    pub pending_bytes: u64,
    /// Where the data are, from the start of the region.
    pub data_offset: u64,
    /// How many bytes of data there are.
    pub data_size: u64,
}

crate::uapi::layout! {
    vfio_device_migration_info, 32, align 8 { device_state @ 0, reserved @ 4, pending_bytes @ 8, data_offset @ 16, data_size @ 24 }
}
const_assert_eq!(REGISTERS, size_of::<vfio_device_migration_info>() as u64);

/// Bytes of the registers.
const REGISTERS: u64 = 32;

/// What a device with a migration region has besides [`Device`]: the bytes of the
/// data section, and what comes and goes by them.
///
/// The data file of [`Device`] is dropped at once. Transitions begin and end
/// transfers all the same. [`Transfer::BeginSave`] of a
/// device that has nothing to save in pre-copy is a transfer of no bytes until the
/// device stops.
pub trait DataSection {
    /// The bytes that are left to save, without those in the section. 0 ends a save
    /// in STOP_COPY; in pre-copy more may come.
    ///
    /// # Errors
    ///
    /// Any errno.
    fn pending(&mut self) -> Result<u64, Errno>;

    /// Puts the next bytes to save into the section, as many as fit `room` at most,
    /// and returns how many.
    ///
    /// # Errors
    ///
    /// Any errno. The bytes are then still pending.
    fn stage(&mut self, room: u64) -> Result<u64, Errno>;

    /// Takes the first `size` bytes of the section to load.
    ///
    /// # Errors
    ///
    /// Any errno.
    fn load(&mut self, size: u64) -> Result<(), Errno>;

    /// Reads the section from `at` on. [`Region`] has checked that all of it is
    /// there.
    ///
    /// # Errors
    ///
    /// Any errno.
    fn read(&mut self, at: u64, to: &mut [u8]) -> Result<(), Errno>;

    /// Writes the section from `at` on. [`Region`] has checked that all of it is
    /// there.
    ///
    /// # Errors
    ///
    /// Any errno.
    fn write(&mut self, at: u64, from: &[u8]) -> Result<(), Errno>;
}

/// What the data section is used for at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Section {
    /// Nothing: it cannot be accessed.
    Idle,
    /// It has so many bytes to read.
    Staged(u64),
    /// It can be written.
    Open,
}

/// The migration region of a device, which is RUNNING at first.
///
/// A user saves by reading `pending_bytes`, `data_offset`, `data_size`, the data,
/// and `pending_bytes` again, which ends the chunk. It loads by reading
/// `data_offset`, and writing the data and `data_size`. Each register is accessed
/// as a whole.
#[derive(Clone, Debug)]
pub struct Region {
    migration: Migration,
    /// Where the data section begins in the region, and its bytes.
    /// INVARIANT: it begins at or after the end of the registers.
    offset: u64,
    size: u64,
    section: Section,
}

impl Region {
    /// A region whose data section begins `offset` bytes after the region and has
    /// `size` bytes. `None` if it would begin in the registers, or if it wraps.
    #[must_use]
    pub fn new(offset: u64, size: u64) -> Option<Self> {
        offset.checked_add(size)?;
        let features = Features {
            p2p: false,
            pre_copy: true,
        };
        (offset >= REGISTERS).then_some(Region {
            migration: Migration::new(features),
            offset,
            size,
            section: Section::Idle,
        })
    }

    /// The bytes of the region: the registers, and the data section to its end.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.offset.saturating_add(self.size)
    }

    /// The state that the device is in: RUNNING, STOP, PRE_COPY, STOP_COPY,
    /// RESUMING or ERROR.
    #[must_use]
    pub const fn state(&self) -> State {
        self.migration.state()
    }

    /// The bits of the register `device_state`.
    #[must_use]
    pub const fn device_state(&self) -> u32 {
        match self.migration.state() {
            State::Running | State::RunningP2p => VFIO_DEVICE_STATE_V1_RUNNING,
            State::PreCopy | State::PreCopyP2p => PRE_COPY,
            State::Stop => VFIO_DEVICE_STATE_V1_STOP,
            State::StopCopy => VFIO_DEVICE_STATE_V1_SAVING,
            State::Resuming => VFIO_DEVICE_STATE_V1_RESUMING,
            State::Error => FAILED,
        }
    }

    /// Follows a reset of the device: the state is RUNNING, and nothing is
    /// transferred. The caller resets the device itself.
    pub fn reset(&mut self) {
        self.migration.reset();
        self.section = Section::Idle;
    }

    /// Reads the region at `offset`.
    ///
    /// # Errors
    ///
    /// - [`Error::RegionAccess`] unless the bytes are one register or lie in the
    ///   data section.
    /// - [`Error::DeviceFailed`] in ERROR, but for `device_state` and `reserved`.
    /// - [`Error::RegionOrder`] for `data_offset` if nothing is saved or loaded, and
    ///   for `data_size` and data if `data_offset` was not read before; for data
    ///   beyond `data_size`, and for data in a load.
    /// - [`Error::Device`] if the device fails.
    pub fn read<D: Device + DataSection>(
        &mut self,
        device: &mut D,
        offset: u64,
        to: &mut [u8],
    ) -> Result<(), Error> {
        match self.place(offset, to.len())? {
            Place::DeviceState => put(to, &self.device_state().to_ne_bytes()),
            Place::Reserved => put(to, &[0; 4]),
            _ if self.state() == State::Error => Err(Error::DeviceFailed),
            Place::PendingBytes => put(to, &self.pending_bytes(device)?.to_ne_bytes()),
            Place::DataOffset => put(to, &self.data_offset(device)?.to_ne_bytes()),
            Place::DataSize => match self.section {
                Section::Staged(size) => put(to, &size.to_ne_bytes()),
                _ => Err(Error::RegionOrder),
            },
            Place::Data { at, end } => match self.section {
                Section::Staged(size) if end <= size => device.read(at, to).map_err(Error::Device),
                _ => Err(Error::RegionOrder),
            },
        }
    }

    /// Writes the region at `offset`.
    ///
    /// # Errors
    ///
    /// - [`Error::RegionAccess`] unless the bytes are one register that can be
    ///   written or lie in the data section.
    /// - [`Error::UnknownState`] for a `device_state` with an unknown bit or with
    ///   RESUMING beside another.
    /// - [`Error::DeviceFailed`] in ERROR, which only a reset leaves. A write to
    ///   `reserved` is ignored.
    /// - [`Error::NoTransition`] from stop-and-copy to pre-copy.
    /// - [`Error::RegionOrder`] for data and `data_size` unless the device loads and
    ///   `data_offset` was read before, and for a `data_size` beyond the section.
    /// - [`Error::Device`] if the device fails. After a write to `device_state` that
    ///   register says how far the device came.
    pub fn write<D: Device + DataSection>(
        &mut self,
        device: &mut D,
        offset: u64,
        from: &[u8],
    ) -> Result<(), Error> {
        match self.place(offset, from.len())? {
            Place::DeviceState => self.set_state(device, from),
            Place::Reserved => Ok(()),
            Place::PendingBytes | Place::DataOffset => Err(Error::RegionAccess),
            _ if self.state() == State::Error => Err(Error::DeviceFailed),
            Place::DataSize => {
                let (size, _) = from.split_first_chunk().unwrap_or((&[0; 8], &[]));
                let size = u64::from_ne_bytes(*size);
                if self.section != Section::Open || size > self.size {
                    return Err(Error::RegionOrder);
                }
                // The next chunk begins with a read of data_offset, come what may.
                self.section = Section::Idle;
                device.load(size).map_err(Error::Device)
            }
            Place::Data { at, .. } => match self.section {
                Section::Open => device.write(at, from).map_err(Error::Device),
                _ => Err(Error::RegionOrder),
            },
        }
    }

    /// Which register, or which part of the data section.
    fn place(&self, offset: u64, len: usize) -> Result<Place, Error> {
        match (offset, len) {
            (0, 4) => return Ok(Place::DeviceState),
            (4, 4) => return Ok(Place::Reserved),
            (8, 8) => return Ok(Place::PendingBytes),
            (16, 8) => return Ok(Place::DataOffset),
            (24, 8) => return Ok(Place::DataSize),
            _ => {}
        }
        let at = offset.checked_sub(self.offset);
        let at = at.ok_or(Error::RegionAccess)?;
        match at.checked_add(len as u64) {
            Some(end) if end <= self.size => Ok(Place::Data { at, end }),
            _ => Err(Error::RegionAccess),
        }
    }

    fn set_state<D: Device>(&mut self, device: &mut D, from: &[u8]) -> Result<(), Error> {
        let (bits, _) = from.split_first_chunk().unwrap_or((&[0; 4], &[]));
        let to = match u32::from_ne_bytes(*bits) {
            VFIO_DEVICE_STATE_V1_STOP => State::Stop,
            VFIO_DEVICE_STATE_V1_RUNNING => State::Running,
            VFIO_DEVICE_STATE_V1_SAVING => State::StopCopy,
            PRE_COPY => State::PreCopy,
            VFIO_DEVICE_STATE_V1_RESUMING => State::Resuming,
            _ => return Err(Error::UnknownState),
        };
        let before = self.state();
        let done = self.migration.set_state(device, to.raw());
        let way = Transition {
            from: before,
            to: self.state(),
        };
        // A chunk that was staged in pre-copy is still there in stop-and-copy.
        if before != way.to && way.transfer() != Transfer::SaveRest {
            self.section = Section::Idle;
        }
        done.map(|_| ())
    }

    /// A read of `pending_bytes` says that the chunk before was taken.
    fn pending_bytes<D: DataSection>(&mut self, device: &mut D) -> Result<u64, Error> {
        if !self.state().is_saving() {
            return Ok(0);
        }
        self.section = Section::Idle;
        device.pending().map_err(Error::Device)
    }

    /// A read of `data_offset` stages the next chunk, or opens the section. It does
    /// nothing more if that was done.
    fn data_offset<D: DataSection>(&mut self, device: &mut D) -> Result<u64, Error> {
        if self.state() == State::Resuming {
            self.section = Section::Open;
        } else if !self.state().is_saving() {
            return Err(Error::RegionOrder);
        } else if self.section == Section::Idle {
            let staged = device.stage(self.size).map_err(Error::Device)?;
            self.section = Section::Staged(staged.min(self.size));
        }
        Ok(self.offset)
    }
}

/// What an access to the region concerns.
enum Place {
    DeviceState,
    Reserved,
    PendingBytes,
    DataOffset,
    DataSize,
    /// Bytes of the data section, from `at` up to `end`.
    Data {
        at: u64,
        end: u64,
    },
}

/// Copies a register's bytes; `to` has as many.
fn put(to: &mut [u8], bytes: &[u8]) -> Result<(), Error> {
    to.iter_mut().zip(bytes).for_each(|(a, b)| *a = *b);
    Ok(())
}
