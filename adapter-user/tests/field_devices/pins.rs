// SPDX-License-Identifier: MIT OR Apache-2.0
//! The books of pins, and pins in a process that locks memory and has mappings of its
//! own.

use std::fs;
use std::sync::Mutex;
use std::thread;

use adapter_user::{charged_pages, Container, Device, Error};

use super::{device, dirty, emulated, memory, GROUP, PAGE, RW};

/// The device's books were cleared, the core's pins stayed, and no UNMAP went on.
#[test]
fn unpin_over_a_hole() {
    let (container, memory) = (emulated(), memory(3));
    container.map(0, &memory, 0, PAGE, RW).expect("map");
    container.map(2 * PAGE, &memory, 0, PAGE, RW).expect("map");
    let device = device(&container);
    device.pin_pages(0, RW, &mut [0]).expect("pin");
    device.pin_pages(2 * PAGE, RW, &mut [0]).expect("pin");
    device.unpin_pages(0, 3);
    assert_eq!(device.pinned(), 1, "the unpin stopped at the hole");
    container.start().expect("start");
    assert_eq!((dirty(&container), dirty(&container)), (4, 4));
    assert_eq!(container.unmap(2 * PAGE, PAGE), Ok(PAGE));
    assert_eq!(device.pinned(), 0);
}

#[test]
fn unpin_over_a_hole_and_close() {
    let (container, memory) = (emulated(), memory(3));
    container.map(2 * PAGE, &memory, 0, PAGE, RW).expect("map");
    let device = device(&container);
    device.pin_pages(2 * PAGE, RW, &mut [0]).expect("pin");
    device.unpin_pages(PAGE, 2);
    drop(device);
    assert_eq!(container.unmap(2 * PAGE, PAGE), Ok(PAGE));
}

#[test]
fn unpinning_no_bytes_unpins_nothing() {
    let (container, memory) = (emulated(), memory(4));
    container.map(0, &memory, 0, 4 * PAGE, RW).expect("map");
    let device = device(&container);
    device.pin_pages(0, RW, &mut [0; 3]).expect("pin");
    let guard = device.pin(3 * PAGE, PAGE, RW).expect("pin");
    device.unpin_range(0, 0);
    device.unpin_range(3 * PAGE, 0);
    device.unpin_pages(0, 0);
    assert_eq!(device.pinned(), 4);
    assert_eq!(device.pin(0, 0, RW).err(), Some(Error::ZeroSize));
    drop(guard);
}

#[test]
fn a_device_that_does_not_unpin_is_ebusy_until_it_does() {
    let (container, memory) = (emulated(), memory(4));
    container.map(0, &memory, 0, 4 * PAGE, RW).expect("map");
    let device = container.open_device(GROUP, Some(Box::new(|_: &Device, _, _| ())));
    let device = device.expect("device");
    device.pin_pages(0, RW, &mut [0; 4]).expect("pin");
    assert_eq!(container.unmap(0, 4 * PAGE), Err(Error::StillPinned));
    device.unpin_pages(0, 4);
    assert_eq!(container.unmap(0, 4 * PAGE), Ok(4 * PAGE));
}

fn status(key: &str) -> u64 {
    let all = fs::read_to_string("/proc/self/status").expect("status");
    let line = all.lines().find_map(|line| line.strip_prefix(key));
    let value = line.and_then(|line| line.split_whitespace().next());
    value
        .and_then(|value| value.parse().ok())
        .expect("a number")
}

/// Fresh memory of the process, which a container maps. It starts with a page.
fn anonymous(size: usize) -> (Container, u64) {
    let (prot, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    let room = size + PAGE as usize;
    // SAFETY: fresh memory.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), room, prot, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    let at = (at as u64).next_multiple_of(PAGE);
    let container = emulated();
    // SAFETY: nobody else uses it.
    unsafe { container.map_process(0, at, size as u64, RW) }.expect("map");
    (container, at)
}

/// One at a time: they count what the whole process has.
static COUNTS: Mutex<()> = Mutex::new(());

#[test]
fn unpin_leaves_the_owners_lock() {
    let _alone = COUNTS.lock().expect("no panic");
    const SIZE: usize = 4 << 20;
    let (container, at) = anonymous(SIZE);
    // SAFETY: locks memory of ours.
    assert_eq!(unsafe { libc::mlock(at as *const _, SIZE) }, 0);
    let device = device(&container);
    let before = status("VmLck:");
    const PAGES: usize = 512 * 4096 / PAGE as usize;
    device.pin_pages(0, RW, &mut [0; PAGES]).expect("pin");
    device.unpin_pages(0, PAGES as u64);
    println!("VmLck {before} KiB before, {} after", status("VmLck:"));
    assert_eq!(status("VmLck:"), before);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::munlock(at as *const _, SIZE) }, 0);
}

fn vmas() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").expect("maps");
    maps.lines().count()
}

/// Each pin took a VMA, and at 32,603 no thread could start any more.
#[test]
fn scattered_pins_leave_room_for_mappings() {
    let _alone = COUNTS.lock().expect("no panic");
    let (container, _) = anonymous(400 << 20);
    let device = device(&container);
    let before = vmas();
    const PINS: u64 = 50_000 * 4096 / PAGE;
    for k in 0..PINS {
        let pinned = device.pin_pages(k * 2 * PAGE, RW, &mut [0]);
        assert_eq!(pinned, Ok(()), "pin {k}");
        if k + 1 == 32_603 {
            println!("{} VMAs before, {} after 32,603 pins", before, vmas());
        }
    }
    // The other tests of this process have some.
    assert!(vmas() < before + 500, "{before} before, {} now", vmas());
    thread::spawn(|| ()).join().expect("a thread can start");
    assert_eq!(device.pinned(), PINS);
    assert!(charged_pages() >= 50_000);
    assert_eq!(container.unmap(0, 400 << 20), Ok(400 << 20));
    assert_eq!(device.pinned(), 0);
}
