// SPDX-License-Identifier: MIT OR Apache-2.0
//! What vm-memory's users expect of a bitmap, against `DirtyBits`. What changed in
//! calls: see `field_tracker.rs`.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use adapter_user::guest::{Report, Tracker};
use adapter_user::{DirtyBits, PageSize};
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion, VolatileMemory,
};

const P: u64 = 4096;

fn pg(bytes: u64) -> PageSize {
    PageSize::new(bytes).unwrap()
}

fn ranges(report: &Report) -> Vec<(u64, u64)> {
    let ranges = report.ranges(P).unwrap();
    ranges.map(|range| (range.gpa, range.size)).collect()
}

fn clean<B: Bitmap>(b: &B, start: usize, len: usize) -> bool {
    (start..start + len).all(|k| !b.dirty_at(k))
}

fn dirty<B: Bitmap>(b: &B, start: usize, len: usize) -> bool {
    (start..start + len).all(|k| b.dirty_at(k))
}

#[test]
fn m01_pages_are_rounded_up() {
    assert_eq!(DirtyBits::new(1025, pg(128)).unwrap().npages(), 9);
    assert_eq!(DirtyBits::new(1024, pg(128)).unwrap().npages(), 8);
}

#[test]
fn m02_a_range_over_two_pages_is_taken_once() {
    let b = DirtyBits::new(1024, pg(128)).unwrap();
    b.mark(128, 129).unwrap();
    assert_eq!(
        [0, 128, 256, 384].map(|k| b.is_dirty(k)),
        [false, true, true, false]
    );
    let mut w = vec![0; b.words()];
    b.take(&mut w).unwrap();
    assert_eq!(w, [0b110]);
    assert!(clean(&b, 0, 1024));
    b.mark(128, 129).unwrap();
    b.reset();
    assert!(clean(&b, 0, 1024));
}

#[test]
fn m03_beyond_the_end_in_pages_of_one_byte() {
    let b = DirtyBits::new(1024, pg(1)).unwrap();
    Bitmap::mark_dirty(&b, 768, 512);
    assert!(dirty(&b, 768, 256));
    assert!(!b.dirty_at(1024) && !b.dirty_at(1152));
}

#[test]
fn m04_slices_share_the_bits() {
    let b = DirtyBits::new(0x800, pg(1)).unwrap();
    let (all, part) = (b.slice_at(0), b.slice_at(0x400));
    assert!(clean(&all, 0, 0x800) && clean(&part, 0, 0x100));
    b.mark_dirty(0x400, 0x100);
    assert!(dirty(&all, 0x400, 0x100) && dirty(&part, 0, 0x100) && !part.dirty_at(0x100));
    part.slice_at(0x200).mark_dirty(0x10, 1);
    assert!(b.dirty_at(0x610) && !b.dirty_at(0x611));
}

#[test]
fn m05_every_way_to_write_marks() {
    let ram = [(GuestAddress(0), 0x1_0000)];
    let mem = GuestMemoryMmap::<DirtyBits>::from_ranges(&ram).unwrap();
    let check = |at: usize, len: usize| {
        mem.get_slices(GuestAddress(at as u64), len).all(|s| {
            let s = s.unwrap();
            dirty(s.bitmap(), 0, s.len())
        })
    };
    mem.write(&[1; 1024], GuestAddress(0x1000)).unwrap();
    assert!(check(0x1000, 1024));
    mem.write_slice(&[1; 1024], GuestAddress(0x2000)).unwrap();
    assert!(check(0x2000, 1024));
    mem.write_obj(1u64, GuestAddress(0x3000)).unwrap();
    assert!(check(0x3000, 8));
    mem.store(1u64, GuestAddress(0x4000), Ordering::Relaxed)
        .unwrap();
    assert!(check(0x4000, 8));
    mem.read_volatile_from(GuestAddress(0x5ffe), &mut &[7u8; 4][..], 4)
        .unwrap();
    assert!(check(0x5ffe, 4));
    let region = mem.find_region(GuestAddress(0)).unwrap();
    let s = region.as_volatile_slice().unwrap();
    s.get_ref::<u64>(0x7000).unwrap().store(1);
    assert!(check(0x7000, 8));
    s.get_array_ref::<u64>(0x8000, 2).unwrap().store(1, 5);
    assert!(check(0x8008, 8));
    let mut w = [0; 1];
    region.bitmap().bits().take(&mut w).unwrap();
    assert_eq!(w, [0b1_1111_1110]);
}

/// AtomicBitmap::reset_addr_range: a page that was discarded, or sent by itself.
#[test]
fn m06_a_part_can_be_forgotten() {
    let b = DirtyBits::new(1024, pg(128)).unwrap();
    b.mark(128, 3 * 128).unwrap();
    b.discard(128, 129);
    assert_eq!([128, 256, 384].map(|k| b.is_dirty(k)), [false, true, true]);
}

/// AtomicBitmap::enlarge: memory that grows keeps its bits.
#[test]
fn m07_bits_can_grow() {
    let b = DirtyBits::new(1024, pg(128)).unwrap();
    let before = b.clone();
    b.mark(0, 1).unwrap();
    b.grow(64 * 1024).unwrap();
    assert_eq!(before.npages(), 512);
    before.mark(63 * 1024, 1).unwrap();
    assert!(b.is_dirty(0) && b.is_dirty(63 * 1024));
}

/// vm-memory's own bitmap is copied by a clone; this one is a handle.
#[test]
fn m08_a_clone_is_a_handle() {
    let b = DirtyBits::with_len(1 << 20);
    let c = b.clone();
    b.mark(0, 1).unwrap();
    assert!(c.is_dirty(0));
}

/// Firecracker's memory has Option<B>: tracking can be off.
#[test]
fn m09_option_of_bits() {
    let on: Option<DirtyBits> = Some(DirtyBits::with_len(0x1_0000));
    on.mark_dirty(0x1fff, 2);
    assert!(on.dirty_at(0x1000) && on.dirty_at(0x2000) && !on.dirty_at(0x3000));
    assert!(on.slice_at(0x1000).dirty_at(0));
    let off: Option<DirtyBits> = None;
    off.mark_dirty(0, 1);
    assert!(!off.dirty_at(0));
}

/// A VMM clones its GuestMemoryMmap with one region more, and hands it over again.
#[test]
fn m10_a_plugged_region_joins() {
    let tracker = Tracker::new(None);
    let region = |gpa| {
        let ram = Arc::new(MmapRegion::<DirtyBits>::new(0x1_0000).unwrap());
        Arc::new(GuestRegionMmap::with_arc(ram, GuestAddress(gpa)).unwrap())
    };
    let mem = GuestMemoryMmap::from_arc_regions(vec![region(0)]).unwrap();
    let kvm = |region: &GuestRegionMmap<DirtyBits>| (region.start_addr().0 >> 20) as u32 + 7;
    tracker.add_memory_as(mem.iter(), kvm).unwrap();
    tracker.start().unwrap();
    let more = mem.insert_region(region(0x10_0000)).unwrap();
    tracker.add_memory_as(more.iter(), kvm).unwrap();
    let mut r = Report::new();
    tracker.take(&mut r).unwrap();
    assert_eq!(ranges(&r), [(0x10_0000, 0x1_0000)]);
    r.clear();
    more.write_obj(1u8, GuestAddress(0x10_3000)).unwrap();
    more.write_obj(1u8, GuestAddress(0x1000)).unwrap();
    tracker.take(&mut r).unwrap();
    assert_eq!(r.slot(8).unwrap(), [0b1000]);
    assert_eq!(r.slot(7).unwrap(), [0b10]);
    tracker.add_memory(more.iter()).unwrap();
    let infos: Vec<_> = r.slots().iter().map(|slot| (slot.id, slot.gpa)).collect();
    assert_eq!(infos, [(7, 0), (8, 0x10_0000)]);
    // Another number for the same memory is a mistake.
    tracker.add_memory_as(more.iter(), |_| 1).unwrap_err();
    // By hand it works too.
    let mut slot = tracker.remove_slot(8).unwrap();
    slot.id = 3;
    tracker.add(slot).unwrap();
}
