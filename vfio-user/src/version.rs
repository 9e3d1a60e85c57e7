// SPDX-License-Identifier: MIT OR Apache-2.0
//! Versions, capabilities, and what two sides agree on.

use core::fmt::Write;

use crate::bytes::Out;
use crate::error::Error;
use crate::json::{BadJson, Json, Name, Value};
use crate::wire::VersionHead;

/// The major version of the protocol.
pub const MAJOR: u16 = 0;
/// The highest minor version that this crate speaks.
pub const MINOR: u16 = 2;

/// What one side can do. The default is what the protocol prescribes for a side that
/// says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The most file descriptors that this side takes with one message.
    pub max_msg_fds: u32,
    /// The most bytes that one message transfers.
    pub max_data_xfer_size: u32,
    /// The most DMA mappings at one time.
    pub max_dma_maps: u32,
    /// The page sizes of DMA mappings: bit k stands for 2^k bytes.
    pub pgsizes: u64,
    /// The side migrates devices.
    pub migration: Option<Migration>,
    /// The side knows REGION_WRITE_MULTI.
    pub write_multiple: bool,
    /// The side knows a second socket for the server's commands.
    pub twin_socket: bool,
    /// Only in a server's reply: which of the reply's descriptors is the second socket.
    pub twin_socket_fd: Option<u32>,
}

impl Default for Capabilities {
    fn default() -> Self {
        Capabilities {
            max_msg_fds: 1,
            max_data_xfer_size: 1 << 20,
            max_dma_maps: 65535,
            pgsizes: 4096,
            migration: None,
            write_multiple: false,
            twin_socket: false,
            twin_socket_fd: None,
        }
    }
}

/// What a side that migrates devices can do. The default is for a side that does not
/// say more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Migration {
    /// The page size of dirty bitmaps, in bytes.
    pub pgsize: u64,
    /// The most bytes of a dirty bitmap.
    pub max_bitmap_size: u64,
}

impl Default for Migration {
    fn default() -> Self {
        Migration {
            pgsize: 4096,
            max_bitmap_size: 256 << 20,
        }
    }
}

/// A VERSION message, from either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// The minor version; the major version is [`MAJOR`].
    pub minor: u16,
    /// What the sender can do.
    pub capabilities: Capabilities,
}

impl Version {
    /// Reads the payload of a VERSION message.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::ShortVersion`] if it is below 4 bytes.
    /// - [`Error::Major`].
    /// - [`Error::NoTerminator`] if there are version data that do not end with NUL.
    /// - [`Error::Json`] if they are no UTF-8, no JSON object, or nest deeper than 32.
    /// - [`Error::Capability`] for `capabilities` that are no object, and for a
    ///   capability of the wrong type or out of range.
    pub(crate) fn read(payload: &[u8]) -> Result<Version, Error> {
        let (head, data) = VersionHead::split(payload).ok_or(Error::ShortVersion)?;
        if head.major != MAJOR {
            return Err(Error::Major);
        }
        let mut capabilities = Capabilities::default();
        match data {
            [] => {}
            [.., 0] => {
                // A C string: it ends at the first NUL.
                let text = data.split(|byte| *byte == 0).next().unwrap_or_default();
                let text = core::str::from_utf8(text).map_err(|_| Error::Json)?;
                capabilities.read(text)?;
            }
            _ => return Err(Error::NoTerminator),
        }
        Ok(Version {
            minor: head.minor,
            capabilities,
        })
    }

    pub(crate) fn write(&self, out: &mut Out<'_>) {
        let head = VersionHead {
            major: MAJOR,
            minor: self.minor,
        };
        out.put(&head.to_bytes());
        self.capabilities.write(out);
        out.put(&[0]);
    }
}

impl From<BadJson> for Error {
    fn from(_: BadJson) -> Error {
        Error::Json
    }
}

impl Capabilities {
    fn read(&mut self, text: &str) -> Result<(), Error> {
        let Value::Object(data) = Json::parse(text)? else {
            return Err(Error::Json);
        };
        data.members(|name, value| match value {
            _ if !name.is("capabilities") => Ok(()),
            Value::Object(list) => list.members(|name, value| self.member(name, value)),
            _ => Err(Error::Capability),
        })
    }

    fn member(&mut self, name: Name<'_>, value: Value<'_>) -> Result<(), Error> {
        if name.is("max_msg_fds") {
            self.max_msg_fds = limit(value)?;
        } else if name.is("max_data_xfer_size") {
            self.max_data_xfer_size = limit(value)?;
            if self.max_data_xfer_size == 0 {
                return Err(Error::Capability);
            }
        } else if name.is("max_dma_maps") {
            self.max_dma_maps = limit(value)?;
        } else if name.is("pgsizes") {
            self.pgsizes = integer(value)?;
        } else if name.is("write_multiple") {
            self.write_multiple = boolean(value)?;
        } else if name.is("migration") {
            let mut migration = Migration::default();
            object(value)?.members(|name, value| {
                if name.is("pgsize") {
                    migration.pgsize = integer(value)?;
                    if !migration.pgsize.is_power_of_two() {
                        return Err(Error::Capability);
                    }
                } else if name.is("max_bitmap_size") {
                    migration.max_bitmap_size = integer(value)?;
                }
                Ok(())
            })?;
            self.migration = Some(migration);
        } else if name.is("twin_socket") {
            (self.twin_socket, self.twin_socket_fd) = (false, None);
            object(value)?.members(|name, value| {
                if name.is("supported") {
                    self.twin_socket = boolean(value)?;
                } else if name.is("fd_index") {
                    self.twin_socket_fd = Some(limit(value)?);
                }
                Ok::<(), Error>(())
            })?;
        }
        Ok(())
    }

    /// Writes the capabilities as JSON, those without a meaning left out.
    fn write(&self, out: &mut Out<'_>) {
        // Never fails: what does not fit, `Out` remembers.
        let _ = write!(
            out,
            "{{\"capabilities\":{{\"max_msg_fds\":{},\"max_data_xfer_size\":{},\
             \"max_dma_maps\":{},\"pgsizes\":{}",
            self.max_msg_fds, self.max_data_xfer_size, self.max_dma_maps, self.pgsizes
        );
        if let Some(Migration {
            pgsize,
            max_bitmap_size,
        }) = self.migration
        {
            let _ = write!(
                out,
                ",\"migration\":{{\"pgsize\":{pgsize},\"max_bitmap_size\":{max_bitmap_size}}}"
            );
        }
        if self.write_multiple {
            out.put(b",\"write_multiple\":true");
        }
        if self.twin_socket || self.twin_socket_fd.is_some() {
            let _ = write!(out, ",\"twin_socket\":{{\"supported\":{}", self.twin_socket);
            if let Some(index) = self.twin_socket_fd {
                let _ = write!(out, ",\"fd_index\":{index}");
            }
            out.put(b"}");
        }
        out.put(b"}}");
    }
}

fn integer(value: Value<'_>) -> Result<u64, Error> {
    match value {
        Value::Integer(integer) => Ok(integer),
        _ => Err(Error::Capability),
    }
}

/// A number that says how much: more than 32 bits is as much as 32 bits can say.
fn limit(value: Value<'_>) -> Result<u32, Error> {
    Ok(u32::try_from(integer(value)?).unwrap_or(u32::MAX))
}

fn boolean(value: Value<'_>) -> Result<bool, Error> {
    match value {
        Value::Bool(boolean) => Ok(boolean),
        _ => Err(Error::Capability),
    }
}

fn object(value: Value<'_>) -> Result<Json<'_>, Error> {
    match value {
        Value::Object(object) => Ok(object),
        _ => Err(Error::Capability),
    }
}

/// What two sides have agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The lower of the two minor versions.
    pub minor: u16,
    /// The most descriptors that this side may send with one message.
    pub max_send_fds: u32,
    /// The most descriptors that this side takes with one message.
    pub max_receive_fds: u32,
    /// The lower of the two limits, in bytes.
    pub max_data_xfer_size: u32,
    /// The lower of the two limits.
    pub max_dma_maps: u32,
    /// The page sizes that both sides have.
    pub pgsizes: u64,
    /// Both sides migrate: the larger page size and the smaller limit.
    pub migration: Option<Migration>,
    /// Both sides know REGION_WRITE_MULTI.
    pub write_multiple: bool,
    /// Both sides know a second socket. A server may still do without.
    pub twin_socket: bool,
}

impl Agreed {
    /// What follows from both sides' messages.
    ///
    /// # Errors
    ///
    /// [`Error::NoPageSize`] if no page size is in both.
    pub(crate) fn new(ours: &Version, theirs: &Version) -> Result<Agreed, Error> {
        let (our, their) = (&ours.capabilities, &theirs.capabilities);
        let pgsizes = our.pgsizes & their.pgsizes;
        if pgsizes == 0 {
            return Err(Error::NoPageSize);
        }
        Ok(Agreed {
            minor: ours.minor.min(theirs.minor),
            max_send_fds: their.max_msg_fds,
            max_receive_fds: our.max_msg_fds,
            max_data_xfer_size: our.max_data_xfer_size.min(their.max_data_xfer_size),
            max_dma_maps: our.max_dma_maps.min(their.max_dma_maps),
            pgsizes,
            migration: our
                .migration
                .zip(their.migration)
                .map(|(our, their)| Migration {
                    pgsize: our.pgsize.max(their.pgsize),
                    max_bitmap_size: our.max_bitmap_size.min(their.max_bitmap_size),
                }),
            write_multiple: our.write_multiple && their.write_multiple,
            twin_socket: our.twin_socket && their.twin_socket,
        })
    }

    /// The server's reply. `twin_socket_fd` is the index of the second socket among the
    /// reply's descriptors. It is left out unless both sides know a second socket.
    #[must_use]
    pub fn reply(&self, twin_socket_fd: Option<u32>) -> Version {
        let twin_socket_fd = twin_socket_fd.filter(|_| self.twin_socket);
        Version {
            minor: self.minor,
            capabilities: Capabilities {
                max_msg_fds: self.max_receive_fds,
                max_data_xfer_size: self.max_data_xfer_size,
                max_dma_maps: self.max_dma_maps,
                pgsizes: self.pgsizes,
                migration: self.migration,
                write_multiple: self.write_multiple,
                twin_socket: twin_socket_fd.is_some(),
                twin_socket_fd,
            },
        }
    }
}
