// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every short sequence of operations on a guest of a few pages: the tracker against
//! the naive model.

#[path = "support/sequences.rs"]
mod sequences;

use dirty_model::tracked::{run, LogKind, Op};
use sequences::depth;

/// Runs every sequence of operations of `alphabet` after `prefix`.
fn all_sequences<const N: usize>(prefix: &[Op], alphabet: [Op; N]) {
    let n = sequences::all(prefix, &alphabet, |ops| {
        if let Err(what) = run(ops) {
            panic!("{what}\n{ops:#?}");
        }
    });
    assert_eq!(n, (N as u64).pow(depth()));
}

/// View 0 gets a log, or loses it.
const PLUG: Op = Op::Plug {
    view: 0,
    kind: LogKind::Strict,
};

/// The unmap of IOVA 0 tells that it was written.
const UNMAP_DIRTY: Op = Op::UnmapDirty {
    view: 0,
    iova: 0,
    n: 1,
    words: 1,
};

/// A memory becomes a slot. The destination has its content.
fn add(memory: usize, place: u64) -> Op {
    Op::Add {
        memory,
        place,
        known: true,
    }
}

/// View 0 maps `n` pages.
fn map(iova: u64, gpa: u64, n: u64) -> Op {
    Op::Map {
        view: 0,
        iova,
        gpa,
        n,
    }
}

/// View 0 unmaps `n` pages from IOVA 0 on.
fn unmap(n: u64) -> Op {
    Op::Unmap {
        view: 0,
        iova: 0,
        n,
    }
}

/// A slot that goes, comes back, moves and grows, and another that comes to its
/// address: 13 operations.
#[test]
fn slots() {
    let alphabet = [
        add(0, 0),
        Op::Add {
            memory: 0,
            place: 1,
            known: false,
        },
        add(1, 0),
        Op::Move {
            memory: 0,
            place: 1,
        },
        Op::Remove { memory: 0 },
        Op::Grow { memory: 0 },
        Op::Vmm { memory: 0, page: 1 },
        Op::Kvm { memory: 0, page: 1 },
        Op::Late { handle: 0, page: 0 },
        Op::Discard { memory: 0, page: 1 },
        Op::DiscardTaken { memory: 0, page: 1 },
        Op::Take { delivered: true },
        Op::Take { delivered: false },
    ];
    all_sequences(&[add(0, 0), map(0, 1, 2), Op::Start], alphabet);
}

/// Mappings that come and go, also in the midst of a take, and a log that fails, goes
/// and comes back, while a slot moves: 12 operations.
fn mappings(kind: LogKind) {
    let alphabet = [
        map(0, 0, 2),
        unmap(1),
        unmap(2),
        UNMAP_DIRTY,
        Op::Remap {
            view: 0,
            iova: 0,
            gpa: 9,
        },
        Op::Log { view: 0, iova: 0 },
        Op::Log { view: 0, iova: 1 },
        Op::FailLog { view: 0 },
        Op::Plug { view: 0, kind },
        Op::Move {
            memory: 0,
            place: 2,
        },
        Op::Take { delivered: true },
        Op::Take { delivered: false },
    ];
    let prefix = [
        add(0, 0),
        add(1, 1),
        Op::Plug { view: 0, kind },
        map(0, 0, 1),
        Op::Start,
    ];
    all_sequences(&prefix, alphabet);
}

#[test]
fn mappings_and_a_simulated_log() {
    mappings(LogKind::Strict);
}

#[test]
fn mappings_and_a_device_log() {
    mappings(LogKind::Device);
}

#[test]
fn mappings_and_a_container() {
    mappings(LogKind::Container);
}

/// Slots that come to where a mapping leads to nothing, and leave: 12 operations.
#[test]
fn a_mapping_of_nothing() {
    let alphabet = [
        add(1, 1),
        Op::Move {
            memory: 1,
            place: 2,
        },
        Op::Remove { memory: 1 },
        Op::Move {
            memory: 0,
            place: 1,
        },
        unmap(1),
        UNMAP_DIRTY,
        Op::Log { view: 0, iova: 0 },
        Op::Mark { view: 0, iova: 1 },
        Op::Late { handle: 0, page: 0 },
        Op::FailLog { view: 0 },
        Op::Take { delivered: true },
        Op::Take { delivered: false },
    ];
    all_sequences(&[add(0, 0), PLUG, map(0, 8, 2), Op::Start], alphabet);
}

/// Tracking that stops and starts while a log and a slot go and come, and KVM's log
/// and the other fail: 13 operations.
#[test]
fn start_and_stop() {
    let alphabet = [
        Op::Start,
        Op::Stop,
        PLUG,
        map(0, 1, 1),
        unmap(1),
        Op::Log { view: 0, iova: 0 },
        Op::FailLog { view: 0 },
        Op::Late { handle: 0, page: 0 },
        Op::Kvm { memory: 0, page: 1 },
        Op::FailKvm,
        Op::Remove { memory: 0 },
        add(0, 1),
        Op::Take { delivered: true },
    ];
    all_sequences(&[add(0, 0), PLUG, map(0, 0, 1), Op::Start], alphabet);
}

/// Upgrades while slots move, mappings come and go, and logs have what no take has seen
/// or fail: 13 operations.
#[test]
fn upgrades() {
    let alphabet = [
        Op::Upgrade,
        map(0, 9, 2),
        unmap(1),
        Op::Move {
            memory: 0,
            place: 2,
        },
        Op::Vmm { memory: 0, page: 1 },
        Op::Kvm { memory: 0, page: 0 },
        Op::Log { view: 0, iova: 0 },
        Op::FailLog { view: 0 },
        Op::Late { handle: 0, page: 0 },
        PLUG,
        Op::DiscardTaken { memory: 0, page: 1 },
        Op::Take { delivered: true },
        Op::Take { delivered: false },
    ];
    let prefix = [add(0, 0), add(1, 1), PLUG, map(0, 0, 1), Op::Start];
    all_sequences(&prefix, alphabet);
}
