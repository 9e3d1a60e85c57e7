// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pins as guards, and devices that have a log of their own.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;

use adapter_user::device_log::DeviceLog;
use adapter_user::{Device, Error, PinGuard, Prot};

use super::{device, dirty, emulated, memory, GROUP, PAGE, RW};

#[test]
fn a_guard_knows_its_bytes_and_reaches_them() {
    let (container, low, high) = (emulated(), memory(4), memory(4));
    container.map(0, &low, PAGE, 2 * PAGE, RW).expect("map");
    let own = vec![0u8; 3 * PAGE as usize];
    let at = (own.as_ptr() as u64).next_multiple_of(PAGE);
    // SAFETY: only the device uses it.
    unsafe { container.map_process(2 * PAGE, at, PAGE, RW) }.expect("map");
    container
        .map(3 * PAGE, &high, 0, 4 * PAGE, RW)
        .expect("map");
    let device = device(&container);
    // From the middle of the second page to the middle of the fifth, over three
    // mappings.
    let (iova, size) = (PAGE + 0x800, 3 * PAGE);
    let guard = device.pin(iova, size, RW).expect("pin");
    assert_eq!((guard.iova(), guard.size(), guard.prot()), (iova, size, RW));
    assert_eq!(device.pinned(), 4);
    let bytes: Vec<u8> = (0..size).map(|k| (k % 251) as u8).collect();
    guard.write(0, &bytes).expect("write");
    let mut by_iova = vec![0; size as usize];
    device.read(iova, &mut by_iova).expect("read");
    assert!(by_iova == bytes);
    for (offset, len) in [
        (0, 1),
        (0x7ff, 2),
        (0x801, 0x1003),
        (size - 1, 1),
        (size, 0),
    ] {
        let mut some = vec![0; len];
        guard.read(offset, &mut some).expect("read");
        assert!(some == bytes[offset as usize..][..len]);
    }
    for (offset, len) in [
        (size, 1),
        (size + 1, 0),
        (0, 3 * PAGE as usize + 1),
        (u64::MAX, 2),
    ] {
        let outside = guard.read(offset, &mut vec![0; len]);
        assert_eq!(outside, Err(Error::Unmapped), "{offset} {len}");
        assert_eq!(guard.write(offset, &vec![0; len]), Err(Error::Unmapped));
    }
    drop(guard);
    assert_eq!(device.pinned(), 0);
}

#[test]
fn a_pinned_page_is_dirty_while_the_guard_lives() {
    let (container, memory) = (emulated(), memory(64));
    container.map(0, &memory, 0, 32 * PAGE, RW).expect("map");
    container
        .map(32 * PAGE, &memory, 0, PAGE, Prot::READ)
        .expect("map");
    container.start().expect("start");
    let device = device(&container);
    let guard = device.pin(PAGE + 1, PAGE, RW).expect("pin");
    assert_eq!((dirty(&container), dirty(&container)), (0b110, 0b110));
    drop(guard);
    assert_eq!((dirty(&container), dirty(&container)), (0b110, 0));
    let read = device.pin(0, 8, Prot::READ).expect("pin");
    assert_eq!(read.write(0, &[1]), Err(Error::Denied));
    read.read(0, &mut [0]).expect("read");
    let write = device.pin(0, 8, Prot::WRITE).expect("pin");
    assert_eq!(write.read(0, &mut [0]), Err(Error::Denied));
    write.write(0, &[1]).expect("write");
    let denied = device.pin(31 * PAGE, 2 * PAGE, RW);
    assert_eq!(denied.err(), Some(Error::Denied));
    let end = device.pin(31 * PAGE, 8 * PAGE, Prot::READ);
    assert_eq!(end.err(), Some(Error::Unmapped));
    assert_eq!(device.pinned(), 2);
}

/// More pages than the kernel pins in one call, or none of them.
#[test]
fn a_guard_of_many_pages() {
    let (container, memory) = (emulated(), memory(2000));
    container.map(0, &memory, 0, 2000 * PAGE, RW).expect("map");
    let device = device(&container);
    let guard = device.pin(0, 1999 * PAGE + 1, RW).expect("pin");
    guard
        .write(1998 * PAGE, &[5; PAGE as usize + 1])
        .expect("write");
    assert_eq!(device.pinned(), 2000);
    assert_eq!(
        device.pin(PAGE, 2000 * PAGE, RW).err(),
        Some(Error::Unmapped)
    );
    assert_eq!(device.pinned(), 2000);
    drop(guard);
    assert_eq!(container.unmap(0, 2000 * PAGE), Ok(2000 * PAGE));
}

/// The callback does nothing but what everybody's does, and a guard is left.
#[test]
fn an_unmap_takes_the_pages_of_guards() {
    let (container, memory) = (emulated(), memory(64));
    container.map(0, &memory, 0, 32 * PAGE, RW).expect("map");
    container.map(32 * PAGE, &memory, 0, PAGE, RW).expect("map");
    let device = device(&container);
    let [both, other] = [31, 32].map(|page| {
        let pages = if page == 31 { 2 } else { 1 };
        device.pin(page * PAGE, pages * PAGE, RW).expect("pin")
    });
    assert_eq!(container.unmap(0, 32 * PAGE), Ok(32 * PAGE));
    assert_eq!(
        both.write(PAGE, &[1]),
        Err(Error::Unmapped),
        "it goes as a whole"
    );
    other.write(0, &[1]).expect("it is in another mapping");
    assert_eq!(device.pinned(), 1);
    drop(both);
    assert_eq!(device.pinned(), 1);
    drop(other);
    assert_eq!(container.unmap(32 * PAGE, PAGE), Ok(PAGE));
}

/// A device that keeps its guards where its callback finds them is no cycle.
#[test]
fn a_callback_may_own_the_guards() {
    let (container, memory) = (emulated(), memory(8));
    container.map(0, &memory, 0, 8 * PAGE, RW).expect("map");
    let queue: Arc<Mutex<Vec<PinGuard>>> = Arc::default();
    let own = Arc::clone(&queue);
    let on_unmap = move |_: &Device, iova, size| {
        let mut guards = own.lock().expect("no panic");
        guards.retain(|guard| !(iova..iova + size).contains(&guard.iova()));
    };
    let device = container.open_device(GROUP, Some(Box::new(on_unmap)));
    let device = device.expect("device");
    let pin = |iova| {
        let guard = device.pin(iova, PAGE, RW).expect("pin");
        queue.lock().expect("no panic").push(guard);
    };
    (0..4).for_each(|page| pin(page * PAGE));
    assert_eq!(container.unmap(0, 8 * PAGE), Ok(8 * PAGE));
    container.map(0, &memory, 0, 8 * PAGE, RW).expect("map");
    pin(0);
    drop(queue); // the callback has the only handle, and the device has the callback
    drop(device);
    let weak = (container.downgrade(), Arc::downgrade(&memory));
    drop((container, memory));
    assert!(weak.0.upgrade().is_none() && weak.1.upgrade().is_none());
}

#[test]
fn one_mark_reaches_container_and_log() {
    let (container, memory) = (emulated(), memory(64));
    container.map(0, &memory, 0, 64 * PAGE, RW).expect("map");
    let log = Arc::new(DeviceLog::new(None));
    let told = Arc::clone(&log);
    let on_mark = move |iova, size| told.mark(iova, size).map_err(|_| Error::Unmapped);
    let device = container.open_logged_device(
        GROUP,
        Some(Box::new(Device::unpin_range)),
        Box::new(on_mark),
    );
    let device = device.expect("device");
    container.start().expect("start");
    log.add_range(0, 32 * PAGE).expect("range");
    log.start(&[(0, 32 * PAGE)], PAGE).expect("start");
    let logged = || {
        let mut words = [0];
        log.report(0, 32 * PAGE, PAGE, &mut words).expect("report");
        words[0]
    };
    device.mark(PAGE, 1).expect("mark");
    device.write(3 * PAGE - 1, &[1, 2]).expect("write");
    assert_eq!((dirty(&container), logged()), (0b1110, 0b1110));
    let guard = device.pin(4 * PAGE, 2 * PAGE, RW).expect("pin");
    guard.write(PAGE, &[1]).expect("write");
    assert_eq!((dirty(&container), logged()), (0b11_0000, 0b10_0000));
    drop(guard);
    // What the log does not take is an error, and in the container all the same.
    assert_eq!(device.mark(40 * PAGE, 1), Err(Error::Unmapped));
    assert_eq!(device.mark(0, 0), Err(Error::ZeroSize));
    assert_eq!(device.mark(2, u64::MAX), Err(Error::Wraps));
    assert_eq!((dirty(&container), logged()), (1 << 40 | 0b11_0000, 0));
    // What was written before an error is in both.
    container.unmap(0, 64 * PAGE).expect("unmap");
    container.map(0, &memory, 0, PAGE, RW).expect("map");
    assert_eq!(device.write(PAGE - 1, &[1, 2]), Err(Error::Unmapped));
    assert_eq!((dirty(&container), logged()), (1, 3));
}

/// Threads write through guards while others unmap, unpin and report: each write that
/// succeeded is in a report after it.
#[test]
fn no_write_through_a_guard_is_lost() {
    const PAGES: u64 = 8;
    const SIZE: u64 = PAGES * PAGE;
    let (container, memory) = (emulated(), memory(PAGES));
    container.map(0, &memory, 0, SIZE, RW).expect("map");
    container.start().expect("start");
    let device = device(&container);
    let (writes, revoked) = (AtomicU64::new(0), AtomicU64::new(0));
    let word = |page: u64, k: u64| {
        let mut bytes = [0; 8];
        let at = page * PAGE + k * 8;
        memory.read(at, &mut bytes).expect("in bounds");
        u64::from_ne_bytes(bytes)
    };
    let mut copy = [[0; 2]; PAGES as usize];
    let mut take = |words: u64| {
        for page in (0..PAGES).filter(|page| words >> page & 1 != 0) {
            copy[page as usize] = [0, 1].map(|k| word(page, k));
        }
    };
    let write = |k: u64| {
        let mut count = 0u64;
        while revoked.load(Relaxed) < 500 {
            let Ok(guard) = device.pin(0, SIZE, RW) else {
                thread::yield_now(); // it is not mapped now
                continue;
            };
            let all = (0..).map(|n| {
                guard.write(n * 7 % PAGES * PAGE + k * 8, &{
                    count += 1;
                    count.to_ne_bytes()
                })
            });
            let good = all.take_while(|written| *written == Ok(()));
            writes.fetch_add(good.count() as u64, Relaxed);
            revoked.fetch_add(1, Relaxed);
        }
    };
    thread::scope(|scope| {
        let writers = [0, 1].map(|k| {
            scope.spawn({
                let write = &write;
                move || write(k)
            })
        });
        while !writers.iter().all(|writer| writer.is_finished()) {
            let mut words = [0];
            match container.unmap_dirty(0, SIZE, PAGE, &mut words) {
                Ok(_) => {
                    take(words[0]);
                    container.map(0, &memory, 0, SIZE, RW).expect("map");
                }
                Err(e) => assert_eq!(e, Error::StillPinned), // they pinned again
            }
            thread::yield_now();
            take(dirty(&container));
            device.unpin_range(PAGE, PAGE);
            take(dirty(&container));
        }
    });
    take(dirty(&container));
    for page in 0..PAGES {
        let now = [0, 1].map(|k| word(page, k));
        assert_eq!(now, copy[page as usize], "page {page}");
    }
    println!("{writes:?} writes, {revoked:?} guards");
    assert_ne!(writes.load(Relaxed), 0);
    assert_eq!((device.pinned(), dirty(&container)), (0, 0));
}
