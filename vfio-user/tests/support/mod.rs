// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the tests share.

#![allow(dead_code)] // each test uses a part

use vfio_user_wire::{Capabilities, Command, Error, Header, Request, Server};

pub(crate) const MAX: u32 = 1 << 20;

/// Bytes of 32-bit and 64-bit fields, one after another.
#[macro_export]
macro_rules! bytes {
    ($($field:expr),* $(,)?) => {{
        let mut bytes: Vec<u8> = Vec::new();
        $(bytes.extend_from_slice(&$field.to_ne_bytes());)*
        bytes
    }};
}

/// The header of a command with so many bytes of payload.
pub(crate) fn header(command: u16, payload: usize) -> Header {
    Header {
        id: 7,
        command,
        size: u32::try_from(payload + Header::SIZE).unwrap(),
        ..Header::default()
    }
}

/// Reads a payload, by itself.
pub(crate) fn read(command: Command, payload: &[u8], fds: usize) -> Result<Request<'_>, Error> {
    Request::read(command, payload, fds, MAX)
}

pub(crate) const JSON: &str = r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}"#;

/// The payload of VERSION.
pub(crate) fn version(minor: u16, data: &str) -> Vec<u8> {
    let mut payload = bytes![0u16, minor];
    payload.extend_from_slice(data.as_bytes());
    payload
}

/// A server that has agreed on a version.
pub(crate) fn negotiated() -> Server {
    let mut server = Server::new(Capabilities::default());
    let payload = version(1, &format!("{JSON}\0"));
    server
        .request(&header(1, payload.len()), &payload, 0)
        .unwrap();
    server
}
