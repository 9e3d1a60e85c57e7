// SPDX-License-Identifier: MIT OR Apache-2.0
//! The file behind memory of the program.
//!
//! A device in another process can map the same file. /proc/self/maps names it by device and
//! inode, and a descriptor of the program, or /proc/self/map_files, opens it.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use nix::sys::stat::{major, minor};

/// A file, and where in it the memory begins.
pub(crate) struct Backing {
    pub(crate) file: File,
    pub(crate) offset: u64,
}

/// A line of /proc/self/maps.
struct Area<'a> {
    /// Its addresses as the name of the file in /proc/self/map_files.
    name: &'a str,
    start: u64,
    end: u64,
    is_shared: bool,
    offset: u64,
    device: (u64, u64),
    inode: u64,
}

/// Finds the file behind the `size` bytes at `addr`, and opens it to read, and to write if
/// `writes`. There is none unless all of them are one piece of a file that is mapped shared.
pub(crate) fn find(addr: u64, size: u64, writes: bool) -> Option<Backing> {
    let end = addr.checked_add(size)?;
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let mut areas = maps.lines().filter_map(area).filter(|area| area.end > addr);
    let first = areas.next()?;
    if first.start > addr || !first.is_shared || first.inode == 0 {
        return None;
    }
    // mprotect and madvise split an area in two.
    let mut known = first.end;
    while known < end {
        let next = areas.next()?;
        let follows = next.start == known && next.offset == first.offset + (known - first.start);
        if !follows || !next.is_shared || (next.device, next.inode) != (first.device, first.inode) {
            return None;
        }
        known = next.end;
    }
    Some(Backing {
        file: open(&first, writes)?,
        offset: first.offset + (addr - first.start),
    })
}

/// Reads a line such as `7f10-7f20 rw-s 00001000 00:01 1033 /memfd:ram`.
fn area(line: &str) -> Option<Area<'_>> {
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let mut words = line.split_whitespace();
    let name = words.next()?;
    let (start, end) = name.split_once('-')?;
    let is_shared = words.next()?.ends_with('s');
    let offset = hex(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    Some(Area {
        name,
        start: hex(start)?,
        end: hex(end)?,
        is_shared,
        offset,
        device: (hex(major)?, hex(minor)?),
        inode: words.next()?.parse().ok()?,
    })
}

/// Opens the file of an area.
fn open(area: &Area<'_>, writes: bool) -> Option<File> {
    let descriptors = fs::read_dir("/proc/self/fd").ok()?;
    let descriptors = descriptors.flatten().map(|entry| entry.path());
    let own = format!("/proc/self/map_files/{}", area.name);
    let mut paths = descriptors.chain([own.into()]);
    paths.find_map(|path| {
        if !is_file_of(&fs::metadata(&path).ok()?, area) {
            return None;
        }
        let file = File::options().read(true).write(writes).open(&path).ok()?;
        // The descriptor may have become another file's in between.
        is_file_of(&file.metadata().ok()?, area).then_some(file)
    })
}

fn is_file_of(found: &fs::Metadata, area: &Area<'_>) -> bool {
    let device = (major(found.dev()), minor(found.dev()));
    found.is_file() && device == area.device && found.ino() == area.inode
}
