// SPDX-License-Identifier: MIT OR Apache-2.0
//! The crates that VMMs use for VFIO, on top of our container and our device's log.
//!
//! Our structures have the layout of those of vfio-bindings and iommufd-bindings.
//! vfio-ioctls opens `/dev/vfio/vfio` and a group's file, and makes ioctls on them. This
//! program defines `open64` and `ioctl` itself, which the linker prefers to libc's. They
//! pass the calls for VFIO to a container in this process.

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_ulong, CStr};
use std::fs;
use std::mem::{offset_of, size_of};
use std::os::fd::RawFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use adapter_user::device_log::{uapi as log, DeviceLog};
use adapter_user::{uapi, Container, Group, GroupId, GuestMemory, Options};
use vfio_bindings::bindings::vfio;
use vfio_ioctls::{DmaLoggingRange, VfioContainer, VfioDevice, VfioError};

// ---- layouts

/// Asserts that sizes and the offsets of fields are the same.
macro_rules! same {
    ($ours:ident, $theirs:ident: $($name:ident { $($field:ident),* })*) => {$(
        assert_eq!(size_of::<$ours::$name>(), size_of::<$theirs::$name>(), stringify!($name));
        $(assert_eq!(
            offset_of!($ours::$name, $field),
            offset_of!($theirs::$name, $field),
            concat!(stringify!($name), ".", stringify!($field))
        );)*
    )*};
}

/// Asserts that numbers are the same.
macro_rules! equal {
    ($ours:ident, $theirs:ident: $($name:ident)*) => {
        $(assert_eq!($ours::$name as u64, $theirs::$name as u64, stringify!($name));)*
    };
}

#[test]
fn the_container_s_structures_are_laid_out_as_vfio_bindings_has_them() {
    same! { uapi, vfio:
        vfio_info_cap_header { id, version, next }
        vfio_iova_range { start, end }
        vfio_iommu_type1_info { argsz, flags, iova_pgsizes, cap_offset, pad }
        vfio_iommu_type1_info_cap_migration { header, flags, pgsize_bitmap, max_dirty_bitmap_size }
        vfio_iommu_type1_info_dma_avail { header, avail }
        vfio_iommu_type1_dma_map { argsz, flags, vaddr, iova, size }
        vfio_iommu_type1_dma_unmap { argsz, flags, iova, size }
        vfio_bitmap { pgsize, size, data }
        vfio_iommu_type1_dirty_bitmap { argsz, flags }
        vfio_iommu_type1_dirty_bitmap_get { iova, size, bitmap }
    }
    equal! { uapi, vfio:
        VFIO_TYPE1_IOMMU VFIO_TYPE1v2_IOMMU VFIO_DMA_CC_IOMMU VFIO_UNMAP_ALL
        VFIO_IOMMU_INFO_PGSIZES VFIO_IOMMU_INFO_CAPS VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE
        VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL
        VFIO_DMA_MAP_FLAG_READ VFIO_DMA_MAP_FLAG_WRITE VFIO_DMA_MAP_FLAG_VADDR
        VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP VFIO_DMA_UNMAP_FLAG_ALL VFIO_DMA_UNMAP_FLAG_VADDR
        VFIO_IOMMU_DIRTY_PAGES_FLAG_START VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP
        VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP
    }
}

#[test]
fn the_log_s_structures_are_laid_out_as_the_crates_have_them() {
    use iommufd_bindings::iommufd;
    same! { log, vfio:
        vfio_device_feature { argsz, flags }
        vfio_device_feature_dma_logging_control { page_size, num_ranges, __reserved, ranges }
        vfio_device_feature_dma_logging_range { iova, length }
        vfio_device_feature_dma_logging_report { iova, length, page_size, bitmap }
    }
    same! { log, iommufd:
        iommu_hwpt_set_dirty_tracking { size, flags, hwpt_id, __reserved }
        iommu_hwpt_get_dirty_bitmap {
            size, hwpt_id, flags, __reserved, iova, length, page_size, data
        }
    }
    equal! { log, vfio:
        VFIO_DEVICE_FEATURE_MASK VFIO_DEVICE_FEATURE_GET VFIO_DEVICE_FEATURE_SET
        VFIO_DEVICE_FEATURE_PROBE VFIO_DEVICE_FEATURE_DMA_LOGGING_START
        VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
    }
    let base = 0x3b00;
    assert_eq!(
        log::IOMMU_HWPT_SET_DIRTY_TRACKING,
        base + iommufd::IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING
    );
    assert_eq!(
        log::IOMMU_HWPT_GET_DIRTY_BITMAP,
        base + iommufd::IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP
    );
    assert_eq!(
        log::IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
        iommufd::iommufd_hwpt_get_dirty_bitmap_flags_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR
    );
    assert_eq!(
        log::IOMMU_HWPT_DIRTY_TRACKING_ENABLE,
        iommufd::iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE
    );
}

#[test]
fn the_structures_of_migration_are_laid_out_as_vfio_bindings_has_them() {
    use dirty_core::migration::{uapi as migration, v1};
    same! { migration, vfio:
        vfio_device_feature { argsz, flags }
        vfio_device_feature_migration { flags }
        vfio_device_feature_mig_state { device_state, data_fd }
        vfio_device_feature_mig_data_size { stop_copy_length }
        vfio_precopy_info { argsz, flags, initial_bytes, dirty_bytes }
    }
    same! { v1, vfio:
        vfio_device_migration_info { device_state, reserved, pending_bytes, data_offset, data_size }
    }
    equal! { migration, vfio:
        VFIO_DEVICE_FEATURE_MIGRATION VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
        VFIO_DEVICE_FEATURE_MIG_DATA_SIZE VFIO_MIGRATION_STOP_COPY VFIO_MIGRATION_P2P
        VFIO_MIGRATION_PRE_COPY
    }
    assert_eq!(
        [
            migration::VFIO_DEVICE_STATE_ERROR,
            migration::VFIO_DEVICE_STATE_STOP,
            migration::VFIO_DEVICE_STATE_RUNNING,
            migration::VFIO_DEVICE_STATE_STOP_COPY,
            migration::VFIO_DEVICE_STATE_RESUMING,
            migration::VFIO_DEVICE_STATE_RUNNING_P2P,
            migration::VFIO_DEVICE_STATE_PRE_COPY,
            migration::VFIO_DEVICE_STATE_PRE_COPY_P2P,
        ],
        [
            vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_ERROR,
            vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP,
            vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING,
            vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY,
            vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING,
            vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING_P2P,
            vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY,
            vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY_P2P,
        ]
    );
    equal! { v1, vfio:
        VFIO_DEVICE_STATE_V1_STOP VFIO_DEVICE_STATE_V1_RUNNING VFIO_DEVICE_STATE_V1_SAVING
        VFIO_DEVICE_STATE_V1_RESUMING VFIO_REGION_TYPE_MIGRATION_DEPRECATED
        VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED
    }
}

// ---- VFIO's files, in this process

const GROUP: GroupId = GroupId(42);

/// What a descriptor stands for.
#[derive(Clone)]
enum File {
    Container(Container),
    Group(Option<Container>),
    Device(DeviceLog),
}

/// The descriptors of VFIO, and the log of the device.
#[derive(Default)]
struct World {
    files: HashMap<RawFd, File>,
    log: Option<DeviceLog>,
}

static WORLD: LazyLock<Mutex<World>> = LazyLock::new(Mutex::default);

fn world() -> MutexGuard<'static, World> {
    WORLD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns a free descriptor, which no other file has.
fn descriptor() -> RawFd {
    // SAFETY: a system call that takes no address.
    unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) }
}

/// libc's `open64`, for `std::fs`.
///
/// # Safety
///
/// As libc's.
#[no_mangle]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    // SAFETY: the caller passes a string.
    let file = match unsafe { CStr::from_ptr(path) }.to_bytes() {
        b"/dev/vfio/vfio" => File::Container(Container::new(Options::default())),
        b"/dev/vfio/42" => File::Group(None),
        // SAFETY: the caller's arguments.
        _ => return unsafe { libc::openat(libc::AT_FDCWD, path, flags, mode) },
    };
    let fd = descriptor();
    world().files.insert(fd, file);
    fd
}

/// libc's `ioctl`, for vmm-sys-util.
///
/// # Safety
///
/// As libc's.
#[no_mangle]
pub unsafe extern "C" fn ioctl(fd: c_int, nr: c_ulong, arg: *mut u32) -> c_int {
    let file = world().files.get(&fd).cloned();
    let nr32 = nr as u32;
    let answer = match file {
        // SAFETY: the caller's arguments.
        None => return unsafe { libc::syscall(libc::SYS_ioctl, fd, nr, arg) } as c_int,
        // SAFETY: the caller's argument fits the number.
        Some(File::Container(container)) => unsafe { container.ioctl(nr32, arg as u64) }
            .map(|value| value as c_int)
            .map_err(|e| e.errno().0),
        Some(File::Device(log)) if nr32 == log::VFIO_DEVICE_FEATURE => {
            // SAFETY: the caller's argument fits the number, as for the real ioctl.
            let answer = unsafe { log.ioctl(nr32, arg as u64) };
            answer.map(|()| 0).map_err(|e| e.errno().0)
        }
        // SAFETY: the caller's argument fits the number.
        Some(file) => unsafe { group_or_device(fd, &file, nr32 - 0x3b64, arg) },
    };
    answer.unwrap_or_else(|errno| {
        nix::errno::Errno::set_raw(errno);
        -1
    })
}

/// Answers the few ioctls of a group, and of a device without regions and interrupts.
///
/// # Safety
///
/// `arg` must be what the number asks for.
unsafe fn group_or_device(
    fd: RawFd,
    file: &File,
    offset: u32,
    arg: *mut u32,
) -> Result<c_int, i32> {
    let mut world = world();
    match (file, offset) {
        (File::Group(_), 3) => {
            // SAFETY: GROUP_GET_STATUS has two numbers: argsz, flags.
            unsafe { arg.cast::<[u32; 2]>().write([8, 1]) }; // viable
            Ok(0)
        }
        (File::Group(None), 4) => {
            // SAFETY: GROUP_SET_CONTAINER: a descriptor.
            let container = unsafe { arg.cast::<RawFd>().read() };
            let Some(File::Container(container)) = world.files.get(&container).cloned() else {
                return Err(libc::EBADF);
            };
            let added = container.add_group(Group::emulated(GROUP));
            world.files.insert(fd, File::Group(Some(container)));
            added.map(|()| 0).map_err(|e| e.errno().0)
        }
        (File::Group(Some(container)), 5) => {
            world.files.insert(fd, File::Group(None));
            let removed = container.remove_group(GROUP);
            removed.map(|()| 0).map_err(|e| e.errno().0)
        }
        (File::Group(Some(_)), 6) => {
            let device = descriptor();
            let log = world
                .log
                .get_or_insert_with(|| DeviceLog::new(Some(1 << 20)));
            let log = log.clone();
            world.files.insert(device, File::Device(log));
            Ok(device)
        }
        (File::Device(_), 7) => {
            let platform = 4;
            // SAFETY: DEVICE_GET_INFO has argsz, flags and more.
            unsafe { arg.cast::<[u32; 2]>().write([24, platform]) };
            Ok(0)
        }
        _ => Err(libc::ENOTTY),
    }
}

fn errno<T>(result: Result<T, VfioError>) -> i32 {
    match result.map(drop) {
        Err(
            VfioError::IommuDmaMap(e)
            | VfioError::IommuDmaUnmap(e)
            | VfioError::VfioDeviceFeature(e),
        ) => e.errno(),
        other => panic!("{other:?}"),
    }
}

/// Makes the files that sysfs has for a device in a group.
fn sysfs(folder: &Path) -> std::path::PathBuf {
    let device = folder.join("device");
    fs::create_dir_all(&device).unwrap();
    symlink("../iommu_groups/42", device.join("iommu_group")).unwrap();
    device
}

const PAGE: u64 = 4096;

#[test]
fn vfio_ioctls_gets_the_answers_it_expects() {
    let folder = tempfile::tempdir().unwrap();
    let container = Arc::new(VfioContainer::new(None).unwrap());
    let device = VfioDevice::new(&sysfs(folder.path()), container.clone(), false).unwrap();

    // Mappings.
    let memory = GuestMemory::new(64 * PAGE).unwrap();
    let map = |iova, size: u64| {
        // SAFETY: the memory outlives its mappings, and is reached by atomics.
        unsafe { container.vfio_dma_map(iova, size as usize, memory.addr() as *mut u8) }
    };
    let unmap = |iova, size: u64| container.vfio_dma_unmap(iova, size as usize);
    map(0x10_0000, 64 * PAGE).unwrap();
    assert_eq!(errno(map(0x10_1000, PAGE)), libc::EEXIST);
    assert_eq!(errno(map(1, PAGE)), libc::EINVAL);
    assert_eq!(
        errno(map(0u64.wrapping_sub(PAGE), 2 * PAGE)),
        libc::EOVERFLOW
    );
    assert_eq!(
        errno(unmap(0x10_1000, PAGE)),
        libc::EINVAL,
        "it starts inside a mapping"
    );
    unmap(0x10_0000, 64 * PAGE).unwrap();
    assert!(
        matches!(unmap(0x10_0000, PAGE), Err(VfioError::InvalidDmaUnmapSize)),
        "nothing is mapped there"
    );

    // DMA logging.
    let log = world().log.clone().expect("the device's");
    let range = |iova, length| DmaLoggingRange { iova, length };
    log.add_range(0, 1 << 40).unwrap(); // the device's map
    let start = |ranges: &[_]| device.start_dma_logging(PAGE, ranges);
    assert_eq!(errno(start(&[range(1, PAGE)])), libc::EINVAL);
    assert_eq!(
        errno(start(&[range(0, 2 * PAGE), range(PAGE, PAGE)])),
        libc::EINVAL
    );
    assert_eq!(
        errno(start(&[range(0u64.wrapping_sub(PAGE), 2 * PAGE)])),
        libc::EOVERFLOW
    );
    assert_eq!(errno(start(&[range(0, PAGE); 257])), libc::E2BIG);
    assert_eq!(
        errno(start(&[range(0, 1 << 40)])),
        libc::ENOMEM,
        "it exceeds the budget"
    );
    assert_eq!(
        start(&[range(0, 100 * PAGE), range(200 * PAGE, 100 * PAGE)]).unwrap(),
        PAGE
    );

    log.mark(3 * PAGE, 1).unwrap();
    log.mark(65 * PAGE, 2 * PAGE).unwrap();
    log.range(299 * PAGE).unwrap().mark(299 * PAGE, 1).unwrap();
    let report = |iova, length, pgsize| device.report_dma_logging(range(iova, length), pgsize);
    assert_eq!(errno(report(0, PAGE, 1024)), libc::EINVAL);
    assert_eq!(
        errno(report(0, 101 * PAGE, PAGE)),
        libc::EINVAL,
        "not all of it is logged"
    );
    assert_eq!(report(0, 100 * PAGE, PAGE).unwrap(), [1 << 3, 0b110]);
    assert_eq!(report(0, 100 * PAGE, PAGE).unwrap(), [0, 0]);
    assert_eq!(
        report(200 * PAGE, 96 * PAGE, PAGE).unwrap(),
        [0, 0],
        "a part"
    );
    assert_eq!(report(256 * PAGE, 44 * PAGE, 16 * PAGE).unwrap(), [0b100]);
    device.stop_dma_logging().unwrap();
    assert!(!log.is_on());

    drop(device); // this removes its group from the container
    drop(container);
}
