// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bug reports of VMMs and device libraries, and findings of a hostile review, as
//! tests of the tracker. `--nocapture --test-threads=1` shows the times, which no test
//! asserts.
//!
//! What changed in calls since they were written:
//!
//! | then | now |
//! |---|---|
//! | a tracker was always on | `start()?` first; a take of a tracker that is off fails |
//! | `take` into a new report gave it slots | `tracker.report()` |
//! | `remove_slot`, then `add` at the new address | `move_slot` |
//! | `Slot { id, gpa, host, bits }` | with `size`, which must be the bits' length |
//! | `add` took the content as known | `add_known`; after `add` all is dirty |
//! | `add_memory(&memory)` | `add_memory(memory.iter())`, again after each change |
//! | `view.harvest()`, `or`, `finish` | `tracker.add_log(name, &view, gap, log)` |
//! | no call (`field_vm_memory.rs`, m06 and m07) | `DirtyBits::discard`, `DirtyBits::grow` |

use std::sync::{Arc, Mutex};
use std::time::Instant;

use adapter_user::device_log::DeviceLog;
use adapter_user::guest::{DirtyIovas, IovaRange, IovaView, Report, SourceError, Tracker};
use adapter_user::{DirtyBits, Extent, PageSize};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

const P: u64 = 4096;

fn pg(bytes: u64) -> PageSize {
    PageSize::new(bytes).unwrap()
}

fn extent(iova: u64, npages: u64) -> Extent {
    Extent {
        bit: 0,
        iova,
        npages,
        pgsize: pg(P),
    }
}

fn ranges(report: &Report) -> Vec<(u64, u64)> {
    let ranges = report.ranges(P).unwrap();
    ranges.map(|range| (range.gpa, range.size)).collect()
}

fn on() -> Tracker {
    let tracker = Tracker::new(None);
    tracker.start().unwrap();
    tracker
}

/// Adds a log that has the same bits in each take.
fn add_log(tracker: &Tracker, view: &IovaView, words: Vec<u64>, extent: Extent) {
    let read = move |_: &[IovaRange], dirty: &mut DirtyIovas| -> Result<(), SourceError> {
        Ok(dirty.or_bitmap(&words, extent)?)
    };
    tracker.add_log("log", view, 0, read).unwrap();
}

/// cloud-hypervisor#7027 (a BAR moves), and KVM's move of a memslot.
#[test]
fn f01_a_slot_that_moves() {
    let t = on();
    t.add_slot(0, 0, None, 16 * P).unwrap();
    t.add_slot(1, 0x10_0000, None, 16 * P).unwrap();
    let mut r = t.report();
    t.take(&mut r).unwrap();
    r.clear();
    t.move_slot(1, 0x20_0000).unwrap();
    let bits = t.slots()[1].bits.clone();
    assert_eq!(bits.mark(3 * P, 1), Ok(()));
    t.take(&mut r).unwrap();
    assert_eq!(
        ranges(&r),
        [(0x20_0000 + 3 * P, P)],
        "one report for all rounds"
    );
    let mut fresh = Report::new();
    bits.mark(3 * P, 1).unwrap();
    t.take(&mut fresh).unwrap();
    assert_eq!(ranges(&fresh), [(0x20_0000 + 3 * P, P)]);
}

/// The guest moves a region of memory (a BAR with RAM behind it).
#[test]
fn a_region_of_vm_memory_moves() {
    let ram = Arc::new(MmapRegion::<DirtyBits>::new(16 << 12).unwrap());
    let at = |gpa| {
        let region = GuestRegionMmap::with_arc(Arc::clone(&ram), GuestAddress(gpa)).unwrap();
        GuestMemoryMmap::from_regions(vec![region]).unwrap()
    };
    let tracker = Tracker::new(None);
    tracker.add_memory(at(0x10_0000).iter()).unwrap();
    tracker.start().unwrap();
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    let after = at(0x20_0000);
    tracker.add_memory(after.iter()).unwrap();
    after.write_obj(7u8, GuestAddress(0x20_3000)).unwrap();
    tracker.take(&mut report).unwrap();
    assert_eq!(ranges(&report), [(0x20_3000, 0x1000)]);
    report.clear();
    // It is out for a while, and nobody knows who wrote it meanwhile.
    tracker.remove_slot(0).unwrap();
    let back = at(0x30_0000);
    tracker.add_memory(back.iter()).unwrap();
    tracker.take(&mut report).unwrap();
    assert_eq!(ranges(&report), [(0x30_0000, 0x1_0000)]);
}

/// openvmm#3367, cloud-hypervisor#7030: a device may write another device's BAR.
#[test]
fn f12_peer_to_peer_mappings() {
    let t = on();
    t.add_slot(0, 0, None, 1 << 20).unwrap();
    let v = t.iova_view();
    let mut r = t.report();
    t.take(&mut r).unwrap();
    r.clear();
    v.map(0xe000_0000, 0xe000_0000, 16 * P).unwrap();
    add_log(&t, &v, vec![1], extent(0xe000_0000, 16));
    for _ in 0..3 {
        t.take(&mut r).unwrap();
        assert_eq!(r.pages(), 0);
    }
}

/// cloud-hypervisor#942, #3165: memory that is plugged while a migration runs.
#[test]
fn f14_memory_that_comes_during_migration() {
    let t = Tracker::new(None);
    t.add_slot(0, 0, None, 1 << 20).unwrap();
    t.start().unwrap();
    let mut r = Report::new();
    t.take(&mut r).unwrap();
    r.clear();
    t.add_slot(1, 1 << 30, None, 16 * P).unwrap(); // with content: a ROM
    t.take(&mut r).unwrap();
    assert_eq!(ranges(&r), [(1 << 30, 16 * P)]);
}

/// vhost-user (cloud-hypervisor#2813): a log of all guest memory, one bit a page.
#[test]
fn f16_a_vhost_log_over_a_gap() {
    let t = Tracker::new(None);
    t.add_slot(0, 0, None, 64 * P).unwrap();
    t.add_slot(1, 256 * P, None, 64 * P).unwrap();
    let mut r = t.report();
    let mut log = vec![0u64; 5];
    log[0] = 1 << 63;
    log[4] = 1;
    r.or_bitmap(&log, extent(0, 320)).unwrap();
    assert_eq!(ranges(&r), [(63 * P, P), (256 * P, P)]);
    log[2] = 1; // a backend that marks in the gap
    r.or_bitmap(&log, extent(0, 320)).unwrap_err();
}

/// Hot-unplug and plug of the same memory.
#[test]
fn g03_a_slot_that_comes_back() {
    let t = on();
    t.add_slot(0, 0, None, 16 * P).unwrap();
    let slot = t.remove_slot(0).unwrap();
    t.add(slot).unwrap();
    let mut r = Report::new();
    t.take(&mut r).unwrap();
    assert_eq!(ranges(&r), [(0, 16 * P)]);
    r.clear();
    let m = t.iova_view().map(0x1000, 0, 16 * P).unwrap();
    assert_eq!(m.mark(0x1000, 1), Ok(()));
    t.take(&mut r).unwrap();
    assert_eq!(ranges(&r), [(0, P)]);
}

/// A BAR that is a slot too, whose pages are left out when copying.
#[test]
fn g05_a_bar_as_a_slot() {
    let t = Tracker::new(None);
    t.add_slot(0, 0, None, 1 << 20).unwrap();
    t.add_slot(9, 0xe000_0000, None, 16 * P).unwrap();
    t.start().unwrap();
    let v = t.iova_view();
    v.map(0xe000_0000, 0xe000_0000, 16 * P).unwrap();
    add_log(&t, &v, vec![1], extent(0xe000_0000, 16));
    let mut r = Report::new();
    t.take(&mut r).unwrap();
    assert_eq!(ranges(&r), [(0xe000_0000, P)]);
}

/// Hosts with pages of 64 KiB (arm64): KVM's log has a bit for each of those.
#[test]
fn g06_a_kvm_log_of_64k_pages() {
    let t = Tracker::new(None);
    t.add_slot(0, 0, None, 64 << 20).unwrap();
    let mut r = t.report();
    let words = vec![0b10u64; 16]; // 1024 pages of 64 KiB
    r.or_slot(0, &words).unwrap_err();
    let large = Extent {
        pgsize: pg(65536),
        ..extent(0, 1024)
    };
    r.or_bitmap(&words, large).unwrap();
    assert_eq!(ranges(&r)[0], (65536, 65536));
}

/// The order that a newcomer wrote: read the log, then look at the mappings. Between
/// the two a device writes through a mapping that then goes and is replaced.
#[test]
fn harvest_order() {
    for early in [false, true] {
        let t = Tracker::new(None);
        t.add_slot(0, 0, None, 16 << 20).unwrap();
        let (view, log) = (t.iova_view(), DeviceLog::new(None));
        view.map(0x8000, 0x10_0000, P).unwrap();
        log.add_range(0x8000, P).unwrap();
        log.set_tracking(true).unwrap();
        let (v, l) = (view.clone(), log.clone());
        // The device's thread, which runs at the worst moment.
        let mut device = Some(move || -> Result<(), SourceError> {
            l.mark(0x8000, 1)?; // it wrote 0x100000
            l.remove_range(0x8000, P)?; // the guest unmaps
            v.unmap(0x8000, P)?;
            v.map(0x8000, 0x20_0000, P)?; // and maps another page there
            l.add_range(0x8000, P)?;
            Ok(())
        });
        let read = move |_: &[IovaRange], dirty: &mut DirtyIovas| {
            let mut words = [0];
            let mut device = device.take();
            if let Some(device) = device.as_mut().filter(|_| early) {
                device()?;
            }
            log.report(0x8000, P, P, &mut words)?;
            if let Some(device) = device.as_mut().filter(|_| !early) {
                device()?;
            }
            Ok(dirty.or_bitmap(&words, extent(0x8000, 1))?)
        };
        t.add_log("device", &view, 0, read).unwrap();
        t.start().unwrap();
        let mut all = vec![];
        let mut report = Report::new();
        for _ in 0..2 {
            t.take(&mut report).unwrap();
            all.extend(ranges(&report));
            report.clear();
        }
        assert!(all.contains(&(0x10_0000, P)), "early {early}: {all:x?}");
    }
}

/// cloud-hypervisor#2858, firecracker#1796: tracking costs while nobody migrates.
#[test]
fn h03_what_tracking_costs_while_nobody_migrates() {
    let len = 64usize << 20;
    let ram = [(GuestAddress(0), len)];
    let mem = GuestMemoryMmap::<DirtyBits>::from_ranges(&ram).unwrap();
    let plain = GuestMemoryMmap::<()>::from_ranges(&ram).unwrap();
    let atomic = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ram).unwrap();
    let tracker = Tracker::new(None);
    tracker.add_memory(mem.iter()).unwrap();
    let buf = [1u8; 64];
    let n = 2_000_000u64;
    let run = |f: &dyn Fn(GuestAddress)| {
        let start = Instant::now();
        for k in 0..n {
            f(GuestAddress(k * 4096 * 7 % (len as u64 - 4096)));
        }
        start.elapsed().as_secs_f64() / n as f64 * 1e9
    };
    let mut best = [f64::MAX; 4];
    let mut least = |at: usize, nanos: f64| best[at] = best[at].min(nanos);
    for _ in 0..5 {
        least(0, run(&|at| drop(plain.write_slice(&buf, at))));
        least(1, run(&|at| drop(mem.write_slice(&buf, at))));
        tracker.start().unwrap();
        least(2, run(&|at| drop(mem.write_slice(&buf, at))));
        tracker.stop();
        least(3, run(&|at| drop(atomic.write_slice(&buf, at))));
    }
    let [none, off, on, atomic] = best;
    println!(
        "a write of 64 bytes: no bitmap {none:.1} ns, off {off:.1} ns ({:.2} x), \
         on {on:.1} ns, AtomicBitmap {atomic:.1} ns",
        off / none
    );
    tracker.start().unwrap();
    mem.write_slice(&buf, GuestAddress(P)).unwrap();
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    assert_eq!(ranges(&report), [(P, P)]);
}

/// A guest that booted with a passthrough domain, then uses a window below 4 GiB.
#[test]
fn harvest_after_a_passthrough_boot() {
    for (gone, runs) in [(1000u64, 10_000u64), (20_000, 20_000), (60_000, 20_000)] {
        for passthrough in [false, true] {
            let t = Tracker::new(None);
            t.add_slot(0, 0, None, 4 << 30).unwrap();
            let view = t.iova_view();
            let base = 0xf000_0000u64;
            let n = runs * 2; // every second page is dirty
            let took = Arc::new(Mutex::new(None));
            let began = Arc::clone(&took);
            let mut rounds = 0;
            let read = move |_: &[IovaRange], dirty: &mut DirtyIovas| {
                rounds += 1;
                if rounds == 2 {
                    *began.lock().unwrap() = Some(Instant::now());
                    let words = vec![0x5555_5555_5555_5555; (n as usize).div_ceil(64)];
                    dirty.or_bitmap(&words, extent(base, n))?;
                }
                Ok(())
            };
            t.add_log("device", &view, 0, read).unwrap();
            t.start().unwrap();
            let mut report = Report::new();
            if passthrough {
                view.map(0, 0, 4 << 30).unwrap();
                view.unmap(0, 4 << 30).unwrap();
                assert_eq!(view.remembered(), 1);
            }
            t.take(&mut report).unwrap();
            assert_eq!(view.remembered(), 0);
            for k in 0..gone {
                let iova = base - (k + 1) * P;
                view.map(iova, k * P, P).unwrap();
                view.unmap(iova, P).unwrap();
            }
            view.map(base, 1 << 30, n * P).unwrap();
            let all = Instant::now();
            t.take(&mut report).unwrap();
            let end = Instant::now();
            let read = took.lock().unwrap().unwrap();
            println!(
                "{gone} remembered, {runs} runs, a forgotten 4 GiB {passthrough}: \
                 {:?} after the log was read, {:?} the take",
                end - read,
                end - all
            );
            assert_eq!(report.pages(), runs);
        }
    }
}

/// The same with a large mapping that is still remembered.
#[test]
fn f17_a_harvest_with_many_gone_mappings() {
    for (large, small) in [
        (false, 65_000u64),
        (true, 1_000),
        (true, 8_000),
        (true, 65_000),
    ] {
        let t = Tracker::new(None);
        t.add_slot(0, 0, None, 1 << 30).unwrap();
        let v = t.iova_view();
        add_log(&t, &v, vec![0x5555_5555_5555_5555; 512], extent(0, 32768));
        t.start().unwrap();
        let mut report = Report::new();
        t.take(&mut report).unwrap();
        for k in 0..small {
            v.map(k * P, k * P, P).unwrap();
            v.unmap(k * P, P).unwrap();
        }
        if large {
            v.map(0, 0, 1 << 30).unwrap();
            v.unmap(0, 1 << 30).unwrap();
        }
        v.map(0, 0, 1 << 30).unwrap();
        let start = Instant::now();
        t.take(&mut report).unwrap();
        println!(
            "{small} remembered, 1 GiB remembered {large}: 16384 runs in {:?}",
            start.elapsed()
        );
        assert_eq!(report.pages(), 16384);
    }
}

/// A ring of 65,536 entries over 4,096 slots, and a take of those.
#[test]
fn a_ring_over_many_slots() {
    let t = Tracker::new(None);
    for id in 0..4096u32 {
        t.add_slot(id, u64::from(id) << 24, None, 8 << 20).unwrap();
    }
    t.start().unwrap();
    let mut report = t.report();
    let start = Instant::now();
    let ring = (0..65_536u32).map(|k| (k.wrapping_mul(2_654_435_761) % 4096, u64::from(k / 4096)));
    report.or_ring(ring).unwrap();
    println!("65,536 entries over 4,096 slots: {:?}", start.elapsed());
    assert_eq!(report.pages(), 65_536);
    let start = Instant::now();
    t.take(&mut report).unwrap();
    println!("a take of 4,096 slots of 8 MiB: {:?}", start.elapsed());
    t.move_slot(0, 1 << 60).unwrap();
    let start = Instant::now();
    t.take(&mut report).unwrap();
    println!("a take after one of them moved: {:?}", start.elapsed());
    assert_eq!(report.pages(), 65_536);
}
