// SPDX-License-Identifier: MIT OR Apache-2.0
//! An emulated device as a program sees it: its group, its ioctls, and its migration.

mod ioctls; // what the ioctls answer
mod migrate; // how a state goes from one device to another
mod uapi; // layouts and numbers
mod writes; // which writes are reported

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use adapter_user::emulated::{
    ConfigSpace, DataDescriptors, DataFile, Descriptors, DeviceFile, DeviceGroup, DeviceModel, Dma,
    Features, GroupFile, Irqs, MigrationVersion, Settings,
};
use adapter_user::{Container, Errno, Group, GroupId, GuestMemory, IommuType, Options, Prot};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const PAGES: u64 = 64;

/// A device with eight registers, of which the test makes what it likes.
pub(crate) struct Toy {
    pub(crate) dma: Dma,
    pub(crate) irqs: Irqs,
    config: Mutex<ConfigSpace>,
    pub(crate) registers: Mutex<[u8; 8]>,
    pub(crate) running: AtomicBool,
    /// How many bytes of early data there are.
    pub(crate) early: AtomicU64,
    /// What was loaded early.
    pub(crate) loaded: Mutex<Vec<u8>>,
    pub(crate) fail_save: AtomicBool,
    pub(crate) unmapped: Mutex<Vec<(u64, u64)>>,
}

impl Toy {
    fn new(dma: Dma, irqs: Irqs) -> Toy {
        Toy {
            dma,
            irqs,
            config: Mutex::new(ConfigSpace::new(0x1234, 0x5678, 0x08_8000).with_memory_bar(0, 16)),
            registers: Mutex::default(),
            running: AtomicBool::new(true),
            early: AtomicU64::new(0),
            loaded: Mutex::default(),
            fail_save: AtomicBool::new(false),
            unmapped: Mutex::default(),
        }
    }
}

/// A toy that the test keeps a handle to.
pub(crate) struct Shared(pub(crate) Arc<Toy>);

impl DeviceModel for Shared {
    fn region_size(&self, region: u32) -> u64 {
        match region {
            0 => 8,
            7 => 256,
            _ => 0,
        }
    }

    fn irq_count(&self, index: u32) -> u32 {
        match index {
            2 => 4,
            _ => 9, // not asked for an index that is none of messages
        }
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) {
        match region {
            0 => data.copy_from_slice(
                &self.0.registers.lock().unwrap()[offset as usize..][..data.len()],
            ),
            _ => self.0.config.lock().unwrap().read(offset, data),
        }
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) {
        match region {
            0 => self.0.registers.lock().unwrap()[offset as usize..][..data.len()]
                .copy_from_slice(data),
            _ => self.0.config.lock().unwrap().write(offset, data),
        }
    }

    fn unmapped(&self, iova: u64, size: u64) {
        self.0.unmapped.lock().unwrap().push((iova, size));
    }

    fn reset(&self) {
        *self.0.registers.lock().unwrap() = [0; 8];
    }

    fn quiesce(&self) {
        self.0.running.store(false, Ordering::SeqCst);
    }

    fn resume(&self) {
        self.0.running.store(true, Ordering::SeqCst);
    }

    fn state_size(&self) -> u64 {
        8
    }

    fn save(&self, stream: &mut dyn Write) -> io::Result<()> {
        assert!(
            !self.0.running.load(Ordering::SeqCst),
            "a device is saved when it has stopped"
        );
        if self.0.fail_save.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(28));
        }
        stream.write_all(&*self.0.registers.lock().unwrap())
    }

    fn load(&self, stream: &mut dyn Read) -> io::Result<()> {
        assert!(
            !self.0.running.load(Ordering::SeqCst),
            "a device is loaded when it has stopped"
        );
        stream.read_exact(&mut *self.0.registers.lock().unwrap())
    }

    fn early_size(&self) -> u64 {
        self.0.early.load(Ordering::SeqCst)
    }

    fn save_early(&self, stream: &mut dyn Write) -> io::Result<()> {
        let size = self.0.early.swap(0, Ordering::SeqCst);
        stream.write_all(&vec![size as u8; size as usize])
    }

    fn load_early(&self, stream: &mut dyn Read) -> io::Result<()> {
        stream
            .read_to_end(&mut self.0.loaded.lock().unwrap())
            .map(drop)
    }
}

/// An open device, and all around it.
pub(crate) struct World {
    pub(crate) device: Arc<DeviceFile>,
    pub(crate) toy: Arc<Toy>,
    pub(crate) container: Container,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) file: Arc<GroupFile>,
    pub(crate) group: Arc<DeviceGroup>,
}

pub(crate) fn v2(p2p: bool, pre_copy: bool) -> Settings {
    Settings {
        migration: MigrationVersion::V2(Features { p2p, pre_copy }),
        own_log: false,
    }
}

/// Where the toy comes when its device is opened.
type Slot = Arc<Mutex<Option<Arc<Toy>>>>;

/// A group with the device `toy`.
pub(crate) fn group(settings: Settings) -> (Arc<DeviceGroup>, Slot) {
    let slot = Slot::default();
    let toys = Arc::clone(&slot);
    let make = move |dma, irqs| {
        let toy = Arc::new(Toy::new(dma, irqs));
        *toys.lock().unwrap() = Some(Arc::clone(&toy));
        Shared(toy)
    };
    let group = DeviceGroup::new(Group::emulated(GroupId(1))).with_device("toy", settings, make);
    (Arc::new(group), slot)
}

/// Opens the toy, in a container that maps `PAGES` pages from IOVA 0 on.
pub(crate) fn world(settings: Settings) -> World {
    let (group, slot) = group(settings);
    let container = Container::new(Options::default());
    let file = group.open().unwrap();
    file.set_container(&container).unwrap();
    container.set_iommu(IommuType::Type1v2).unwrap();
    let memory = Arc::new(GuestMemory::new(PAGES * PAGE).unwrap());
    let size = memory.len();
    container
        .map(0, &memory, 0, size, Prot::READ_WRITE)
        .unwrap();
    let device = file.device("toy").unwrap();
    let toy = slot.lock().unwrap().take().unwrap();
    World {
        device,
        toy,
        container,
        memory,
        file,
        group,
    }
}

/// The descriptors of a program that has none of the kernel's.
#[derive(Default)]
pub(crate) struct Table {
    pub(crate) containers: BTreeMap<i32, Container>,
    pub(crate) devices: Mutex<Vec<Arc<DeviceFile>>>,
    pub(crate) data: Mutex<BTreeMap<i32, DataFile>>,
    /// What opening a file fails with.
    pub(crate) full: Option<Errno>,
}

impl DataDescriptors for Table {
    fn install_data(&self, file: DataFile) -> Result<i32, Errno> {
        if let Some(errno) = self.full {
            return Err(errno);
        }
        let mut data = self.data.lock().unwrap();
        let fd = 100 + data.len() as i32;
        data.insert(fd, file);
        Ok(fd)
    }

    fn remove(&self, fd: i32) {
        self.data.lock().unwrap().remove(&fd);
    }
}

impl Descriptors for Table {
    fn container(&self, fd: i32) -> Option<Container> {
        self.containers.get(&fd).cloned()
    }

    fn install(&self, device: Arc<DeviceFile>) -> Result<i32, Errno> {
        let mut devices = self.devices.lock().unwrap();
        devices.push(device);
        Ok(devices.len() as i32)
    }
}
