// SPDX-License-Identifier: MIT OR Apache-2.0
//! The row "map and unmap on a running DeviceLog".

use super::*;

/// 200,000 cycles of map, mark and unmap, with a report each 1,000.
#[test]
fn map_and_unmap_on_a_running_log_stays_small() {
    let log = on();
    let (before, start) = (heap(), Instant::now());
    let mut most = 0;
    for cycle in 0..200_000u64 {
        // Near IOVAs, and IOVAs that are far from each other.
        let iova = (cycle % 1000) << [12, 30][(cycle / 1000 % 2) as usize];
        log.add_range(iova, PAGE).unwrap();
        log.mark(iova, 1).unwrap();
        log.remove_range(iova, PAGE).unwrap();
        most = most.max(heap() - before);
        if cycle % 1000 == 999 {
            let mut told = 0;
            for n in 0..1000u64 {
                let mut words = [0];
                let iova = n << [12, 30][(cycle / 1000 % 2) as usize];
                log.report(iova, PAGE, PAGE, &mut words).unwrap();
                told += words[0];
            }
            assert_eq!(told, 1000);
        }
    }
    println!(
        "200,000 cycles: {:?}, at most {most} bytes",
        start.elapsed()
    );
    assert!(most < 4 << 20, "{most}");
    assert!(heap() - before < 4 << 10, "all is told");
}

/// Each cycle maps another IOVA, and nobody ever asks for a report.
#[test]
fn removed_ranges_that_nobody_asks_for_stay_within_the_cap() {
    let cap = 64 << 10;
    let log = DeviceLog::with_options(LogOptions {
        removed: cap,
        ..LogOptions::default()
    });
    log.set_tracking(true).unwrap();
    let before = heap();
    // All over the IOVA space.
    let written = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) & !(PAGE - 1);
    for n in 0..100_000 {
        log.add_range(written(n), PAGE).unwrap();
        log.mark(written(n), 1).unwrap();
        log.remove_range(written(n), PAGE).unwrap();
    }
    let more = heap() - before;
    assert!(more < 2 * cap as i64, "{more} bytes for a cap of {cap}");
    // No page is forgotten.
    for n in 0..100_000 {
        let mut words = [0];
        log.dirty_bitmap(written(n), PAGE, PAGE, false, &mut words)
            .unwrap();
        assert_eq!(words, [1], "page {n}");
    }
    let mut ranges = Vec::new();
    log.take_removed(|iova, size| {
        ranges.push((iova, iova + (size - 1)));
        Ok(())
    })
    .unwrap();
    for n in 0..100_000 {
        let has = |range: &(u64, u64)| range.0 <= written(n) && written(n) <= range.1;
        assert!(ranges.iter().any(has), "page {n}");
    }
    let mut words = [0];
    assert!(log.report(written(7), PAGE, PAGE, &mut words).is_err());
    assert!(heap() - before < (100 << 10), "all is told");
}

/// What a report of a part had is freed, and the rest stays.
#[test]
fn a_removed_range_that_is_told_in_parts_is_freed_in_parts() {
    let log = on();
    let size = 1 << 30;
    log.add_range(0, size).unwrap();
    for page in (0..size / PAGE).step_by(2) {
        log.mark(page * PAGE, 1).unwrap();
    }
    let before = heap();
    log.remove_range(0, size).unwrap();
    let full = heap();
    let mut words = [0; 1 << 11];
    for part in 0..8 {
        words.fill(0);
        log.report(part * (size / 8), size / 8, PAGE, &mut words[..1 << 9])
            .unwrap();
        assert!(words[..1 << 9]
            .iter()
            .all(|word| *word == 0x5555_5555_5555_5555));
        let left = (full - before) * (7 - part as i64) / 8;
        assert!(heap() - before <= left + 4096, "after part {part}");
    }
}

/// 65,535 maps, which is what a vfio-user server allows, and as many unmaps.
#[test]
fn a_running_log_takes_65_535_maps() {
    let log = on();
    let start = Instant::now();
    for n in 0..65_535u64 {
        log.add_range(n << 13, PAGE).unwrap();
    }
    println!("65,535 maps: {:?}", start.elapsed());
    log.mark(0, 65_535 << 13).unwrap_err(); // there are gaps
    let start = Instant::now();
    for n in 0..65_535u64 {
        log.remove_range(n << 13, PAGE).unwrap();
    }
    println!("65,535 unmaps: {:?}", start.elapsed());
    let mut pages = 0;
    log.take_removed(|_, size| {
        pages += size / PAGE;
        Ok(())
    })
    .unwrap();
    assert_eq!(pages, 65_535);
}

/// l1: a virtual IOMMU maps and unmaps one page a million times between two reports.
#[test]
fn l1_ranges_that_come_and_go_between_reports_stay_bounded() {
    let log = on();
    let before = heap();
    let start = Instant::now();
    for _ in 0..1_000_000 {
        log.add_range(0x8000, PAGE).unwrap();
        log.remove_range(0x8000, PAGE).unwrap();
    }
    println!("1,000,000 cycles: {:?}", start.elapsed());
    log.report(0x8000, PAGE, PAGE, &mut [0]).unwrap();
    assert!(heap() - before < 4 << 10);
}

/// l2: reports in pieces never dropped a removed range.
#[test]
fn l2_reports_in_pieces_forget_removed_ranges() {
    let log = DeviceLog::new(Some(64 << 10));
    log.set_tracking(true).unwrap();
    let before = heap();
    for _ in 0..2000 {
        log.add_range(0, 16 << 20).unwrap();
        log.mark(0x5000, 1).unwrap();
        log.remove_range(0, 16 << 20).unwrap();
        let mut words = [0u64; 32];
        log.report(0, 8 << 20, PAGE, &mut words).unwrap();
        assert_eq!(words[0], 1 << 5);
        log.report(8 << 20, 8 << 20, PAGE, &mut words).unwrap();
        assert!(heap() - before < 4 << 10, "nothing is left");
    }
}

/// l3, and the example log_quadratic: ranges added one by one, and one range added
/// and removed. The times are for people to read.
#[test]
fn l3_adding_ranges_is_not_quadratic() {
    for n in [5_000u64, 10_000, 20_000, 40_000] {
        let (log, start) = (on(), Instant::now());
        for k in 0..n {
            log.add_range(k << 13, PAGE).unwrap();
        }
        let each = start.elapsed().as_nanos() as u64 / n;
        println!("{n} ranges added: {each} ns each");
        let (log, start) = (on(), Instant::now());
        for _ in 0..n {
            log.add_range(0, PAGE).unwrap();
            log.remove_range(0, PAGE).unwrap();
        }
        let each = start.elapsed().as_nanos() as u64 / n;
        println!("{n} times added and removed: {each} ns each");
    }
}

/// f06, libvfio-user#852 and #539: what unmapping costs while a log runs.
#[test]
fn f06_map_and_unmap_while_logging() {
    for n in [5_000u64, 10_000, 20_000, 40_000] {
        let (log, before) = (on(), heap());
        for k in 0..n {
            log.add_range(0x10_0000 + k % 16 * PAGE, PAGE).unwrap();
            log.remove_range(0x10_0000 + k % 16 * PAGE, PAGE).unwrap();
        }
        assert!(heap() - before < 4 << 10);
        log.report(0x10_0000, 16 * PAGE, PAGE, &mut [0]).unwrap();
    }
}

/// f08: one page that is mapped and unmapped used up a budget of 64 KiB.
#[test]
fn f08_churn_under_a_budget() {
    let log = DeviceLog::new(Some(1 << 16));
    log.set_tracking(true).unwrap();
    for _ in 0..20_000u64 {
        log.add_range(0x10_0000, PAGE).unwrap();
        log.mark(0x10_0000, 1).unwrap();
        log.remove_range(0x10_0000, PAGE).unwrap();
    }
    let mut words = [0];
    log.report(0x10_0000, PAGE, PAGE, &mut words).unwrap();
    assert_eq!(words, [1]);
}
