// SPDX-License-Identifier: MIT OR Apache-2.0
//! The vfio-user protocol, by which a VMM uses a device that lives in another process:
//! the bytes of a message become a typed request or reply, and a typed request or reply
//! becomes bytes.
//!
//! The crate does no I/O. It is `no_std`, allocates nothing, has no unsafe code, and any
//! bytes of a peer give a typed message or one [`Error`].
//!
//! - [`Server`] and [`Client`] are the two ends of a connection. They say how many bytes
//!   of the next message to read, agree on a version and capabilities, and refuse what
//!   cannot come now.
//! - [`Request`] and [`Reply`] are the messages of all commands. They borrow their data
//!   from the bytes. [`Reply::check`] tells whether a reply belongs to a request.
//! - [`wire`] has the structures and flags.
//! - [`Error::errno`] is the number for the reply, and [`Error::verdict`] tells whether
//!   to answer or to close the connection.
//!
//! # A server's loop
//!
//! ```
//! use vfio_user_wire::{wire::*, *};
//!
//! /// Answers the first message of `input`. Returns the length of the reply in `out`.
//! fn serve(server: &mut Server, input: &[u8], out: &mut [u8]) -> Result<usize, Error> {
//!     let (head, rest) = input.split_first_chunk().expect("read 16 bytes");
//!     let header = server.header(head)?; // read no more bytes after an error
//!     let payload = &rest[..header.payload()]; // read as many bytes
//!     let reply = match server.request(&header, payload, 0) {
//!         Ok(Request::Version(_)) => Reply::Version(server.agreed().unwrap().reply(None)),
//!         Ok(Request::GetInfo(_)) => Reply::GetInfo(DeviceInfo {
//!             argsz: DeviceInfo::SIZE as u32,
//!             flags: 3, // PCI, and it can be reset
//!             num_regions: 9,
//!             num_irqs: 5,
//!         }),
//!         Ok(other) => Reply::Failure(other.command(), 95), // EOPNOTSUPP
//!         Err(error) if error.verdict() == Verdict::Answer => {
//!             out[..16].copy_from_slice(&header.refuse(error.errno()).to_bytes());
//!             return Ok(16);
//!         }
//!         Err(error) => return Err(error),
//!     };
//!     Ok(reply.write(header.id, out).expect("room for the reply"))
//! }
//!
//! let (mut server, mut client) = (Server::new(Capabilities::default()), Client::new(Capabilities::default()));
//! let (mut input, mut out) = ([0; 512], [0; 512]);
//! let len = client.version().write(1, false, &mut input).unwrap();
//! let len = serve(&mut server, &input[..len], &mut out)?;
//!
//! let header = client.header(out.first_chunk().unwrap())?;
//! client.accept(&Reply::read(&header, &out[16..len])?, 0)?;
//! assert_eq!(client.agreed().unwrap().max_data_xfer_size, 1 << 20);
//!
//! let request = Request::GetInfo(DeviceInfo { argsz: 16, ..DeviceInfo::default() });
//! let len = request.write(2, false, &mut input).unwrap();
//! let len = serve(&mut server, &input[..len], &mut out)?;
//! let header = client.header(out.first_chunk().unwrap())?;
//! let reply = Reply::read(&header, &out[16..len])?;
//! reply.check(&request)?;
//! assert!(matches!(reply, Reply::GetInfo(info) if info.num_regions == 9));
//! # Ok::<(), Error>(())
//! ```
//!
//! # Memory
//!
//! [`Header::payload`] of a header that [`Server::header`] or [`Client::header`] took is
//! at most [`HEADROOM`] (64 KiB) in the first message, and at most `max_data_xfer_size`
//! of this side's capabilities and 64 KiB in all others. A request cannot ask for a
//! larger transfer or bitmap in its reply either: [`Request::read`] refuses it.
//!
//! # Errors
//!
//! The errors of each command, in their order, are listed at [`Request::read`] and
//! [`Feature::call`]. They are those of the specification (QEMU's
//! `docs/interop/vfio-user.rst`) and of libvfio-user, which answers EINVAL to all that
//! is wrong with a message. Where the specification says nothing and this crate differs
//! from libvfio-user, the reason is in this table:
//!
//! | message | libvfio-user | here |
//! |---|---|---|
//! | a size below 16 | EINVAL, and it reads on | close, because the peer does not know its own framing |
//! | a size above the limit | EINVAL, and the payload is taken for the next message | close |
//! | a type that is neither command nor reply | EINVAL, and the payload is taken for the next message | close |
//! | a reply to a server that waits for none | EINVAL | for the caller, who knows what it waits for |
//! | a first message that is not VERSION | reads it, EINVAL, close | EINVAL, close, without reading it |
//! | JSON with something after it, or that is no object | what comes before counts | EINVAL, close |
//! | `max_msg_fds` above 1024 | EINVAL, close | it is only a limit, so it is taken |
//! | `max_data_xfer_size` of 0 | taken | EINVAL, close, because nothing could be transferred |
//! | a `migration.pgsize` other than the host's | EINVAL, close; 0 counts as not said | the larger page size of both is agreed on; EINVAL, close, if it is not a power of two |
//! | no page size in common | not looked at | EINVAL, close |
//! | `max_data_xfer_size` of a client | limits MIG_DATA_READ, MIG_DATA_WRITE and the server's own DMA messages | the lower of both limits is agreed on, and limits everything |
//! | DMA_UNMAP that is smaller than its structure | reads beyond the message | EINVAL |
//! | DEVICE_SET_IRQS with unknown flags | ignored | EINVAL, as Linux |
//! | REGION_READ or REGION_WRITE of 0 bytes | a reply without payload | a reply with its structure and no data |
//! | DMA_LOGGING_START and REPORT, MIG_DEVICE_STATE that are smaller than their structure | reads beyond the message | EINVAL |
//! | DMA_LOGGING_START whose ranges do not fit | ranges are not looked at | EINVAL |
//! | DMA_LOGGING_REPORT with a bitmap above `max_data_xfer_size` | takes the memory | E2BIG |
//! | REGION_WRITE_MULTI | EINVAL, it is not known | known; fewer bytes than writes, or a write of more than 8, is EINVAL |
//!
//! libvfio-user has no client that serves DMA_READ and DMA_WRITE. There this crate
//! answers as QEMU does: EINVAL for a message that is smaller than its structure, E2BIG
//! for a count above the data or the limit.
//!
//! Replies differ in form, too, and [`Reply::read`] takes all of them: the reply to
//! DMA_WRITE has no payload (QEMU), a count of 4 bytes (specification) or of 8 bytes
//! (libvfio-user, and [`Reply::write`]); a sub-region of DEVICE_GET_REGION_IO_FDS has 40
//! bytes (specification, and [`SubRegions::write`]) or 48 (libvfio-user). A reply with an
//! error number of 0 or above 4096 is EINVAL ([`Header::failure`]).
#![no_std]
#![forbid(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::string_slice,
    clippy::todo,
    clippy::unimplemented,
    clippy::unreachable,
    clippy::unwrap_used
)]

mod bytes;
mod error;
mod feature;
mod header;
mod json;
mod reply;
mod request;
mod session;
mod version;
pub mod wire;

pub use error::{Error, NoRoom, Verdict};
pub use feature::{Feature, FeatureAnswer, FeatureCall, Ranges};
pub use header::{Command, Header};
pub use reply::{Reply, SubRegions};
pub use request::{RegionWrite, Request, Writes};
pub use session::{Client, Server, HEADROOM};
pub use version::{Agreed, Capabilities, Migration, Version, MAJOR, MINOR};
