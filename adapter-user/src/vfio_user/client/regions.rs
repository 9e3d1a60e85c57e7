// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device's regions.

use std::os::fd::OwnedFd;

use vfio_user_wire::wire::{RegionAccess, RegionInfo};
use vfio_user_wire::{RegionWrite, Reply, Request};

use super::{Client, ClientError};

/// What a region is like.
#[derive(Debug)]
pub struct Region {
    /// `VFIO_REGION_INFO_FLAG_*` of `linux/vfio.h`.
    pub flags: u32,
    /// The length in bytes, 0 if the device has no such region.
    pub size: u64,
    /// The capabilities, as they are after `struct vfio_region_info` in Linux: the first is
    /// at the start, and the offset of the next one counts from 32 bytes before it.
    pub capabilities: Vec<u8>,
    /// The file that can be mapped, if there is one, and the offset of the region in it.
    pub file: Option<(OwnedFd, u64)>,
}

impl Client {
    /// Returns what a region is like.
    ///
    /// # Errors
    ///
    /// As every call of a [`Client`].
    pub fn region_info(&self, index: u32) -> Result<Region, ClientError> {
        let ask = |argsz: u32| {
            let request = Request::GetRegionInfo(RegionInfo {
                argsz,
                index,
                ..RegionInfo::default()
            });
            self.link().call(&request, &[], |reply, fds| match reply {
                Reply::GetRegionInfo(info, capabilities) => {
                    let capabilities = match info.cap_offset {
                        0 => Vec::new(),
                        offset => {
                            let skip = (offset as usize).checked_sub(RegionInfo::SIZE)?;
                            capabilities.get(skip..)?.to_vec()
                        }
                    };
                    let file = fds.into_iter().next().map(|fd| (fd, info.offset));
                    Some((info, capabilities, file))
                }
                _ => None,
            })
        };
        let least = RegionInfo::SIZE as u32;
        let mut answer = ask(least)?;
        // The capabilities need more room, of which there may be as much as a message has.
        let most = self.inner.agreed.max_data_xfer_size.max(least);
        if answer.0.argsz > least {
            answer = ask(answer.0.argsz.min(most))?;
        }
        let (info, capabilities, file) = answer;
        Ok(Region {
            flags: info.flags,
            size: info.size,
            capabilities,
            file,
        })
    }

    /// Reads as many bytes at `offset` of a region as `data` has: in one message, if they fit
    /// into one.
    ///
    /// # Errors
    ///
    /// [`ClientError::Argument`] if the offsets wrap. Then as every call of a [`Client`].
    pub fn read_region(
        &self,
        region: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), ClientError> {
        check(offset, data.len())?;
        let mut offset = offset;
        for part in data.chunks_mut(self.max_data()) {
            let request = Request::RegionRead(RegionAccess {
                offset,
                region,
                count: part.len() as u32, // at most max_data_xfer_size
            });
            offset = offset.wrapping_add(part.len() as u64);
            self.link().call(&request, &[], |reply, _| match reply {
                Reply::RegionRead { data, .. } => {
                    part.copy_from_slice(data); // `check` has compared the lengths
                    Some(())
                }
                _ => None,
            })?;
        }
        Ok(())
    }

    /// Writes `data` at `offset` of a region, and waits until the device has them: in one
    /// message, if they fit into one.
    ///
    /// # Errors
    ///
    /// [`ClientError::Argument`] if the offsets wrap. Then as every call of a [`Client`].
    pub fn write_region(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.each_write(region, offset, data, |request| {
            self.link().call(request, &[], |_, _| Some(()))
        })
    }

    /// As [`write_region`](Client::write_region), without waiting: as a posted write on a PCI
    /// bus. The device has it before whatever is sent later. If the server refuses it, nobody
    /// is told.
    ///
    /// # Errors
    ///
    /// [`ClientError::Argument`] if the offsets wrap. [`ClientError::Silent`] and
    /// [`ClientError::Lost`] if it cannot be sent.
    pub fn post_region(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.each_write(region, offset, data, |request| self.link().post(request))
    }

    fn each_write(
        &self,
        region: u32,
        offset: u64,
        data: &[u8],
        send: impl Fn(&Request<'_>) -> Result<(), ClientError>,
    ) -> Result<(), ClientError> {
        check(offset, data.len())?;
        let mut offset = offset;
        for data in data.chunks(self.max_data()) {
            send(&Request::RegionWrite(RegionWrite {
                offset,
                region,
                data,
            }))?;
            offset = offset.wrapping_add(data.len() as u64);
        }
        Ok(())
    }
}

fn check(offset: u64, len: usize) -> Result<(), ClientError> {
    match offset.checked_add(len as u64) {
        Some(_) => Ok(()),
        None => Err(ClientError::Argument("the offsets in the region wrap")),
    }
}
