// SPDX-License-Identifier: MIT OR Apache-2.0
//! `DirtyBits` behaves as vm-memory's own bitmap does. vm-memory's tests of
//! `AtomicBitmap`, of slices, of volatile memory, of regions and of guest memory are
//! written anew for any bitmap here, and run on both.

use std::fmt::Debug;
use std::num::NonZeroUsize;
use std::sync::atomic::Ordering;

use adapter_user::guest::{Report, Tracker};
use adapter_user::{DirtyBits, PageSize};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress, MmapRegion, VolatileMemory,
};

const KIB: usize = 1024;

fn ours(len: usize, pgsize: u64) -> DirtyBits {
    DirtyBits::new(len as u64, PageSize::new(pgsize).unwrap()).unwrap()
}

fn theirs(len: usize, pgsize: usize) -> AtomicBitmap {
    AtomicBitmap::new(len, NonZeroUsize::new(pgsize).unwrap())
}

fn is_all<B: Bitmap>(bitmap: &B, start: usize, len: usize, dirty: bool) -> bool {
    (start..start + len).all(|at| bitmap.dirty_at(at) == dirty)
}

/// Checks that a bitmap of at least 2 KiB and a slice of it show the same marks.
fn a_slice_shows_its_part(bitmap: &impl Bitmap) {
    let slice = bitmap.slice_at(KIB);
    assert!(is_all(bitmap, 0, 2 * KIB, false));
    assert!(is_all(&slice, 0, KIB, false));
    bitmap.mark_dirty(KIB, 256);
    assert!(is_all(bitmap, KIB, 256, true));
    assert!(is_all(&slice, 0, 256, true));
    slice.mark_dirty(512, 1);
    assert!(bitmap.dirty_at(KIB + 512));
    assert!(slice.slice_at(512).dirty_at(0));
}

#[test]
fn slices_show_their_part() {
    for pgsize in [1, 128] {
        a_slice_shows_its_part(&theirs(2 * KIB, pgsize));
        a_slice_shows_its_part(&ours(2 * KIB, pgsize as u64));
        a_slice_shows_its_part(&ours(2 * KIB, pgsize as u64).slice_at(0));
        a_slice_shows_its_part(&Some(ours(2 * KIB, pgsize as u64)));
    }
}

#[test]
fn sizes_round_up_to_pages() {
    assert_eq!(theirs(1025, 128).len(), 9);
    assert_eq!(ours(1025, 128).npages(), 9);
    assert_eq!(ours(1024, 128).npages(), 8);
}

/// Marks the second and third page of eight, of 128 bytes each.
fn pages_in_the_middle<B: Bitmap>(bitmap: &B) {
    bitmap.mark_dirty(128, 129);
    for (at, dirty) in [
        (0, false),
        (128, true),
        (256, true),
        (383, true),
        (384, false),
    ] {
        assert_eq!(bitmap.dirty_at(at), dirty, "{at}");
    }
}

#[test]
fn marks_are_taken_once() {
    let theirs = theirs(KIB, 128);
    pages_in_the_middle(&theirs);
    let ours = ours(KIB, 128);
    pages_in_the_middle(&ours);

    let mut taken = [0];
    ours.take(&mut taken).unwrap();
    assert_eq!(theirs.get_and_reset(), taken);
    assert_eq!(taken, [0b110]);
    assert!(is_all(&ours, 0, KIB, false));

    pages_in_the_middle(&ours);
    ours.reset();
    assert!(is_all(&ours, 0, KIB, false));
    ours.take(&mut taken).unwrap();
    assert_eq!(taken, [0b110], "taken bits are ORed into what is there");
}

fn the_end_holds<B: Bitmap>(bitmap: &B) {
    bitmap.mark_dirty(768, 512);
    assert!(is_all(bitmap, 768, 256, true));
    bitmap.mark_dirty(KIB, 1);
    bitmap.mark_dirty(usize::MAX, 2);
    bitmap.mark_dirty(5, 0);
    assert!(is_all(bitmap, 1024, 512, false));
    assert!(is_all(bitmap, 0, 768, false));
    assert!(!bitmap.dirty_at(usize::MAX));
}

#[test]
fn memory_beyond_the_end_has_no_bits() {
    the_end_holds(&theirs(KIB, 1));
    the_end_holds(&ours(KIB, 1));
    let none = DirtyBits::default();
    none.mark_dirty(0, 1);
    assert!(!none.dirty_at(0));
}

#[test]
fn pages_are_those_of_the_machine() {
    let ours = DirtyBits::with_len(0x3001);
    let theirs = AtomicBitmap::with_len(0x3001);
    assert_eq!(ours.npages() as usize, theirs.len());
    ours.mark_dirty(0x1fff, 2);
    assert!(is_all(&ours, 0x1000, 0x2000, true));
    assert!(!ours.dirty_at(0xfff) && !ours.dirty_at(0x3000));
}

/// Checks that each way to write marks exactly the pages that it writes. `look` says
/// whether all of a range is dirty, or all of it clean.
fn writes_mark<A, M>(
    memory: &M,
    address: impl Fn(usize) -> A,
    look: impl Fn(usize, usize, bool) -> bool,
) where
    M: Bytes<A>,
    M::E: Debug,
{
    let bytes = [1u8; KIB];
    let at = 0x1000;
    assert!(look(at, KIB, false));
    assert_eq!(memory.write(&bytes, address(at)).unwrap(), KIB);
    assert!(look(at, KIB, true));

    let at = 0x2000;
    assert!(look(at, KIB, false));
    memory.write_slice(&bytes, address(at)).unwrap();
    assert!(look(at, KIB, true));

    let at = 0x3000;
    assert!(look(at, 8, false));
    memory.write_obj(1u64, address(at)).unwrap();
    assert!(look(at, 8, true));

    let at = 0x4000;
    assert!(look(at, 8, false));
    memory.store(1u64, address(at), Ordering::Relaxed).unwrap();
    assert!(look(at, 8, true));

    let at = 0x5000;
    let mut file: &[u8] = &bytes;
    assert!(look(at, KIB, false));
    memory
        .read_exact_volatile_from(address(at), &mut file, KIB)
        .unwrap();
    assert!(look(at, KIB, true));

    let at = 0x6000;
    memory.read_obj::<u64>(address(at)).unwrap();
    assert!(look(at, 8, false), "a read marks nothing");
}

fn volatile_memory_marks<B: NewBitmap>() {
    let region = MmapRegion::<B>::new(0x8000).unwrap();
    let whole = region.as_volatile_slice();
    let part = region.get_slice(0x7000, 8).unwrap();
    assert!(is_all(whole.bitmap(), 0, 0x8000, false));
    whole.write_obj(123u64, 0x7000).unwrap();
    assert!(is_all(whole.bitmap(), 0x7000, 8, true));
    assert!(is_all(part.bitmap(), 0, 8, true));

    region.get_ref::<u64>(0).unwrap().store(1);
    assert!(is_all(whole.bitmap(), 0, 8, true));

    let region = MmapRegion::<B>::new(0x8000).unwrap();
    let whole = region.as_volatile_slice();
    region.get_array_ref::<u64>(0x3000, 1).unwrap().store(0, 1);
    assert!(is_all(whole.bitmap(), 0x3000, 8, true));

    let region = MmapRegion::<B>::new(0x8000).unwrap();
    let whole = region.as_volatile_slice();
    writes_mark(
        &whole,
        |at| at,
        |at, len, dirty| is_all(whole.bitmap(), at, len, dirty),
    );
}

#[test]
fn volatile_memory_is_tracked() {
    volatile_memory_marks::<AtomicBitmap>();
    volatile_memory_marks::<DirtyBits>();
}

fn guest_memory_marks<B: NewBitmap + 'static>() {
    // The two regions touch, so that a write can span them.
    let ranges = [(GuestAddress(0), 0x5000), (GuestAddress(0x5000), 0xb000)];
    let memory = || GuestMemoryMmap::<B>::from_ranges(&ranges).unwrap();

    let guest = memory();
    let region = guest.find_region(GuestAddress(0)).unwrap();
    assert!(is_all(&region.bitmap(), 0, 0x5000, false));
    let slice = region.get_slice(MemoryRegionAddress(0), 8).unwrap();
    region.write_obj(1u64, MemoryRegionAddress(0)).unwrap();
    assert!(is_all(&region.bitmap(), 0, 8, true));
    assert!(is_all(slice.bitmap(), 0, 8, true));

    let guest = memory();
    guest.write_obj(1u64, GuestAddress(0x4ffc)).unwrap();
    let bitmaps: Vec<_> = guest.iter().map(|region| region.bitmap()).collect();
    assert!(bitmaps[0].dirty_at(0x4fff) && bitmaps[1].dirty_at(0));
    assert!(!bitmaps[0].dirty_at(0x3fff) && !bitmaps[1].dirty_at(0x1000));

    let guest = memory();
    let look = |at: usize, len: usize, dirty: bool| {
        let mut slices = guest.get_slices(GuestAddress(at as u64), len);
        slices.all(|slice| {
            let slice = slice.unwrap();
            is_all(slice.bitmap(), 0, slice.len(), dirty)
        })
    };
    writes_mark(&guest, |at| GuestAddress(at as u64), look);
}

#[test]
fn guest_memory_is_tracked() {
    guest_memory_marks::<AtomicBitmap>();
    guest_memory_marks::<DirtyBits>();
}

/// Every write that goes through vm-memory is in the tracker's report.
#[test]
fn a_tracker_reports_what_a_vmm_writes() {
    let ranges = [(GuestAddress(0), 0x8000), (GuestAddress(0x10_0000), 0x8000)];
    let memory = GuestMemoryMmap::<DirtyBits>::from_ranges(&ranges).unwrap();
    let tracker = Tracker::new(None);
    tracker.add_memory(memory.iter()).unwrap();
    let hosts: Vec<_> = tracker.slots().iter().map(|slot| slot.host).collect();
    for (host, (gpa, _)) in hosts.iter().zip(ranges) {
        assert_eq!(*host, Some(memory.get_host_address(gpa).unwrap() as u64));
    }

    memory.write_obj(1u8, GuestAddress(0x2000)).unwrap();
    tracker.start().unwrap();
    memory.write_obj(1u8, GuestAddress(0x10_7fff)).unwrap();
    memory
        .write_slice(&[1; 4097], GuestAddress(0x3fff))
        .unwrap();
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    assert_eq!(report.slot(0), Some(&[0b11000][..]));
    assert_eq!(report.slot(1), Some(&[0b1000_0000][..]));
}
