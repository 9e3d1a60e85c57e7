// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happens to a server.

/// The bytes of a page.
pub(super) const PAGE: u64 = 4096;
/// The pages of IOVAs that are mapped and written.
pub(super) const IOVAS: u64 = 32;
/// The pages of each file.
pub(super) const FILE: u64 = 8;
/// How many mappings the client may have.
pub(super) const MAPS: u32 = 6;
/// How many pages the device's state may carry.
pub(super) const CARRY: u64 = 9;

/// What a mapping has behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Messages to the client.
    Remote,
    /// A file of the client: 0 cannot shrink, 1 can.
    File(usize),
    /// File 1, by a descriptor that only reads.
    ReadOnly,
    /// A pipe.
    Pipe,
}

/// How the device accesses memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// It writes through a pin.
    Pin,
}

/// One step. `iova`, `n` and `offset` count pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are what their types and names say
pub enum Op {
    /// DMA_MAP. `skew` is added to the IOVA, in bytes.
    Map {
        iova: u64,
        n: u64,
        flags: u32,
        backing: Backing,
        offset: u64,
        skew: u64,
    },
    /// DMA_UNMAP of any range.
    Unmap { iova: u64, n: u64 },
    /// DMA_UNMAP of the mapping that has this page, with its dirty pages if there is a page size.
    UnmapAt { iova: u64, pgsize: Option<u64> },
    /// DMA_UNMAP of everything.
    UnmapAll,
    /// A write to the device's doorbell, so that it accesses `len` bytes. `iova` counts bytes.
    Doorbell { access: Access, iova: u64, len: u64 },
    /// A write to the command register.
    BusMaster { on: bool },
    /// The client refuses the server's commands, or no longer.
    Refuse { on: bool },
    /// DMA_LOGGING_START.
    Start {
        pgsize: u64,
        ranges: [Option<(u64, u64)>; 2],
    },
    /// DMA_LOGGING_STOP.
    Stop,
    /// DMA_LOGGING_REPORT. `iova` and `len` count units of 1 KiB.
    Report { iova: u64, len: u64, pgsize: u64 },
    /// MIG_DEVICE_STATE. The device's state is read in STOP_COPY.
    State { to: u32 },
    /// MIG_DATA_WRITE of what was read last, or of other bytes.
    Load { good: bool },
    /// DEVICE_RESET.
    Reset,
    /// A message that is too short, or has an unknown command.
    Bad { command: u16, len: usize },
}

/// Makes operations of any bytes.
#[must_use]
pub fn decode(bytes: &[u8]) -> Vec<Op> {
    bytes.chunks_exact(4).map(op).collect()
}

fn pgsize(k: u64) -> u64 {
    [PAGE, 2 * PAGE, 1024, 4 * PAGE, PAGE, 1 << 20, PAGE, 3][k as usize % 8]
}

fn op(bytes: &[u8]) -> Op {
    let [kind, a, b, c] = [0, 1, 2, 3].map(|at| u64::from(bytes[at]));
    let iova = a % IOVAS;
    let n = 1 + b % 8;
    match kind % 32 {
        0..=5 => Op::Map {
            iova,
            n: if b == 255 { 0 } else { n },
            flags: match c % 16 {
                flags @ 0..=2 => flags as u32,
                14 => 7,
                15 => 15,
                _ => 3,
            },
            backing: match c / 16 % 8 {
                0..=2 => Backing::Remote,
                3 | 4 => Backing::File(0),
                5 => Backing::File(1),
                6 if a & 128 != 0 => Backing::ReadOnly,
                7 if a & 192 == 192 => Backing::Pipe,
                _ => Backing::File(1),
            },
            offset: b / 8 % (FILE + 1),
            skew: if a == 255 { 512 } else { 0 },
        },
        6 => Op::Unmap { iova, n },
        7 | 8 => Op::UnmapAt { iova, pgsize: None },
        9 => Op::UnmapAt {
            iova,
            pgsize: Some(pgsize(b)),
        },
        10 if c % 4 == 0 => Op::UnmapAll,
        10..=19 => Op::Doorbell {
            access: match kind % 32 {
                10 | 11 => Access::Read,
                12 | 13 => Access::Pin,
                _ => Access::Write,
            },
            iova: iova * PAGE + (b & 15) * 256,
            len: (b >> 4) * (c + 1),
        },
        20 => Op::BusMaster { on: c % 4 != 0 },
        21 => Op::Refuse { on: c % 4 == 0 },
        22 | 23 => {
            let range = |on: bool, iova: u64, n: u64| on.then_some((iova % IOVAS, n % 32));
            Op::Start {
                pgsize: pgsize(c / 4),
                ranges: [
                    range(c % 4 > 0, a, b),
                    range(c % 4 > 2, a / 8 + b / 16, a / 16 + 1),
                ],
            }
        }
        24 => Op::Stop,
        25..=27 => Op::Report {
            iova: match b % 4 {
                0 => 4 * iova + a / 64,
                1 => 4 * iova,
                _ => 0,
            },
            len: match b % 4 {
                0 => 1 + b,
                1 => 4 * n,
                _ => 4 * (IOVAS + 8),
            },
            pgsize: pgsize(c),
        },
        28 | 29 => Op::State {
            to: (c % 10) as u32,
        },
        30 if c % 8 == 0 => Op::Reset,
        30 => Op::Load { good: c % 4 != 1 },
        _ => Op::Bad {
            command: [2, 3, 4, 8, 9, 10, 11, 14, 16, 17, 99, 0][a as usize % 12],
            len: b as usize % 8,
        },
    }
}
