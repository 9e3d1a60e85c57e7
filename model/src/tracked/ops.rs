// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happens to a tracked guest.

/// The bytes of a page.
pub(super) const PAGE: u64 = 4096;
/// How many pieces of memory there are.
pub(super) const MEMORIES: usize = 3;
/// How many places there are for them, of [`PLACE`] pages each.
pub(super) const PLACES: u64 = 4;
/// The pages of a place, and the most that a memory grows to.
pub(super) const PLACE: u64 = 8;
/// The pages that a memory has at first.
pub(super) const SMALL: u64 = 5;
/// How many views there are. Each may have one log.
pub(super) const VIEWS: usize = 2;
/// The pages of IOVAs that a view has.
pub(super) const IOVAS: u64 = 16;

/// Who keeps the log of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogKind {
    /// A simulated log that tells all that it has.
    Loose,
    /// A simulated log that tells only what it is asked.
    Strict,
    /// A `DeviceLog`.
    Device,
    /// A `Container`, whose device writes.
    Container,
}

/// One step. Addresses are numbers of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are what their types and names say
pub enum Op {
    /// A memory becomes a slot.
    Add {
        memory: usize,
        place: u64,
        known: bool,
    },
    /// A slot moves.
    Move { memory: usize, place: u64 },
    /// A slot goes.
    Remove { memory: usize },
    /// A slot grows to a whole place.
    Grow { memory: usize },
    /// A view maps IOVAs.
    Map {
        view: usize,
        iova: u64,
        gpa: u64,
        n: u64,
    },
    /// A view unmaps IOVAs.
    Unmap { view: usize, iova: u64, n: u64 },
    /// As `Unmap`, after writes that only the unmap tells.
    UnmapDirty {
        view: usize,
        iova: u64,
        n: u64,
        words: u64,
    },
    /// The VMM writes a memory, which may be no slot.
    Vmm { memory: usize, page: u64 },
    /// A device writes and marks through the view.
    Mark { view: usize, iova: u64 },
    /// A device that kept a mapping writes and marks, however late.
    Late { handle: usize, page: u64 },
    /// A device that has a log writes.
    Log { view: usize, iova: u64 },
    /// A CPU writes. KVM has a log by slot.
    Kvm { memory: usize, page: u64 },
    /// The next read of a view's log fails.
    FailLog { view: usize },
    /// The next read of KVM's log fails.
    FailKvm,
    /// The log of a view comes or goes.
    Plug { view: usize, kind: LogKind },
    /// In the next take, after the read of a view's log, a device writes, the guest maps
    /// another page to the IOVA, and the device writes again.
    Remap { view: usize, iova: u64, gpa: u64 },
    /// A page is discarded from the bits.
    Discard { memory: usize, page: u64 },
    /// A page is discarded from the report.
    DiscardTaken { memory: usize, page: u64 },
    /// Tracking begins, perhaps again, and all memory is copied.
    Start,
    /// Tracking ends.
    Stop,
    /// The tracker is saved with the report, and another one goes on.
    Upgrade,
    /// A take. If it is `delivered`, the report is cleared.
    Take { delivered: bool },
}

/// Makes operations of any bytes.
#[must_use]
pub fn decode(bytes: &[u8]) -> Vec<Op> {
    bytes.chunks_exact(4).map(op).collect()
}

fn op(bytes: &[u8]) -> Op {
    let [kind, a, b, c] = [0, 1, 2, 3].map(|at| u64::from(bytes[at]));
    let (memory, view) = (a as usize % MEMORIES, a as usize % VIEWS);
    let place = b % PLACES;
    let page = b % PLACE;
    let iova = b % IOVAS;
    let n = 1 + (c % 8).min(IOVAS - iova - 1);
    // From 32 on the common ones come again.
    match kind % 48 {
        0 => Op::Add {
            memory,
            place,
            known: c % 2 == 0,
        },
        1 => Op::Move { memory, place },
        2 => Op::Remove { memory },
        3 => Op::Grow { memory },
        4 => Op::Add {
            memory,
            place,
            known: true,
        },
        5..=7 => Op::Map {
            view,
            iova,
            gpa: c % (PLACES * PLACE),
            n: 1 + (a / 2 % 8).min(IOVAS - iova - 1),
        },
        8..=10 => Op::Unmap { view, iova, n },
        11 => Op::UnmapDirty {
            view,
            iova,
            n,
            words: a.wrapping_mul(0x9e37) >> 3,
        },
        12..=14 => Op::Vmm { memory, page },
        15..=16 => Op::Mark { view, iova },
        17..=18 => Op::Late {
            handle: a as usize % 4,
            page,
        },
        19..=22 => Op::Log { view, iova },
        23..=24 => Op::Kvm { memory, page },
        25 => Op::FailLog { view },
        26 if b % 4 == 3 => Op::Upgrade,
        26 => Op::FailKvm,
        27 => Op::Plug {
            view,
            kind: match (b % 8, c % 2) {
                (0 | 1, _) => LogKind::Device,
                (2 | 3, _) => LogKind::Container,
                (_, 0) => LogKind::Strict,
                _ => LogKind::Loose,
            },
        },
        28 => Op::Discard { memory, page },
        29 => Op::DiscardTaken { memory, page },
        30 => Op::Start,
        31 if c % 4 == 0 => Op::Stop,
        31 => Op::Remap {
            view,
            iova,
            gpa: c / 4 % (PLACES * PLACE),
        },
        32..=35 => Op::Map {
            view,
            iova,
            gpa: c % (PLACES * PLACE),
            n: 1,
        },
        36..=38 => Op::Log { view, iova },
        39..=40 => Op::Unmap { view, iova, n },
        41 => Op::Move { memory, place },
        _ => Op::Take {
            delivered: c % 4 != 0,
        },
    }
}
