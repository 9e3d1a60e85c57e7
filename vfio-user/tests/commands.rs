// SPDX-License-Identifier: MIT OR Apache-2.0
//! For each command: payloads that are well, short, long, or wrong in one field.

mod support;

use support::{read, MAX};
use vfio_user_wire::wire::*;
use vfio_user_wire::{Command, Error, FeatureCall, Request, Verdict};

/// A payload with its descriptors, and the error that it gets.
type Row = (&'static str, Vec<u8>, usize, Option<Error>);

fn check(command: Command, rows: &[Row]) {
    for (what, payload, fds, error) in rows {
        let got = read(command, payload, *fds).err();
        assert_eq!(got, *error, "{command:?}: {what}");
    }
}

/// Every prefix of a payload that has no byte too many is too short.
fn every_prefix_is_short(command: Command, payload: &[u8], fds: usize) {
    assert!(read(command, payload, fds).is_ok(), "{command:?}");
    for len in 0..payload.len() {
        let got = read(command, &payload[..len], fds);
        assert_eq!(got, Err(Error::ShortPayload), "{command:?}, {len} bytes");
    }
}

#[test]
fn dma_map() {
    let map = |argsz: u32, flags: u32| bytes![argsz, flags, 0u64, 0x1000u64, 0x1000u64];
    let with_more = [map(32, 3), vec![0; 9]].concat();
    every_prefix_is_short(Command::DmaMap, &map(32, 3), 0);
    check(
        Command::DmaMap,
        &[
            ("well", map(32, 3), 0, None),
            ("a descriptor", map(32, 3), 1, None),
            ("descriptors that are not used", map(32, 3), 5, None),
            ("no access", map(32, 0), 0, None),
            ("a larger argsz", map(64, 3), 0, None),
            ("a longer payload", with_more, 0, None),
            ("MMAP", map(32, 7), 1, None),
            ("FILE_IO", map(32, 11), 1, None),
            ("argsz", map(31, 3), 0, Some(Error::ShortArgsz)),
            (
                "argsz before flags",
                map(31, 16),
                0,
                Some(Error::ShortArgsz),
            ),
            ("MMAP of nothing", map(32, 7), 0, Some(Error::NoDescriptor)),
            (
                "FILE_IO of nothing",
                map(32, 11),
                0,
                Some(Error::NoDescriptor),
            ),
            (
                "descriptor before flags",
                map(32, 20),
                0,
                Some(Error::NoDescriptor),
            ),
            ("an unknown flag", map(32, 16), 0, Some(Error::UnknownFlags)),
            (
                "the highest flag",
                map(32, 1 << 31),
                0,
                Some(Error::UnknownFlags),
            ),
            (
                "MMAP and FILE_IO",
                map(32, 15),
                1,
                Some(Error::FlagCombination),
            ),
        ],
    );
}

#[test]
fn dma_unmap() {
    let unmap = |argsz: u32, flags: u32, iova: u64, size: u64| bytes![argsz, flags, iova, size];
    let bits = |argsz: u32, pgsize: u64, size: u64| {
        [unmap(argsz, 1, 0x1000, 0x1000), bytes![pgsize, size]].concat()
    };
    every_prefix_is_short(Command::DmaUnmap, &unmap(24, 0, 0, 0), 0);
    every_prefix_is_short(Command::DmaUnmap, &bits(48, 4096, 8), 0);
    check(
        Command::DmaUnmap,
        &[
            ("well", unmap(24, 0, 0x1000, 0x1000), 0, None),
            ("everything", unmap(24, 2, 0, 0), 0, None),
            ("a bitmap", bits(48, 4096, 8), 0, None),
            (
                "the largest bitmap",
                bits(MAX, 4096, u64::from(MAX) - 40),
                0,
                None,
            ),
            ("argsz", unmap(23, 0, 0, 0), 0, Some(Error::ShortArgsz)),
            (
                "argsz of a bitmap",
                bits(47, 4096, 8),
                0,
                Some(Error::ShortArgsz),
            ),
            (
                "a bitmap that wraps",
                bits(48, 4096, u64::MAX),
                0,
                Some(Error::ShortArgsz),
            ),
            (
                "a huge argsz",
                unmap(MAX + 1, 0, 0, 0),
                0,
                Some(Error::LongArgsz),
            ),
            (
                "a huge bitmap",
                bits(u32::MAX, 4096, 1 << 31),
                0,
                Some(Error::LongArgsz),
            ),
            (
                "everything at an iova",
                unmap(24, 2, 1, 0),
                0,
                Some(Error::FlagCombination),
            ),
            (
                "everything of a size",
                unmap(24, 2, 0, 1),
                0,
                Some(Error::FlagCombination),
            ),
            (
                "a bitmap of everything",
                unmap(24, 3, 0, 0),
                0,
                Some(Error::UnknownFlags),
            ),
            (
                "an unknown flag",
                unmap(24, 4, 0, 0),
                0,
                Some(Error::UnknownFlags),
            ),
        ],
    );
}

#[test]
fn infos() {
    for (command, size) in [
        (Command::GetInfo, 16),
        (Command::GetRegionInfo, 32),
        (Command::GetIrqInfo, 16),
        (Command::GetRegionIoFds, 16),
    ] {
        let info = |argsz: u32| [bytes![argsz], vec![0; size - 4]].concat();
        let least = u32::try_from(size).unwrap();
        every_prefix_is_short(command, &info(least), 0);
        check(
            command,
            &[
                ("well", info(least), 0, None),
                ("a larger argsz", info(4096), 0, None),
                (
                    "a longer payload",
                    [info(least), vec![1; 3]].concat(),
                    0,
                    None,
                ),
                ("argsz", info(least - 1), 0, Some(Error::ShortArgsz)),
                ("argsz of 0", info(0), 0, Some(Error::ShortArgsz)),
            ],
        );
    }
    let io = |argsz: u32, flags: u32, count: u32| bytes![argsz, flags, 0u32, count];
    check(
        Command::GetRegionIoFds,
        &[
            ("the largest argsz", io(MAX, 0, 0), 0, None),
            ("a huge argsz", io(MAX + 1, 0, 0), 0, Some(Error::LongArgsz)),
            ("flags", io(16, 1, 0), 0, Some(Error::NotZero)),
            ("a count", io(16, 0, 1), 0, Some(Error::NotZero)),
            ("flags before argsz", io(0, 1, 0), 0, Some(Error::NotZero)),
        ],
    );
}

#[test]
fn set_irqs() {
    let set = |argsz: u32, flags: u32, start: u32, count: u32, data: usize| {
        [bytes![argsz, flags, 0u32, start, count], vec![1; data]].concat()
    };
    const NONE: u32 = IRQ_DATA_NONE | IRQ_ACTION_TRIGGER;
    const BOOL: u32 = IRQ_DATA_BOOL | IRQ_ACTION_TRIGGER;
    const EVENT: u32 = IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER;
    every_prefix_is_short(Command::SetIrqs, &set(20, NONE, 0, 1, 0), 0);
    check(
        Command::SetIrqs,
        &[
            ("trigger", set(20, NONE, 2, 1, 0), 0, None),
            ("disable all", set(20, NONE, 0, 0, 0), 0, None),
            (
                "mask",
                set(20, IRQ_DATA_NONE | IRQ_ACTION_MASK, 0, 1, 0),
                0,
                None,
            ),
            ("booleans", set(23, BOOL, 0, 3, 3), 0, None),
            ("descriptors", set(20, EVENT, 0, 3, 0), 3, None),
            ("take descriptors away", set(20, EVENT, 0, 3, 0), 0, None),
            ("argsz", set(19, NONE, 0, 1, 0), 0, Some(Error::ShortArgsz)),
            (
                "an unknown flag",
                set(20, NONE | 64, 0, 1, 0),
                0,
                Some(Error::UnknownFlags),
            ),
            (
                "too few booleans",
                set(20, BOOL, 0, 3, 2),
                0,
                Some(Error::CountMismatch),
            ),
            (
                "too many booleans",
                set(20, BOOL, 0, 3, 4),
                0,
                Some(Error::CountMismatch),
            ),
            (
                "no action",
                set(20, IRQ_DATA_NONE, 0, 1, 0),
                0,
                Some(Error::FlagCombination),
            ),
            (
                "no data",
                set(20, IRQ_ACTION_MASK, 0, 1, 0),
                0,
                Some(Error::FlagCombination),
            ),
            (
                "two actions",
                set(20, NONE | 8, 0, 1, 0),
                0,
                Some(Error::FlagCombination),
            ),
            (
                "two kinds",
                set(20, NONE | 4, 0, 1, 0),
                0,
                Some(Error::FlagCombination),
            ),
            (
                "a wrap",
                set(20, NONE, u32::MAX, 1, 0),
                0,
                Some(Error::IrqRange),
            ),
            (
                "none, not at 0",
                set(20, NONE, 1, 0, 0),
                0,
                Some(Error::IrqRange),
            ),
            (
                "none of events",
                set(20, EVENT, 0, 0, 0),
                0,
                Some(Error::FlagCombination),
            ),
            (
                "a descriptor of none",
                set(20, NONE, 0, 1, 0),
                1,
                Some(Error::Descriptors),
            ),
            (
                "too few descriptors",
                set(20, EVENT, 0, 3, 0),
                2,
                Some(Error::Descriptors),
            ),
            (
                "too many descriptors",
                set(20, EVENT, 0, 3, 0),
                4,
                Some(Error::Descriptors),
            ),
        ],
    );
}

#[test]
fn regions() {
    let at = |count: u32, data: usize| [bytes![8u64, 2u32, count], vec![5; data]].concat();
    every_prefix_is_short(Command::RegionRead, &at(4, 0), 0);
    check(
        Command::RegionRead,
        &[
            ("nothing", at(0, 0), 0, None),
            ("the longest", at(MAX, 0), 0, None),
            ("too long", at(MAX + 1, 0), 0, Some(Error::TransferTooLong)),
            ("2 GiB", at(1 << 31, 0), 0, Some(Error::TransferTooLong)),
        ],
    );
    check(
        Command::RegionWrite,
        &[
            ("well", at(4, 4), 0, None),
            ("nothing", at(0, 0), 0, None),
            ("the longest", at(MAX, MAX as usize), 0, None),
            ("short", vec![0; 15], 0, Some(Error::ShortPayload)),
            (
                "too long",
                at(MAX + 1, MAX as usize + 1),
                0,
                Some(Error::TransferTooLong),
            ),
            ("too few data", at(4, 3), 0, Some(Error::CountMismatch)),
            ("too many data", at(4, 5), 0, Some(Error::CountMismatch)),
            (
                "the largest count",
                at(u32::MAX, 4),
                0,
                Some(Error::TransferTooLong),
            ),
        ],
    );
}

#[test]
fn dma_messages() {
    let at = |count: u64, data: usize| [bytes![0x1000u64, count], vec![5; data]].concat();
    every_prefix_is_short(Command::DmaRead, &at(4, 0), 0);
    check(
        Command::DmaRead,
        &[
            ("the longest", at(MAX.into(), 0), 0, None),
            (
                "too long",
                at(u64::from(MAX) + 1, 0),
                0,
                Some(Error::DmaTooLong),
            ),
            (
                "the largest count",
                at(u64::MAX, 0),
                0,
                Some(Error::DmaTooLong),
            ),
        ],
    );
    check(
        Command::DmaWrite,
        &[
            ("well", at(4, 4), 0, None),
            ("more data", at(4, 5), 0, None),
            ("short", vec![0; 15], 0, Some(Error::ShortPayload)),
            ("too few data", at(4, 3), 0, Some(Error::DmaTooLong)),
            (
                "the largest count",
                at(u64::MAX, 4),
                0,
                Some(Error::DmaTooLong),
            ),
        ],
    );
    assert_eq!(Error::DmaTooLong.errno(), 7);
    let more = at(4, 5);
    let Ok(Request::DmaWrite { data, .. }) = read(Command::DmaWrite, &more, 0) else {
        panic!("DMA_WRITE");
    };
    assert_eq!(data.len(), 4);
}

#[test]
fn reset() {
    check(
        Command::Reset,
        &[
            ("well", vec![], 0, None),
            ("a payload", vec![1; 40], 0, None),
        ],
    );
}

#[test]
fn region_write_multi() {
    let write = |count: u32| bytes![8u64, 1u32, count, 0x0807_0605_0403_0201u64];
    let multi = |n: u64, writes: &[Vec<u8>]| [bytes![n], writes.concat()].concat();
    check(
        Command::RegionWriteMulti,
        &[
            ("none", multi(0, &[]), 0, None),
            ("two", multi(2, &[write(8), write(0)]), 0, None),
            ("unused ones", multi(1, &[write(8), write(9)]), 0, None),
            ("short", vec![0; 7], 0, Some(Error::ShortPayload)),
            (
                "too few",
                multi(2, &[write(8)]),
                0,
                Some(Error::CountMismatch),
            ),
            (
                "a part",
                multi(1, &[write(8)[..23].to_vec()]),
                0,
                Some(Error::CountMismatch),
            ),
            (
                "9 bytes",
                multi(1, &[write(9)]),
                0,
                Some(Error::CountMismatch),
            ),
            (
                "a long one",
                multi(1, &[write(u32::MAX)]),
                0,
                Some(Error::CountMismatch),
            ),
            (
                "a wrap",
                multi(u64::MAX / 24 + 1, &[write(8)]),
                0,
                Some(Error::CountMismatch),
            ),
            (
                "the largest",
                multi(u64::MAX, &[write(8)]),
                0,
                Some(Error::CountMismatch),
            ),
        ],
    );
    let two = multi(2, &[write(8), write(3)]);
    let Ok(Request::RegionWriteMulti(writes)) = read(Command::RegionWriteMulti, &two, 0) else {
        panic!("REGION_WRITE_MULTI");
    };
    let lengths: Vec<_> = writes
        .iter()
        .map(|w| (w.offset, w.region, w.data))
        .collect();
    assert_eq!(
        lengths,
        [
            (8, 1, &[1, 2, 3, 4, 5, 6, 7, 8][..]),
            (8, 1, &[1, 2, 3][..])
        ]
    );
}

#[test]
fn mig_data() {
    let mig = |argsz: u32, size: u32, data: usize| [bytes![argsz, size], vec![5; data]].concat();
    every_prefix_is_short(Command::MigDataRead, &mig(8, 0, 0), 0);
    check(
        Command::MigDataRead,
        &[
            ("the longest", mig(MAX + 8, MAX, 0), 0, None),
            (
                "too long",
                mig(u32::MAX, MAX + 1, 0),
                0,
                Some(Error::TransferTooLong),
            ),
            ("argsz", mig(11, 4, 0), 0, Some(Error::ShortArgsz)),
        ],
    );
    check(
        Command::MigDataWrite,
        &[
            ("well", mig(12, 4, 4), 0, None),
            ("more data", mig(12, 4, 5), 0, None),
            ("short", vec![0; 7], 0, Some(Error::ShortPayload)),
            (
                "too long",
                mig(u32::MAX, u32::MAX, 4),
                0,
                Some(Error::TransferTooLong),
            ),
            ("argsz", mig(8, 4, 4), 0, Some(Error::ShortArgsz)),
            ("too few data", mig(12, 4, 3), 0, Some(Error::CountMismatch)),
        ],
    );
}

#[test]
fn features() {
    const GET: u32 = FEATURE_GET;
    const SET: u32 = FEATURE_SET;
    const PROBE: u32 = FEATURE_PROBE;
    let call = |argsz: u32, flags: u32, data: &[u8]| [bytes![argsz, flags], data.to_vec()].concat();
    let start = |ranges: u32, have: usize| {
        let data = [bytes![4096u64, ranges, 0u32], vec![0; have * 16]].concat();
        call(u32::try_from(data.len()).unwrap() + 8, SET | 6, &data)
    };
    let report =
        |argsz: u32, length: u64, page: u64| call(argsz, GET | 8, &bytes![0u64, length, page]);
    every_prefix_is_short(Command::Feature, &call(16, GET | 1, &[]), 0);
    check(
        Command::Feature,
        &[
            ("what can it do", call(16, GET | 1, &[]), 0, None),
            ("which state", call(16, GET | 2, &[]), 0, None),
            ("another state", call(16, SET | 2, &[0; 8]), 0, None),
            ("start, all", start(0, 0), 0, None),
            ("start, 2", start(2, 2), 0, None),
            ("start, 2 of 3", start(2, 3), 0, None),
            ("stop", call(8, SET | 7, &[]), 0, None),
            ("report", report(40, 64 * 4096, 4096), 0, None),
            (
                "the largest report",
                report(MAX + 32, u64::from(MAX) << 15, 4096),
                0,
                None,
            ),
            ("probe", call(8, PROBE | 1, &[]), 0, None),
            (
                "probe GET and SET",
                call(8, PROBE | GET | SET | 2, &[]),
                0,
                None,
            ),
            (
                "an unknown flag",
                call(16, GET | 1 << 19 | 1, &[]),
                0,
                Some(Error::UnknownFlags),
            ),
            (
                "feature 0",
                call(16, GET, &[]),
                0,
                Some(Error::UnknownFeature),
            ),
            (
                "feature 9",
                call(16, GET | 9, &[]),
                0,
                Some(Error::UnknownFeature),
            ),
            (
                "SET of MIGRATION",
                call(16, SET | 1, &[0; 8]),
                0,
                Some(Error::UnknownFeature),
            ),
            (
                "GET of START",
                call(32, GET | 6, &[0; 16]),
                0,
                Some(Error::UnknownFeature),
            ),
            (
                "probe GET of STOP",
                call(8, PROBE | GET | 7, &[]),
                0,
                Some(Error::UnknownFeature),
            ),
            (
                "GET and SET",
                call(16, GET | SET | 2, &[0; 8]),
                0,
                Some(Error::FlagCombination),
            ),
            ("neither", call(16, 2, &[]), 0, Some(Error::FlagCombination)),
            (
                "argsz of GET",
                call(15, GET | 1, &[]),
                0,
                Some(Error::ShortArgsz),
            ),
            (
                "argsz of SET",
                call(15, SET | 2, &[0; 8]),
                0,
                Some(Error::ShortArgsz),
            ),
            (
                "argsz of a probe",
                call(7, PROBE | 1, &[]),
                0,
                Some(Error::ShortArgsz),
            ),
            (
                "a short state",
                call(16, SET | 2, &[0; 7]),
                0,
                Some(Error::ShortPayload),
            ),
            (
                "a short start",
                call(24, SET | 6, &[0; 15]),
                0,
                Some(Error::ShortPayload),
            ),
            ("too few ranges", start(3, 2), 0, Some(Error::CountMismatch)),
            (
                "the most ranges",
                start(u32::MAX, 2),
                0,
                Some(Error::CountMismatch),
            ),
            (
                "a short report",
                call(99, GET | 8, &[0; 23]),
                0,
                Some(Error::ShortPayload),
            ),
            ("page size 0", report(40, 4096, 0), 0, Some(Error::PageSize)),
            (
                "page size 4097",
                report(40, 4096, 4097),
                0,
                Some(Error::PageSize),
            ),
            ("no length", report(40, 0, 4096), 0, Some(Error::ZeroLength)),
            (
                "argsz of a report",
                report(39, 4096, 4096),
                0,
                Some(Error::ShortArgsz),
            ),
            (
                "everything",
                report(u32::MAX, u64::MAX, 1),
                0,
                Some(Error::ShortArgsz),
            ),
            (
                "a large bitmap",
                report(u32::MAX, (u64::from(MAX) << 15) + 1, 4096),
                0,
                Some(Error::BitmapTooLong),
            ),
        ],
    );
    assert_eq!(Error::BitmapTooLong.errno(), 7);
    let two = start(2, 3);
    let Ok(Request::Feature(feature)) = read(Command::Feature, &two, 0) else {
        panic!("DEVICE_FEATURE");
    };
    let Ok(FeatureCall::StartLogging { page_size, ranges }) = feature.call(MAX) else {
        panic!("DMA_LOGGING_START");
    };
    assert_eq!(
        (page_size, ranges.len(), ranges.iter().count()),
        (4096, 2, 2)
    );
}

#[test]
fn errnos() {
    for error in Error::ALL {
        let expected = match error {
            Error::DmaTooLong | Error::BitmapTooLong => 7,
            // A side that reads a wrong reply sends none.
            _ if error.verdict() == Verdict::Close => continue,
            _ => 22,
        };
        assert_eq!(error.errno(), expected, "{error:?}");
    }
}
