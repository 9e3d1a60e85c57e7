// SPDX-License-Identifier: MIT OR Apache-2.0
//! The migration of a device's own state.
//!
//! A VMM moves a VFIO device by states: it asks for one, and a data file carries
//! the device's state out of the source and into the destination. This module has
//! what is the same for every device. Its answers are those of Linux, to the errno
//! (rules M1 to M9 in docs/rules.md).
//!
//! - [`State`] and [`Features`] say which states a device has, and
//!   [`Features::next`] the next one on the way to any other.
//! - [`Migration`] is the machine. It drives a [`Device`] through one
//!   [`Transition`] at a time, and knows in which states the device may write
//!   memory.
//! - [`DeviceFeature`] is a VFIO_DEVICE_FEATURE ioctl whose argument was read,
//!   which needs no lock. [`Migration::run`] answers those of migration, and a
//!   device's log those of DMA logging.
//! - [`PrecopyInfo`] is the ioctl of a data file in pre-copy.
//! - [`uapi`] has the structures and numbers.
//! - [`v1`] is the first interface, a region of the device.
//!
//! # Example
//!
//! A device with one register, of which the data file is a copy:
//!
//! ```
//! use dirty_core::migration::{uapi::*, Device, Failure, Features, Migration, State, Transition};
//! use dirty_core::Errno;
//!
//! struct Counter {
//!     register: u32,
//!     loaded: Option<u32>, // what was written to the data file
//! }
//! impl Device for Counter {
//!     type File = u32;
//!     fn begin(&mut self, _: Transition) -> Result<u32, Failure> {
//!         Ok(self.register)
//!     }
//!     fn step(&mut self, transition: Transition) -> Result<(), Failure> {
//!         if transition.from == State::Resuming {
//!             self.register = self.loaded.take().ok_or(Failure::Unchanged(Errno::EINVAL))?;
//!         }
//!         Ok(())
//!     }
//!     fn stop_copy_length(&mut self) -> Result<u64, Errno> {
//!         Ok(4)
//!     }
//! }
//!
//! let mut source = Counter { register: 7, loaded: None };
//! let mut migration = Migration::new(Features::default());
//! let file = migration.set_state(&mut source, VFIO_DEVICE_STATE_STOP_COPY)?;
//! assert_eq!(file, Some(7));
//! assert!(!migration.state().may_write_memory());
//!
//! let mut destination = Counter { register: 0, loaded: None };
//! let mut migration = Migration::new(Features::default());
//! migration.set_state(&mut destination, VFIO_DEVICE_STATE_RESUMING)?;
//! destination.loaded = file;
//! migration.set_state(&mut destination, VFIO_DEVICE_STATE_RUNNING)?;
//! assert_eq!(destination.register, 7);
//! # Ok::<(), dirty_core::Error>(())
//! ```

// Each file uses only files below it.
pub mod v1; // the migration region of the first interface

mod machine; // drives a device, and answers the ioctls of migration

mod feature; // VFIO_DEVICE_FEATURE: the argument
mod precopy; // VFIO_MIG_GET_PRECOPY_INFO: the argument

mod state; // states, features, the way from one state to another
pub mod uapi;

pub use feature::{DeviceFeature, LoggingCall, MigrationCall, Offers};
pub use machine::{Device, Failure, Migration};
pub use precopy::{Precopy, PrecopyInfo};
pub use state::{Features, State, Transfer, Transition};
