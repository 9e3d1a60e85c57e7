// SPDX-License-Identifier: MIT OR Apache-2.0
//! The frames that the two processes exchange.
//!
//! A frame is a header of 16 bytes and a payload. The header holds a magic number, the version, the
//! kind, the length of the payload and a checksum, all little-endian. The receiver trusts none of
//! it.

use std::fmt;
use std::io::{self, Read};

use super::guest::PAGE;

const MAGIC: [u8; 4] = *b"VDMG";
const VERSION: u16 = 1;
const HEADER: usize = 16;
const RECORD: usize = 8 + PAGE as usize;

/// The most pages in one frame.
const BATCH: usize = 256;
const MAX_PAYLOAD: usize = BATCH * RECORD;

/// The bytes that a page takes on the wire.
pub(super) const BYTES_PER_PAGE: u64 = RECORD as u64;

#[derive(Debug, PartialEq)]
pub(super) enum Frame<'a> {
    /// Source: a guest with this many bytes of memory will come.
    Hello { memory: u64 },
    /// Destination: it still allocates its memory.
    Busy,
    /// Destination: its memory is allocated. The memory file comes with the next byte.
    Ready,
    /// Source: the contents of pages.
    Pages(Pages<'a>),
    /// Source: the round is over, and this many pages were sent in it.
    EndOfRound { round: u32, last: bool, pages: u64 },
    /// Destination: it has checked and stored all pages of the round.
    Stored { round: u32 },
    /// Destination: it gives up for this reason.
    Refused { reason: &'a str },
}

/// Records, each of a page number and the page's bytes.
#[derive(Debug, PartialEq)]
pub(super) struct Pages<'a>(&'a [u8]);

impl<'a> Pages<'a> {
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &'a [u8])> {
        self.0.chunks_exact(RECORD).map(|record| {
            let (number, bytes) = record.split_at(8);
            (u64_at(number, 0).unwrap_or(u64::MAX), bytes)
        })
    }
}

/// A frame of pages that is being filled.
pub(super) struct Batch(Vec<u8>);

impl Batch {
    pub(super) fn new() -> Self {
        let mut frame = Vec::with_capacity(HEADER + MAX_PAYLOAD);
        frame.resize(HEADER, 0);
        Self(frame)
    }

    /// Appends a page and returns the place for its bytes.
    pub(super) fn push(&mut self, page: u64) -> &mut [u8] {
        self.0.extend_from_slice(&page.to_le_bytes());
        let start = self.0.len();
        self.0.resize(start + PAGE as usize, 0);
        &mut self.0[start..]
    }

    /// Removes the last page.
    pub(super) fn pop(&mut self) {
        let rest = self.0.len().saturating_sub(RECORD).max(HEADER);
        self.0.truncate(rest);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.len() == HEADER
    }

    pub(super) fn is_full(&self) -> bool {
        self.0.len() >= HEADER + MAX_PAYLOAD
    }

    pub(super) fn clear(&mut self) {
        self.0.truncate(HEADER);
    }

    /// Fills in the header and returns the bytes to send.
    pub(super) fn seal(&mut self) -> &[u8] {
        seal(&mut self.0, 3);
        &self.0
    }
}

/// Encodes a frame. Use [`Batch`] for frames of pages.
pub(super) fn encode(frame: &Frame<'_>) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    let kind = match frame {
        Frame::Hello { memory } => {
            bytes.extend(memory.to_le_bytes());
            1
        }
        Frame::Ready => 2,
        Frame::Busy => 7,
        Frame::Pages(pages) => {
            bytes.extend(pages.0);
            3
        }
        Frame::EndOfRound { round, last, pages } => {
            bytes.extend(round.to_le_bytes());
            bytes.extend(u32::from(*last).to_le_bytes());
            bytes.extend(pages.to_le_bytes());
            4
        }
        Frame::Stored { round } => {
            bytes.extend(round.to_le_bytes());
            5
        }
        Frame::Refused { reason } => {
            bytes.extend(reason.bytes().take(MAX_PAYLOAD));
            6
        }
    };
    seal(&mut bytes, kind);
    bytes
}

/// Fills in the header of `frame`.
fn seal(frame: &mut [u8], kind: u16) {
    let Some((header, payload)) = frame.split_first_chunk_mut::<HEADER>() else {
        return;
    };
    header[..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&VERSION.to_le_bytes());
    header[6..8].copy_from_slice(&kind.to_le_bytes());
    header[8..12].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    let sum = checksum(header, payload);
    header[12..].copy_from_slice(&sum.to_le_bytes());
}

/// The checksum of the header, up to its own field, and the payload.
fn checksum(header: &[u8; HEADER], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[..12]);
    hasher.update(payload);
    hasher.finalize()
}

/// Receives one frame; `buffer` holds its payload.
pub(super) fn receive<'a>(
    stream: &mut impl Read,
    buffer: &'a mut Vec<u8>,
) -> Result<Frame<'a>, WireError> {
    let mut header = [0; HEADER];
    let first = loop {
        match stream.read(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => break result?,
        }
    };
    if first == 0 {
        return Err(WireError::Closed);
    }
    stream.read_exact(&mut header[first..])?;

    let [m0, m1, m2, m3, v0, v1, k0, k1, l0, l1, l2, l3, c0, c1, c2, c3] = header;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(WireError::Magic);
    }
    let version = u16::from_le_bytes([v0, v1]);
    if version != VERSION {
        return Err(WireError::Version(version));
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > MAX_PAYLOAD {
        return Err(WireError::Length(length));
    }
    buffer.resize(length, 0);
    stream.read_exact(buffer)?;
    if u32::from_le_bytes([c0, c1, c2, c3]) != checksum(&header, buffer) {
        return Err(WireError::Checksum);
    }
    let kind = u16::from_le_bytes([k0, k1]);
    decode(kind, buffer).ok_or(WireError::Payload(kind))
}

fn decode(kind: u16, payload: &[u8]) -> Option<Frame<'_>> {
    match (kind, payload.len()) {
        (1, 8) => Some(Frame::Hello {
            memory: u64_at(payload, 0)?,
        }),
        (2, 0) => Some(Frame::Ready),
        (7, 0) => Some(Frame::Busy),
        (3, length) if length % RECORD == 0 => Some(Frame::Pages(Pages(payload))),
        (4, 16) => Some(Frame::EndOfRound {
            round: u32_at(payload, 0)?,
            last: u32_at(payload, 4)? != 0,
            pages: u64_at(payload, 8)?,
        }),
        (5, 4) => Some(Frame::Stored {
            round: u32_at(payload, 0)?,
        }),
        (6, _) => Some(Frame::Refused {
            reason: std::str::from_utf8(payload).ok()?,
        }),
        _ => None,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .copied()
        .map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..)?
        .first_chunk()
        .copied()
        .map(u64::from_le_bytes)
}

/// Why no frame could be received.
#[derive(Debug)]
pub(super) enum WireError {
    /// The other side closed the connection between two frames.
    Closed,
    Io(io::Error),
    Magic,
    Version(u16),
    Length(usize),
    Checksum,
    /// The kind of the frame is unknown, or the payload does not fit it.
    Payload(u16),
    /// The other side gave up and said why.
    Refused(String),
}

impl WireError {
    pub(super) fn is_timeout(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::TimedOut)
    }
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the connection was closed"),
            Self::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                f.write_str("the connection ended inside a frame")
            }
            error if error.is_timeout() => f.write_str("it was silent for too long"),
            Self::Io(error) => write!(f, "the connection failed: {error}"),
            Self::Magic => f.write_str("the bytes received are not a frame"),
            Self::Version(version) => {
                write!(f, "a frame has version {version}, not {VERSION}")
            }
            Self::Length(length) => write!(f, "a frame claims {length} bytes"),
            Self::Checksum => f.write_str("a frame's checksum is wrong"),
            Self::Payload(kind) => write!(f, "a frame of kind {kind} has a wrong payload"),
            Self::Refused(reason) => f.write_str(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn receive_bytes(bytes: &[u8]) -> Result<(), WireError> {
        receive(&mut &*bytes, &mut Vec::new()).map(|_| ())
    }

    fn pages_frame() -> Vec<u8> {
        let mut batch = Batch::new();
        batch.push(7).fill(1);
        batch.push(9).fill(2);
        batch.push(11).fill(3);
        batch.pop();
        batch.seal().to_vec()
    }

    #[test]
    fn frames_arrive_as_they_were_sent() {
        let frames = [
            Frame::Hello { memory: 1 << 40 },
            Frame::Busy,
            Frame::Ready,
            Frame::EndOfRound {
                round: 3,
                last: true,
                pages: 5,
            },
            Frame::Stored { round: 3 },
            Frame::Refused { reason: "no" },
        ];
        let mut bytes: Vec<u8> = frames.iter().flat_map(encode).collect();
        bytes.extend(pages_frame());
        let mut stream = &bytes[..];
        let mut buffer = Vec::new();
        for frame in &frames {
            assert_eq!(receive(&mut stream, &mut buffer).unwrap(), *frame);
        }
        let Ok(Frame::Pages(pages)) = receive(&mut stream, &mut buffer) else {
            panic!("not a frame of pages");
        };
        let pages: Vec<_> = pages.iter().collect();
        assert_eq!(pages, [(7, &[1; 4096][..]), (9, &[2; 4096][..])]);
        let end = receive(&mut stream, &mut buffer);
        assert!(matches!(end, Err(WireError::Closed)));
    }

    #[test]
    fn a_batch_is_full_at_the_largest_frame() {
        let mut batch = Batch::new();
        assert!(batch.is_empty());
        for page in 0..BATCH as u64 {
            assert!(!batch.is_full());
            batch.push(page);
        }
        assert!(batch.is_full());
        assert!(receive_bytes(batch.seal()).is_ok());
        batch.push(0);
        assert!(matches!(
            receive_bytes(batch.seal()),
            Err(WireError::Length(_))
        ));
        batch.clear();
        assert!(batch.is_empty());
    }

    #[test]
    fn a_corrupt_byte_anywhere_is_noticed() {
        let good = pages_frame();
        for at in (0..32).chain([good.len() - 1]) {
            let mut bytes = good.clone();
            bytes[at] ^= 0x10;
            assert!(receive_bytes(&bytes).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_truncated_frame_is_noticed() {
        let good = pages_frame();
        for length in [1, 15, 16, 17, good.len() - 1] {
            let error = receive_bytes(&good[..length]);
            assert!(matches!(error, Err(WireError::Io(_))), "{length} bytes");
        }
    }

    #[test]
    fn a_frame_of_another_version_is_named() {
        let mut bytes = encode(&Frame::Ready);
        bytes[4] = 2;
        assert!(matches!(receive_bytes(&bytes), Err(WireError::Version(2))));
    }

    #[test]
    fn a_page_record_that_is_cut_short_is_refused() {
        let mut bytes = pages_frame();
        bytes.truncate(bytes.len() - 1);
        seal(&mut bytes, 3);
        assert!(matches!(receive_bytes(&bytes), Err(WireError::Payload(3))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>, kind in 0..9_u16) {
            let _ = receive_bytes(&bytes);
            let mut frame = vec![0; HEADER];
            frame.extend(&bytes);
            seal(&mut frame, kind);
            if let Ok(Frame::Pages(pages)) = receive(&mut &frame[..], &mut Vec::new()) {
                pages.iter().for_each(drop);
            }
        }
    }
}
