// SPDX-License-Identifier: MIT OR Apache-2.0
//! Arguments that are hostile, and a process that forks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use adapter_user::uapi::*;
use adapter_user::{
    host_options, Container, Error, Group, GroupId, IommuSpec, IommuType, Options, PageSize,
};

use super::{device, emulated, memory, GROUP, PAGE, RW};

/// argsz 48, and GET_BITMAP; then iova, size, pgsize, the bitmap's bytes and address.
const GET: u64 = 48 | 4 << 32;

#[test]
fn the_argument_changes_while_the_ioctl_runs() {
    const PAGES: u64 = 64 * 64;
    let (container, memory) = (emulated(), memory(PAGES));
    container.map(0, &memory, 0, PAGES * PAGE, RW).expect("map");
    container.start().expect("start");
    let canary = 0xdead_beef;
    let bitmap: Vec<AtomicU64> = (0..64 + 512).map(|_| AtomicU64::new(canary)).collect();
    let good = [GET, 0, PAGES * PAGE, PAGE, 64 * 8, bitmap.as_ptr() as u64];
    let arg: Vec<AtomicU64> = good.iter().map(|word| AtomicU64::new(*word)).collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for n in (0u64..).take_while(|_| !stop.load(Relaxed)) {
                let k = (n % 6) as usize;
                // The address stays good: the ioctl writes where it is told to.
                let bad = [u64::MAX, 0, 1 << 40, n, good[k]][(n % 5) as usize];
                arg[k].store(if k == 5 { good[k] } else { bad }, Relaxed);
                arg.iter().zip(good).for_each(|(a, g)| a.store(g, Relaxed));
            }
        });
        for _ in 0..20_000 {
            container.mark(0, PAGES * PAGE).expect("mark");
            let at = arg.as_ptr() as u64;
            // SAFETY: it writes to `bitmap`, whatever the other words are: a size of
            // more than the range needs is refused or not all used.
            let _ = unsafe { container.ioctl(VFIO_IOMMU_DIRTY_PAGES, at) };
            container.start().expect("start"); // the flags may have been those of STOP
        }
        stop.store(true, Relaxed);
    });
    let behind = &bitmap[64..];
    assert!(behind.iter().all(|word| word.load(Relaxed) == canary));
}

#[test]
fn arguments_anywhere() {
    let (container, memory) = (emulated(), memory(64));
    container.map(0, &memory, 0, 64 * PAGE, RW).expect("map");
    container.start().expect("start");
    let top = [u64::MAX, u64::MAX - 3, u64::MAX - 47, 1 << 63, 1 << 56];
    let user = [0, 1, 0xfff, (1 << 47) - 1, (1 << 47) - 8];
    for address in top.into_iter().chain(user) {
        for nr in 0x3b60..0x3b90 {
            // SAFETY: there is no memory at these addresses.
            let _ = unsafe { container.ioctl(nr, address) };
        }
    }
    // The bitmap is the argument.
    let arg = [GET, 0, 64 * PAGE, PAGE, 8, 0].map(AtomicU64::new);
    let at = arg.as_ptr() as u64;
    arg[5].store(at, Relaxed);
    container.mark(0, 3 * PAGE).expect("mark");
    // SAFETY: `arg` is a structure of 48 bytes, of atomics.
    let done = unsafe { container.ioctl(VFIO_IOMMU_DIRTY_PAGES, at) };
    assert_eq!((done, arg[0].load(Relaxed)), (Ok(0), 7));
    // argsz of 4 GiB.
    let mut bitmap = [0u64; 1];
    let data = bitmap.as_mut_ptr() as u64;
    let mut arg = [GET | 0xffff_ffff, 0, 64 * PAGE, PAGE, 8, data];
    let arg = &raw mut arg as u64;
    // SAFETY: as above, and the bitmap has 8 bytes.
    let done = unsafe { container.ioctl(VFIO_IOMMU_DIRTY_PAGES, arg) };
    assert_eq!(done, Ok(0));
}

#[test]
fn a_fork_of_the_process() {
    let (container, memory) = (emulated(), memory(16));
    container.map(0, &memory, 0, 16 * PAGE, RW).expect("map");
    let own = vec![0u8; 8 * PAGE as usize];
    let at = (own.as_ptr() as u64).next_multiple_of(PAGE);
    // SAFETY: only the devices use it from now on.
    unsafe { container.map_process(1 << 20, at, 4 * PAGE, RW) }.expect("map");
    let device = device(&container);
    device.pin_pages(1 << 20, RW, &mut [0; 2]).expect("pin");
    let (guard, shared) = (device.pin(1 << 20, 8, RW), device.pin(0, 8, RW));
    let (guard, shared) = (guard.expect("pin"), shared.expect("pin"));
    container.start().expect("start");
    // SAFETY: no other thread of this test holds a lock that the child needs.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let good = device.write(1 << 20, &[1]) == Err(Error::OtherMm)
            && guard.write(0, &[1]) == Err(Error::OtherMm)
            && shared.write(0, &[1]) == Ok(())
            && device.pin((1 << 20) + 2 * PAGE, 1, RW).is_err()
            && device.write(0, &[1]).is_ok()
            && container.unmap(0, 1 << 40).is_ok();
        // SAFETY: it ends the child at once.
        unsafe { libc::_exit(i32::from(!good)) }
    }
    let mut status = 0;
    // SAFETY: it writes to `status`.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert_eq!(status, 0);
    drop((guard, shared));
    device.unpin_pages(1 << 20, 2);
    assert_eq!(container.unmap(0, 1 << 40), Ok(20 * PAGE));
}

#[test]
fn the_end_of_the_address_space() {
    let (container, memory) = (emulated(), memory(64));
    let top = 0u64.wrapping_sub(64 * PAGE);
    container.map(top, &memory, 0, 64 * PAGE, RW).expect("map");
    container.start().expect("start");
    let device = device(&container);
    device.write(u64::MAX, &[1]).expect("write");
    assert_eq!(device.write(u64::MAX, &[1, 2]), Err(Error::Unmapped));
    device.mark(top, 64 * PAGE).expect("mark");
    let report = |pgsize, words: &mut [u64]| {
        let reported = container.dirty_bitmap(top, 64 * PAGE, pgsize, words);
        reported.map(|()| words.iter().any(|word| *word != 0))
    };
    assert_eq!(report(PAGE, &mut [0]), Ok(true));
    device.mark(u64::MAX - 1, 2).expect("mark");
    assert_eq!(device.mark(u64::MAX, 2), Err(Error::Wraps));
    let last = 0u64.wrapping_sub(PAGE);
    device.pin_pages(last, RW, &mut [0]).expect("pin");
    device.unpin_pages(last, 5);
    assert_eq!(device.pinned(), 0);
    let guard = device.pin(u64::MAX, 1, RW).expect("pin");
    guard.write(0, &[9]).expect("write");
    device.unpin_range(u64::MAX, u64::MAX);
    assert_eq!(device.pinned(), 0);
    for shift in 0..64 {
        let bits = (64 * PAGE) >> shift;
        let mut words = vec![0; bits.div_ceil(64).max(1) as usize];
        container.mark(u64::MAX, 1).expect("mark");
        let told = report(1 << shift, &mut words);
        let left = report(PAGE, &mut [0]).expect("report");
        assert_eq!(told == Ok(true), !left, "{shift}: {told:?}");
    }
    assert_eq!(container.unmap(top, 64 * PAGE), Ok(64 * PAGE));
}

/// It was accepted, and then pins could not be dropped.
#[test]
fn a_page_size_that_is_not_made_of_the_hosts_is_refused() {
    for size in [1, 512, 2048, 128 << 10, 2 << 20, 1 << 63] {
        for group in [
            Group::emulated(GROUP),
            Group::iommu(GroupId(2), IommuSpec::default()),
        ] {
            let mut options = Options::default();
            options.page_size = PageSize::new(size).expect("a power of two");
            let container = Container::new(options);
            container.add_group(group).expect("group");
            let set = container.set_iommu(IommuType::Type1v2);
            assert_eq!(set, Err(Error::WrongPageSize), "{size}");
            // SAFETY: this ioctl takes a value and no address.
            let set = unsafe { container.ioctl(VFIO_SET_IOMMU, 3) };
            assert_eq!(set, Err(Error::WrongPageSize), "{size}");
            assert_eq!(container.start(), Err(Error::NoIommu));
        }
    }
}

/// Pages of the host's own size and larger ones, which are made of the host's.
#[test]
fn the_hosts_page_size_and_larger_ones_are_taken() {
    let host = host_options().page_size;
    for shift in host.shift()..=16 {
        let mut options = host_options();
        options.page_size = PageSize::new(1 << shift).expect("a power of two");
        let container = Container::new(options);
        container.add_group(Group::emulated(GROUP)).expect("group");
        let set = container.set_iommu(IommuType::Type1v2);
        assert_eq!(set, Ok(()), "{shift}");
        // A page is the least that can be mapped, and a pin covers all of it.
        let (size, memory) = (1 << shift, memory(64));
        assert_eq!(container.map(0, &memory, 0, size, RW), Ok(()));
        let less = container.map(size, &memory, 0, size / 2, RW);
        assert_eq!(less, Err(Error::Misaligned));
        let device = device(&container);
        let mut pfn = [0];
        device.pin_pages(0, RW, &mut pfn).expect("pin");
        assert_eq!(pfn[0] << shift, memory.addr());
    }
}
