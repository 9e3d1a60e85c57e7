// SPDX-License-Identifier: MIT OR Apache-2.0
//! The calls of DMA logging that were recorded of Linux, made on a log: each answer is
//! the recorded one, or it is listed with the reason. The driver behind the recorded
//! calls accepts every log and reports no page, so they show the kernel's own checks.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use adapter_user::device_log::uapi::*;
use nix::sys::mman::{mmap_anonymous, mprotect, munmap, MapFlags, ProtFlags};

use super::*;

const LINUX: &str = include_str!("../data/migration/logging.txt");
const DIFFERENCES: &str = include_str!("../data/migration/differences.txt");

const CPU_PAGE: usize = 4096;

/// A page that can be written, one that is not there, one that can only be read, and
/// one that is not there.
struct Pages(NonNull<u8>);

impl Pages {
    fn new() -> Pages {
        let len = NonZeroUsize::new(4 * CPU_PAGE).unwrap();
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses a free address.
        let pages = unsafe { mmap_anonymous(None, len, prot, MapFlags::MAP_PRIVATE) }.unwrap();
        let pages = Pages(pages.cast());
        for page in [1, 3] {
            // SAFETY: the page is ours, and there is no reference to it.
            unsafe { munmap(pages.at(page * CPU_PAGE).cast(), CPU_PAGE) }.unwrap();
        }
        pages
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        // SAFETY: inside of the four pages that were mapped as one.
        unsafe { self.0.add(offset) }
    }

    /// Puts words at a place, as far as it has memory, and returns its address.
    fn put(&self, place: &str, words: &[u64]) -> u64 {
        self.protect(ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
        let (offset, room) = match place {
            "mem" => (0, 8),
            "half" => (CPU_PAGE - 8, 1),
            "hole" => (CPU_PAGE, 0),
            "ro" => (2 * CPU_PAGE, 8),
            _ => panic!("{place}"),
        };
        let addr = self.at(offset);
        for (k, word) in words.iter().take(room).enumerate() {
            let to = addr.cast::<u64>().as_ptr().wrapping_add(k);
            // SAFETY: the words that there is room for are in a page of ours.
            unsafe { to.write(*word) };
        }
        self.protect(ProtFlags::PROT_READ);
        addr.as_ptr() as u64
    }

    fn protect(&self, prot: ProtFlags) {
        // SAFETY: the page is ours, and there is no reference to it.
        unsafe { mprotect(self.at(2 * CPU_PAGE).cast(), CPU_PAGE, prot) }.unwrap();
    }
}

fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).unwrap(),
        None => text.parse().unwrap(),
    }
}

/// Makes the call of a line and returns the answer as it was recorded.
fn answer(log: &DeviceLog, argument: &Pages, other: &Pages, line: &str) -> String {
    let mut words = line.split(' ');
    let name = words.next().unwrap();
    let fields: HashMap<&str, &str> = words.map(|word| word.split_once('=').unwrap()).collect();
    let n = |key| number(fields[key]);
    let (place, words) = match name {
        "feature" => (fields["at"], vec![n("argsz") | (n("flags") | n("n")) << 32]),
        "logstart" => {
            let ranges = fields["r"].split(',').flat_map(|range| {
                let (iova, length) = range.split_once(':').unwrap();
                [number(iova), number(length)]
            });
            let ranges = other.put(fields["from"], &ranges.collect::<Vec<_>>());
            let head = 32
                | u64::from(VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START) << 32;
            (fields["at"], vec![head, n("page"), n("count"), ranges])
        }
        _ => {
            let bitmap = other.put(fields["at"], &[0; 8]);
            let head = 40
                | u64::from(VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT) << 32;
            ("mem", vec![head, n("iova"), n("length"), n("page"), bitmap])
        }
    };
    let arg = argument.put(place, &words);
    // SAFETY: every address is of a page that only this test uses, or of none.
    let done = unsafe { log.ioctl(VFIO_DEVICE_FEATURE, arg) };
    let mut text = done.map_or_else(|e| e.errno().to_string(), |()| "ok".into());
    if name == "feature" {
        text += " 0x0 -"; // data that a STOP does not have
    }
    if name == "logstart" && ["mem", "ro"].contains(&place) {
        // SAFETY: the second word of the argument, which is in a page of ours.
        let page = unsafe { (arg as *const u64).wrapping_add(1).read() };
        text += &format!(" {page:#x}");
    }
    text
}

#[test]
fn recorded_calls() {
    let mut listed: BTreeMap<&str, &str> = DIFFERENCES
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(|line| line.split_once(" => ").unwrap())
        .collect();
    let (argument, other) = (Pages::new(), Pages::new());
    let log = DeviceLog::new(None);
    log.add_range(0, 1 << 30).unwrap();
    let mut lines = 0;
    let mut wrong = Vec::new();
    for line in LINUX.lines() {
        let (call, linux) = line.split_once(" => ").unwrap();
        let ours = answer(&log, &argument, &other, call);
        match listed.remove(call) {
            Some(expected) => assert_eq!(format!("{linux} | {ours}"), expected, "{call}"),
            None if ours == linux => {}
            None => wrong.push(format!("{call} => {linux} | {ours}")),
        }
        lines += 1;
    }
    assert!(wrong.is_empty(), "not listed:\n{}", wrong.join("\n"));
    assert!(listed.is_empty(), "listed, but not met: {listed:?}");
    assert_eq!(lines, 686);
}
