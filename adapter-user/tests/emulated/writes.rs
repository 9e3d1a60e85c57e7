// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which writes the container and the device's own log report.

use adapter_user::{charged_pages, Errno, Error, Prot};

use crate::{v2, world, Settings, World, PAGE, PAGES};

/// The dirty pages of the container, which are clean afterwards.
fn container(world: &World) -> u64 {
    let mut bitmap = [0];
    let done = world
        .container
        .dirty_bitmap(0, PAGES * PAGE, PAGE, &mut bitmap);
    done.unwrap();
    bitmap[0]
}

/// The dirty pages of the device's log, which are clean afterwards.
fn log(world: &World) -> u64 {
    let mut bitmap = [0];
    let done = world
        .device
        .log()
        .report(0, PAGES * PAGE, PAGE, &mut bitmap);
    done.unwrap();
    bitmap[0]
}

#[test]
fn a_mark_reaches_container_and_log_at_once() {
    let world = world(Settings {
        own_log: true,
        ..v2(false, false)
    });
    let dma = &world.toy.dma;
    world.container.start().unwrap();
    dma.write(0, &[1]).unwrap(); // the log is off, which is no error
    world
        .device
        .log()
        .start(&[(0, PAGES * PAGE)], PAGE)
        .unwrap();
    dma.write(2 * PAGE - 1, &[1, 2]).unwrap();
    dma.mark(5 * PAGE, 1).unwrap();
    let pin = dma.pin(8 * PAGE, 2 * PAGE, Prot::READ_WRITE).unwrap();
    pin.write(PAGE, &[3]).unwrap();
    assert_eq!(
        log(&world),
        0b10_0010_0110,
        "what was written, and not what is only pinned"
    );
    assert_eq!(
        container(&world),
        0b11_0010_0111,
        "and here every pinned page"
    );
    assert_eq!(container(&world), 0b11_0000_0000, "as long as it is pinned");
    drop(pin);
    assert_eq!(container(&world), 0b11_0000_0000, "and once more");
    assert_eq!((container(&world), log(&world)), (0, 0));
}

#[test]
fn an_unmap_tells_the_model_and_takes_its_pins() {
    let world = world(v2(false, false));
    let pin = world.toy.dma.pin(PAGE, PAGE, Prot::READ_WRITE).unwrap();
    assert_eq!(world.device.pinned(), 1);
    world.container.unmap(0, PAGES * PAGE).unwrap();
    assert_eq!(*world.toy.unmapped.lock().unwrap(), [(0, PAGES * PAGE)]);
    assert_eq!(pin.write(0, &[1]), Err(Error::Unmapped));
    assert_eq!(world.device.pinned(), 0);
}

#[test]
fn a_reset_drops_pins_and_leaves_the_log_on() {
    let world = world(Settings {
        own_log: true,
        ..v2(false, false)
    });
    world
        .device
        .log()
        .start(&[(0, PAGES * PAGE)], PAGE)
        .unwrap();
    let pin = world.toy.dma.pin(PAGE, PAGE, Prot::READ_WRITE).unwrap();
    pin.write(0, &[1]).unwrap();
    world.device.write(0, &[1; 8]).unwrap();
    world.device.reset();
    assert_eq!((world.device.pinned(), charged_by(&world)), (0, 0));
    assert_eq!(*world.toy.registers.lock().unwrap(), [0; 8]);
    assert_eq!(log(&world), 0b10);
}

fn charged_by(world: &World) -> u64 {
    world.device.pinned().min(charged_pages()) // other tests may pin at the same time
}

#[test]
fn a_closed_device_does_no_dma_and_lets_its_group_go() {
    let world = world(v2(false, false));
    let pin = world.toy.dma.pin(PAGE, PAGE, Prot::READ_WRITE).unwrap();
    assert_eq!(world.file.unset_container(), Err(Errno::EBUSY));
    world.device.close();
    world.device.close();
    assert!(!world.toy.running.load(std::sync::atomic::Ordering::SeqCst));
    assert_eq!(world.toy.dma.write(0, &[1]), Err(Error::UnknownDevice));
    assert_eq!(pin.write(0, &[1]), Err(Error::Unmapped));
    let mut byte = [0];
    world.memory.read(PAGE, &mut byte).unwrap();
    assert_eq!(byte, [0]);
    world.file.unset_container().unwrap();
    assert_eq!(world.file.unset_container(), Err(Errno::EINVAL));
}

#[test]
fn a_device_keeps_its_group_s_file_open() {
    let World {
        device,
        toy: _toy,
        container,
        memory: _memory,
        file,
        group,
    } = world(v2(false, false));
    drop(file);
    assert!(group.open().is_err(), "the device has it open");
    drop(device);
    let file = group.open().unwrap();
    assert_eq!(file.status(), 1, "it has left its container");
    file.set_container(&container).unwrap();
    assert_eq!(file.status(), 3);
    assert_eq!(file.set_container(&container), Err(Errno::EINVAL));
}
