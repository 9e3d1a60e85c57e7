// SPDX-License-Identifier: MIT OR Apache-2.0
//! Replies: typed to bytes, and bytes to typed.

use crate::bytes::Out;
use crate::error::{Error, NoRoom};
use crate::feature::Feature;
use crate::header::{message, Command, Header, Kind};
use crate::request::{mig_data, Request};
use crate::version::Version;
use crate::wire::*;

/// A reply whose payload was read, or that is to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    /// The command failed with this error number. There is no payload.
    Failure(Command, u32),
    /// To VERSION.
    Version(Version),
    /// To DMA_MAP.
    DmaMap,
    /// To DMA_UNMAP: the request's structure, and the dirty bitmap that was asked for.
    DmaUnmap(DmaUnmap, Option<(BitmapHead, &'a [u8])>),
    /// To DEVICE_GET_INFO.
    GetInfo(DeviceInfo),
    /// To DEVICE_GET_REGION_INFO, with the region's capabilities.
    GetRegionInfo(RegionInfo, &'a [u8]),
    /// To DEVICE_GET_REGION_IO_FDS.
    GetRegionIoFds(RegionIoFds, SubRegions<'a>),
    /// To DEVICE_GET_IRQ_INFO.
    GetIrqInfo(IrqInfo),
    /// To DEVICE_SET_IRQS.
    SetIrqs,
    /// To REGION_READ.
    RegionRead {
        /// The offset in the region, in bytes.
        offset: u64,
        /// The region's number.
        region: u32,
        /// What was read.
        data: &'a [u8],
    },
    /// To REGION_WRITE: what was written.
    RegionWrite(RegionAccess),
    /// To DMA_READ.
    DmaRead {
        /// The first IOVA.
        iova: u64,
        /// What was read.
        data: &'a [u8],
    },
    /// To DMA_WRITE: what was written. QEMU says nothing.
    DmaWrite(Option<DmaAccess>),
    /// To DEVICE_RESET.
    Reset,
    /// To REGION_WRITE_MULTI: how many writes were done.
    RegionWriteMulti(u64),
    /// To DEVICE_FEATURE. [`Feature::answer`] says what it is.
    Feature(Feature<'a>),
    /// To MIG_DATA_READ: the next bytes of the device's state. Fewer than asked for are
    /// the last ones.
    MigDataRead(&'a [u8]),
    /// To MIG_DATA_WRITE.
    MigDataWrite,
}

/// The sub-regions in a reply to DEVICE_GET_REGION_IO_FDS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SubRegions<'a> {
    bytes: &'a [u8],
    /// Bytes of each: 40, or more in the reply of a server that adds fields.
    stride: usize,
}

/// Bytes of libvfio-user's sub-region, which has a second descriptor and its offset
/// before an ioeventfd's value.
const SHADOW: usize = 48;

impl<'a> SubRegions<'a> {
    /// Puts sub-regions together in a buffer, 40 bytes each.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if they do not fit.
    pub fn write(regions: &[SubRegion], buffer: &'a mut [u8]) -> Result<SubRegions<'a>, NoRoom> {
        let mut out = Out::new(buffer);
        for region in regions {
            out.put(&region.to_bytes());
        }
        let bytes = out.done()?;
        let stride = if regions.is_empty() {
            0
        } else {
            SubRegion::SIZE
        };
        Ok(SubRegions { bytes, stride })
    }

    /// One after another. None comes if the request's `argsz` was too small for all.
    pub fn iter(self) -> impl Iterator<Item = SubRegion> + 'a {
        // A stride of 0 comes with no bytes.
        self.bytes
            .chunks_exact(self.stride.max(1))
            .map_while(move |bytes| {
                let (mut region, rest) = SubRegion::split(bytes)?;
                if let (SHADOW, 0 | 2, Some(value)) = (self.stride, region.kind, rest.first_chunk())
                {
                    region.value = u64::from_ne_bytes(*value);
                }
                Some(region)
            })
    }

    fn read(count: u32, bytes: &'a [u8]) -> Option<SubRegions<'a>> {
        if count == 0 || bytes.is_empty() {
            return Some(SubRegions::default());
        }
        let stride = bytes.len().checked_div(count as usize)?;
        let fits = stride >= SubRegion::SIZE && bytes.len().checked_rem(count as usize) == Some(0);
        fits.then_some(SubRegions { bytes, stride })
    }
}

impl<'a> Reply<'a> {
    /// The command that this is a reply to.
    #[must_use]
    pub const fn command(&self) -> Command {
        match self {
            Reply::Failure(command, _) => *command,
            Reply::Version(_) => Command::Version,
            Reply::DmaMap => Command::DmaMap,
            Reply::DmaUnmap(..) => Command::DmaUnmap,
            Reply::GetInfo(_) => Command::GetInfo,
            Reply::GetRegionInfo(..) => Command::GetRegionInfo,
            Reply::GetRegionIoFds(..) => Command::GetRegionIoFds,
            Reply::GetIrqInfo(_) => Command::GetIrqInfo,
            Reply::SetIrqs => Command::SetIrqs,
            Reply::RegionRead { .. } => Command::RegionRead,
            Reply::RegionWrite(_) => Command::RegionWrite,
            Reply::DmaRead { .. } => Command::DmaRead,
            Reply::DmaWrite(_) => Command::DmaWrite,
            Reply::Reset => Command::Reset,
            Reply::RegionWriteMulti(_) => Command::RegionWriteMulti,
            Reply::Feature(_) => Command::Feature,
            Reply::MigDataRead(_) => Command::MigDataRead,
            Reply::MigDataWrite => Command::MigDataWrite,
        }
    }

    /// The reply to DEVICE_GET_REGION_INFO whose capabilities are `capabilities`, or
    /// none if it is empty. They are left out if they do not fit into the `argsz` of the
    /// request. `argsz` then tells the client to ask again with more room.
    #[must_use]
    pub fn region_info(request: &RegionInfo, mut info: RegionInfo, capabilities: &'a [u8]) -> Self {
        let size = capabilities.len().saturating_add(RegionInfo::SIZE);
        info.argsz = u32::try_from(size).unwrap_or(u32::MAX);
        let fits = !capabilities.is_empty() && info.argsz <= request.argsz;
        (info.flags, info.cap_offset) = match fits {
            true => (info.flags | REGION_CAPS, RegionInfo::SIZE as u32),
            false => (info.flags & !REGION_CAPS, 0),
        };
        Reply::GetRegionInfo(info, if fits { capabilities } else { &[] })
    }

    /// Reads a reply.
    ///
    /// # Errors
    ///
    /// - [`Error::UnexpectedMessage`] if it is no reply, or the command is unknown.
    /// - [`Error::BadReply`] if the payload does not have the command's form.
    pub fn read(header: &Header, payload: &'a [u8]) -> Result<Reply<'a>, Error> {
        let command = Command::from_number(header.command).filter(|_| header.is_reply());
        let command = command.ok_or(Error::UnexpectedMessage)?;
        match header.failure() {
            Some(errno) => Ok(Reply::Failure(command, errno)),
            None => Reply::payload(command, payload).ok_or(Error::BadReply),
        }
    }

    fn payload(command: Command, payload: &'a [u8]) -> Option<Reply<'a>> {
        Some(match command {
            Command::Version => Reply::Version(Version::read(payload).ok()?),
            Command::DmaMap => Reply::DmaMap,
            Command::DmaUnmap => {
                let (unmap, rest) = DmaUnmap::split(payload)?;
                let mut bitmap = None;
                if unmap.flags & UNMAP_GET_DIRTY_BITMAP != 0 {
                    let (head, bits) = BitmapHead::split(rest)?;
                    bitmap = Some((head, bits.get(..usize::try_from(head.size).ok()?)?));
                }
                Reply::DmaUnmap(unmap, bitmap)
            }
            Command::GetInfo => Reply::GetInfo(DeviceInfo::split(payload)?.0),
            Command::GetRegionInfo => {
                let (info, rest) = RegionInfo::split(payload)?;
                Reply::GetRegionInfo(
                    info,
                    if info.flags & REGION_CAPS == 0 {
                        &[]
                    } else {
                        rest
                    },
                )
            }
            Command::GetRegionIoFds => {
                let (io, rest) = RegionIoFds::split(payload)?;
                Reply::GetRegionIoFds(io, SubRegions::read(io.count, rest)?)
            }
            Command::GetIrqInfo => Reply::GetIrqInfo(IrqInfo::split(payload)?.0),
            Command::SetIrqs => Reply::SetIrqs,
            Command::RegionRead => {
                let (at, data) = RegionAccess::split(payload)?;
                Reply::RegionRead {
                    offset: at.offset,
                    region: at.region,
                    data: data.get(..at.count as usize)?,
                }
            }
            Command::RegionWrite => Reply::RegionWrite(RegionAccess::split(payload)?.0),
            Command::DmaRead => {
                let (at, data) = DmaAccess::split(payload)?;
                Reply::DmaRead {
                    iova: at.iova,
                    data: data.get(..usize::try_from(at.count).ok()?)?,
                }
            }
            Command::DmaWrite => Reply::DmaWrite(dma_write(payload)?),
            Command::Reset => Reply::Reset,
            Command::RegionWriteMulti => {
                Reply::RegionWriteMulti(u64::from_ne_bytes(*payload.first_chunk()?))
            }
            Command::Feature => Reply::Feature(Feature::read(payload)?),
            Command::MigDataRead => {
                let (mig, data) = MigData::split(payload)?;
                Reply::MigDataRead(data.get(..mig.size as usize)?)
            }
            Command::MigDataWrite => Reply::MigDataWrite,
        })
    }

    /// Whether this reply belongs to `request`: the same command, the same place, as
    /// many bytes. A failure belongs to each request of its command.
    ///
    /// # Errors
    ///
    /// [`Error::WrongReply`] if it does not.
    pub fn check(&self, request: &Request<'_>) -> Result<(), Error> {
        let fits = match (self, request) {
            (Reply::Failure(command, _), _) => *command == request.command(),
            (Reply::DmaUnmap(done, bitmap), Request::DmaUnmap(asked, wanted)) => {
                (done.flags, done.iova, done.size) == (asked.flags, asked.iova, asked.size)
                    && bitmap.map(|(head, _)| head) == *wanted
            }
            (Reply::GetRegionInfo(info, _), Request::GetRegionInfo(asked)) => {
                info.index == asked.index
            }
            (Reply::GetRegionIoFds(io, _), Request::GetRegionIoFds(asked)) => {
                io.index == asked.index
            }
            (Reply::GetIrqInfo(info), Request::GetIrqInfo(asked)) => info.index == asked.index,
            (
                Reply::RegionRead {
                    offset,
                    region,
                    data,
                },
                Request::RegionRead(at),
            ) => (*offset, *region) == (at.offset, at.region) && data.len() == at.count as usize,
            (Reply::RegionWrite(at), Request::RegionWrite(write)) => {
                (at.offset, at.region) == (write.offset, write.region)
                    && at.count as usize == write.data.len()
            }
            (Reply::DmaRead { iova, data }, Request::DmaRead(at)) => {
                *iova == at.iova && data.len() as u64 == at.count
            }
            (Reply::DmaWrite(Some(at)), Request::DmaWrite { iova, data }) => {
                at.iova == *iova && at.count == data.len() as u64
            }
            (Reply::RegionWriteMulti(done), Request::RegionWriteMulti(writes)) => {
                *done == writes.len() as u64
            }
            (Reply::Feature(reply), Request::Feature(asked)) => reply.answer(asked).is_ok(),
            (Reply::MigDataRead(data), Request::MigDataRead { size }) => {
                data.len() <= *size as usize
            }
            _ => self.command() == request.command(),
        };
        match fits {
            true => Ok(()),
            false => Err(Error::WrongReply),
        }
    }

    /// Writes the whole message into `out` and returns its length. `id` is the request's
    /// number.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if it does not fit.
    pub fn write(&self, id: u16, out: &mut [u8]) -> Result<usize, NoRoom> {
        let kind = match self {
            Reply::Failure(_, errno) => Kind::Failure(*errno),
            _ => Kind::Reply,
        };
        message(id, self.command(), kind, out, |out| self.fill(out))
    }

    fn fill(&self, out: &mut Out<'_>) -> Result<(), NoRoom> {
        match self {
            Reply::Failure(..)
            | Reply::DmaMap
            | Reply::SetIrqs
            | Reply::Reset
            | Reply::MigDataWrite
            | Reply::DmaWrite(None) => {}
            Reply::Version(version) => version.write(out),
            Reply::DmaUnmap(unmap, bitmap) => {
                out.put(&unmap.to_bytes());
                if let Some((head, bits)) = bitmap {
                    out.put(&head.to_bytes());
                    out.put(bits);
                }
            }
            Reply::GetInfo(info) => out.put(&info.to_bytes()),
            Reply::GetRegionInfo(info, capabilities) => {
                out.put(&info.to_bytes());
                out.put(capabilities);
            }
            Reply::GetRegionIoFds(io, regions) => {
                out.put(&io.to_bytes());
                out.put(regions.bytes);
            }
            Reply::GetIrqInfo(info) => out.put(&info.to_bytes()),
            Reply::RegionRead {
                offset,
                region,
                data,
            } => {
                let (offset, region) = (*offset, *region);
                let count = u32::try_from(data.len()).map_err(|_| NoRoom)?;
                let head = RegionAccess {
                    offset,
                    region,
                    count,
                };
                out.put(&head.to_bytes());
                out.put(data);
            }
            Reply::RegionWrite(at) => out.put(&at.to_bytes()),
            Reply::DmaRead { iova, data } => {
                let (iova, count) = (*iova, data.len() as u64);
                out.put(&DmaAccess { iova, count }.to_bytes());
                out.put(data);
            }
            Reply::DmaWrite(Some(at)) => out.put(&at.to_bytes()),
            Reply::RegionWriteMulti(done) => out.put(&done.to_ne_bytes()),
            Reply::Feature(feature) => feature.write(out),
            Reply::MigDataRead(data) => {
                out.put(&mig_data(data.len())?.to_bytes());
                out.put(data);
            }
        }
        Ok(())
    }
}

/// The three forms of a reply to DMA_WRITE: nothing (QEMU), a count of 4 bytes (the
/// specification), a count of 8 bytes (libvfio-user).
fn dma_write(payload: &[u8]) -> Option<Option<DmaAccess>> {
    if payload.is_empty() {
        return Some(None);
    }
    if let Some((at, _)) = DmaAccess::split(payload) {
        return Some(Some(at));
    }
    let (iova, rest) = payload.split_first_chunk()?;
    Some(Some(DmaAccess {
        iova: u64::from_ne_bytes(*iova),
        count: u32::from_ne_bytes(*rest.first_chunk()?).into(),
    }))
}
