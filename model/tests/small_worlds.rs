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
/// address: 15 operations.
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
        Op::Move {
            memory: 0,
            place: 0,
        },
        Op::Remove { memory: 0 },
        Op::Grow { memory: 0 },
        Op::Vmm { memory: 0, page: 1 },
        Op::Kvm { memory: 0, page: 1 },
        Op::Mark { view: 0, iova: 1 },
        Op::Late { handle: 0, page: 0 },
        Op::Discard { memory: 0, page: 1 },
        Op::DiscardTaken { memory: 0, page: 1 },
        Op::Take { delivered: true },
        Op::Take { delivered: false },
    ];
    all_sequences(&[add(0, 0), map(0, 1, 2), Op::Start], alphabet);
}

/// Mappings that come and go, also in the midst of a take, and a log that fails, goes
/// and comes back, while a slot moves: 15 operations.
fn mappings(kind: LogKind) {
    let alphabet = [
        map(0, 0, 2),
        map(1, 8, 1),
        unmap(1),
        unmap(2),
        Op::UnmapDirty {
            view: 0,
            iova: 0,
            n: 1,
            words: 1,
        },
        Op::Remap {
            view: 0,
            iova: 0,
            gpa: 9,
        },
        Op::Log { view: 0, iova: 0 },
        Op::Log { view: 0, iova: 1 },
        Op::Late { handle: 0, page: 0 },
        Op::FailLog { view: 0 },
        Op::Plug { view: 0, kind },
        Op::Move {
            memory: 0,
            place: 2,
        },
        Op::Remove { memory: 1 },
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

/// Tracking that starts and stops while two logs, KVM's and the slots come and go: 16
/// operations.
#[test]
fn start_and_stop() {
    let alphabet = [
        Op::Start,
        Op::Stop,
        Op::Plug {
            view: 0,
            kind: LogKind::Device,
        },
        map(0, 0, 1),
        unmap(1),
        Op::Log { view: 0, iova: 0 },
        Op::FailLog { view: 0 },
        Op::Mark { view: 0, iova: 0 },
        Op::Late { handle: 0, page: 0 },
        Op::Kvm { memory: 0, page: 1 },
        Op::FailKvm,
        Op::Vmm { memory: 0, page: 2 },
        Op::Remove { memory: 0 },
        add(0, 1),
        Op::Take { delivered: true },
        Op::Take { delivered: false },
    ];
    all_sequences(&[add(0, 0)], alphabet);
}
