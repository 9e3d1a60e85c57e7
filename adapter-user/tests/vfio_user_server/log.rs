// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which pages are reported.

use vfio_user_wire::wire::{BitmapHead, DmaUnmap, DMA_READABLE, UNMAP_GET_DIRTY_BITMAP};
use vfio_user_wire::{FeatureCall, Request};

use crate::{dirty, memfd, world, Errno, World, PAGE, RW};

/// A world with 16 pages of memory without a descriptor at IOVA 0, and the same number of a file
/// from IOVA 1 MiB on.
fn logged() -> World {
    let mut world = world();
    let file = memfd(16 * PAGE, true);
    world.client.map((0, 16 * PAGE), RW, None).unwrap();
    world
        .client
        .map((1 << 20, 16 * PAGE), RW, Some((&file, 0)))
        .unwrap();
    world
}

const ALL: u64 = (1 << 20) + 16 * PAGE;
const FILE: u64 = 256;
const NONE: [u64; 0] = [];

#[test]
fn a_start_without_ranges_logs_everything() {
    let mut world = logged();
    assert_eq!(
        world.client.report(0, PAGE, PAGE),
        Err(Errno(22)),
        "it is off"
    );
    world.client.doorbell(0, 1);
    assert_eq!(world.client.start(PAGE, &[]), Ok(PAGE));
    assert_eq!(world.client.report(0, ALL, PAGE).unwrap(), NONE);
    world.client.doorbell(3 * PAGE - 4, u64::MAX); // by messages
    world.toy.dma.write((1 << 20) + 5 * PAGE, &[1]).unwrap();
    assert_eq!(world.client.memory[3 * 4096 - 4..][..8], [0xff; 8]);
    assert_eq!(world.client.report(0, ALL, PAGE).unwrap(), [2, 3, FILE + 5]);
    assert_eq!(world.client.report(0, ALL, PAGE).unwrap(), NONE);
    // A range that is mapped later is logged too.
    let file = memfd(PAGE, false);
    world
        .client
        .map((1 << 30, PAGE), RW, Some((&file, 0)))
        .unwrap();
    world.toy.dma.write(1 << 30, &[1]).unwrap();
    assert_eq!(world.client.report(1 << 30, PAGE, PAGE).unwrap(), [0]);
    // The same START once more is no error and clears nothing; another one is an error.
    world.client.doorbell(0, 1);
    assert_eq!(world.client.start(PAGE, &[]), Ok(PAGE));
    assert_eq!(world.client.start(2 * PAGE, &[]), Err(Errno(22)));
    assert_eq!(world.client.start(PAGE, &[(0, PAGE)]), Err(Errno(22)));
    assert_eq!(world.client.report(0, ALL, PAGE).unwrap(), [0]);
    world.client.stop().unwrap();
    world.client.stop().unwrap();
    assert_eq!(world.client.report(0, PAGE, PAGE), Err(Errno(22)));
    assert_eq!(world.client.start(2 * PAGE, &[]), Ok(2 * PAGE));
}

/// A client that answers with an error may have taken the write.
#[test]
fn a_write_that_the_client_refuses_is_reported() {
    let mut world = logged();
    world.client.start(PAGE, &[]).unwrap();
    world.client.refuse = true;
    world.client.doorbell(PAGE, 1);
    let last = world.toy.last.lock().unwrap().take();
    assert_eq!(last, Some(Err(adapter_user::Error::BadAddress)));
    assert_eq!(world.client.report(0, ALL, PAGE).unwrap(), [1]);
}

#[test]
fn ranges_with_holes_and_what_is_outside() {
    let mut world = logged();
    let ranges = [(8 * PAGE, 4 * PAGE), (1 << 19, 1 << 20)]; // the second has holes at both ends
    assert_eq!(world.client.start(PAGE, &ranges), Ok(PAGE));
    for page in [7, 8, 11, 12] {
        world.client.doorbell(page * PAGE, 1);
    }
    world.toy.dma.write(1 << 20, &[1]).unwrap();
    assert_eq!(
        world.client.report(8 * PAGE, 4 * PAGE, PAGE).unwrap(),
        [0, 3]
    );
    assert_eq!(world.client.report(7 * PAGE, PAGE, PAGE), Err(Errno(2)));
    assert_eq!(world.client.report(8 * PAGE, 5 * PAGE, PAGE), Err(Errno(2)));
    assert_eq!(world.client.report(1 << 19, 1 << 20, PAGE).unwrap(), [128]);
    assert_eq!(world.client.report(1 << 19, 1 << 20, PAGE).unwrap(), NONE);
    assert_eq!(
        world.client.report(u64::MAX - PAGE + 1, 2 * PAGE, PAGE),
        Err(Errno(75))
    );
}

#[test]
fn parts_of_a_range() {
    let mut world = logged();
    world.client.start(PAGE, &[]).unwrap();
    for page in 0..16 {
        world.client.doorbell(page * PAGE, 1);
    }
    assert_eq!(
        world.client.report(4 * PAGE, 3 * PAGE, PAGE).unwrap(),
        [0, 1, 2]
    );
    let rest: Vec<u64> = (0..4).chain(7..16).collect();
    assert_eq!(world.client.report(0, 16 * PAGE, PAGE).unwrap(), rest);
}

#[test]
fn page_sizes_above_and_below_4_kib() {
    let mut world = logged();
    world.client.start(PAGE, &[]).unwrap();
    world.client.doorbell(5 * PAGE, 1);
    assert_eq!(world.client.report(0, 16 * PAGE, 4 * PAGE).unwrap(), [1]);
    assert_eq!(world.client.report(0, 16 * PAGE, PAGE).unwrap(), NONE);
    // Larger than the range.
    world.client.doorbell(5 * PAGE, 1);
    assert_eq!(world.client.report(0, 16 * PAGE, 1 << 30).unwrap(), [0]);
    // Each page of 4 KiB has four of 1 KiB.
    world.client.doorbell(2 * PAGE, 1);
    assert_eq!(
        world.client.report(PAGE, 2 * PAGE, 1024).unwrap(),
        [4, 5, 6, 7]
    );
    assert_eq!(world.client.report(PAGE, 2 * PAGE, 1024).unwrap(), NONE);
    // A range with a part of a page leaves it dirty.
    world.client.doorbell(2 * PAGE, 1);
    world.client.doorbell(3 * PAGE, 1);
    world.client.doorbell(4 * PAGE, 1);
    assert_eq!(
        world
            .client
            .report(3 * PAGE - 1024, PAGE + 2048, 1024)
            .unwrap(),
        [0, 1, 2, 3, 4, 5]
    );
    assert_eq!(world.client.report(0, 16 * PAGE, PAGE).unwrap(), [2, 4]);
    assert_eq!(world.client.report(512, PAGE, 1024), Err(Errno(22)));
    world.client.stop().unwrap();
    // A hint below 4 KiB, with ranges that are no whole pages of it.
    assert_eq!(
        world.client.start(1024, &[(1024, 1024), (3072, 2048)]),
        Ok(PAGE)
    );
    world.client.doorbell(PAGE, 1);
    assert_eq!(world.client.report(3072, 2048, 1024).unwrap(), [1]);
    assert_eq!(world.client.report(0, 2 * PAGE, PAGE).unwrap(), [1]);
    assert_eq!(world.client.report(0, 3 * PAGE, PAGE), Err(Errno(2)));
    world.client.stop().unwrap();
    assert_eq!(world.client.start(1024, &[(512, 1024)]), Err(Errno(22)));
    // A log of large pages reports them whole.
    assert_eq!(world.client.start(4 * PAGE, &[]), Ok(4 * PAGE));
    world.client.doorbell(5 * PAGE, 1);
    assert_eq!(
        world.client.report(0, 16 * PAGE, PAGE).unwrap(),
        [4, 5, 6, 7]
    );
}

#[test]
fn what_was_unmapped_is_told_once() {
    let mut world = logged();
    world.client.start(PAGE, &[]).unwrap();
    world.client.doorbell(2 * PAGE, 1);
    world.toy.dma.write((1 << 20) + PAGE, &[1]).unwrap();
    world.client.unmap(0, 16 * PAGE).unwrap();
    world.client.unmap(1 << 20, 16 * PAGE).unwrap();
    world.client.map((0, 16 * PAGE), RW, None).unwrap();
    world.client.doorbell(3 * PAGE, 1);
    assert_eq!(world.client.report(0, ALL, PAGE).unwrap(), [2, 3, FILE + 1]);
    assert_eq!(world.client.report(0, ALL, PAGE).unwrap(), NONE);
}

fn unmap_bitmap(
    world: &mut World,
    iova: u64,
    size: u64,
    pgsize: u64,
    bytes: u64,
) -> Result<Vec<u64>, crate::Failed> {
    let unmap = DmaUnmap {
        argsz: 40 + bytes as u32,
        flags: UNMAP_GET_DIRTY_BITMAP,
        iova,
        size,
    };
    let head = BitmapHead {
        pgsize,
        size: bytes,
    };
    let payload = world
        .client
        .call(&Request::DmaUnmap(unmap, Some(head)), &[])?;
    Ok(dirty(&payload[40..]))
}

#[test]
fn an_unmap_with_its_dirty_pages() {
    let mut world = logged();
    let off = unmap_bitmap(&mut world, 0, 16 * PAGE, PAGE, 8);
    assert_eq!(off, Err(Errno(22)), "the log is off");
    world.client.start(PAGE, &[]).unwrap();
    world.client.doorbell(2 * PAGE, 1);
    for (iova, size, pgsize, bytes, errno) in [
        (PAGE, PAGE, PAGE, 8, 2),
        (0, 16 * PAGE, 3, 8, 22),
        (0, 16 * PAGE, 512, 8, 22), // too short
    ] {
        let got = unmap_bitmap(&mut world, iova, size, pgsize, bytes);
        assert_eq!(got, Err(Errno(errno)), "{iova:#x} {pgsize}");
    }
    // Longer than it must be.
    assert_eq!(
        unmap_bitmap(&mut world, 0, 16 * PAGE, PAGE, 16).unwrap(),
        [2]
    );
    assert_eq!(world.client.unmap(0, 16 * PAGE), Err(Errno(2)));
    assert_eq!(
        world.client.report(0, ALL, PAGE).unwrap(),
        NONE,
        "it was told"
    );
}

/// It takes no bits, so that a client can map and read all it likes.
#[test]
fn what_the_device_may_only_read_is_clean() {
    let mut world = world();
    world.client.start(PAGE, &[]).unwrap();
    world.client.map((0, 1 << 60), DMA_READABLE, None).unwrap();
    assert_eq!(world.client.report(0, 1 << 20, PAGE).unwrap(), NONE);
    let no_room = world.client.map((1 << 60, 1 << 60), RW, None);
    assert_eq!(no_room, Err(Errno(12)), "its bits would take 32 TiB");
    assert_eq!(world.client.unmap(0, 1 << 60), Ok(()));
}

#[test]
fn probes() {
    let mut world = world();
    for feature in [1, 2, 6, 7, 8] {
        world
            .client
            .feature(FeatureCall::Probe { feature }, |_| ())
            .unwrap();
    }
    let got = world
        .client
        .feature(FeatureCall::Probe { feature: 9 }, |_| ());
    assert_eq!(got, Err(Errno(22)));
}
