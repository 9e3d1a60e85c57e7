// SPDX-License-Identifier: GPL-2.0-only
//! Each call of each feature with all that its answer may depend on, each change from
//! one state to another, and saves and loads.

use dirty_model::migration::{Op, Place, HEADER, TOTAL};

const GET: u32 = 0x1_0000;
const SET: u32 = 0x2_0000;

const STOP_COPY: u32 = 3;
const RESUMING: u32 = 4;
const RUNNING: u32 = 2;
const PRE_COPY: u32 = 6;

fn feature(n: u32, flags: u32, argsz: u32, at: Place, state: u32) -> Op {
    Op::Feature {
        n,
        flags,
        argsz,
        at,
        state,
    }
}

fn set(state: u32) -> Op {
    feature(2, SET, 16, Place::Mem, state)
}

fn get() -> Op {
    feature(2, GET, 16, Place::Mem, 0)
}

fn precopy(file: usize) -> Op {
    Op::Precopy {
        file,
        nr: 0x3b79,
        argsz: 24,
        flags: 0,
        at: Place::Mem,
    }
}

/// All of them.
pub(crate) fn operations() -> Vec<Op> {
    let mut ops = Vec::new();
    arguments(&mut ops);
    changes(&mut ops);
    transfers(&mut ops);
    ops
}

/// Feature, flags, size and place. Nothing here changes the state.
fn arguments(ops: &mut Vec<Op>) {
    let flags = (0..16).map(|bits| bits * GET).chain([0x8000_0000]);
    for (n, flags) in (0..=14).flat_map(|n| flags.clone().map(move |flags| (n, flags))) {
        for argsz in [0, 7, 8, 15, 16, 17] {
            for at in Place::ALL {
                ops.push(feature(n, flags, argsz, at, 0));
            }
        }
        ops.push(Op::Reopen);
    }
}

/// From each state to each number.
fn changes(ops: &mut Vec<Op>) {
    for (from, to) in (1..=7).flat_map(|from| (0..=8).map(move |to| (from, to))) {
        ops.push(Op::Reset);
        ops.push(set(from));
        ops.push(set(to));
        ops.push(get());
    }
    ops.push(Op::Reopen);
    // The answer cannot be written, but the state changes, and the file is lost.
    for at in [Place::ReadOnly, Place::Half, Place::Hole] {
        for state in [STOP_COPY, RESUMING, PRE_COPY, RUNNING, 0] {
            ops.push(feature(2, SET, 16, at, state));
            ops.push(get());
        }
    }
    ops.push(Op::Reopen);
}

/// Saves with and without pre-copy, loads that are good, short, wrong and late.
fn transfers(ops: &mut Vec<Op>) {
    // A save without pre-copy, of which a load takes all.
    let save = opened(ops);
    ops.extend([set(STOP_COPY), precopy(save), set(STOP_COPY)]);
    ops.extend([0, 1, TOTAL, 1].map(|len| Op::Read { file: save, len }));
    ops.push(set(RUNNING));
    ops.push(Op::Read { file: save, len: 1 });
    let load = save + 1;
    ops.extend([set(RESUMING), precopy(load)]);
    ops.push(Op::Read { file: load, len: 1 });
    ops.push(Op::Copy {
        from: save,
        to: load,
    });
    ops.push(Op::Write { file: load, len: 1 });
    ops.extend([set(RUNNING), get()]);
    ops.push(Op::Write { file: load, len: 1 });
    ops.push(Op::Copy {
        from: save,
        to: load,
    });

    // A save with pre-copy, with each question about it.
    let save = load + 1;
    ops.push(set(PRE_COPY));
    for flags in [0, 1, 0x8000_0001] {
        for argsz in [0, 8, 23, 24, 25, u32::MAX] {
            for at in Place::ALL {
                ops.extend([0x3b79, 0x3b75].map(|nr| Op::Precopy {
                    file: save,
                    nr,
                    argsz,
                    flags,
                    at,
                }));
            }
        }
    }
    ops.push(feature(12, SET, 8, Place::Mem, 0));
    ops.extend([0, 1, 0x8000_0001].map(|flags| Op::Precopy {
        file: save,
        nr: 0x3b79,
        argsz: 24,
        flags,
        at: Place::Mem,
    }));
    ops.push(Op::Write { file: save, len: 1 });
    ops.extend([10, HEADER, 1].map(|len| Op::Read { file: save, len }));
    ops.extend([precopy(save), set(7), precopy(save), set(PRE_COPY)]);
    ops.extend([precopy(save), set(STOP_COPY), precopy(save)]);
    ops.extend([10, TOTAL, 1].map(|len| Op::Read { file: save, len }));
    ops.extend([set(PRE_COPY), get(), set(7), get(), set(1)]);
    ops.extend([Op::Read { file: save, len: 1 }, precopy(save)]);
    ops.push(Op::Close { file: save });
    ops.push(Op::Close { file: save });

    // Loads: nothing, a part, and the rest; a wrong header; a reset in the middle.
    let load = save + 1;
    ops.extend([set(RESUMING), set(1), get(), set(RUNNING), get()]);
    ops.push(Op::Write {
        file: load,
        len: TOTAL + 1,
    });
    ops.push(Op::Write { file: load, len: 0 });
    ops.push(Op::Copy {
        from: save,
        to: load,
    });
    ops.extend([set(RUNNING), get()]);
    let load = load + 1;
    ops.push(set(RESUMING));
    ops.push(Op::Write {
        file: load,
        len: 10,
    });
    ops.extend([set(RUNNING), get()]);
    ops.push(Op::Write {
        file: load,
        len: 20,
    });
    ops.push(Op::Write {
        file: load,
        len: TOTAL - 30,
    });
    ops.extend([set(RUNNING), get(), set(RESUMING)]);
    let load = load + 1;
    ops.push(Op::Write {
        file: load,
        len: 10,
    });
    ops.extend([Op::Reset, get()]);
    ops.push(Op::Write {
        file: load,
        len: 10,
    });
    ops.extend([set(PRE_COPY), Op::Reset, get(), precopy(load + 1)]);
    ops.push(set(PRE_COPY));
    // The file of a save that is over, while another save goes on.
    ops.extend([precopy(load + 1), precopy(load + 2)]);
    // Version 2 of pre-copy info ends with the last user.
    ops.extend([
        Op::Reopen,
        set(PRE_COPY),
        Op::Precopy {
            file: load + 3,
            nr: 0x3b79,
            argsz: 24,
            flags: 5,
            at: Place::Mem,
        },
    ]);
}

/// How many data files the operations open.
fn opened(ops: &[Op]) -> usize {
    let mut core = dirty_model::migration::Core::new(7);
    let answers = ops.iter().map(|op| core.run(op));
    answers.filter(|answer| answer.contains(" f")).count()
}
