// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every message is the same after it was written and read, and every reply to a request
//! belongs to it.

mod support;

use proptest::prelude::*;
use support::MAX;
use vfio_user_wire::wire::*;
use vfio_user_wire::{
    Capabilities, Command, Error, Feature, FeatureAnswer, FeatureCall, Header, Migration, Ranges,
    RegionWrite, Reply, Request, SubRegions, Version, Writes,
};

/// Fields from which a message of any command is made.
#[derive(Clone, Debug)]
struct Fields {
    a: u64,
    b: u64,
    c: u32,
    d: u32,
    data: Vec<u8>,
}

fn fields() -> impl Strategy<Value = Fields> {
    let data = prop::collection::vec(any::<u8>(), 0..200);
    (any::<u64>(), any::<u64>(), any::<u32>(), any::<u32>(), data)
        .prop_map(|(a, b, c, d, data)| Fields { a, b, c, d, data })
}

fn capabilities(f: &Fields) -> Capabilities {
    Capabilities {
        max_msg_fds: f.c,
        max_data_xfer_size: f.d.max(1),
        max_dma_maps: f.c ^ f.d,
        pgsizes: f.a,
        migration: (f.c & 1 != 0).then_some(Migration {
            pgsize: 1 << (f.c % 64),
            max_bitmap_size: f.b,
        }),
        write_multiple: f.c & 2 != 0,
        twin_socket: f.c & 4 != 0,
        twin_socket_fd: (f.c & 8 != 0).then_some(f.d),
    }
}

fn call<'a>(f: &Fields, ranges: &'a mut [u8]) -> FeatureCall<'a> {
    match f.c % 7 {
        0 => FeatureCall::Probe {
            feature: [1, 2, 6, 7, 8][f.d as usize % 5],
        },
        1 => FeatureCall::GetMigration,
        2 => FeatureCall::GetState,
        3 => FeatureCall::SetState(MigState {
            device_state: f.d,
            data_fd: f.c,
        }),
        4 => {
            let range = LoggingRange {
                iova: f.a,
                length: f.b,
            };
            let all = vec![range; f.d as usize % 5];
            let ranges = Ranges::write(&all, ranges).unwrap();
            assert_eq!(ranges.iter().collect::<Vec<_>>(), all);
            FeatureCall::StartLogging {
                page_size: f.a,
                ranges,
            }
        }
        5 => FeatureCall::StopLogging,
        _ => {
            let report = LoggingReport {
                iova: f.b,
                length: f.a % (1 << 30) + 1,
                page_size: 4096 << (f.d % 20),
            };
            let bytes = bitmap_bytes(report.length, report.page_size).unwrap();
            FeatureCall::Report {
                report,
                bitmap_bytes: u32::try_from(bytes).unwrap(),
            }
        }
    }
}

/// A request of `command`, whose buffers are `one` and `two`, and a reply to it.
fn messages<'a>(
    command: Command,
    f: &'a Fields,
    [one, two, three]: [&'a mut [u8]; 3],
) -> (Request<'a>, Reply<'a>) {
    let at = RegionAccess {
        offset: f.a,
        region: f.c,
        count: f.data.len() as u32,
    };
    let dma = DmaAccess {
        iova: f.a,
        count: f.data.len() as u64,
    };
    let write = RegionWrite {
        offset: f.a,
        region: f.c,
        data: &f.data,
    };
    match command {
        Command::Version => {
            let version = Version {
                minor: f.d as u16,
                capabilities: capabilities(f),
            };
            (Request::Version(version), Reply::Version(version))
        }
        Command::DmaMap => {
            let map = DmaMap {
                argsz: 32 + f.c % 100,
                flags: f.d % 4,
                offset: f.a,
                iova: f.b,
                size: f.a ^ f.b,
            };
            (Request::DmaMap(map), Reply::DmaMap)
        }
        Command::DmaUnmap => {
            let (iova, size, flags) = match f.c % 3 {
                2 => (0, 0, 2),
                flags => (f.a, f.b, flags),
            };
            let unmap = DmaUnmap {
                argsz: 40 + f.data.len() as u32,
                flags,
                iova,
                size,
            };
            let head = BitmapHead {
                pgsize: f.a,
                size: f.data.len() as u64,
            };
            let bitmap = (flags == 1).then_some(head);
            (
                Request::DmaUnmap(unmap, bitmap),
                Reply::DmaUnmap(unmap, bitmap.map(|head| (head, &f.data[..]))),
            )
        }
        Command::GetInfo => {
            let info = DeviceInfo {
                argsz: f.c.max(16),
                flags: f.d,
                num_regions: f.c,
                num_irqs: f.d,
            };
            (Request::GetInfo(info), Reply::GetInfo(info))
        }
        Command::GetRegionInfo => {
            let info = RegionInfo {
                argsz: 32 + f.c % 200,
                flags: f.d,
                index: f.c,
                cap_offset: f.d,
                size: f.a,
                offset: f.b,
            };
            let reply = Reply::region_info(&info, info, &f.data);
            (Request::GetRegionInfo(info), reply)
        }
        Command::GetRegionIoFds => {
            let io = RegionIoFds {
                argsz: 16 + f.c % 200,
                index: f.d,
                ..RegionIoFds::default()
            };
            let region = SubRegion {
                offset: f.a,
                size: f.b,
                fd_index: f.c,
                kind: f.d,
                flags: f.c,
                padding: f.d,
                value: f.a,
            };
            let all = vec![region; f.c as usize % 4];
            let regions = SubRegions::write(&all, one).unwrap();
            assert_eq!(regions.iter().collect::<Vec<_>>(), all);
            let answer = RegionIoFds {
                count: all.len() as u32,
                ..io
            };
            (
                Request::GetRegionIoFds(io),
                Reply::GetRegionIoFds(answer, regions),
            )
        }
        Command::GetIrqInfo => {
            let info = IrqInfo {
                argsz: f.c.max(16),
                flags: f.d,
                index: f.c,
                count: f.d,
            };
            (Request::GetIrqInfo(info), Reply::GetIrqInfo(info))
        }
        Command::SetIrqs => {
            let is_bool = f.c & 1 != 0 && !f.data.is_empty();
            let kind = if is_bool {
                IRQ_DATA_BOOL
            } else {
                IRQ_DATA_NONE
            };
            let set = IrqSet {
                argsz: 20 + f.data.len() as u32,
                flags: kind | 8 << (f.d % 3),
                index: f.c,
                start: f.c / 2,
                count: if is_bool {
                    f.data.len() as u32
                } else {
                    f.d / 2 + 1
                },
            };
            let data = if is_bool { &f.data[..] } else { &[] };
            (Request::SetIrqs(set, data), Reply::SetIrqs)
        }
        Command::RegionRead => (
            Request::RegionRead(at),
            Reply::RegionRead {
                offset: f.a,
                region: f.c,
                data: &f.data,
            },
        ),
        Command::RegionWrite => (Request::RegionWrite(write), Reply::RegionWrite(at)),
        Command::DmaRead => {
            let (iova, data) = (f.a, &f.data[..]);
            (Request::DmaRead(dma), Reply::DmaRead { iova, data })
        }
        Command::DmaWrite => {
            let (iova, data) = (f.a, &f.data[..]);
            let reply = (f.c & 1 != 0).then_some(dma);
            (Request::DmaWrite { iova, data }, Reply::DmaWrite(reply))
        }
        Command::Reset => (Request::Reset, Reply::Reset),
        Command::RegionWriteMulti => {
            let data = &f.data[..f.data.len().min(8)];
            let all = vec![RegionWrite { data, ..write }; f.c as usize % 5];
            let writes = Writes::write(&all, one).unwrap();
            assert_eq!(writes.iter().collect::<Vec<_>>(), all);
            (
                Request::RegionWriteMulti(writes),
                Reply::RegionWriteMulti(all.len() as u64),
            )
        }
        Command::Feature => {
            let call = call(f, one);
            let request = call.request(two).unwrap();
            assert_eq!(request.call(MAX), Ok(call));
            let bitmap;
            let answer = match call {
                FeatureCall::GetMigration => FeatureAnswer::Migration(f.a),
                FeatureCall::GetState => FeatureAnswer::State(MigState {
                    device_state: f.d,
                    data_fd: 0,
                }),
                FeatureCall::SetState(state) => FeatureAnswer::State(state),
                FeatureCall::StartLogging { .. } => FeatureAnswer::Started(4096),
                FeatureCall::Report {
                    report,
                    bitmap_bytes,
                } => {
                    bitmap = vec![0x55; bitmap_bytes as usize];
                    FeatureAnswer::Report(report, &bitmap)
                }
                FeatureCall::Probe { .. } | FeatureCall::StopLogging => FeatureAnswer::Done,
            };
            let reply = request.reply(answer, three).unwrap();
            assert_eq!(reply.answer(&request), Ok(answer));
            // argsz tells the payload's size, as the request allows it.
            assert!(reply.argsz <= request.argsz);
            assert_eq!(reply.argsz as usize, reply.data.len() + 8);
            (Request::Feature(request), Reply::Feature(reply))
        }
        Command::MigDataRead => {
            let size = f.data.len() as u32 + f.c % 10;
            (Request::MigDataRead { size }, Reply::MigDataRead(&f.data))
        }
        Command::MigDataWrite => (Request::MigDataWrite(&f.data), Reply::MigDataWrite),
        _ => panic!("{command:?} is not tested"),
    }
}

fn same(command: Command, f: &Fields, id: u16, no_reply: bool) {
    let mut buffers = [vec![0; 500], vec![0; 500], vec![0; 40_000]];
    let [one, two, three] = &mut buffers;
    let (request, reply) = messages(command, f, [one, two, three]);
    assert_eq!((request.command(), reply.command()), (command, command));
    let mut out = vec![0xaa; 41_000];

    let len = request.write(id, no_reply, &mut out).unwrap();
    let header = Header::from_bytes(out.first_chunk().unwrap());
    assert_eq!((header.id, header.command), (id, command as u16));
    assert_eq!(
        (header.wants_reply(), header.is_reply()),
        (!no_reply, false)
    );
    assert_eq!(header.payload(), len - 16);
    assert_eq!(Request::read(command, &out[16..len], 0, MAX), Ok(request));
    assert!(request.write(id, no_reply, &mut out[..len - 1]).is_err());

    let len = reply.write(id, &mut out).unwrap();
    let header = Header::from_bytes(out.first_chunk().unwrap());
    assert_eq!((header.id, header.command), (id, command as u16));
    assert_eq!((header.wants_reply(), header.is_reply()), (false, true));
    assert_eq!((header.payload(), header.failure()), (len - 16, None));
    let read = Reply::read(&header, &out[16..len]).unwrap();
    assert_eq!(read, reply);
    assert_eq!(read.check(&request), Ok(()));
    assert!(reply.write(id, &mut vec![0; len - 1]).is_err());
    let other = if command == Command::Reset {
        Request::MigDataWrite(&[])
    } else {
        Request::Reset
    };
    assert_eq!(read.check(&other), Err(Error::WrongReply));

    let failure = header.refuse(f.d % 4096 + 1);
    let read = Reply::read(&Header::from_bytes(&failure.to_bytes()), &[]).unwrap();
    assert_eq!(read, Reply::Failure(command, f.d % 4096 + 1));
    assert_eq!(read.check(&request), Ok(()));
    assert_eq!(read.write(id, &mut out), Ok(16));
    assert_eq!(out[..16], failure.to_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn every_command(f in fields(), id: u16, no_reply: bool) {
        for command in Command::ALL {
            same(*command, &f, id, no_reply);
        }
    }
}

#[test]
fn numbers() {
    for number in 0..=u16::MAX {
        let is_known = matches!(number, 1..=13 | 15..=18);
        let command = Command::from_number(number);
        assert_eq!(
            command.map(|command| command as u16),
            is_known.then_some(number)
        );
    }
    assert_eq!(Command::ALL.len(), 17);
}

#[test]
fn forms_of_replies() {
    let reply = |command: u16, flags: u32, payload: usize| Header {
        flags,
        ..support::header(command, payload)
    };
    // DMA_WRITE: QEMU, the specification, libvfio-user.
    let write = |payload: &[u8]| {
        Reply::read(&reply(12, 1, payload.len()), payload).map(|reply| {
            let Reply::DmaWrite(at) = reply else {
                panic!("{reply:?}")
            };
            at.map(|at| (at.iova, at.count))
        })
    };
    assert_eq!(write(&[]), Ok(None));
    assert_eq!(write(&bytes![5u64, 6u32]), Ok(Some((5, 6))));
    assert_eq!(write(&bytes![5u64, 6u64]), Ok(Some((5, 6))));
    for len in 1..12 {
        assert_eq!(write(&vec![0; len]), Err(Error::BadReply), "{len}");
    }
    // libvfio-user's ioeventfd has 48 bytes; the value comes last.
    let long = [
        bytes![64u32, 0u32, 0u32, 1u32],
        bytes![1u64, 4u64, 0u32, 0u32, 2u32, 9u32, 77u64, 88u64],
    ]
    .concat();
    let Ok(Reply::GetRegionIoFds(_, regions)) = Reply::read(&reply(6, 1, long.len()), &long) else {
        panic!("DEVICE_GET_REGION_IO_FDS");
    };
    let values: Vec<_> = regions.iter().map(|region| region.value).collect();
    assert_eq!(values, [88]);
    for wrong in [39, 41] {
        let payload = [bytes![0u32, 0u32, 0u32, 2u32], vec![0; 40 + wrong]].concat();
        let got = Reply::read(&reply(6, 1, payload.len()), &payload);
        assert_eq!(got.err(), Some(Error::BadReply), "{wrong}");
    }
    // Error numbers.
    for (number, errno) in [(0, 22), (1, 1), (4096, 4096), (4097, 22), (u32::MAX, 22)] {
        let header = Header {
            error: number,
            ..reply(4, 0x21, 0)
        };
        let got = Reply::read(&header, &[]);
        assert_eq!(got, Ok(Reply::Failure(Command::GetInfo, errno)));
    }
    assert_eq!(
        Reply::read(&reply(14, 1, 0), &[]),
        Err(Error::UnexpectedMessage)
    );
    assert_eq!(
        Reply::read(&reply(4, 0, 0), &[]),
        Err(Error::UnexpectedMessage)
    );
}

#[test]
fn replies_that_do_not_belong() {
    let at = |offset: u64, region: u32, count: u32| RegionAccess {
        offset,
        region,
        count,
    };
    let read = Request::RegionRead(at(8, 1, 4));
    let answer = |offset, region, data| Reply::RegionRead {
        offset,
        region,
        data,
    };
    assert_eq!(answer(8, 1, &[0; 4]).check(&read), Ok(()));
    for wrong in [
        answer(9, 1, &[0; 4]),
        answer(8, 2, &[0; 4]),
        answer(8, 1, &[0; 3]),
        answer(8, 1, &[0; 5]),
    ] {
        assert_eq!(wrong.check(&read), Err(Error::WrongReply), "{wrong:?}");
    }
    let write = Request::RegionWrite(RegionWrite {
        offset: 8,
        region: 1,
        data: &[0; 4],
    });
    for wrong in [at(9, 1, 4), at(8, 2, 4), at(8, 1, 3)] {
        assert_eq!(
            Reply::RegionWrite(wrong).check(&write),
            Err(Error::WrongReply)
        );
    }
    let dma = |iova: u64, count: u64| DmaAccess { iova, count };
    for wrong in [dma(9, 4), dma(8, 3), dma(8, 5)] {
        let write = Request::DmaWrite {
            iova: 8,
            data: &[0; 4],
        };
        assert_eq!(
            Reply::DmaWrite(Some(wrong)).check(&write),
            Err(Error::WrongReply)
        );
        let data = &[0; 8][..wrong.count as usize];
        let reply = Reply::DmaRead {
            iova: wrong.iova,
            data,
        };
        assert_eq!(
            reply.check(&Request::DmaRead(dma(8, 4))),
            Err(Error::WrongReply)
        );
    }
    let state = Reply::MigDataRead(&[0; 5]);
    assert_eq!(
        state.check(&Request::MigDataRead { size: 4 }),
        Err(Error::WrongReply)
    );
    assert_eq!(state.check(&Request::MigDataRead { size: 5 }), Ok(()));

    // A report with another range or a bitmap of another size.
    let mut data = [0; 64];
    let report = LoggingReport {
        iova: 0,
        length: 1 << 20,
        page_size: 4096,
    };
    let call = FeatureCall::Report {
        report,
        bitmap_bytes: 32,
    };
    let request = call.request(&mut data).unwrap();
    for (iova, bits, fits) in [
        (0, 32, true),
        (4096, 32, false),
        (0, 24, false),
        (0, 40, false),
    ] {
        let mut answer = [0; 100];
        let report = LoggingReport { iova, ..report };
        let answer = request.reply(FeatureAnswer::Report(report, &[0; 40][..bits]), &mut answer);
        let reply = Reply::Feature(answer.unwrap());
        assert_eq!(
            reply.check(&Request::Feature(request)).is_ok(),
            fits,
            "{iova} {bits}"
        );
    }
    let other = Feature {
        flags: request.flags + 1,
        ..request
    };
    assert_eq!(other.answer(&request), Err(Error::WrongReply));
}

#[test]
fn argsz_of_replies() {
    // GET says how much there is, whatever the client has room for; SET repeats.
    let (mut out, state) = ([0; 64], MigState::default());
    for (flags, data, argsz) in [(FEATURE_GET, &[][..], 16), (FEATURE_SET, &[0; 8][..], 4096)] {
        let request = Feature {
            argsz: 4096,
            flags: flags | MIG_DEVICE_STATE,
            data,
        };
        let reply = request
            .reply(FeatureAnswer::State(state), &mut out)
            .unwrap();
        assert_eq!((reply.argsz, reply.data.len()), (argsz, 8));
    }
    // Capabilities come if there is room for all of them.
    for (room, comes) in [(32, false), (71, false), (72, true), (4096, true)] {
        let request = RegionInfo {
            argsz: room,
            ..RegionInfo::default()
        };
        let region = RegionInfo {
            flags: 7,
            index: 2,
            ..RegionInfo::default()
        };
        let Reply::GetRegionInfo(info, caps) = Reply::region_info(&request, region, &[1; 40])
        else {
            panic!("DEVICE_GET_REGION_INFO");
        };
        assert_eq!((info.argsz, info.index), (72, 2), "{room}");
        assert_eq!(caps.len(), if comes { 40 } else { 0 }, "{room}");
        let (flags, offset) = if comes { (7 | REGION_CAPS, 32) } else { (7, 0) };
        assert_eq!((info.flags, info.cap_offset), (flags, offset), "{room}");
    }
    let plain = Reply::region_info(&RegionInfo::default(), RegionInfo::default(), &[]);
    assert!(matches!(plain, Reply::GetRegionInfo(info, _) if info.argsz == 32 && info.flags == 0));
}

#[test]
fn bitmaps() {
    assert_eq!(bitmap_bytes(0, 4096), Some(0));
    assert_eq!(bitmap_bytes(1, 4096), Some(8));
    assert_eq!(bitmap_bytes(64 * 4096, 4096), Some(8));
    assert_eq!(bitmap_bytes(64 * 4096 + 1, 4096), Some(16));
    assert_eq!(bitmap_bytes(u64::MAX, 1), Some(1 << 61));
    assert_eq!(bitmap_bytes(1, 1 << 63), Some(8));
    assert_eq!(bitmap_bytes(1, 0), None);
    assert_eq!(bitmap_bytes(1, 3), None);
}
