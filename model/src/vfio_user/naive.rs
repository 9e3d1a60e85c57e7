// SPDX-License-Identifier: MIT OR Apache-2.0
//! The model: sets of pages, and bytes.

use std::collections::BTreeSet;

use adapter_user::Error;

use super::ops::{Access, Backing, CARRY, FILE, IOVAS, MAPS, PAGE};

pub(super) const EPERM: u32 = 1;
pub(super) const ENOENT: u32 = 2;
pub(super) const EACCES: u32 = 13;
pub(super) const EFAULT: u32 = 14;
pub(super) const EEXIST: u32 = 17;
pub(super) const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;

/// Where a page of a mapping is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    File(usize, u64),
    Remote,
}

struct Map {
    iova: u64,
    n: u64,
    read: bool,
    write: bool,
    place: Place,
}

impl Map {
    fn has(&self, page: u64) -> bool {
        (self.iova..self.iova + self.n).contains(&page)
    }
}

/// The device's log while it is on.
pub(super) struct Log {
    pub(super) hint: u64,
    pub(super) ranges: Vec<(u64, u64)>,
    /// The pages that it was started for; `None` is all.
    filter: Option<BTreeSet<u64>>,
    /// The pages that the next report must have.
    must: BTreeSet<u64>,
    /// Pages that it may have.
    may: BTreeSet<u64>,
}

impl Log {
    /// How many pages of 4 KiB a page of the log has.
    fn pages(&self) -> u64 {
        self.hint.max(PAGE) / PAGE
    }

    fn has(&self, page: u64) -> bool {
        self.filter
            .as_ref()
            .is_none_or(|filter| filter.contains(&page))
    }
}

#[derive(Default)]
struct Carry {
    pages: BTreeSet<u64>,
    lost: BTreeSet<u64>,
    exceeded: bool,
}

pub(super) struct Naive {
    maps: Vec<Map>,
    pub(super) files: [Vec<u8>; 2],
    pub(super) remote: Vec<u8>,
    pub(super) master: bool,
    pub(super) refuse: bool,
    pub(super) log: Option<Log>,
    carry: Option<Carry>,
}

impl Naive {
    pub(super) fn new(carries: bool) -> Self {
        Naive {
            maps: Vec::new(),
            files: [0, 1].map(|_| vec![0; (FILE * PAGE) as usize]),
            remote: vec![0; ((IOVAS + 8) * PAGE) as usize],
            master: false,
            refuse: false,
            log: None,
            carry: carries.then(Carry::default),
        }
    }

    fn at(&self, page: u64) -> Option<&Map> {
        self.maps.iter().find(|map| map.has(page))
    }

    /// The first page and the number of pages of the mapping that has a page.
    pub(super) fn bounds(&self, page: u64) -> Option<(u64, u64)> {
        self.at(page).map(|map| (map.iova, map.n))
    }

    pub(super) fn map(
        &mut self,
        (iova, n): (u64, u64),
        flags: u32,
        backing: Backing,
        offset: u64,
        skew: u64,
    ) -> Result<(), u32> {
        let file = backing != Backing::Remote;
        let odd = flags & 4 != 0 && !file || flags == 15 || flags & 3 == 0;
        if odd || n == 0 || skew != 0 {
            return Err(EINVAL);
        }
        if (iova..iova + n).any(|page| self.at(page).is_some()) {
            return Err(EEXIST);
        }
        if self.maps.len() >= MAPS as usize {
            return Err(ENOSPC);
        }
        let write = flags & 2 != 0;
        let place = match backing {
            Backing::Remote => Place::Remote,
            Backing::Pipe => return Err(EINVAL),
            Backing::File(_) | Backing::ReadOnly if offset + n > FILE => return Err(EINVAL),
            Backing::ReadOnly if write => return Err(EACCES),
            Backing::ReadOnly => Place::File(1, offset),
            Backing::File(file) => Place::File(file, offset),
        };
        self.maps.push(Map {
            iova,
            n,
            read: flags & 1 != 0,
            write,
            place,
        });
        Ok(())
    }

    pub(super) fn unmap(&mut self, iova: u64, n: u64) -> Result<(), u32> {
        let exact = |map: &Map| map.iova == iova && map.n == n;
        let at = self.maps.iter().position(exact).ok_or(ENOENT)?;
        let map = self.maps.swap_remove(at);
        if let Some(carry) = self.carry.as_mut().filter(|_| map.write) {
            let gone = take(&mut carry.pages, |page| map.has(page));
            carry.lost.extend(gone);
        }
        Ok(())
    }

    pub(super) fn unmap_all(&mut self) {
        while let Some((iova, n)) = self.maps.last().map(|map| (map.iova, map.n)) {
            let _ = self.unmap(iova, n);
        }
    }

    /// What the device's access comes to.
    pub(super) fn access(
        &mut self,
        access: Access,
        iova: u64,
        data: &[u8],
    ) -> Result<Vec<u8>, Error> {
        if !self.master {
            return Err(Error::Denied);
        }
        self.access_always(access, iova, data)
    }

    fn access_always(&mut self, access: Access, iova: u64, data: &[u8]) -> Result<Vec<u8>, Error> {
        if data.is_empty() {
            return Err(Error::ZeroSize);
        }
        let end = iova + data.len() as u64;
        let pages = iova / PAGE..=(end - 1) / PAGE;
        for page in pages.clone() {
            let map = self.at(page).ok_or(Error::Unmapped)?;
            let allowed = if access == Access::Read {
                map.read
            } else {
                map.write
            };
            if !allowed {
                return Err(Error::Denied);
            }
        }
        let remote = |page| self.at(page).is_some_and(|map| map.place == Place::Remote);
        if access == Access::Pin && pages.clone().any(remote) {
            return Err(Error::Unmapped);
        }
        let mut read = Vec::new();
        let mut failed = None;
        for page in pages {
            let Some((first, _)) = self.bounds(page) else {
                break;
            };
            if failed.is_some_and(|failed| failed != first) {
                break; // the parts after the one that failed are left out
            }
            let place = self.at(page).map_or(Place::Remote, |map| match map.place {
                Place::File(file, at) => Place::File(file, at + (page - map.iova)),
                Place::Remote => Place::Remote,
            });
            let from = iova.max(page * PAGE);
            let to = end.min((page + 1) * PAGE);
            if place == Place::Remote && self.refuse {
                failed = Some(first);
            } else {
                let (bytes, start) = match place {
                    Place::File(file, at) => (&mut self.files[file], at * PAGE),
                    Place::Remote => (&mut self.remote, page * PAGE),
                };
                let at = (start + from % PAGE) as usize;
                let bytes = &mut bytes[at..at + (to - from) as usize];
                match access {
                    Access::Read => read.extend_from_slice(bytes),
                    _ => bytes.copy_from_slice(&data[(from - iova) as usize..(to - iova) as usize]),
                }
            }
            if access != Access::Read {
                self.wrote(page); // a client that refuses may have taken it
            }
        }
        match failed {
            Some(_) => Err(Error::BadAddress),
            None => Ok(read),
        }
    }

    fn wrote(&mut self, page: u64) {
        if let Some(log) = self.log.as_mut().filter(|log| log.has(page)) {
            log.must.insert(page);
        }
        if let Some(carry) = self.carry.as_mut().filter(|carry| !carry.exceeded) {
            carry.pages.insert(page);
        }
    }

    /// After each access: more pages than may be are forgotten as a whole.
    pub(super) fn check_budget(&mut self) {
        if let Some(carry) = &mut self.carry {
            if carry.pages.len() + carry.lost.len() > CARRY as usize {
                *carry = Carry {
                    exceeded: true,
                    ..Carry::default()
                };
            }
        }
    }

    pub(super) fn start(&mut self, hint: u64, ranges: &[(u64, u64)]) -> Result<u64, u32> {
        if let Some(log) = &self.log {
            let same = (log.hint, &log.ranges[..]) == (hint, ranges);
            return if same {
                Ok(hint.max(PAGE))
            } else {
                Err(EINVAL)
            };
        }
        if !hint.is_power_of_two() {
            return Err(EINVAL);
        }
        let mut pages = BTreeSet::new();
        for (iova, n) in ranges {
            if *n == 0 || (iova * PAGE | n * PAGE) % hint != 0 {
                return Err(EINVAL);
            }
            for page in *iova..iova + n {
                if !pages.insert(page) && hint >= PAGE {
                    return Err(EINVAL);
                }
            }
        }
        match &mut self.carry {
            Some(carry) if ranges.is_empty() => *carry = Carry::default(),
            Some(carry) => {
                carry.pages.retain(|page| !pages.contains(page));
                carry.lost.retain(|page| !pages.contains(page));
            }
            None => {}
        }
        self.log = Some(Log {
            hint,
            ranges: ranges.to_vec(),
            filter: (!ranges.is_empty()).then_some(pages),
            must: BTreeSet::new(),
            may: BTreeSet::new(),
        });
        Ok(hint.max(PAGE))
    }

    /// Whether a report can be made. Addresses are in bytes.
    pub(super) fn can_report(&self, iova: u64, len: u64, pgsize: u64) -> Result<(), u32> {
        let log = self.log.as_ref().ok_or(EINVAL)?;
        if iova % pgsize != 0 {
            return Err(EINVAL);
        }
        let mut pages = iova / PAGE..=(iova + len - 1) / PAGE;
        match pages.all(|page| log.has(page)) {
            true => Ok(()),
            false => Err(ENOENT),
        }
    }

    /// Checks a report, and makes clean what it has told.
    pub(super) fn reported(
        &mut self,
        (iova, len): (u64, u64),
        pgsize: u64,
        bit: impl Fn(u64) -> bool,
    ) -> Result<(), String> {
        let log = self.log.as_mut().ok_or("a report of a log that is off")?;
        let (end, of_log) = (iova + len, log.pages());
        let touches = |page: u64, from: u64, to: u64| page * PAGE < to && from < (page + 1) * PAGE;
        let all: BTreeSet<u64> = log
            .must
            .union(&log.may)
            .flat_map(|page| page / of_log * of_log..(page / of_log + 1) * of_log)
            .collect();
        for k in 0..len.div_ceil(pgsize) {
            let (from, to) = (iova + k * pgsize, iova + (k + 1) * pgsize);
            let must = log
                .must
                .iter()
                .any(|page| touches(*page, from, to.min(end)));
            let may = all.iter().any(|page| touches(*page, from, to));
            if must && !bit(k) {
                return Err(format!(
                    "bit {k} of {iova:#x}+{len:#x} is clean, and was written"
                ));
            }
            if bit(k) && !may {
                return Err(format!(
                    "bit {k} of {iova:#x}+{len:#x} is dirty, and was not written"
                ));
            }
        }
        for k in len.div_ceil(pgsize)..len.div_ceil(pgsize).next_multiple_of(64) {
            if bit(k) {
                return Err(format!("bit {k} is beyond the range"));
            }
        }
        let whole = |page: u64| iova <= page * PAGE && (page + 1) * PAGE <= end;
        for page in take(&mut log.must, whole) {
            log.may.insert(page);
        }
        log.may.retain(|page| {
            let first = page / of_log * of_log;
            !(first..first + of_log).all(whole)
        });
        if let Some(carry) = &mut self.carry {
            carry.pages.retain(|page| !whole(*page));
            carry.lost.retain(|page| !whole(*page));
        }
        Ok(())
    }

    /// The pages that the device's state has, and their bytes.
    pub(super) fn save(&mut self) -> Result<Option<Vec<(u64, Vec<u8>)>>, u32> {
        let Some(carry) = &self.carry else {
            return Ok(None);
        };
        if carry.exceeded {
            return Err(ENOSPC);
        }
        if !carry.lost.is_empty() {
            return Err(EFAULT);
        }
        let pages: Vec<u64> = carry.pages.iter().copied().collect();
        let mut saved = Vec::new();
        for page in pages {
            // What may be written can be read here, whatever the device may do.
            let map = self.maps.iter_mut().find(|map| map.has(page));
            let allowed = map.map(|map| std::mem::replace(&mut map.read, true));
            let read = self.access_always(Access::Read, page * PAGE, &[0; PAGE as usize]);
            if let Some(map) = self.maps.iter_mut().find(|map| map.has(page)) {
                map.read = allowed.unwrap_or_default();
            }
            saved.push((page, read.map_err(errno)?));
        }
        Ok(Some(saved))
    }

    /// Writes what another device has saved.
    pub(super) fn load(&mut self, saved: &[(u64, Vec<u8>)]) -> Result<(), u32> {
        for (page, bytes) in saved {
            let written = self.access_always(Access::Write, page * PAGE, bytes);
            self.check_budget();
            written.map_err(errno)?;
        }
        Ok(())
    }
}

fn errno(error: Error) -> u32 {
    match error {
        Error::Denied => EPERM,
        Error::BadAddress => EFAULT,
        _ => EINVAL,
    }
}

/// Takes numbers out of a set.
fn take(pages: &mut BTreeSet<u64>, which: impl Fn(u64) -> bool) -> BTreeSet<u64> {
    let taken: BTreeSet<u64> = pages.iter().copied().filter(|page| which(*page)).collect();
    pages.retain(|page| !taken.contains(page));
    taken
}
