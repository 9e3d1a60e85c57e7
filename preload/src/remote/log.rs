// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the device has written.
//!
//! The device's own log is in the server. A report of it is put into a log here, which also has
//! what the server wrote by messages. The program is answered from this one, so that a bit that
//! was read from the server stays until the program has it, whatever fails in between.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adapter_user::device_log::{DeviceLog, Holes, LogOptions};
use adapter_user::guest::IovaRange;
use adapter_user::vfio_user::{Client, ClientError};
use adapter_user::{Errno, Error, Extent, OnMark, PageSize, TrackError};
use dirty_core::migration::LoggingCall;

use super::{is_gone, said};
use crate::faults::{self, is_lost};
use crate::mappings::{Mapping, Mappings};
use crate::trace::trace;
use crate::user;

/// How many bytes of IOVAs are read at a time.
const PIECE: u64 = 1 << 36;

/// Has a log answer the ioctl that the program makes.
pub(crate) type AnswerLogging<'a> = dyn Fn(&DeviceLog) -> Result<(), Errno> + 'a;

/// The log of a device.
pub(crate) struct Log {
    client: Client,
    /// What the program has not been told.
    unread: DeviceLog,
    mappings: Arc<Mappings>,
    /// Who has started the device's log, if it is on, and the size of its pages.
    started: Mutex<Option<(User, PageSize)>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum User {
    /// The container's tracking.
    Container,
    /// The program, by DMA_LOGGING_START.
    Program,
}

/// A log that is off.
pub(super) fn unread() -> DeviceLog {
    DeviceLog::with_options(LogOptions {
        holes: Holes::Clean,
        ..LogOptions::default()
    })
}

/// Marks in `unread` what the device writes by messages.
pub(super) fn on_mark(unread: DeviceLog) -> OnMark {
    Box::new(move |iova, size| match unread.mark(iova, size) {
        Ok(()) | Err(TrackError::Cause(Error::NotTracking)) => Ok(()),
        Err(TrackError::Cause(cause)) => Err(cause),
        Err(_) => Err(Error::Unmapped),
    })
}

impl Log {
    pub(super) fn new(client: Client, unread: DeviceLog, mappings: Arc<Mappings>) -> Self {
        Log {
            client,
            unread,
            mappings,
            started: Mutex::new(None),
        }
    }

    fn started(&self) -> MutexGuard<'_, Option<(User, PageSize)>> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- for the container

    /// Starts the log for the container's tracking. Fails with EINVAL if the program has
    /// started it, and with the errno of the client.
    pub(crate) fn start(&self) -> Result<(), Errno> {
        let mut started = self.started();
        if started.is_some() {
            return Err(Errno::EINVAL);
        }
        let chosen = self.unread.start_all(4096).map_err(|error| error.errno())?;
        let pgsize = self.client.start_logging(&[], chosen);
        let pgsize = pgsize.map_err(|cause| {
            self.unread.stop();
            said(cause)
        })?;
        *started = Some((User::Container, pgsize));
        Ok(())
    }

    /// Ends what `start` began.
    pub(crate) fn stop(&self) {
        let mut started = self.started();
        if matches!(*started, Some((User::Container, _))) {
            *started = None;
            self.unread.stop();
            if let Err(cause) = self.client.stop_logging() {
                trace!("remote: the log does not stop: {cause}");
            }
        }
    }

    /// Reads the device's log of all mappings that touch the IOVAs from `first` to `last`, if
    /// the container's tracking has started it.
    pub(crate) fn collect(&self, first: u64, last: u64) -> Result<(), Errno> {
        match *self.started() {
            Some((User::Container, pgsize)) => self.collect_all(first, last, pgsize),
            _ => Ok(()),
        }
    }

    /// ORs what was written to the IOVAs into a bitmap of the program, and forgets it, if the
    /// container's tracking has started the log.
    pub(crate) fn tell(&self, report: &Report) -> Result<(), Errno> {
        if !matches!(*self.started(), Some((User::Container, _))) {
            return Ok(());
        }
        let pages = PageSize::new(report.pgsize).map_or(0, |pgsize| pgsize.pages(report.size));
        let mut words = vec![0; pages.div_ceil(64) as usize];
        let mut bytes = user::bytes(report.addr, pages.div_ceil(8) as usize)?;
        let told = self
            .unread
            .report(report.iova, report.size, report.pgsize, &mut words);
        told.map_err(|error| error.errno())?;
        let dirty = words.iter().flat_map(|word| word.to_le_bytes());
        bytes.iter_mut().zip(dirty).for_each(|(a, b)| *a |= b);
        user::write(report.addr, &bytes)
    }

    /// Forgets what was written to a mapping that has gone, if the container's tracking has
    /// started the log.
    pub(crate) fn forget(&self, mapping: &Mapping) {
        if matches!(*self.started(), Some((User::Container, _))) {
            // unreachable error: the mapping is aligned, and the log is on
            let _ = self.unread.clear_range(mapping.iova, mapping.size);
        }
    }

    // ---- for both

    /// The device is about to get a mapping.
    pub(super) fn add(&self, mapping: &Mapping) -> Result<(), Errno> {
        let added = self.unread.add_range(mapping.iova, mapping.size);
        added.map_err(|error| error.errno())
    }

    /// The device has not got a mapping.
    pub(super) fn remove(&self, mapping: &Mapping) {
        // unreachable error: it was added
        let _ = self.unread.remove_range(mapping.iova, mapping.size);
    }

    /// The device does not have a mapping any more: reads the device's log of it.
    pub(super) fn unmapped(&self, mapping: &Mapping) -> Result<(), Errno> {
        let started = self.started();
        let read = started.map_or(Ok(()), |(_, pgsize)| self.read(mapping, pgsize));
        match read {
            Err(cause) if is_gone(cause) || matches!(cause, ClientError::Refused(..)) => {
                // The server does not know any more, as libvfio-user after an unmap.
                self.mark(mapping.iova, mapping.size);
            }
            read => read.map_err(said)?,
        }
        self.remove(mapping);
        Ok(())
    }

    fn collect_all(&self, first: u64, last: u64, pgsize: PageSize) -> Result<(), Errno> {
        for mapping in self.mappings.touched(first, last) {
            self.read(&mapping, pgsize).map_err(said)?;
        }
        Ok(())
    }

    /// Moves what the device's log has of a mapping to `unread`: whole mappings, because
    /// libvfio-user's servers report no others.
    fn read(&self, mapping: &Mapping, pgsize: PageSize) -> Result<(), ClientError> {
        let inside = pgsize.bytes() - 1;
        let (mut first, end) = (mapping.iova & !inside, mapping.last() | inside);
        loop {
            let last = (first | (PIECE - 1)).min(end);
            let npages = pgsize.pages(last - first) + 1;
            let mut words = vec![0; npages.div_ceil(64) as usize];
            let size = (last - first).saturating_add(1);
            let done = self.client.read_log(first, size, pgsize, &mut words);
            // After an error the words still have what was read before it.
            let extent = Extent {
                bit: 0,
                iova: first,
                npages,
                pgsize,
            };
            for (first, last) in extent.ranges(&words).into_iter().flatten() {
                self.mark(first, (last - first).saturating_add(1));
            }
            done?;
            match last.checked_add(1) {
                Some(next) if next <= end => first = next,
                _ => return Ok(()),
            }
        }
    }

    fn mark(&self, iova: u64, size: u64) {
        if is_lost(faults::Report::Device) {
            return trace!("lost iova={iova:#x} size={size:#x}");
        }
        // It fails for what the program does not log, and for pages of the device's log that
        // reach beyond a mapping.
        let _ = self.unread.mark(iova, size);
    }

    // ---- for the program

    /// Answers the features DMA_LOGGING_START, STOP and REPORT.
    ///
    /// Fails as [`DeviceLog::ioctl`], with EINVAL for a START while the container's tracking
    /// uses the log, and with the errno of the client.
    pub(super) fn answer(
        &self,
        call: LoggingCall,
        answer: &AnswerLogging<'_>,
    ) -> Result<(), Errno> {
        let mut started = self.started();
        if matches!(*started, Some((User::Container, _))) {
            return Err(Errno::EINVAL);
        }
        match call {
            LoggingCall::Start { control, .. } => {
                answer(&self.unread)?; // checks the ranges
                let begun = ranges(control.ranges, control.num_ranges).and_then(|ranges| {
                    let pgsize = self.unread.pgsize().ok_or(Errno::EINVAL)?;
                    self.client.start_logging(&ranges, pgsize).map_err(said)
                });
                *started = Some((User::Program, begun.inspect_err(|_| self.unread.stop())?));
                Ok(())
            }
            LoggingCall::Stop => {
                let was_on = started.take().is_some();
                answer(&self.unread)?;
                match was_on {
                    true => self.client.stop_logging().map_err(said),
                    false => Ok(()),
                }
            }
            LoggingCall::Report(report) => {
                if let (Some((_, pgsize)), Some(more)) = (*started, report.length.checked_sub(1)) {
                    let last = report.iova.saturating_add(more);
                    self.collect_all(report.iova, last, pgsize)?;
                }
                answer(&self.unread)
            }
        }
    }
}

/// A bitmap of the program that is to be filled.
pub(crate) struct Report {
    pub(crate) iova: u64,
    pub(crate) size: u64,
    pub(crate) pgsize: u64,
    pub(crate) addr: u64,
}

/// The ranges of a START.
fn ranges(addr: u64, count: u32) -> Result<Vec<IovaRange>, Errno> {
    let bytes = user::bytes(addr, count as usize * 16)?;
    let number = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
    let ranges = bytes.chunks_exact(16).map(|range| IovaRange {
        iova: number(&range[..8]),
        size: number(&range[8..]),
    });
    Ok(ranges.collect())
}
