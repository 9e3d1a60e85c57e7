// SPDX-License-Identifier: MIT OR Apache-2.0
//! A group of emulated devices, and its file.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use dirty_core::{Errno, Error};

use super::device::{DataDescriptors, DeviceFile, Opening, Settings};
use super::dma::Dma;
use super::irqs::Irqs;
use super::model::DeviceModel;
use super::uapi::{
    VFIO_GROUP_FLAGS_CONTAINER_SET, VFIO_GROUP_FLAGS_VIABLE, VFIO_GROUP_GET_DEVICE_FD,
    VFIO_GROUP_GET_STATUS, VFIO_GROUP_SET_CONTAINER, VFIO_GROUP_UNSET_CONTAINER,
};
use super::user::{get, get_string, get_words, offset, put};
use crate::container::{group::Group, Container};

/// The descriptors of the program that makes the ioctls. Whoever passes its ioctls on keeps
/// them.
pub trait Descriptors: DataDescriptors {
    /// Returns the container that `fd` is a descriptor of.
    fn container(&self, fd: i32) -> Option<Container>;

    /// Gives a device's file a descriptor.
    ///
    /// # Errors
    ///
    /// Any, as EMFILE. The file is closed then.
    fn install(&self, device: Arc<DeviceFile>) -> Result<i32, Errno>;
}

/// Makes a device's model when the device is opened.
type Make = Box<dyn Fn(Dma, Irqs) -> Arc<dyn DeviceModel> + Send + Sync>;

/// A device of a group.
struct Member {
    name: String,
    settings: Settings,
    make: Make,
    /// The device's file, while it is open.
    open: Mutex<Weak<DeviceFile>>,
}

/// A group of emulated devices: what `/dev/vfio/N` stands for.
pub struct DeviceGroup {
    group: Group,
    members: Vec<Member>,
    opened: AtomicBool,
}

impl fmt::Debug for DeviceGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.members.iter().map(|member| &member.name);
        f.debug_struct("DeviceGroup")
            .field("group", &self.group)
            .field("devices", &names.collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl DeviceGroup {
    /// Creates a group without devices. `group` says how a container sees it.
    #[must_use]
    pub fn new(group: Group) -> Self {
        DeviceGroup {
            group,
            members: Vec::new(),
            opened: AtomicBool::new(false),
        }
    }

    /// Adds a device. `make` is called each time that the device is opened, with the guest
    /// memory that it reaches and the interrupts that it raises.
    #[must_use]
    pub fn with_device<M: DeviceModel + 'static>(
        mut self,
        name: &str,
        settings: Settings,
        make: impl Fn(Dma, Irqs) -> M + Send + Sync + 'static,
    ) -> Self {
        self.members.push(Member {
            name: name.to_owned(),
            settings,
            make: Box::new(move |dma, irqs| Arc::new(make(dma, irqs))),
            open: Mutex::default(),
        });
        self
    }

    /// Opens the group's file.
    ///
    /// # Errors
    ///
    /// EBUSY while it is open. A device's file keeps it open.
    pub fn open(self: &Arc<Self>) -> Result<Arc<GroupFile>, Errno> {
        if self.opened.swap(true, Ordering::AcqRel) {
            return Err(Errno::EBUSY);
        }
        Ok(Arc::new(GroupFile {
            group: Arc::clone(self),
            container: Mutex::new(None),
        }))
    }
}

/// The open file of a group. When the last handle goes, and the last device's file, the
/// group leaves its container.
#[derive(Debug)]
pub struct GroupFile {
    group: Arc<DeviceGroup>,
    container: Mutex<Option<Container>>,
}

impl GroupFile {
    fn container(&self) -> MutexGuard<'_, Option<Container>> {
        let container = self.container.lock();
        container.unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers VFIO_GROUP_GET_STATUS: the flags VIABLE, and CONTAINER_SET if the group is in
    /// a container.
    #[must_use]
    pub fn status(&self) -> u32 {
        match *self.container() {
            Some(_) => VFIO_GROUP_FLAGS_VIABLE | VFIO_GROUP_FLAGS_CONTAINER_SET,
            None => VFIO_GROUP_FLAGS_VIABLE,
        }
    }

    /// Answers VFIO_GROUP_SET_CONTAINER: adds the group to a container.
    ///
    /// # Errors
    ///
    /// EINVAL if it is in one; then as [`Container::add_group`].
    pub fn set_container(&self, container: &Container) -> Result<(), Errno> {
        let mut own = self.container();
        if own.is_some() {
            return Err(Errno::EINVAL);
        }
        container
            .add_group(self.group.group.clone())
            .map_err(Error::errno)?;
        *own = Some(container.clone());
        Ok(())
    }

    /// Answers VFIO_GROUP_UNSET_CONTAINER: removes the group from its container.
    ///
    /// # Errors
    ///
    /// EINVAL if it is in none, EBUSY while one of its devices is open.
    pub fn unset_container(&self) -> Result<(), Errno> {
        let mut own = self.container();
        let container = own.as_ref().ok_or(Errno::EINVAL)?;
        container
            .remove_group(self.group.group.id())
            .map_err(Error::errno)?;
        *own = None;
        Ok(())
    }

    /// Answers VFIO_GROUP_GET_DEVICE_FD: opens a device. A device that is open already gets
    /// another handle.
    ///
    /// # Errors
    ///
    /// In this order: ENODEV if the group has no device of this name; EINVAL if the group is
    /// in no container, or the container has no IOMMU type; ENOMEM.
    pub fn device(self: &Arc<Self>, name: &str) -> Result<Arc<DeviceFile>, Errno> {
        let mut members = self.group.members.iter();
        let member = members.find(|member| member.name == name);
        let member = member.ok_or(Errno::ENODEV)?;
        let mut open = member.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = open.upgrade() {
            return Ok(device);
        }
        let container = self.container().clone().ok_or(Errno::EINVAL)?;
        let device = Arc::new(DeviceFile::open(Opening {
            container: &container,
            id: self.group.group.id(),
            name,
            settings: member.settings,
            make: &member.make,
            group: Arc::clone(self) as _,
            bus: None,
        })?);
        *open = Arc::downgrade(&device);
        Ok(device)
    }

    /// Answers an ioctl of the group's file. `nr` is its number, and `arg` its argument: an
    /// address in this process, or a value.
    ///
    /// # Errors
    ///
    /// ENOTTY for an ioctl that a group does not have. EFAULT for a bad address, EINVAL for an
    /// argsz that is too small, EBADF for a descriptor that is no container's; then as the
    /// call of the same name.
    ///
    /// # Safety
    ///
    /// It reads and writes memory of this process as the system call would: an ioctl that
    /// answers in its structure writes to it, and nobody else may use it meanwhile.
    pub unsafe fn ioctl(
        self: &Arc<Self>,
        nr: u32,
        arg: u64,
        descriptors: &dyn Descriptors,
    ) -> Result<i32, Errno> {
        match nr {
            VFIO_GROUP_GET_STATUS => {
                let [_argsz, _flags] = get_words(arg)?;
                put(offset(arg, 4)?, &self.status().to_ne_bytes())?;
            }
            VFIO_GROUP_SET_CONTAINER => {
                let fd = i32::from_ne_bytes(get(arg)?);
                let container = descriptors.container(fd).ok_or(Errno::EBADF)?;
                self.set_container(&container)?;
            }
            VFIO_GROUP_UNSET_CONTAINER => self.unset_container()?,
            VFIO_GROUP_GET_DEVICE_FD => {
                let name = String::from_utf8(get_string(arg)?).map_err(|_| Errno::ENODEV)?;
                return descriptors.install(self.device(&name)?);
            }
            _ => return Err(Errno::ENOTTY),
        }
        Ok(0)
    }
}

impl Drop for GroupFile {
    fn drop(&mut self) {
        if let Some(container) = self.container().take() {
            // unreachable: an open device keeps this file
            let _ = container.remove_group(self.group.group.id());
        }
        self.group.opened.store(false, Ordering::Release);
    }
}
