// SPDX-License-Identifier: MIT OR Apache-2.0
//! Devices in another process: both ends of the vfio-user protocol over a Unix socket.
//!
//! The crate `vfio-user-wire` has the protocol itself, without I/O.

// Each file uses only files below it.
mod client; // a VMM's end
mod server; // a device for clients

mod calls; // commands whose replies this side awaits

mod socket; // messages with descriptors over a stream

pub use self::client::{Client, ClientError, ClientLog, ClientOptions, DmaMemory, Region};
pub use self::server::{Handled, Remote, Server, Session};
pub use vfio_user_wire as wire;
