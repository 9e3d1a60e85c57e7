// SPDX-License-Identifier: GPL-2.0-only
//! User memory that comes late or not at all: who waits meanwhile, and what the call
//! that needs it answers. The pages come by userfaultfd.

mod again;
mod killed;

use std::fs;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use dirty_core::uapi::VFIO_IOMMU_GET_INFO;
use dirty_script::op::PAGE;
use dirty_script::System;

use crate::ask::{ask, expect, text};
use crate::faults::{pins, settled};
use crate::memory;
use crate::process;
use crate::real::Real;
use crate::userfault::{page, Userfault};

/// Where the pages are that come late, and how many. A device sees them at 4 TiB.
const ABSENT: u64 = 0x5_0000_0000;
const ABSENT_PAGES: u64 = 16;
/// How often a thread must be found asleep before it counts as waiting.
const ASLEEP: u32 = 20;
/// How long to look at something that must come to an end.
const LOOKS: u32 = 2400;

fn look() {
    thread::sleep(Duration::from_millis(50));
}

/// Lines that a thread of its own runs.
struct Work {
    name: String,
    thread: JoinHandle<Result<String, String>>,
    id: Arc<AtomicI32>,
}

impl Work {
    fn start(
        name: &str,
        run: impl FnOnce() -> Result<String, String> + Send + 'static,
    ) -> Result<Work, String> {
        let id = Arc::new(AtomicI32::new(0));
        let own = Arc::clone(&id);
        let thread = thread::Builder::new().spawn(move || {
            own.store(nix::unistd::gettid().as_raw(), Ordering::Relaxed);
            run()
        });
        Ok(Work {
            name: name.into(),
            thread: thread.map_err(text)?,
            id,
        })
    }

    /// Runs lines one after another; returns all answers.
    fn lines(real: &Real, k: u64, lines: &[&str]) -> Result<Work, String> {
        let mut real = real.share(k).map_err(text)?;
        let lines: Vec<String> = lines.iter().map(|line| (*line).to_string()).collect();
        Work::start(&lines.join("; ").clone(), move || {
            let answers: Result<Vec<_>, _> = lines.iter().map(|l| ask(&mut real, l)).collect();
            Ok(answers?.join("; "))
        })
    }

    fn done(&self) -> bool {
        self.thread.is_finished()
    }

    /// Its answers, when it is done.
    fn end(self) -> Result<String, String> {
        for _ in 0..LOOKS {
            if self.done() {
                let answer = self.thread.join();
                return answer.map_err(|_| format!("{}: panicked", self.name))?;
            }
            look();
        }
        Err(format!("{}: does not end", self.name))
    }
}

/// Whether a thread sleeps where only its waker or a fatal signal ends that.
fn sleeps(stat: &str) -> bool {
    let stat = fs::read_to_string(stat).unwrap_or_default();
    let state = stat.rsplit(')').next().unwrap_or_default();
    state.trim_start().starts_with('D')
}

/// Looks until each of `works` is done or waits, and returns which wait.
fn waiting(works: &[Work]) -> Result<Vec<&str>, String> {
    let mut asleep = vec![0; works.len()];
    for _ in 0..LOOKS {
        look();
        for (work, asleep) in works.iter().zip(&mut asleep) {
            let stat = format!("/proc/self/task/{}/stat", work.id.load(Ordering::Relaxed));
            *asleep = if sleeps(&stat) { *asleep + 1 } else { 0 };
        }
        let waits = |(work, asleep): (&Work, &u32)| !work.done() && *asleep >= ASLEEP;
        let each = works.iter().zip(&asleep);
        if each.clone().all(|pair| pair.0.done() || waits(pair)) {
            let waiting = each.filter(|pair| waits(*pair));
            return Ok(waiting.map(|(work, _)| work.name.as_str()).collect());
        }
    }
    Err("an operation neither ends nor waits".into())
}

/// Waits until `work` asks for the page at `addr`.
fn needs(pages: &Userfault, work: &Work, addr: u64) -> Result<(), String> {
    for _ in 0..LOOKS {
        match pages.asked().map_err(text)? {
            Some(page) if page == addr => return Ok(()),
            Some(page) => return Err(format!("{}: asked for {page:#x}", work.name)),
            None => {}
        }
        if work.done() {
            break;
        }
        look();
    }
    Err(format!("{}: no page was asked for", work.name))
}

/// A line of a script, and the end of its answer. `{}` stands for the bits of pages 3
/// and 9.
type Line = (&'static str, &'static str);

/// How often the module makes a call again before its copies wait under the lock.
const TRIES: u32 = 16;

/// Brings `work`, a call that needs two pages from `first` on, to wait for the first of
/// them under the lock: whenever one of them comes, the other goes. The real driver does
/// so at once.
fn wait_under_lock(
    pages: &Userfault,
    work: &Work,
    first: u64,
    real_driver: bool,
) -> Result<(), String> {
    let turns = [(first, first + PAGE), (first + PAGE, first)];
    let tries = if real_driver { 0 } else { TRIES };
    for (next, other) in (0..tries).flat_map(|_| turns) {
        needs(pages, work, next)?;
        memory::evict(other, PAGE)?;
        pages.give(next, &page(&[])).map_err(text)?;
    }
    needs(pages, work, first)
}

/// A call that needs a missing page.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    /// The call and its answer; an empty line for GET_INFO, which scripts cannot place.
    call: Line,
    /// How the page starts.
    words: &'static [u64],
    /// What shows that the call was done.
    done: &'static [Line],
    /// What shows that it was not done. Nothing may be lost then either.
    refused: &'static [Line],
    /// How many of 8 operations wait with the real driver.
    linux: usize,
}

/// GET of the first mapping: all is left to report.
const LEFT: Line = ("get size=64p", "0 ok bm={},0");
const WRITTEN: &[Line] = &[
    ("peek a=0x500000000 n=4", "5a5a5a5a"),
    ("peek a=0x500000040 n=4", "01000000"),
    ("get iova=0x40000000000 size=16p", "0 ok bm=1,0"),
    LEFT,
];
/// The page after the 64 bytes that a device writes.
const MEMORY: &[u64] = &[1, 1, 1, 1, 1, 1, 1, 1, 1];

#[rustfmt::skip]
const CASES: [Case; 9] = [
    Case { name: "argument of MAP", call: ("map ptr=0x500000000", "0 ok"),
        words: &[32 | 3 << 32, 0x1_0000_0000, 1 << 43, 4 * PAGE],
        done: &[("unmap iova=0x80000000000 size=4p", "0 ok size=0x4000"), LEFT],
        refused: &[("unmap iova=0x80000000000 size=4p", "0 ok size=0")], linux: 0 },
    Case { name: "argument of UNMAP", call: ("unmap ptr=0x500000000", "0 ok size=0"),
        words: &[24, 0, 64 * PAGE],
        done: &[("peek a=0x500000010 n=4", "00000400"), ("map size=64p vaddr=mem", "0 ok")],
        refused: &[], linux: 0 },
    Case { name: "argument of DIRTY_PAGES",
        call: ("get ptr=0x500000000 data=buf+8p", "0 ok bm={},0"),
        words: &[48 | 4 << 32, 0, 64 * PAGE, PAGE, 8, 0x2_0000_8000],
        done: &[("get size=64p", "0 ok bm=0,0")], refused: &[], linux: 0 },
    Case { name: "argument of GET_INFO", call: ("", "argsz=4096 flags=3"),
        words: &[4096], done: &[LEFT], refused: &[], linux: 0 },
    Case { name: "bitmap of GET", call: ("get size=64p data=0x500000000", "0 ok bm={},0"),
        words: &[], done: &[("get size=64p", "0 ok bm=0,0")], refused: &[], linux: 7 },
    Case { name: "bitmap of UNMAP",
        call: ("unmap size=64p flags=1 data=0x500000000", "0 ok size=0x40000 bm={},0"),
        words: &[], done: &[("map size=64p vaddr=mem", "0 ok")], refused: &[], linux: 7 },
    Case { name: "memory that a device writes",
        call: ("rw iova=0x40000000000 len=64", "ret=0"),
        words: MEMORY, done: WRITTEN, refused: &[], linux: 7 },
    Case { name: "memory that a kernel thread writes",
        call: ("rw iova=0x40000000000 len=64 kthread=1", "ret=0"),
        words: MEMORY, done: WRITTEN, refused: &[], linux: 7 },
    Case { name: "memory that a device reads",
        call: ("rw iova=0x40000000000 len=64 write=0", "ret=0"),
        words: MEMORY, done: &[LEFT], refused: &[], linux: 7 },
];

/// The other operations: as many threads.
const OTHERS: [&[&str]; 8] = [
    &["pin iova=16M+5p n=1", "unpin iova=16M+5p n=1"],
    &["info"],
    &["map iova=32M vaddr=mem size=1p", "unmap iova=32M size=1p"],
    &["ext n=3"],
    &["rw iova=16M+7p len=64"],
    &["start"],
    &["get iova=16M size=64p"],
    &["unmap iova=64M size=1p"],
];
/// Their answers, in order. What GET answers depends on who is first.
const ANSWERS: [&str; 8] = [
    "ret=0",
    "pgsizes=",
    "size=0x1000",
    "1 ok",
    "ret=0",
    "0 ok",
    "0 ok",
    "size=0",
];

/// Which of its own threads has which memory for arguments.
const BLOCKED: u64 = 9;

/// A container with a device, two mappings, and one of missing pages. Tracking is on,
/// and page 3 is dirty.
fn container() -> Result<(Real, Userfault), String> {
    let mut real = Real::new(65535).map_err(text)?;
    let size = ABSENT_PAGES * PAGE;
    real.map_memory(ABSENT, size, true).map_err(text)?;
    let pages = Userfault::new(ABSENT, size).map_err(|e| format!("userfaultfd: {e}"))?;
    for (line, end) in [
        ("new devs=emu0", "set_iommu(3)=ok"),
        ("map size=64p vaddr=mem", "0 ok"),
        ("map iova=16M size=64p vaddr=mem+64p", "0 ok"),
        ("map iova=0x40000000000 size=16p vaddr=0x500000000", "0 ok"),
        ("start", "0 ok"),
        ("rw iova=3p", "ret=0"),
    ] {
        expect(&mut real, line, end)?;
    }
    Ok((real, pages))
}

/// A word of this process's memory, half by half.
fn halves(real: &mut Real, addr: u64) -> Result<(u32, u32), String> {
    let mut word = [0; 8];
    match real.peek(addr, &mut word) {
        true => Ok((
            u32::from_ne_bytes([word[0], word[1], word[2], word[3]]),
            u32::from_ne_bytes([word[4], word[5], word[6], word[7]]),
        )),
        false => Err(format!("{addr:#x} cannot be read")),
    }
}

/// Starts a call whose page is missing, and waits until it needs the page.
fn block(real: &Real, pages: &Userfault, case: &Case) -> Result<Work, String> {
    let work = match case.call.0 {
        "" => {
            let mut real = real.share(BLOCKED).map_err(text)?;
            Work::start(case.name, move || {
                if let Err(e) = real.ioctl(VFIO_IOMMU_GET_INFO, ABSENT) {
                    return Ok(format!("-1 {e}"));
                }
                let (argsz, flags) = halves(&mut real, ABSENT)?;
                Ok(format!("argsz={argsz} flags={flags}"))
            })?
        }
        line => Work::lines(real, BLOCKED, &[line])?,
    };
    needs(pages, &work, ABSENT)?;
    Ok(work)
}

/// The bits of the second mapping in an answer of GET.
fn bits(answer: &str) -> Result<u64, String> {
    let word = answer.split("bm=").nth(1).and_then(|w| w.split(',').next());
    let bits = word.and_then(|w| u64::from_str_radix(w, 16).ok());
    bits.ok_or(format!("no bits in {answer}"))
}

/// While a call waits for its page, eight other operations run. Then the page comes.
fn given(case: &Case, real_driver: bool) -> Result<(), String> {
    let (mut real, pages) = container()?;
    let blocked = block(&real, &pages, case)?;
    let others: Result<Vec<Work>, String> = (1..)
        .zip(OTHERS)
        .map(|(k, lines)| Work::lines(&real, k, lines))
        .collect();
    let others = others?;
    let waits = waiting(&others)?;
    println!("absent: {}: {} of 8 wait", case.name, waits.len());
    let expected = if real_driver { case.linux } else { 0 };
    if waits.len() != expected {
        return Err(format!("expected {expected}; these wait: {waits:?}"));
    }
    let free = expected == 0;
    if free {
        expect(&mut real, "rw iova=9p", "ret=0")?;
    }
    let dirty = if free { "208" } else { "8" };
    if blocked.done() {
        return Err(format!("{}: ended without its page", case.name));
    }
    pages.give(ABSENT, &page(case.words)).map_err(text)?;
    let answer = blocked.end()?;
    let end = case.call.1.replace("{}", dirty);
    if !answer.ends_with(&end) {
        return Err(format!("{}: {answer}, expected {end}", case.name));
    }
    let mut seen = 0;
    for ((other, end), k) in others.into_iter().zip(ANSWERS).zip(0..) {
        let answer = other.end()?;
        if !answer.contains(end) || answer.contains("-1 ") {
            return Err(format!("beside {}: {answer}, expected {end}", case.name));
        }
        if k == 6 {
            seen = bits(&answer)?;
        }
    }
    seen |= bits(&ask(&mut real, "get iova=16M size=64p")?)?;
    if seen != 0xa0 {
        return Err(format!("beside {}: {seen:#x} was reported", case.name));
    }
    expect_all(&mut real, case.done, dirty)
}

fn expect_all(real: &mut Real, lines: &[Line], dirty: &str) -> Result<(), String> {
    let mut lines = lines.iter();
    lines.try_for_each(|(line, end)| expect(real, line, &end.replace("{}", dirty)))
}

/// The page cannot be had: the call fails, and nothing is lost.
fn refused(case: &Case) -> Result<(), String> {
    let (mut real, pages) = container()?;
    let blocked = block(&real, &pages, case)?;
    expect(&mut real, "rw iova=9p", "ret=0")?;
    pages.refuse(ABSENT).map_err(text)?;
    let answer = blocked.end()?;
    if !answer.contains("EFAULT") {
        return Err(format!("{}: {answer}, expected EFAULT", case.name));
    }
    expect_all(&mut real, case.refused, "208")?;
    expect_all(&mut real, &[LEFT], "208")
}

/// Runs `work` in a process of its own, since each has its own missing pages.
fn child(work: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let code = process::in_child(|| match work() {
        Ok(()) => 0,
        Err(e) => {
            println!("{e}");
            -1
        }
    });
    match code.map_err(text)? {
        0 => Ok(()),
        _ => Err("absent: failed".into()),
    }
}

/// With `real_driver`, expects what the real driver does, and leaves out what it does
/// not do right.
pub(crate) fn run(real_driver: bool) -> Result<(), String> {
    let before = pins()?;
    for case in &CASES {
        child(|| given(case, real_driver))?;
    }
    if !real_driver {
        for case in &CASES {
            child(|| refused(case))?;
        }
        println!("absent: a page that cannot be had is EFAULT, and no bit is lost");
        again::run()?;
    }
    killed::run(real_driver)?;
    settled(before)
}
