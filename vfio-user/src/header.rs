// SPDX-License-Identifier: MIT OR Apache-2.0
//! The 16 bytes before each message.

use crate::bytes::{Fields, Out};
use crate::error::{Error, NoRoom, EINVAL};

const TYPE: u32 = 0xf;
const REPLY: u32 = 1;
const NO_REPLY: u32 = 0x10;
const ERROR: u32 = 0x20;

/// The highest error number that a reply may have.
const MAX_ERRNO: u32 = 4096;

/// The header of a message (`struct vfio_user_header`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender's number for the command. The reply has it too.
    pub id: u16,
    /// The command's number, see [`Command`].
    pub command: u16,
    /// Bytes of the whole message.
    pub size: u32,
    /// The type, and the flags No_reply and Error.
    pub flags: u32,
    /// The error number of an error reply.
    pub error: u32,
}

static_assertions::assert_eq_size!(Header, [u8; Header::SIZE]);
static_assertions::const_assert_eq!(core::mem::offset_of!(Header, command), 2);
static_assertions::const_assert_eq!(core::mem::offset_of!(Header, size), 4);
static_assertions::const_assert_eq!(core::mem::offset_of!(Header, flags), 8);
static_assertions::const_assert_eq!(core::mem::offset_of!(Header, error), 12);

impl Header {
    /// Bytes of a header.
    pub const SIZE: usize = 16;

    /// From the bytes of a header, without a check.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 16]) -> Header {
        let mut f = Fields(bytes);
        Header {
            id: u16::from_ne_bytes(f.take()),
            command: u16::from_ne_bytes(f.take()),
            size: u32::from_ne_bytes(f.take()),
            flags: u32::from_ne_bytes(f.take()),
            error: u32::from_ne_bytes(f.take()),
        }
    }

    /// The bytes of the header.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        let mut out = Out::new(&mut bytes);
        out.put(&self.id.to_ne_bytes());
        out.put(&self.command.to_ne_bytes());
        out.put(&self.size.to_ne_bytes());
        out.put(&self.flags.to_ne_bytes());
        out.put(&self.error.to_ne_bytes());
        bytes
    }

    /// Bytes of the payload, which follows the header.
    #[must_use]
    pub const fn payload(&self) -> usize {
        (self.size as usize).saturating_sub(Header::SIZE)
    }

    /// Whether this is the header of a reply.
    #[must_use]
    pub const fn is_reply(&self) -> bool {
        self.flags & TYPE == REPLY
    }

    /// Whether this is the header of a command whose sender waits for a reply.
    #[must_use]
    pub const fn wants_reply(&self) -> bool {
        self.flags & (TYPE | NO_REPLY) == 0
    }

    /// The error number of an error reply. A number that is no Linux error number
    /// becomes EINVAL.
    #[must_use]
    pub const fn failure(&self) -> Option<u32> {
        if self.flags & ERROR == 0 {
            return None;
        }
        match self.error {
            errno @ 1..=MAX_ERRNO => Some(errno),
            _ => Some(EINVAL),
        }
    }

    /// The reply that answers this command with an error number. It has no payload.
    #[must_use]
    pub const fn refuse(&self, errno: u32) -> Header {
        Header {
            id: self.id,
            command: self.command,
            size: Header::SIZE as u32,
            flags: REPLY | ERROR,
            error: errno,
        }
    }

    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::MessageType`] if it is neither a command nor a reply.
    /// - [`Error::MessageTooShort`] if the size is below 16.
    /// - [`Error::MessageTooLong`] if the size is above `limit`.
    pub(crate) fn check(&self, limit: u32) -> Result<(), Error> {
        if self.flags & TYPE > REPLY {
            return Err(Error::MessageType);
        }
        if (self.size as usize) < Header::SIZE {
            return Err(Error::MessageTooShort);
        }
        if self.size > limit {
            return Err(Error::MessageTooLong);
        }
        Ok(())
    }
}

/// What a message that is written is.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Command { no_reply: bool },
    Reply,
    Failure(u32),
}

/// Writes a message whose payload `payload` writes.
pub(crate) fn message(
    id: u16,
    command: Command,
    kind: Kind,
    out: &mut [u8],
    payload: impl FnOnce(&mut Out<'_>) -> Result<(), NoRoom>,
) -> Result<usize, NoRoom> {
    let (place, rest) = out.split_first_chunk_mut().ok_or(NoRoom)?;
    let mut body = Out::new(rest);
    payload(&mut body)?;
    let len = body.done()?.len().checked_add(Header::SIZE).ok_or(NoRoom)?;
    let (flags, error) = match kind {
        Kind::Command { no_reply: true } => (NO_REPLY, 0),
        Kind::Command { no_reply: false } => (0, 0),
        Kind::Reply => (REPLY, 0),
        Kind::Failure(errno) => (REPLY | ERROR, errno),
    };
    let header = Header {
        id,
        command: command as u16,
        size: u32::try_from(len).map_err(|_| NoRoom)?,
        flags,
        error,
    };
    *place = header.to_bytes();
    Ok(len)
}

macro_rules! commands {
    ($($name:ident = $number:literal, $about:literal;)*) => {
        /// A command's number.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        #[repr(u16)]
        pub enum Command {
            $(#[doc = $about] $name = $number,)*
        }

        impl Command {
            /// Every command.
            pub const ALL: &'static [Command] = &[$(Command::$name,)*];

            /// The command with this number.
            #[must_use]
            pub const fn from_number(number: u16) -> Option<Command> {
                match number {
                    $($number => Some(Command::$name),)*
                    _ => None,
                }
            }
        }
    };
}

commands! {
    Version = 1, "VERSION: agree on a version and capabilities.";
    DmaMap = 2, "DMA_MAP: the device may access memory.";
    DmaUnmap = 3, "DMA_UNMAP: the device may no longer access memory.";
    GetInfo = 4, "DEVICE_GET_INFO.";
    GetRegionInfo = 5, "DEVICE_GET_REGION_INFO.";
    GetRegionIoFds = 6, "DEVICE_GET_REGION_IO_FDS.";
    GetIrqInfo = 7, "DEVICE_GET_IRQ_INFO.";
    SetIrqs = 8, "DEVICE_SET_IRQS.";
    RegionRead = 9, "REGION_READ.";
    RegionWrite = 10, "REGION_WRITE.";
    DmaRead = 11, "DMA_READ, from the server.";
    DmaWrite = 12, "DMA_WRITE, from the server.";
    Reset = 13, "DEVICE_RESET.";
    RegionWriteMulti = 15, "REGION_WRITE_MULTI.";
    Feature = 16, "DEVICE_FEATURE.";
    MigDataRead = 17, "MIG_DATA_READ.";
    MigDataWrite = 18, "MIG_DATA_WRITE.";
}

impl Command {
    /// Whether the server sends this command. The client sends all others.
    #[must_use]
    pub const fn is_from_server(self) -> bool {
        matches!(self, Command::DmaRead | Command::DmaWrite)
    }
}
