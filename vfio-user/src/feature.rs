// SPDX-License-Identifier: MIT OR Apache-2.0
//! DEVICE_FEATURE: a device's migration and the log of its DMA.

use crate::bytes::Out;
use crate::error::{Error, NoRoom};
use crate::wire::*;

const OPERATIONS: u32 = FEATURE_GET | FEATURE_SET | FEATURE_PROBE;

/// The payload of DEVICE_FEATURE, and of its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature<'a> {
    /// Bytes that the reply's payload may have; in the reply, has.
    pub argsz: u32,
    /// The feature's number, with GET, SET and PROBE.
    pub flags: u32,
    /// The feature's data.
    pub data: &'a [u8],
}

/// What a client asks for with DEVICE_FEATURE. States, addresses and lengths are as the
/// client has them; the device and its log check them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureCall<'a> {
    /// Is this feature there, with these of GET and SET? The reply repeats the request.
    Probe {
        /// The feature's number, which this crate knows.
        feature: u32,
    },
    /// What can the device do?
    GetMigration,
    /// Which state is the device in?
    GetState,
    /// Take the device to another state. The reply repeats the request.
    SetState(MigState),
    /// Start the log. The reply repeats the request, with the log's page size.
    StartLogging {
        /// A hint for the page size.
        page_size: u64,
        /// What to log; everything if it is empty.
        ranges: Ranges<'a>,
    },
    /// Stop the log. The reply repeats the request.
    StopLogging,
    /// Which pages are dirty?
    Report {
        /// The range, and the page size of the answer.
        report: LoggingReport,
        /// Bytes of the bitmap.
        bitmap_bytes: u32,
    },
}

/// What a server answers to DEVICE_FEATURE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureAnswer<'a> {
    /// To [`FeatureCall::GetMigration`]: `VFIO_MIGRATION_*` of `linux/vfio.h`.
    Migration(u64),
    /// To [`FeatureCall::GetState`] and [`FeatureCall::SetState`].
    State(MigState),
    /// To [`FeatureCall::StartLogging`]: the page size of the log.
    Started(u64),
    /// To [`FeatureCall::Report`].
    Report(LoggingReport, &'a [u8]),
    /// To [`FeatureCall::Probe`] and [`FeatureCall::StopLogging`].
    Done,
}

/// The ranges of DMA_LOGGING_START.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ranges<'a>(&'a [u8]);

impl<'a> Ranges<'a> {
    /// Writes ranges into a buffer, 16 bytes each.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if they do not fit.
    pub fn write(ranges: &[LoggingRange], buffer: &'a mut [u8]) -> Result<Ranges<'a>, NoRoom> {
        let mut out = Out::new(buffer);
        for range in ranges {
            out.put(&range.to_bytes());
        }
        Ok(Ranges(out.done()?))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len() / LoggingRange::SIZE
    }

    /// Whether there is none, which means everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One after another.
    pub fn iter(self) -> impl Iterator<Item = LoggingRange> + 'a {
        let mut rest = self.0;
        core::iter::from_fn(move || {
            let (range, tail) = LoggingRange::split(rest)?;
            rest = tail;
            Some(range)
        })
    }
}

impl<'a> Feature<'a> {
    pub(crate) fn read(payload: &'a [u8]) -> Option<Feature<'a>> {
        let (FeatureHead { argsz, flags }, data) = FeatureHead::split(payload)?;
        Some(Feature { argsz, flags, data })
    }

    pub(crate) fn write(&self, out: &mut Out<'_>) {
        let head = FeatureHead {
            argsz: self.argsz,
            flags: self.flags,
        };
        out.put(&head.to_bytes());
        out.put(self.data);
    }

    /// Bytes of the payload.
    fn size(&self) -> u64 {
        (self.data.len() as u64).saturating_add(FeatureHead::SIZE as u64)
    }

    fn needs(&self, bytes: u64) -> Result<(), Error> {
        match u64::from(self.argsz) < bytes {
            true => Err(Error::ShortArgsz),
            false => Ok(()),
        }
    }

    /// What this request asks for. `max` is max_data_xfer_size.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::UnknownFlags`].
    /// - [`Error::UnknownFeature`] for a feature that vfio-user does not have, and for a
    ///   GET or SET that the feature does not have.
    /// - [`Error::FlagCombination`] for GET with SET but without PROBE, and for none of
    ///   the three.
    /// - [`Error::ShortArgsz`] if `argsz` is below the request's payload, for PROBE and
    ///   SET, or below 16, for GET of MIGRATION and MIG_DEVICE_STATE.
    /// - [`Error::ShortPayload`] if the data are smaller than their structure.
    /// - [`Error::CountMismatch`] if the ranges do not fit into the data.
    /// - For a report: [`Error::PageSize`], [`Error::ZeroLength`], [`Error::ShortArgsz`]
    ///   if `argsz` is below the reply, [`Error::BitmapTooLong`].
    pub fn call(&self, max: u32) -> Result<FeatureCall<'a>, Error> {
        if self.flags & !(FEATURE_MASK | OPERATIONS) != 0 {
            return Err(Error::UnknownFlags);
        }
        let feature = self.flags & FEATURE_MASK;
        let known = match feature {
            MIGRATION | DMA_LOGGING_REPORT => FEATURE_GET,
            MIG_DEVICE_STATE => FEATURE_GET | FEATURE_SET,
            DMA_LOGGING_START | DMA_LOGGING_STOP => FEATURE_SET,
            _ => return Err(Error::UnknownFeature),
        };
        if self.flags & (FEATURE_GET | FEATURE_SET) & !known != 0 {
            return Err(Error::UnknownFeature);
        }
        let is_set = match self.flags & OPERATIONS {
            probe if probe & FEATURE_PROBE != 0 => {
                self.needs(self.size())?;
                return Ok(FeatureCall::Probe { feature });
            }
            FEATURE_GET => false,
            FEATURE_SET => {
                self.needs(self.size())?;
                true
            }
            _ => return Err(Error::FlagCombination),
        };
        match feature {
            MIGRATION => self.needs(16).map(|()| FeatureCall::GetMigration),
            MIG_DEVICE_STATE if is_set => {
                let (state, _) = MigState::split(self.data).ok_or(Error::ShortPayload)?;
                Ok(FeatureCall::SetState(state))
            }
            MIG_DEVICE_STATE => self.needs(16).map(|()| FeatureCall::GetState),
            DMA_LOGGING_START => {
                let (control, rest) =
                    LoggingControl::split(self.data).ok_or(Error::ShortPayload)?;
                let ranges = usize::try_from(control.num_ranges)
                    .ok()
                    .and_then(|n| rest.get(..n.checked_mul(LoggingRange::SIZE)?));
                Ok(FeatureCall::StartLogging {
                    page_size: control.page_size,
                    ranges: Ranges(ranges.ok_or(Error::CountMismatch)?),
                })
            }
            DMA_LOGGING_STOP => Ok(FeatureCall::StopLogging),
            _ => self.report(max),
        }
    }

    fn report(&self, max: u32) -> Result<FeatureCall<'a>, Error> {
        let (report, _) = LoggingReport::split(self.data).ok_or(Error::ShortPayload)?;
        let bytes = bitmap_bytes(report.length, report.page_size).ok_or(Error::PageSize)?;
        if bytes == 0 {
            return Err(Error::ZeroLength);
        }
        self.needs(bytes.saturating_add(32))?;
        match u32::try_from(bytes) {
            Ok(bitmap_bytes) if bitmap_bytes <= max => Ok(FeatureCall::Report {
                report,
                bitmap_bytes,
            }),
            _ => Err(Error::BitmapTooLong),
        }
    }

    /// What this reply says. `request` is what it answers.
    ///
    /// # Errors
    ///
    /// [`Error::WrongReply`] if the flags are not the request's, or the data are not
    /// those of an answer to it. A bitmap must have the size that the range needs.
    pub fn answer(&self, request: &Feature<'_>) -> Result<FeatureAnswer<'a>, Error> {
        let wrong = Error::WrongReply;
        if self.flags != request.flags {
            return Err(wrong);
        }
        if self.flags & FEATURE_PROBE != 0 {
            return Ok(FeatureAnswer::Done);
        }
        match self.flags & FEATURE_MASK {
            MIGRATION => {
                let (flags, _) = self.data.split_first_chunk().ok_or(wrong)?;
                Ok(FeatureAnswer::Migration(u64::from_ne_bytes(*flags)))
            }
            MIG_DEVICE_STATE => {
                let (state, _) = MigState::split(self.data).ok_or(wrong)?;
                Ok(FeatureAnswer::State(state))
            }
            DMA_LOGGING_START => {
                let (control, _) = LoggingControl::split(self.data).ok_or(wrong)?;
                match control.page_size.is_power_of_two() {
                    true => Ok(FeatureAnswer::Started(control.page_size)),
                    false => Err(wrong),
                }
            }
            DMA_LOGGING_STOP => Ok(FeatureAnswer::Done),
            DMA_LOGGING_REPORT => {
                let (report, bitmap) = LoggingReport::split(self.data).ok_or(wrong)?;
                let asked = LoggingReport::split(request.data).map(|(asked, _)| asked);
                let bytes = bitmap_bytes(report.length, report.page_size);
                match asked == Some(report) && bytes == Some(bitmap.len() as u64) {
                    true => Ok(FeatureAnswer::Report(report, bitmap)),
                    false => Err(wrong),
                }
            }
            _ => Err(wrong),
        }
    }

    /// The reply to this request. Its data are put together in `buffer`, which needs
    /// room for them.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if the data do not fit, or the answer is none to this request.
    pub fn reply<'b>(
        &self,
        answer: FeatureAnswer<'_>,
        buffer: &'b mut [u8],
    ) -> Result<Feature<'b>, NoRoom> {
        let mut out = Out::new(buffer);
        match answer {
            FeatureAnswer::Migration(flags) => out.put(&flags.to_ne_bytes()),
            FeatureAnswer::State(state) => out.put(&state.to_bytes()),
            FeatureAnswer::Started(page_size) => {
                let (mut control, ranges) = LoggingControl::split(self.data).ok_or(NoRoom)?;
                control.page_size = page_size;
                out.put(&control.to_bytes());
                out.put(ranges);
            }
            FeatureAnswer::Report(report, bitmap) => {
                out.put(&report.to_bytes());
                out.put(bitmap);
            }
            FeatureAnswer::Done => out.put(self.data),
        }
        let mut reply = Feature {
            argsz: self.argsz,
            flags: self.flags,
            data: out.done()?,
        };
        // A probe and a SET repeat the request; GET says how much there is.
        if self.flags & OPERATIONS == FEATURE_GET {
            reply.argsz = u32::try_from(reply.size()).map_err(|_| NoRoom)?;
        }
        Ok(reply)
    }
}

impl FeatureCall<'_> {
    /// The request that asks for this. Its data are put together in `buffer`, which
    /// needs room for them. A probe asks for the feature alone, without GET and SET.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if the data do not fit.
    pub fn request<'b>(&self, buffer: &'b mut [u8]) -> Result<Feature<'b>, NoRoom> {
        let mut out = Out::new(buffer);
        let mut reply_data = 0u32;
        let flags = match self {
            FeatureCall::Probe { feature } => FEATURE_PROBE | *feature,
            FeatureCall::GetMigration => {
                reply_data = 8;
                FEATURE_GET | MIGRATION
            }
            FeatureCall::GetState => {
                reply_data = 8;
                FEATURE_GET | MIG_DEVICE_STATE
            }
            FeatureCall::SetState(state) => {
                out.put(&state.to_bytes());
                FEATURE_SET | MIG_DEVICE_STATE
            }
            FeatureCall::StartLogging { page_size, ranges } => {
                let control = LoggingControl {
                    page_size: *page_size,
                    num_ranges: u32::try_from(ranges.len()).map_err(|_| NoRoom)?,
                    reserved: 0,
                };
                out.put(&control.to_bytes());
                out.put(ranges.0);
                FEATURE_SET | DMA_LOGGING_START
            }
            FeatureCall::StopLogging => FEATURE_SET | DMA_LOGGING_STOP,
            FeatureCall::Report {
                report,
                bitmap_bytes,
            } => {
                out.put(&report.to_bytes());
                reply_data = *bitmap_bytes;
                FEATURE_GET | DMA_LOGGING_REPORT
            }
        };
        let mut request = Feature {
            argsz: 0,
            flags,
            data: out.done()?,
        };
        let argsz = request.size().saturating_add(reply_data.into());
        request.argsz = u32::try_from(argsz).map_err(|_| NoRoom)?;
        Ok(request)
    }
}
