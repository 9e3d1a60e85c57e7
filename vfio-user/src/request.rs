// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands: the bytes of a payload become a typed request, and back.

use crate::bytes::Out;
use crate::error::{Error, NoRoom};
use crate::feature::Feature;
use crate::header::{message, Command, Kind};
use crate::version::Version;
use crate::wire::*;

/// A command whose payload was read. Data are borrowed from the payload. Addresses,
/// offsets, indices and lengths of mappings are as the sender has them; whoever maps or
/// accesses checks them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// VERSION.
    Version(Version),
    /// DMA_MAP.
    DmaMap(DmaMap),
    /// DMA_UNMAP, with what the dirty bitmap shall be like if one is asked for.
    DmaUnmap(DmaUnmap, Option<BitmapHead>),
    /// DEVICE_GET_INFO.
    GetInfo(DeviceInfo),
    /// DEVICE_GET_REGION_INFO.
    GetRegionInfo(RegionInfo),
    /// DEVICE_GET_REGION_IO_FDS.
    GetRegionIoFds(RegionIoFds),
    /// DEVICE_GET_IRQ_INFO.
    GetIrqInfo(IrqInfo),
    /// DEVICE_SET_IRQS, with a byte for each interrupt if the flags say so.
    SetIrqs(IrqSet, &'a [u8]),
    /// REGION_READ.
    RegionRead(RegionAccess),
    /// REGION_WRITE.
    RegionWrite(RegionWrite<'a>),
    /// DMA_READ, from the server.
    DmaRead(DmaAccess),
    /// DMA_WRITE, from the server.
    DmaWrite {
        /// The first IOVA.
        iova: u64,
        /// What is written.
        data: &'a [u8],
    },
    /// DEVICE_RESET.
    Reset,
    /// REGION_WRITE_MULTI.
    RegionWriteMulti(Writes<'a>),
    /// DEVICE_FEATURE. [`Feature::call`] says what is asked for.
    Feature(Feature<'a>),
    /// MIG_DATA_READ: the next so many bytes of the device's state.
    MigDataRead {
        /// How many bytes.
        size: u32,
    },
    /// MIG_DATA_WRITE: the next bytes of the device's state.
    MigDataWrite(&'a [u8]),
}

/// A write to a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionWrite<'a> {
    /// The offset in the region, in bytes.
    pub offset: u64,
    /// The region's number.
    pub region: u32,
    /// What is written.
    pub data: &'a [u8],
}

/// The writes of REGION_WRITE_MULTI, of 8 bytes or fewer each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writes<'a>(&'a [u8]);

/// Bytes of a write of REGION_WRITE_MULTI: a [`RegionAccess`] and 8 bytes.
const WRITE: usize = RegionAccess::SIZE + 8;

impl<'a> Writes<'a> {
    /// Puts writes together in a buffer, 24 bytes each.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if they do not fit, or one is longer than 8 bytes.
    pub fn write(writes: &[RegionWrite<'_>], buffer: &'a mut [u8]) -> Result<Writes<'a>, NoRoom> {
        let mut out = Out::new(buffer);
        for write in writes {
            let mut data = [0; 8];
            let place = data.get_mut(..write.data.len()).ok_or(NoRoom)?;
            place.copy_from_slice(write.data);
            out.put(&write.head()?.to_bytes());
            out.put(&data);
        }
        Ok(Writes(out.done()?))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len() / WRITE
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One after another.
    pub fn iter(self) -> impl Iterator<Item = RegionWrite<'a>> + 'a {
        let mut rest = self.0;
        core::iter::from_fn(move || {
            let (head, tail) = RegionAccess::split(rest)?;
            let (data, tail) = tail.split_at_checked(8)?;
            rest = tail;
            Some(RegionWrite {
                offset: head.offset,
                region: head.region,
                data: data.get(..head.count as usize)?,
            })
        })
    }

    fn read(payload: &'a [u8]) -> Result<Writes<'a>, Error> {
        let (count, rest) = payload.split_first_chunk().ok_or(Error::ShortPayload)?;
        let bytes = usize::try_from(u64::from_ne_bytes(*count))
            .ok()
            .and_then(|n| rest.get(..n.checked_mul(WRITE)?));
        let writes = Writes(bytes.ok_or(Error::CountMismatch)?);
        match writes.iter().count() == writes.len() {
            true => Ok(writes),
            false => Err(Error::CountMismatch), // one is longer than 8 bytes
        }
    }
}

impl RegionWrite<'_> {
    fn head(&self) -> Result<RegionAccess, NoRoom> {
        Ok(RegionAccess {
            offset: self.offset,
            region: self.region,
            count: u32::try_from(self.data.len()).map_err(|_| NoRoom)?,
        })
    }
}

/// The structure at the start of a payload, and what follows.
fn head<T, const N: usize>(
    payload: &[u8],
    from_bytes: fn(&[u8; N]) -> T,
) -> Result<(T, &[u8]), Error> {
    let (head, rest) = payload.split_first_chunk().ok_or(Error::ShortPayload)?;
    Ok((from_bytes(head), rest))
}

fn argsz(argsz: u32, least: usize) -> Result<(), Error> {
    match (argsz as usize) < least {
        true => Err(Error::ShortArgsz),
        false => Ok(()),
    }
}

impl<'a> Request<'a> {
    /// The command.
    #[must_use]
    pub const fn command(&self) -> Command {
        match self {
            Request::Version(_) => Command::Version,
            Request::DmaMap(_) => Command::DmaMap,
            Request::DmaUnmap(..) => Command::DmaUnmap,
            Request::GetInfo(_) => Command::GetInfo,
            Request::GetRegionInfo(_) => Command::GetRegionInfo,
            Request::GetRegionIoFds(_) => Command::GetRegionIoFds,
            Request::GetIrqInfo(_) => Command::GetIrqInfo,
            Request::SetIrqs(..) => Command::SetIrqs,
            Request::RegionRead(_) => Command::RegionRead,
            Request::RegionWrite(_) => Command::RegionWrite,
            Request::DmaRead(_) => Command::DmaRead,
            Request::DmaWrite { .. } => Command::DmaWrite,
            Request::Reset => Command::Reset,
            Request::RegionWriteMulti(_) => Command::RegionWriteMulti,
            Request::Feature(_) => Command::Feature,
            Request::MigDataRead { .. } => Command::MigDataRead,
            Request::MigDataWrite(_) => Command::MigDataWrite,
        }
    }

    /// Reads the payload of a command that came with `fds` file descriptors. `max` is
    /// max_data_xfer_size. [`Server::request`](crate::Server::request) and
    /// [`Client::request`](crate::Client::request) call it, and refuse what the other
    /// side may not send.
    ///
    /// A payload may be longer than its structure. It may come with descriptors that the
    /// command does not use; the receiver closes them.
    ///
    /// # Errors
    ///
    /// But for VERSION, [`Error::ShortPayload`] comes first if the payload is below its
    /// structure. Then, for each command, in this order:
    ///
    /// - VERSION: [`Error::VersionDescriptors`], and then as for the payload:
    ///   [`Error::ShortVersion`], [`Error::Major`], [`Error::NoTerminator`],
    ///   [`Error::Json`], [`Error::Capability`].
    /// - DMA_MAP: [`Error::ShortArgsz`], [`Error::NoDescriptor`] if the flags MMAP or
    ///   FILE_IO come without one, [`Error::UnknownFlags`], [`Error::FlagCombination`]
    ///   for both of these flags.
    /// - DMA_UNMAP: [`Error::UnknownFlags`], [`Error::FlagCombination`] for ALL with an
    ///   address or size, [`Error::ShortPayload`] for a bitmap without its structure,
    ///   [`Error::ShortArgsz`], [`Error::LongArgsz`].
    /// - DEVICE_GET_INFO, DEVICE_GET_REGION_INFO, DEVICE_GET_IRQ_INFO:
    ///   [`Error::ShortArgsz`].
    /// - DEVICE_GET_REGION_IO_FDS: [`Error::NotZero`] for flags or a count,
    ///   [`Error::ShortArgsz`], [`Error::LongArgsz`].
    /// - DEVICE_SET_IRQS: [`Error::ShortArgsz`], [`Error::UnknownFlags`],
    ///   [`Error::CountMismatch`] if there is not one boolean for each interrupt,
    ///   [`Error::FlagCombination`] unless there is one action and one kind of data,
    ///   [`Error::IrqRange`], [`Error::FlagCombination`] for an empty range with
    ///   anything but TRIGGER and no data, [`Error::Descriptors`].
    /// - REGION_READ and REGION_WRITE: [`Error::TransferTooLong`]; REGION_WRITE:
    ///   [`Error::CountMismatch`] if the data are not `count` bytes.
    /// - DMA_READ: [`Error::DmaTooLong`] for more than `max` bytes. DMA_WRITE: the same,
    ///   also if the data are fewer than `count` bytes.
    /// - REGION_WRITE_MULTI: [`Error::CountMismatch`] if the writes do not fit into the
    ///   payload, or one has more than 8 bytes.
    /// - DEVICE_FEATURE: as [`Feature::call`].
    /// - MIG_DATA_READ: [`Error::TransferTooLong`], [`Error::ShortArgsz`].
    ///   MIG_DATA_WRITE: the same, and [`Error::CountMismatch`] if the data are fewer
    ///   than `size` bytes.
    pub fn read(
        command: Command,
        payload: &'a [u8],
        fds: usize,
        max: u32,
    ) -> Result<Request<'a>, Error> {
        Ok(match command {
            Command::Version if fds != 0 => return Err(Error::VersionDescriptors),
            Command::Version => Request::Version(Version::read(payload)?),
            Command::DmaMap => {
                let (map, _) = head(payload, DmaMap::from_bytes)?;
                argsz(map.argsz, DmaMap::SIZE)?;
                if map.flags & (DMA_MMAP | DMA_FILE_IO) != 0 && fds == 0 {
                    return Err(Error::NoDescriptor);
                }
                let known = DMA_READABLE | DMA_WRITABLE | DMA_MMAP | DMA_FILE_IO;
                if map.flags & !known != 0 {
                    return Err(Error::UnknownFlags);
                }
                if map.flags & (DMA_MMAP | DMA_FILE_IO) == DMA_MMAP | DMA_FILE_IO {
                    return Err(Error::FlagCombination);
                }
                Request::DmaMap(map)
            }
            Command::DmaUnmap => dma_unmap(payload, max)?,
            Command::GetInfo => {
                let (info, _) = head(payload, DeviceInfo::from_bytes)?;
                argsz(info.argsz, DeviceInfo::SIZE)?;
                Request::GetInfo(info)
            }
            Command::GetRegionInfo => {
                let (info, _) = head(payload, RegionInfo::from_bytes)?;
                argsz(info.argsz, RegionInfo::SIZE)?;
                Request::GetRegionInfo(info)
            }
            Command::GetRegionIoFds => {
                let (io, _) = head(payload, RegionIoFds::from_bytes)?;
                if io.flags != 0 || io.count != 0 {
                    return Err(Error::NotZero);
                }
                argsz(io.argsz, RegionIoFds::SIZE)?;
                if io.argsz > max {
                    return Err(Error::LongArgsz);
                }
                Request::GetRegionIoFds(io)
            }
            Command::GetIrqInfo => {
                let (info, _) = head(payload, IrqInfo::from_bytes)?;
                argsz(info.argsz, IrqInfo::SIZE)?;
                Request::GetIrqInfo(info)
            }
            Command::SetIrqs => set_irqs(payload, fds)?,
            Command::RegionRead | Command::RegionWrite => {
                let (at, data) = head(payload, RegionAccess::from_bytes)?;
                if at.count > max {
                    return Err(Error::TransferTooLong);
                }
                if command == Command::RegionRead {
                    return Ok(Request::RegionRead(at));
                }
                if data.len() != at.count as usize {
                    return Err(Error::CountMismatch);
                }
                Request::RegionWrite(RegionWrite {
                    offset: at.offset,
                    region: at.region,
                    data,
                })
            }
            Command::DmaRead | Command::DmaWrite => {
                let (at, data) = head(payload, DmaAccess::from_bytes)?;
                if at.count > max.into() {
                    return Err(Error::DmaTooLong);
                }
                if command == Command::DmaRead {
                    return Ok(Request::DmaRead(at));
                }
                let data = data.get(..at.count as usize).ok_or(Error::DmaTooLong)?;
                Request::DmaWrite {
                    iova: at.iova,
                    data,
                }
            }
            Command::Reset => Request::Reset,
            Command::RegionWriteMulti => Request::RegionWriteMulti(Writes::read(payload)?),
            Command::Feature => {
                let feature = Feature::read(payload).ok_or(Error::ShortPayload)?;
                feature.call(max)?;
                Request::Feature(feature)
            }
            Command::MigDataRead | Command::MigDataWrite => {
                let (mig, data) = head(payload, MigData::from_bytes)?;
                if mig.size > max {
                    return Err(Error::TransferTooLong);
                }
                argsz(mig.argsz, (mig.size as usize).saturating_add(MigData::SIZE))?;
                if command == Command::MigDataRead {
                    return Ok(Request::MigDataRead { size: mig.size });
                }
                let data = data.get(..mig.size as usize);
                Request::MigDataWrite(data.ok_or(Error::CountMismatch)?)
            }
        })
    }

    /// Writes the whole message into `out` and returns its length. `id` is the sender's
    /// number for it. `no_reply` asks for no reply.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if it does not fit.
    pub fn write(&self, id: u16, no_reply: bool, out: &mut [u8]) -> Result<usize, NoRoom> {
        let kind = Kind::Command { no_reply };
        message(id, self.command(), kind, out, |out| self.payload(out))
    }

    fn payload(&self, out: &mut Out<'_>) -> Result<(), NoRoom> {
        match self {
            Request::Version(version) => version.write(out),
            Request::DmaMap(map) => out.put(&map.to_bytes()),
            Request::DmaUnmap(unmap, bitmap) => {
                out.put(&unmap.to_bytes());
                if let Some(bitmap) = bitmap {
                    out.put(&bitmap.to_bytes());
                }
            }
            Request::GetInfo(info) => out.put(&info.to_bytes()),
            Request::GetRegionInfo(info) => out.put(&info.to_bytes()),
            Request::GetRegionIoFds(io) => out.put(&io.to_bytes()),
            Request::GetIrqInfo(info) => out.put(&info.to_bytes()),
            Request::SetIrqs(set, data) => {
                out.put(&set.to_bytes());
                out.put(data);
            }
            Request::RegionRead(at) => out.put(&at.to_bytes()),
            Request::RegionWrite(write) => {
                out.put(&write.head()?.to_bytes());
                out.put(write.data);
            }
            Request::DmaRead(at) => out.put(&at.to_bytes()),
            Request::DmaWrite { iova, data } => {
                let (iova, count) = (*iova, data.len() as u64);
                out.put(&DmaAccess { iova, count }.to_bytes());
                out.put(data);
            }
            Request::Reset => {}
            Request::RegionWriteMulti(writes) => {
                out.put(&(writes.len() as u64).to_ne_bytes());
                out.put(writes.0);
            }
            Request::Feature(feature) => feature.write(out),
            Request::MigDataRead { size } => out.put(&mig_data(*size as usize)?.to_bytes()),
            Request::MigDataWrite(data) => {
                out.put(&mig_data(data.len())?.to_bytes());
                out.put(data);
            }
        }
        Ok(())
    }
}

/// The head of so many bytes of a device's state.
pub(crate) fn mig_data(size: usize) -> Result<MigData, NoRoom> {
    let size = u32::try_from(size).map_err(|_| NoRoom)?;
    let argsz = size.checked_add(MigData::SIZE as u32).ok_or(NoRoom)?;
    Ok(MigData { argsz, size })
}

fn dma_unmap(payload: &[u8], max: u32) -> Result<Request<'_>, Error> {
    let (unmap, rest) = head(payload, DmaUnmap::from_bytes)?;
    let (mut bitmap, mut least) = (None, DmaUnmap::SIZE as u64);
    match unmap.flags {
        0 => {}
        UNMAP_ALL if unmap.iova != 0 || unmap.size != 0 => return Err(Error::FlagCombination),
        UNMAP_ALL => {}
        UNMAP_GET_DIRTY_BITMAP => {
            let (asked, _) = head(rest, BitmapHead::from_bytes)?;
            least = asked.size.saturating_add(40);
            bitmap = Some(asked);
        }
        _ => return Err(Error::UnknownFlags),
    }
    if u64::from(unmap.argsz) < least {
        return Err(Error::ShortArgsz);
    }
    if unmap.argsz > max {
        return Err(Error::LongArgsz);
    }
    Ok(Request::DmaUnmap(unmap, bitmap))
}

fn set_irqs(payload: &[u8], fds: usize) -> Result<Request<'_>, Error> {
    const DATA: u32 = IRQ_DATA_NONE | IRQ_DATA_BOOL | IRQ_DATA_EVENTFD;
    const ACTION: u32 = IRQ_ACTION_MASK | IRQ_ACTION_UNMASK | IRQ_ACTION_TRIGGER;
    let (set, data) = head(payload, IrqSet::from_bytes)?;
    argsz(set.argsz, IrqSet::SIZE)?;
    if set.flags & !(DATA | ACTION) != 0 {
        return Err(Error::UnknownFlags);
    }
    let (kind, action) = (set.flags & DATA, set.flags & ACTION);
    if kind == IRQ_DATA_BOOL && data.len() != set.count as usize {
        return Err(Error::CountMismatch);
    }
    if !kind.is_power_of_two() || !action.is_power_of_two() {
        return Err(Error::FlagCombination);
    }
    if set.start.checked_add(set.count).is_none() || (set.count == 0 && set.start != 0) {
        return Err(Error::IrqRange);
    }
    if set.count == 0 && (action, kind) != (IRQ_ACTION_TRIGGER, IRQ_DATA_NONE) {
        return Err(Error::FlagCombination);
    }
    if fds != 0 && (kind != IRQ_DATA_EVENTFD || fds != set.count as usize) {
        return Err(Error::Descriptors);
    }
    let data = if kind == IRQ_DATA_BOOL { data } else { &[] };
    Ok(Request::SetIrqs(set, data))
}
