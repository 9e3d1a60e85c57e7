// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the device has written.
//!
//! The device's own log is in the server. What a report of it says is marked here, where it
//! stays until the program has it, whatever fails in between: in the container, if its tracking
//! has started the device's log, or in a log that stands for the device's if the program has.
//! What the server writes by messages is marked in both when it is written.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adapter_user::device_log::{DeviceLog, Holes, LogOptions};
use adapter_user::vfio_user::{Client, ClientError};
use adapter_user::{Container, Errno, Error, Extent, OnMark, PageSize, TrackError};
use dirty_core::migration::LoggingCall;

use super::{is_gone, said};
use crate::faults::{is_lost, Report};
use crate::mappings::{Mapping, Mappings};
use crate::trace::trace;

/// How many bytes of IOVAs are read at a time.
const PIECE: u64 = 1 << 36;

/// Has a log answer the ioctl that the program makes.
pub(crate) type AnswerLogging<'a> = dyn Fn(&DeviceLog) -> Result<(), Errno> + 'a;

/// The log of a device.
pub(crate) struct Log {
    client: Client,
    container: Container,
    /// For a program that has started the log.
    unread: DeviceLog,
    mappings: Arc<Mappings>,
    /// Set while the device's log is on.
    started: Mutex<Option<Started>>,
}

/// Who has started a device's log, and the size of its pages.
type Started = (User, PageSize);

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
    pub(super) fn new(
        client: Client,
        container: Container,
        unread: DeviceLog,
        mappings: Arc<Mappings>,
    ) -> Self {
        Log {
            client,
            container,
            unread,
            mappings,
            started: Mutex::new(None),
        }
    }

    fn started(&self) -> MutexGuard<'_, Option<Started>> {
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
        *started = Some((User::Container, self.begin(PageSize::new(4096))?));
        Ok(())
    }

    /// Ends what `start` began.
    pub(crate) fn stop(&self) {
        let mut started = self.started();
        if matches!(*started, Some((User::Container, _))) {
            *started = None;
            if let Err(cause) = self.client.stop_logging() {
                trace!("remote: the log does not stop: {cause}");
            }
        }
    }

    /// Reads the device's log of all mappings that touch the IOVAs from `first` to `last`, if
    /// the container's tracking has started it.
    pub(crate) fn collect(&self, first: u64, last: u64) -> Result<(), Errno> {
        match *self.started() {
            Some(on @ (User::Container, _)) => self.collect_all(first, last, on),
            _ => Ok(()),
        }
    }

    // ---- for both

    /// Starts the device's log for everything. Returns the size of its pages.
    fn begin(&self, wish: Option<PageSize>) -> Result<PageSize, Errno> {
        let wish = wish.ok_or(Errno::EINVAL)?; // unreachable: there is one
        self.client.start_logging(&[], wish).map_err(said)
    }

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
        if let Some(on) = *self.started() {
            self.read_or_all(mapping, on).map_err(said)?;
        }
        self.remove(mapping);
        Ok(())
    }

    /// The device closes, and has no mapping any more: what it wrote counts for the container's
    /// tracking as before.
    pub(super) fn close(&self) {
        if let Some(on @ (User::Container, _)) = self.started().take() {
            for mapping in self.mappings.touched(0, u64::MAX) {
                if self.read_or_all(&mapping, on).is_err() {
                    self.mark(on.0, mapping.iova, mapping.size);
                }
            }
        }
    }

    fn collect_all(&self, first: u64, last: u64, on: Started) -> Result<(), Errno> {
        for mapping in self.mappings.touched(first, last) {
            self.read(&mapping, on).map_err(said)?;
        }
        Ok(())
    }

    /// As `read`. If the server does not know any more, as libvfio-user's after an unmap, or has
    /// gone, the whole mapping is dirty.
    fn read_or_all(&self, mapping: &Mapping, on: Started) -> Result<(), ClientError> {
        match self.read(mapping, on) {
            Err(cause) if is_gone(cause) || matches!(cause, ClientError::Refused(..)) => {
                self.mark(on.0, mapping.iova, mapping.size);
                Ok(())
            }
            read => read,
        }
    }

    /// Reads the device's log of a mapping, and marks what it has: of the whole mapping, because
    /// libvfio-user's servers report no part of one.
    fn read(&self, mapping: &Mapping, on: Started) -> Result<(), ClientError> {
        let (user, pgsize) = on;
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
                self.mark(user, first, (last - first).saturating_add(1));
            }
            done?;
            match last.checked_add(1) {
                Some(next) if next <= end => first = next,
                _ => return Ok(()),
            }
        }
    }

    fn mark(&self, user: User, iova: u64, size: u64) {
        if is_lost(Report::Device) {
            return trace!("lost iova={iova:#x} size={size:#x}");
        }
        // Both mark what they can. The rest is what the program does not log, or is in no
        // mapping, since the pages of the device's log may be larger than a mapping's.
        match user {
            User::Container => drop(self.container.mark(iova, size)),
            User::Program => drop(self.unread.mark(iova, size)),
        }
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
            LoggingCall::Start { .. } => {
                answer(&self.unread)?; // it keeps the ranges; the device logs everything
                let begun = self.begin(self.unread.pgsize());
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
                if let (Some(on), Some(more)) = (*started, report.length.checked_sub(1)) {
                    let last = report.iova.saturating_add(more);
                    self.collect_all(report.iova, last, on)?;
                }
                answer(&self.unread)
            }
        }
    }
}
