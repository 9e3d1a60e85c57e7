// SPDX-License-Identifier: GPL-2.0-only
//! Pages that go again while a call waits for others, and calls that go on where they
//! stopped.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use dirty_script::op::PAGE;
use dirty_script::System;

use super::{child, container, expect_all, look, needs, wait_under_lock, waiting, Line, Work};
use super::{ABSENT, BLOCKED, LOOKS};
use crate::ask::{expect, text};
use crate::memory;
use crate::real::Real;
use crate::userfault::page;

/// Mapped memory for a bitmap of two pages, and its pages.
const LARGE: u64 = 0x6_0000_0000;
const LARGE_PAGES: u64 = 40000;
/// Memory that another thread evicts; the first page is for bitmaps.
const SHARED: u64 = 0x7_0000_0000;
const ROUNDS: u64 = 400;

/// Calls that need two missing pages, and what shows that they were done.
const CALLS: [(Line, &[Line]); 4] = [
    (
        (
            "get iova=1T size=40000p bsize=5000 dump=1 data=0x500000000",
            "0 ok bm=8",
        ),
        &[
            ("peek a=0x500001387 n=1", "80"),
            ("get iova=1T size=40000p bsize=5000 dump=1", "0 ok bm=0"),
        ],
    ),
    (("rw iova=0x40000000000 len=2p", "ret=0"), WRITTEN),
    (("rw iova=0x40000000000 len=2p kthread=1", "ret=0"), WRITTEN),
    (("rw iova=0x40000000000 len=2p write=0", "ret=0"), &[]),
];
const WRITTEN: &[Line] = &[
    ("peek a=0x500000000 n=2", "5a5a"),
    ("peek a=0x500001ffe n=2", "5a5a"),
    ("get iova=0x40000000000 size=16p", "0 ok bm=3,0"),
];

/// Each of a call's two pages goes when the other comes. After some tries the call waits
/// under the lock, and ends.
fn in_turns(call: Line, done: &[Line]) -> Result<(), String> {
    let (mut real, pages) = container()?;
    let large = real.map_memory(LARGE, LARGE_PAGES * PAGE, true);
    large.map_err(text)?;
    let lines = [
        ("map iova=1T size=40000p vaddr=0x600000000", "0 ok"),
        ("rw iova=1T+3p", "ret=0"),
        ("rw iova=1T+39999p", "ret=0"),
    ];
    expect_all(&mut real, &lines, "")?;
    let work = Work::lines(&real, BLOCKED, &[call.0])?;
    wait_under_lock(&pages, &work, ABSENT, false)?;
    let info = [Work::lines(&real, 1, &["info"])?];
    if waiting(&info)?.is_empty() {
        return Err(format!("{}: waits without the lock for ever", call.0));
    }
    pages.give(ABSENT, &page(&[])).map_err(text)?;
    let answer = work.end()?;
    if !answer.ends_with(call.1) {
        return Err(format!("{answer}, expected {}", call.1));
    }
    for info in info {
        info.end()?;
    }
    expect_all(&mut real, done, "")
}

/// A device's write stops at the second page. The guest changes what it has seen in the
/// first, and that stays.
fn once(kernel_thread: bool) -> Result<(), String> {
    let (mut real, pages) = container()?;
    pages.give(ABSENT, &page(&[])).map_err(text)?;
    let call = match kernel_thread {
        true => "rw iova=0x40000000fc0 len=128 kthread=1",
        false => "rw iova=0x40000000fc0 len=128",
    };
    let work = Work::lines(&real, BLOCKED, &[call])?;
    needs(&pages, &work, ABSENT + PAGE)?;
    let lines = [
        ("peek a=0x500000ffc n=4", "5a5a5a5a"),
        ("get iova=0x40000000000 size=16p", "0 ok bm=1,0"),
        ("poke a=0x500000ffc hex=77777777", ""),
    ];
    expect_all(&mut real, &lines, "")?;
    pages.give(ABSENT + PAGE, &page(&[])).map_err(text)?;
    let answer = work.end()?;
    if !answer.ends_with("ret=0") {
        return Err(answer);
    }
    let lines = [
        ("peek a=0x500000ffc n=4", "77777777"),
        ("peek a=0x50000103c n=8", "5a5a5a5a00000000"),
        ("get iova=0x40000000000 size=16p", "0 ok bm=2,0"),
    ];
    expect_all(&mut real, &lines, "")
}

/// Another thread evicts the memory of bitmaps and devices all the time.
fn evicted() -> Result<(), String> {
    let (mut real, _pages) = container()?;
    memory::shared(SHARED, 17 * PAGE)?;
    expect(&mut real, "map iova=1G size=16p vaddr=0x700001000", "0 ok")?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let evictor = Work::start("evict", move || {
        while !stopped.load(Ordering::Relaxed) {
            memory::evict(SHARED, 17 * PAGE)?;
        }
        Ok(String::new())
    })?;
    let calls = Work::start("calls on memory that goes", {
        let mut real = real.share(BLOCKED).map_err(text)?;
        move || rounds(&mut real).map(|()| String::new())
    })?;
    for _ in 0..LOOKS {
        if calls.done() {
            break;
        }
        look();
    }
    let answer = calls.end();
    stop.store(true, Ordering::Relaxed);
    evictor.end()?;
    answer.map(|_| ())
}

fn rounds(real: &mut Real) -> Result<(), String> {
    for round in 0..ROUNDS {
        let (k, kernel_thread) = (round % 16, round % 2);
        let at = (1 << 30) + k * PAGE;
        let rw = format!("rw iova={at:#x} len=64 kthread={kernel_thread}");
        expect(real, &rw, "ret=0")?;
        let read = format!("rw iova={at:#x} len=4096 write=0");
        expect(real, &read, "ret=0")?;
        let peek = format!("peek a={:#x} n=2", SHARED + (k + 1) * PAGE);
        expect(real, &peek, "5a5a")?;
        let get = "get iova=1G size=16p dump=1 data=0x700000000";
        expect(real, get, &format!("0 ok bm={:x}", 1 << k))?;
    }
    Ok(())
}

pub(super) fn run() -> Result<(), String> {
    for (call, done) in CALLS {
        child(|| in_turns(call, done))?;
    }
    println!("absent: a call whose pages go in turns waits under the lock, and ends");
    for kernel_thread in [false, true] {
        child(|| once(kernel_thread))?;
    }
    println!("absent: a device's write goes on where it stopped");
    child(evicted)?;
    println!("absent: {ROUNDS} rounds on memory that goes all the time, with right answers");
    Ok(())
}
