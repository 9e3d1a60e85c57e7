// SPDX-License-Identifier: MIT OR Apache-2.0
//! Emulated VFIO devices: a trait for what a device does, and the files of VFIO over it.
//!
//! The author of a device implements [`DeviceModel`]: registers, reset, and how its state is
//! saved and loaded. The model reaches guest memory by its [`Dma`], which pins by guards and
//! marks each write in the container and in the device's log, and raises its [`Irqs`].
//!
//! A [`DeviceGroup`] has devices. Its [`GroupFile`] joins a [`Container`](crate::Container)
//! and opens [`DeviceFile`]s, which answer the ioctls of a VFIO device, with its migration and
//! with its log. A state on its way is read from a [`DataFile`] and written to one. Each file
//! has typed calls, and an `ioctl` that takes what a program passes to the kernel.
//!
//! # Example
//!
//! A device that copies four bytes when its doorbell is written, and how it moves to another
//! container:
//!
//! ```
//! use std::io::{self, Read, Write};
//! use std::sync::{Arc, Mutex};
//! use adapter_user::emulated::{ConfigSpace, DeviceGroup, DeviceModel, Dma};
//! use adapter_user::emulated::{MigrationVersion, Settings};
//! use adapter_user::{host_options, Container, Group, GroupId, GuestMemory, IommuType, Prot};
//!
//! /// BAR 0 has 16 bytes: from, to (IOVAs). A write of `to` is the doorbell.
//! struct Copier {
//!     dma: Dma,
//!     config: Mutex<ConfigSpace>,
//!     registers: Mutex<[u8; 16]>,
//! }
//!
//! impl Copier {
//!     fn new(dma: Dma) -> Self {
//!         let config = ConfigSpace::new(0x1234, 0x0c0b, 0x088000).with_memory_bar(0, 16);
//!         Copier { dma, config: Mutex::new(config), registers: Mutex::default() }
//!     }
//! }
//!
//! impl DeviceModel for Copier {
//!     fn region_size(&self, region: u32) -> u64 {
//!         match region { 0 => 16, 7 => 256, _ => 0 }
//!     }
//!     fn read(&self, region: u32, offset: u64, data: &mut [u8]) {
//!         match region {
//!             0 => data.copy_from_slice(&self.registers.lock().unwrap()[offset as usize..][..data.len()]),
//!             _ => self.config.lock().unwrap().read(offset, data),
//!         }
//!     }
//!     fn write(&self, region: u32, offset: u64, data: &[u8]) {
//!         if region != 0 {
//!             return self.config.lock().unwrap().write(offset, data);
//!         }
//!         // The lock is held during the DMA, so that `quiesce` waits for it.
//!         let mut registers = self.registers.lock().unwrap();
//!         registers[offset as usize..][..data.len()].copy_from_slice(data);
//!         if offset == 8 {
//!             let from = u64::from_le_bytes(registers[..8].try_into().unwrap());
//!             let to = u64::from_le_bytes(registers[8..].try_into().unwrap());
//!             let mut bytes = [0; 4];
//!             // A real device would tell the guest of an error.
//!             let _ = self.dma.read(from, &mut bytes).and_then(|()| self.dma.write(to, &bytes));
//!         }
//!     }
//!     fn reset(&self) {
//!         *self.registers.lock().unwrap() = [0; 16];
//!     }
//!     fn quiesce(&self) {
//!         drop(self.registers.lock()); // no DMA begins by itself
//!     }
//!     fn resume(&self) {}
//!     fn state_size(&self) -> u64 {
//!         256 + 16
//!     }
//!     fn save(&self, stream: &mut dyn Write) -> io::Result<()> {
//!         stream.write_all(self.config.lock().unwrap().bytes())?;
//!         stream.write_all(&*self.registers.lock().unwrap())
//!     }
//!     fn load(&self, stream: &mut dyn Read) -> io::Result<()> {
//!         let mut config = [0; 256];
//!         stream.read_exact(&mut config)?;
//!         self.config.lock().unwrap().restore(&config);
//!         stream.read_exact(&mut *self.registers.lock().unwrap())
//!     }
//! }
//!
//! /// Opens the device in a container that maps `memory`.
//! fn open(memory: &Arc<GuestMemory>) -> Result<(Container, Arc<adapter_user::emulated::DeviceFile>), Box<dyn std::error::Error>> {
//!     let settings = Settings {
//!         migration: MigrationVersion::V2(Default::default()),
//!         own_log: false,
//!     };
//!     let group = Group::emulated(GroupId(1));
//!     let group = Arc::new(DeviceGroup::new(group).with_device("copier", settings, |dma, _| Copier::new(dma)));
//!     let container = Container::new(host_options());
//!     let file = group.open().map_err(|errno| errno.to_string())?;
//!     file.set_container(&container).map_err(|errno| errno.to_string())?;
//!     container.set_iommu(IommuType::Type1v2)?;
//!     container.map(0, memory, 0, memory.len(), Prot::READ_WRITE)?;
//!     Ok((container, file.device("copier").map_err(|errno| errno.to_string())?))
//! }
//!
//! let memory = Arc::new(GuestMemory::new(1 << 20)?);
//! let (container, source) = open(&memory)?;
//! container.start()?;
//! memory.write(0x1000, b"data")?;
//! source.write(0, &0x1000u64.to_le_bytes()).unwrap();
//! source.write(8, &0x2000u64.to_le_bytes()).unwrap(); // rings the doorbell
//! let mut dirty = [0; 4];
//! container.dirty_bitmap(0, 1 << 20, 4096, &mut dirty)?;
//! assert_eq!(dirty, [1 << 2, 0, 0, 0]);
//!
//! // A VMM stops the device, reads its state, and writes it to another one.
//! let file = source.set_state(3).unwrap().unwrap(); // STOP_COPY
//! let mut state = [0; 1024];
//! let size = file.read(&mut state).unwrap();
//! let (_container, destination) = open(&Arc::new(GuestMemory::new(1 << 20)?))?;
//! let file = destination.set_state(4).unwrap().unwrap(); // RESUMING
//! file.write(&state[..size]).unwrap();
//! destination.set_state(2).unwrap(); // RUNNING
//! let mut register = [0; 8];
//! destination.read(8, &mut register).unwrap();
//! assert_eq!(u64::from_le_bytes(register), 0x2000);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

// Each file uses only files below it.
mod group; // a group of devices, and its file

mod device; // a device's file

mod transfer; // a device that the machine of migration drives

mod data; // the file that a device's state goes through
mod dma;
mod irqs;

pub(crate) mod bus; // what may stand between a device and its container

mod config;
mod model;
pub mod uapi;
mod user; // the structures of ioctls

pub use self::config::ConfigSpace;
pub use self::data::DataFile;
#[cfg(feature = "vfio-user")]
pub(crate) use self::device::{irq_flags, region_flags, Opening, DEVICE_FLAGS, REGION_SHIFT};
pub use self::device::{DataDescriptors, DeviceFile, MigrationVersion, Settings};
pub use self::dma::Dma;
pub use self::group::{Descriptors, DeviceGroup, GroupFile};
pub use self::irqs::{IrqData, Irqs};
pub use self::model::DeviceModel;
pub use dirty_core::migration::Features;
