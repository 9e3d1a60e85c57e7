// SPDX-License-Identifier: MIT OR Apache-2.0
//! The two ends of a connection: which message may come now, and how large it may be.

use crate::error::Error;
use crate::header::{Command, Header};
use crate::reply::Reply;
use crate::request::Request;
use crate::version::{Agreed, Capabilities, Version, MINOR};

/// How much larger than `max_data_xfer_size` a message may be, in bytes. The first
/// message, VERSION, may have this size.
pub const HEADROOM: u32 = 64 << 10;

/// A server's end of a connection. It holds no message.
#[derive(Clone, Debug)]
pub struct Server {
    ours: Version,
    agreed: Option<Agreed>,
}

/// A client's end of a connection. It holds no message.
#[derive(Clone, Debug)]
pub struct Client {
    ours: Version,
    agreed: Option<Agreed>,
}

/// A header that a side with these limits takes.
fn header(bytes: &[u8; 16], ours: &Version, agreed: Option<&Agreed>) -> Result<Header, Error> {
    let limit = match agreed {
        Some(_) => ours
            .capabilities
            .max_data_xfer_size
            .saturating_add(HEADROOM),
        None => HEADROOM,
    };
    let header = Header::from_bytes(bytes);
    header.check(limit)?;
    Ok(header)
}

impl Server {
    /// A server that can do what `capabilities` says. The server's
    /// [`twin_socket_fd`](Capabilities::twin_socket_fd) is an argument of
    /// [`Agreed::reply`] instead.
    #[must_use]
    pub const fn new(capabilities: Capabilities) -> Server {
        Server {
            ours: Version {
                minor: MINOR,
                capabilities,
            },
            agreed: None,
        }
    }

    /// What was agreed on, once a VERSION was read. Its reply is [`Agreed::reply`].
    #[must_use]
    pub const fn agreed(&self) -> Option<&Agreed> {
        self.agreed.as_ref()
    }

    /// Reads the header of the next message. [`Header::payload`] is how many bytes
    /// follow: at most [`HEADROOM`] in the first message, and `max_data_xfer_size` more
    /// in others. A reply ([`Header::is_reply`]) is for [`Reply::read`], a command for
    /// [`request`](Self::request).
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::MessageType`], [`Error::MessageTooShort`], [`Error::MessageTooLong`].
    /// - Before VERSION: [`Error::UnexpectedMessage`] for a reply, and
    ///   [`Error::NotNegotiated`] for another command.
    pub fn header(&self, bytes: &[u8; 16]) -> Result<Header, Error> {
        let header = header(bytes, &self.ours, self.agreed.as_ref())?;
        if self.agreed.is_none() {
            if header.is_reply() {
                return Err(Error::UnexpectedMessage);
            }
            if header.command != Command::Version as u16 {
                return Err(Error::NotNegotiated);
            }
        }
        Ok(header)
    }

    /// Reads a command of the client that came with `fds` file descriptors. A VERSION
    /// that is well agrees on it. The receiver closes descriptors that the command does
    /// not use, also after an error.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::UnexpectedMessage`] for a reply.
    /// - [`Error::UnknownCommand`], also for a server's command.
    /// - [`Error::NegotiatedTwice`] for a second VERSION, and [`Error::NotNegotiated`]
    ///   for another command before the first.
    /// - The errors of [`Request::read`].
    /// - For a VERSION, [`Error::NoPageSize`] if no page size is common to both.
    pub fn request<'a>(
        &mut self,
        header: &Header,
        payload: &'a [u8],
        fds: usize,
    ) -> Result<Request<'a>, Error> {
        let command = command(header, false)?;
        let max = match (&self.agreed, command) {
            (Some(_), Command::Version) => return Err(Error::NegotiatedTwice),
            (Some(agreed), _) => agreed.max_data_xfer_size,
            (None, Command::Version) => 0,
            (None, _) => return Err(Error::NotNegotiated),
        };
        let request = Request::read(command, payload, fds, max)?;
        if let Request::Version(theirs) = &request {
            self.agreed = Some(Agreed::new(&self.ours, theirs)?);
        }
        Ok(request)
    }
}

impl Client {
    /// A client that can do what `capabilities` says.
    #[must_use]
    pub const fn new(capabilities: Capabilities) -> Client {
        Client {
            ours: Version {
                minor: MINOR,
                capabilities,
            },
            agreed: None,
        }
    }

    /// The first message that the client sends.
    #[must_use]
    pub const fn version(&self) -> Request<'static> {
        Request::Version(self.ours)
    }

    /// What was agreed on, once [`accept`](Self::accept) took the reply.
    #[must_use]
    pub const fn agreed(&self) -> Option<&Agreed> {
        self.agreed.as_ref()
    }

    /// Takes the server's reply to VERSION, which came with `fds` descriptors. Returns
    /// which of them is the second socket, if the server uses one.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::UnexpectedMessage`] if it is no such reply, or one was taken already.
    /// - [`Error::Minor`] if the server's minor version is above the client's.
    /// - [`Error::TwinSocket`] if the server uses a second socket that the client does
    ///   not know of or that is none of the descriptors.
    /// - [`Error::NoPageSize`] if no page size is common to both.
    pub fn accept(&mut self, reply: &Reply<'_>, fds: usize) -> Result<Option<usize>, Error> {
        let (Reply::Version(theirs), None) = (reply, &self.agreed) else {
            return Err(Error::UnexpectedMessage);
        };
        if theirs.minor > self.ours.minor {
            return Err(Error::Minor);
        }
        let mut twin = None;
        if theirs.capabilities.twin_socket {
            let index = theirs.capabilities.twin_socket_fd;
            twin = index
                .map(|index| index as usize)
                .filter(|index| *index < fds);
            if twin.is_none() || !self.ours.capabilities.twin_socket {
                return Err(Error::TwinSocket);
            }
        }
        self.agreed = Some(Agreed::new(&self.ours, theirs)?);
        Ok(twin)
    }

    /// Reads the header of the next message, as [`Server::header`].
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::MessageType`], [`Error::MessageTooShort`], [`Error::MessageTooLong`].
    /// - [`Error::UnexpectedMessage`] before [`accept`](Self::accept), for anything but
    ///   a reply to VERSION.
    pub fn header(&self, bytes: &[u8; 16]) -> Result<Header, Error> {
        let header = header(bytes, &self.ours, self.agreed.as_ref())?;
        let is_version = header.is_reply() && header.command == Command::Version as u16;
        match self.agreed.is_some() || is_version {
            true => Ok(header),
            false => Err(Error::UnexpectedMessage),
        }
    }

    /// Reads a command of the server: DMA_READ or DMA_WRITE.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::UnexpectedMessage`] for a reply, and before [`accept`](Self::accept).
    /// - [`Error::UnknownCommand`], also for a client's command.
    /// - The errors of [`Request::read`].
    pub fn request<'a>(&self, header: &Header, payload: &'a [u8]) -> Result<Request<'a>, Error> {
        let max = match &self.agreed {
            Some(agreed) => agreed.max_data_xfer_size,
            None => return Err(Error::UnexpectedMessage),
        };
        Request::read(command(header, true)?, payload, 0, max)
    }
}

/// The command of a message that comes from the server, or from the client.
fn command(header: &Header, from_server: bool) -> Result<Command, Error> {
    if header.is_reply() {
        return Err(Error::UnexpectedMessage);
    }
    Command::from_number(header.command)
        .filter(|command| command.is_from_server() == from_server)
        .ok_or(Error::UnknownCommand)
}
