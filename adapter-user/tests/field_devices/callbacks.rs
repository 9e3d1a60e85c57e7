// SPDX-License-Identifier: MIT OR Apache-2.0
//! Callbacks that misbehave, and devices that close.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{mpsc, Arc, Mutex};
use std::thread;
use std::time::Duration;

use adapter_user::{Container, Device, Error};

use super::{device, dirty, emulated, memory, GROUP, PAGE, RW};

#[test]
fn a_callback_that_panics_leaves_a_container_that_works() {
    let (container, memory) = (emulated(), memory(4));
    container.map(0, &memory, 0, 4 * PAGE, RW).expect("map");
    let calls = AtomicU32::new(0);
    let on_unmap = move |device: &Device, iova, size| {
        assert!(calls.fetch_add(1, SeqCst) != 0, "a bug of the device");
        device.unpin_range(iova, size);
    };
    let device = container.open_device(GROUP, Some(Box::new(on_unmap)));
    let device = device.expect("device");
    device.pin_pages(0, RW, &mut [0; 4]).expect("pin");
    container.start().expect("start");
    device.write(0, &[1]).expect("write");
    let unmap = AssertUnwindSafe(|| container.unmap(0, 4 * PAGE));
    catch_unwind(unmap).expect_err("it panics the first time");
    assert_eq!(dirty(&container), 0xf);
    let mut words = [0];
    let freed = container.unmap_dirty(0, 4 * PAGE, PAGE, &mut words);
    assert_eq!((freed, words), (Ok(4 * PAGE), [0xf]));
}

#[test]
fn callbacks_that_call_back() {
    let (container, memory) = (emulated(), memory(16));
    container.map(0, &memory, 0, 16 * PAGE, RW).expect("map");
    let slot: Arc<Mutex<Option<Arc<Device>>>> = Arc::default();
    let (own, weak) = (Arc::clone(&slot), container.downgrade());
    let calls = Arc::new(AtomicU32::new(0));
    let called = Arc::clone(&calls);
    let on_unmap = move |device: &Device, iova, size| {
        called.fetch_add(1, SeqCst);
        let container = weak.upgrade().expect("it is open");
        container.stop().expect("stop");
        container.start().expect("start");
        container.map(1 << 30, &memory, 0, PAGE, RW).expect("map");
        assert_eq!(container.remove_group(GROUP), Err(Error::GroupBusy));
        device.unpin_range(iova, size);
        drop(own.lock().expect("no panic").take()); // closes the device in its callback
    };
    let device = container.open_device(GROUP, Some(Box::new(on_unmap)));
    let device = device.expect("device");
    device.pin_pages(0, RW, &mut [0; 4]).expect("pin");
    *slot.lock().expect("no panic") = Some(device);
    container.start().expect("start");
    assert_eq!(container.unmap(0, 1 << 40), Ok(17 * PAGE));
    assert!(slot.lock().expect("no panic").is_none());
    assert_eq!(calls.load(SeqCst), 1);
    assert_eq!(container.remove_group(GROUP), Ok(()));
}

/// The stack overflowed.
#[test]
fn a_callback_that_unmaps_before_it_unpins() {
    let (container, memory) = (emulated(), memory(4));
    container.map(0, &memory, 0, 4 * PAGE, RW).expect("map");
    let calls = Arc::new(AtomicU32::new(0));
    let (called, weak) = (Arc::clone(&calls), container.downgrade());
    let on_unmap = move |device: &Device, iova, size| {
        let inner = weak.upgrade().expect("it is open").unmap(iova, size);
        if called.fetch_add(1, SeqCst) == 2 {
            device.unpin_range(iova, size);
        }
        assert_eq!(inner, Err(Error::StillPinned), "nobody is told");
    };
    let device = container.open_device(GROUP, Some(Box::new(on_unmap)));
    let device = device.expect("device");
    device.pin_pages(0, RW, &mut [0; 4]).expect("pin");
    assert_eq!(container.unmap(0, 4 * PAGE), Ok(4 * PAGE));
    assert_eq!((calls.load(SeqCst), device.pinned()), (3, 0));
}

/// After a callback, an unmap by the same thread tells devices again.
#[test]
fn an_unmap_after_a_callback_tells_devices() {
    let (container, memory) = (emulated(), memory(4));
    let device = device(&container);
    for _ in 0..3 {
        container.map(0, &memory, 0, 4 * PAGE, RW).expect("map");
        device.pin_pages(0, RW, &mut [0; 4]).expect("pin");
        assert_eq!(container.unmap(0, 4 * PAGE), Ok(4 * PAGE));
    }
}

/// The container could not be unset while an `Arc` of a device was left.
#[test]
fn a_device_closes_though_a_thread_holds_it() {
    let (container, memory) = (emulated(), memory(4));
    container.map(0, &memory, 0, 4 * PAGE, RW).expect("map");
    let device = device(&container);
    let guard = device.pin(0, PAGE, RW).expect("pin");
    device.pin_pages(PAGE, RW, &mut [0; 2]).expect("pin");
    let held = Arc::clone(&device);
    assert_eq!(container.remove_group(GROUP), Err(Error::GroupBusy));
    device.close();
    device.close();
    drop(device);
    assert_eq!(held.pinned(), 0);
    assert_eq!(guard.write(0, &[1]), Err(Error::Unmapped));
    assert_eq!(held.write(0, &[1]), Err(Error::UnknownDevice));
    assert_eq!(held.read(0, &mut [1]), Err(Error::UnknownDevice));
    let pinned = held.pin_pages(0, RW, &mut [0]);
    assert_eq!(pinned, Err(Error::UnknownDevice));
    assert_eq!(held.pin(0, 1, RW).err(), Some(Error::UnknownDevice));
    held.unpin_pages(0, 1);
    held.unpin_range(0, PAGE);
    container.start().expect("start");
    held.mark(PAGE, 1).expect("a mark may come late");
    assert_eq!(dirty(&container), 2);
    assert_eq!(container.unmap(0, PAGE * 4), Ok(PAGE * 4));
    assert_eq!(container.remove_group(GROUP), Ok(()));
    assert_eq!(held.mark(PAGE, 1), Err(Error::NoIommu));
}

/// The same, with a device that closes slowly: a write through a guard is under way.
#[test]
fn an_unmap_waits_for_a_device_that_is_being_closed() {
    let (container, memory) = (emulated(), memory(4));
    container.map(0, &memory, 0, 4 * PAGE, RW).expect("map");
    let (started, start) = mpsc::channel();
    let (finish, finished) = mpsc::channel();
    let finished = Mutex::new(finished);
    let on_mark = move |_, _| {
        started.send(()).expect("the test waits");
        finished.lock().expect("no panic").recv().expect("it ends");
        Ok(())
    };
    let unpin = Box::new(Device::unpin_range);
    let device = container.open_logged_device(GROUP, Some(unpin), Box::new(on_mark));
    let device = device.expect("device");
    let guard = device.pin(0, PAGE, RW).expect("pin");
    let weak = Arc::downgrade(&device);
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| guard.write(0, &[1]).expect("write"));
        start.recv().expect("the write has started");
        scope.spawn(|| drop(device));
        while weak.strong_count() != 0 {
            thread::yield_now();
        }
        let unmaps = scope.spawn(|| {
            let unmapped = container.unmap(0, 4 * PAGE);
            (unmapped, ended.load(SeqCst))
        });
        thread::sleep(Duration::from_millis(20)); // or it would not find the device
        ended.store(true, SeqCst);
        finish.send(()).expect("the write waits");
        assert_eq!(unmaps.join().expect("no panic"), (Ok(4 * PAGE), true));
    });
    assert_eq!(guard.write(0, &[1]), Err(Error::Unmapped));
}

/// UNMAP was EBUSY now and then.
#[test]
fn unmap_beside_a_device_that_is_being_closed() {
    beside(drop);
    beside(|device| device.close());
}

fn beside(close: fn(Arc<Device>)) {
    let mut busy = 0;
    // As many bytes whatever a page has.
    let per_4k = |pages: u64| pages * 4096 / PAGE;
    let pages = per_4k(60_000);
    let mut pfns = vec![0; per_4k(500) as usize];
    let memory = memory(pages);
    for round in 0..40 {
        let container = emulated();
        container.map(0, &memory, 0, pages * PAGE, RW).expect("map");
        let device = device(&container);
        for k in 0..20 {
            let pinned = device.pin_pages(k * per_4k(1000) * PAGE, RW, &mut pfns);
            pinned.expect("pin");
        }
        let go = Arc::new(AtomicBool::new(false));
        let started = Arc::clone(&go);
        let closes = thread::spawn(move || {
            started.store(true, SeqCst);
            close(device);
        });
        while !go.load(SeqCst) {
            std::hint::spin_loop();
        }
        (0..round * 20).for_each(|_| std::hint::spin_loop());
        match container.unmap(0, pages * PAGE) {
            Ok(_) => {}
            Err(Error::StillPinned) => busy += 1,
            Err(e) => panic!("{e:?}"),
        }
        closes.join().expect("no panic");
    }
    assert_eq!(busy, 0, "so many of 40 unmaps were EBUSY");
}

#[test]
fn handles_in_odd_orders() {
    let (container, memory) = (emulated(), memory(16));
    container.map(0, &memory, 0, 16 * PAGE, RW).expect("map");
    let device = device(&container);
    let weak = container.downgrade();
    device.pin_pages(0, RW, &mut [0; 2]).expect("pin");
    let guard = device.pin(PAGE, PAGE, RW).expect("pin");
    drop(container);
    drop(memory);
    device.write(0, &[7]).expect("write");
    let container: Container = weak.upgrade().expect("the device keeps it");
    assert_eq!(container.remove_group(GROUP), Err(Error::GroupBusy));
    drop(device);
    assert_eq!(guard.write(0, &[7]), Err(Error::Unmapped));
    container.remove_group(GROUP).expect("remove");
    drop(guard);
    drop(container);
    assert!(weak.upgrade().is_none());
}
