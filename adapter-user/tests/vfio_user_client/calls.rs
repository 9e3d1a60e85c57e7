// SPDX-License-Identifier: MIT OR Apache-2.0
//! What each call sends, and what it makes of the answer.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{mpsc, Arc};
use std::thread;

use adapter_user::emulated::uapi::{
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
};
use adapter_user::emulated::{Features, IrqData};
use adapter_user::vfio_user::wire::wire::*;
use adapter_user::vfio_user::wire::{
    Capabilities, Command, FeatureAnswer, FeatureCall, Reply, Request,
};
use adapter_user::vfio_user::{Client, ClientError, ClientOptions};
use adapter_user::{Errno, Prot};
use dirty_core::migration::State;

use crate::peer::{able, client, with, Memory, Peer};

/// Answers a DEVICE_FEATURE, which must be `wanted`.
fn feature(peer: &mut Peer, wanted: &FeatureCall<'_>, answer: FeatureAnswer<'_>) {
    let (header, payload) = peer.expect(Command::Feature);
    let Ok(Request::Feature(feature)) = Request::read(Command::Feature, &payload, 0, 1 << 20)
    else {
        panic!("no feature");
    };
    assert_eq!(&feature.call(1 << 20).unwrap(), wanted);
    let mut buffer = vec![0; 4096];
    let reply = feature.reply(answer, &mut buffer).unwrap();
    peer.reply(&header, &Reply::Feature(reply));
}

#[test]
fn a_device_says_what_it_has() {
    let (client, server) = client(|peer| {
        let (header, _) = peer.expect(Command::GetInfo);
        let info = DeviceInfo {
            argsz: 16,
            flags: 3,
            num_regions: 9,
            num_irqs: 5,
        };
        peer.reply(&header, &Reply::GetInfo(info));
        let (header, _) = peer.expect(Command::GetIrqInfo);
        let info = IrqInfo {
            argsz: 16,
            flags: 9,
            index: 2,
            count: 33,
        };
        peer.reply(&header, &Reply::GetIrqInfo(info));
        let (header, payload) = peer.expect(Command::Reset);
        assert!(payload.is_empty());
        peer.reply(&header, &Reply::Reset);
    });
    assert_eq!(client.ended(), None);
    let info = client.device_info().unwrap();
    assert_eq!((info.flags, info.num_regions, info.num_irqs), (3, 9, 5));
    assert_eq!(client.irq_info(2).unwrap().count, 33);
    client.reset().unwrap();
    server.join().unwrap();
    while client.ended().is_none() {
        thread::yield_now();
    }
    let cause = client.reset().unwrap_err();
    assert!(matches!(cause, ClientError::Lost(_)), "{cause}");
    assert_eq!(client.ended(), Some(cause));
}

/// It asks again with the room that the capabilities need, and gets the file.
#[test]
fn a_region_has_capabilities_and_a_file() {
    let (client, server) = client(|peer| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"region").unwrap();
        for room in [32, 48] {
            let (header, payload) = peer.expect(Command::GetRegionInfo);
            let (asked, _) = RegionInfo::split(&payload).unwrap();
            assert_eq!((asked.argsz, asked.index), (room, 4));
            let info = RegionInfo {
                flags: 7,
                index: 4,
                size: 0x2000,
                offset: 0x1000,
                ..RegionInfo::default()
            };
            let reply = Reply::region_info(&asked, info, &[5; 16]);
            peer.reply_with(&header, &reply, &[file.as_fd()]);
        }
    });
    let region = client.region_info(4).unwrap();
    assert_eq!((region.flags, region.size), (7 | REGION_CAPS, 0x2000));
    assert_eq!(region.capabilities, [5; 16]);
    let (file, offset) = region.file.unwrap();
    assert_eq!(offset, 0x1000);
    let (mut file, mut text) = (File::from(file), String::new());
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "region");
    server.join().unwrap();
}

/// With a limit of 8 bytes, 20 bytes take three messages. A posted write awaits no reply.
#[test]
fn regions_are_read_and_written_in_parts() {
    let small = Capabilities {
        max_data_xfer_size: 8,
        ..able()
    };
    let script = |peer: &mut Peer| {
        for (at, count) in [(100, 8), (108, 8), (116, 4)] {
            let (header, payload) = peer.expect(Command::RegionRead);
            let (access, _) = RegionAccess::split(&payload).unwrap();
            assert_eq!((access.offset, access.region, access.count), (at, 1, count));
            let data = vec![at as u8; count as usize];
            let reply = Reply::RegionRead {
                offset: at,
                region: 1,
                data: &data,
            };
            peer.reply(&header, &reply);
        }
        for (at, count) in [(4, 8), (12, 1), (6, 3)] {
            let (header, payload) = peer.expect(Command::RegionWrite);
            let (access, data) = RegionAccess::split(&payload).unwrap();
            assert_eq!((access.offset, access.region, access.count), (at, 2, count));
            assert_eq!(data, vec![9; count as usize]);
            assert_eq!(header.wants_reply(), at != 6);
            if header.wants_reply() {
                peer.reply(&header, &Reply::RegionWrite(access));
            }
        }
    };
    let (client, server) = with(small, ClientOptions::default(), &Memory::new(), script);
    let client = client.unwrap();
    let mut data = [0; 20];
    client.read_region(1, 100, &mut data).unwrap();
    assert_eq!(data[..8], [100; 8]);
    assert_eq!(data[8..16], [108; 8]);
    assert_eq!(data[16..], [116; 4]);
    client.write_region(2, 4, &[9; 9]).unwrap();
    client.post_region(2, 6, &[9; 3]).unwrap();
    let wraps = client.read_region(1, u64::MAX, &mut data);
    assert!(matches!(wraps, Err(ClientError::Argument(_))));
    server.join().unwrap();
}

/// A server that takes two descriptors gets three eventfds with two messages.
#[test]
fn interrupts_are_set() {
    let few = Capabilities {
        max_msg_fds: 2,
        ..able()
    };
    let script = |peer: &mut Peer| {
        let mut next = |data: u32, action: u32, start: u32, count: u32, fds: usize| {
            let (header, payload) = peer.expect(Command::SetIrqs);
            let got = std::mem::take(&mut peer.fds);
            let request = Request::read(Command::SetIrqs, &payload, got.len(), 8);
            let Ok(Request::SetIrqs(set, bytes)) = request else {
                panic!("{request:?}");
            };
            assert_eq!((set.flags, set.index), (data | action, 2));
            assert_eq!((set.start, set.count, got.len()), (start, count, fds));
            let bytes = bytes.to_vec();
            peer.reply(&header, &Reply::SetIrqs);
            bytes
        };
        next(IRQ_DATA_EVENTFD, IRQ_ACTION_TRIGGER, 5, 2, 2);
        next(IRQ_DATA_EVENTFD, IRQ_ACTION_TRIGGER, 7, 1, 1);
        let bools = next(IRQ_DATA_BOOL, IRQ_ACTION_MASK, 1, 3, 0);
        assert_eq!(bools, [1, 0, 1]);
        next(IRQ_DATA_NONE, IRQ_ACTION_UNMASK, 0, 4, 0);
        next(IRQ_DATA_EVENTFD, IRQ_ACTION_TRIGGER, 3, 2, 0);
        next(IRQ_DATA_EVENTFD, IRQ_ACTION_TRIGGER, 5, 1, 1);
        next(IRQ_DATA_EVENTFD, IRQ_ACTION_TRIGGER, 6, 1, 0);
        next(IRQ_DATA_NONE, IRQ_ACTION_TRIGGER, 0, 0, 0);
    };
    let (client, server) = with(few, ClientOptions::default(), &Memory::new(), script);
    let client = client.unwrap();
    let (one, _other) = UnixStream::pair().unwrap();
    let fds = [Some(one.as_fd()); 3];
    let set = |start, count, action, data| client.set_irqs(action, 2, start, count, data).unwrap();
    set(5, 3, VFIO_IRQ_SET_ACTION_TRIGGER, IrqData::Eventfds(&fds));
    set(1, 3, VFIO_IRQ_SET_ACTION_MASK, IrqData::Bool(&[1, 0, 1]));
    set(0, 4, VFIO_IRQ_SET_ACTION_UNMASK, IrqData::None);
    let some = [None, None, Some(one.as_fd()), None];
    set(3, 4, VFIO_IRQ_SET_ACTION_TRIGGER, IrqData::Eventfds(&some));
    set(0, 0, VFIO_IRQ_SET_ACTION_TRIGGER, IrqData::None);
    for (start, count) in [(u32::MAX, 3), (0, 2)] {
        let data = IrqData::Eventfds(&fds);
        let bad = client.set_irqs(VFIO_IRQ_SET_ACTION_TRIGGER, 2, start, count, data);
        assert!(matches!(bad, Err(ClientError::Argument(_))));
    }
    server.join().unwrap();
}

#[test]
fn memory_is_mapped_with_and_without_a_file() {
    let (client, server) = client(|peer| {
        for (offset, iova, flags, fds) in [(0x3000, 0x1000, 3, 1), (0, 0x10_0000, 1, 0)] {
            let (header, payload) = peer.expect(Command::DmaMap);
            let (map, _) = DmaMap::split(&payload).unwrap();
            assert_eq!((map.offset, map.iova, map.flags), (offset, iova, flags));
            assert_eq!((map.size, peer.fds.len()), (0x2000, fds));
            peer.fds.clear();
            peer.reply(&header, &Reply::DmaMap);
        }
        for flags in [0, UNMAP_ALL] {
            let (header, payload) = peer.expect(Command::DmaUnmap);
            let (unmap, _) = DmaUnmap::split(&payload).unwrap();
            assert_eq!(unmap.flags, flags);
            peer.reply(&header, &Reply::DmaUnmap(unmap, None));
        }
    });
    let file = tempfile::tempfile().unwrap();
    let place = Some((file.as_fd(), 0x3000));
    client.map(0x1000, 0x2000, Prot::READ_WRITE, place).unwrap();
    client.map(0x10_0000, 0x2000, Prot::READ, None).unwrap();
    client.unmap(0x1000, 0x2000).unwrap();
    client.unmap_all().unwrap();
    for (iova, size) in [(0, 0), (u64::MAX, 2)] {
        let bad = client.map(iova, size, Prot::READ, None);
        assert!(matches!(bad, Err(ClientError::Argument(_))));
    }
    server.join().unwrap();
}

/// The state is read until a short answer, and written in parts.
#[test]
fn a_state_moves() {
    let small = Capabilities {
        max_data_xfer_size: 10,
        ..able()
    };
    let script = |peer: &mut Peer| {
        feature(
            peer,
            &FeatureCall::GetMigration,
            FeatureAnswer::Migration(5),
        );
        let state = |state: State| MigState {
            device_state: state.raw(),
            data_fd: u32::MAX,
        };
        let stop = state(State::StopCopy);
        feature(
            peer,
            &FeatureCall::SetState(stop),
            FeatureAnswer::State(stop),
        );
        feature(peer, &FeatureCall::GetState, FeatureAnswer::State(stop));
        for (size, data) in [(10, &b"0123456789"[..]), (10, b"abcdefghij"), (10, b"xyz")] {
            let (header, payload) = peer.expect(Command::MigDataRead);
            assert_eq!(MigData::split(&payload).unwrap().0.size, size);
            peer.reply(&header, &Reply::MigDataRead(data));
        }
        for data in [&b"0123456789"[..], b"ab"] {
            let (header, payload) = peer.expect(Command::MigDataWrite);
            assert_eq!(MigData::split(&payload).unwrap().1, data);
            peer.reply(&header, &Reply::MigDataWrite);
        }
        let (header, _) = peer.expect(Command::Feature);
        peer.refuse(&header, 22);
    };
    let (client, server) = with(small, ClientOptions::default(), &Memory::new(), script);
    let client = client.unwrap();
    let features = Features {
        p2p: false,
        pre_copy: true,
    };
    assert_eq!(client.migration_features().unwrap(), features);
    client.set_state(State::StopCopy).unwrap();
    assert_eq!(client.state().unwrap(), State::StopCopy);
    let mut data = [0; 100];
    assert_eq!(client.read_state(&mut data).unwrap(), 23);
    assert_eq!(&data[..23], b"0123456789abcdefghijxyz");
    client.write_state(b"0123456789ab").unwrap();
    let refused = client.set_state(State::Running);
    assert_eq!(
        refused,
        Err(ClientError::Refused(Command::Feature, Errno::EINVAL))
    );
    server.join().unwrap();
}

/// An error number is that call's alone.
#[test]
fn a_refusal_leaves_the_connection() {
    let (client, server) = client(|peer| {
        for errno in [28, 2, 5000, 0] {
            let (header, _) = peer.receive();
            peer.refuse(&header, errno);
        }
        let (header, _) = peer.receive();
        peer.reply(&header, &Reply::Reset);
    });
    let refused = |command, errno| Err(ClientError::Refused(command, errno));
    let mapped = client.map(0, 0x1000, Prot::READ, None);
    assert_eq!(mapped, refused(Command::DmaMap, Errno::ENOSPC));
    let unmapped = client.unmap(0, 0x1000);
    assert_eq!(unmapped, refused(Command::DmaUnmap, Errno::ENOENT));
    // What is no error number counts as EINVAL.
    assert_eq!(client.reset(), refused(Command::Reset, Errno::EINVAL));
    assert_eq!(client.reset(), refused(Command::Reset, Errno::EINVAL));
    client.reset().unwrap();
    server.join().unwrap();
}

/// Replies come in another order than the commands, to callers of several threads.
#[test]
fn replies_find_their_callers() {
    let (client, server) = client(|peer| {
        let mut asked: Vec<_> = (0..8).map(|_| peer.expect(Command::RegionRead)).collect();
        asked.reverse();
        for (header, payload) in asked {
            let (at, _) = RegionAccess::split(&payload).unwrap();
            let data = [at.region as u8; 4];
            let (offset, region) = (at.offset, at.region);
            let data = &data[..];
            peer.reply(
                &header,
                &Reply::RegionRead {
                    offset,
                    region,
                    data,
                },
            );
        }
    });
    let readers: Vec<_> = (0..8)
        .map(|region| {
            let client = client.clone();
            thread::spawn(move || {
                let mut data = [0; 4];
                client.read_region(region, 0, &mut data).unwrap();
                assert_eq!(data, [region as u8; 4]);
            })
        })
        .collect();
    readers
        .into_iter()
        .for_each(|reader| reader.join().unwrap());
    server.join().unwrap();
}

/// The server's own commands, while a caller waits: all of them are done before its reply.
fn dma_while_a_call_waits(peer: &mut Peer, dma: &mut Peer) {
    let (header, _) = peer.expect(Command::Reset);
    let data = &[7; 5000][..];
    dma.send(&Request::DmaWrite { iova: 100, data }, 40, false);
    let (answer, payload) = dma.receive();
    assert_eq!((answer.id, answer.failure()), (40, None));
    assert!(matches!(
        Reply::read(&answer, &payload),
        Ok(Reply::DmaWrite(Some(DmaAccess {
            iova: 100,
            count: 5000
        })))
    ));
    let at = DmaAccess {
        iova: 5099,
        count: 2,
    };
    dma.send(&Request::DmaRead(at), 41, false);
    let (answer, payload) = dma.receive();
    let read = Reply::read(&answer, &payload).unwrap();
    let data = &[7, 0][..];
    assert_eq!((answer.id, read), (41, Reply::DmaRead { iova: 5099, data }));

    // The VMM's error number, one of the client's own, and a write that wants no answer.
    let far = DmaAccess {
        iova: 1 << 40,
        count: 1,
    };
    dma.send(&Request::DmaRead(far), 42, false);
    assert_eq!(dma.receive().0.failure(), Some(14));
    let large = DmaAccess {
        iova: 0,
        count: 2 << 20,
    };
    dma.send(&Request::DmaRead(large), 43, false);
    assert_eq!(dma.receive().0.failure(), Some(7));
    let data = &[1][..];
    dma.send(&Request::DmaWrite { iova: 0, data }, 44, true);
    dma.send(
        &Request::DmaWrite {
            iova: 1 << 40,
            data,
        },
        45,
        true,
    );
    dma.send(&Request::Reset, 46, false);
    assert_eq!(dma.receive().0.failure(), Some(22));
    peer.reply(&header, &Reply::Reset);
}

#[test]
fn the_server_reaches_memory_while_a_call_waits() {
    let memory = Memory::new();
    let (client, server) = with(able(), ClientOptions::default(), &memory, |peer| {
        let mut same = Peer::new(peer.stream.try_clone().unwrap());
        dma_while_a_call_waits(peer, &mut same);
    });
    let client = client.unwrap();
    client.reset().unwrap();
    assert_eq!(memory.0.lock().unwrap()[0], 1);
    assert_eq!(memory.0.lock().unwrap()[100..5100], [7; 5000]);
    server.join().unwrap();
}

#[test]
fn the_second_socket_is_for_the_servers_commands() {
    let memory = Memory::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (answered, is_answered) = mpsc::channel();
    let server = thread::spawn(move || {
        let mut peer = Peer::new(theirs);
        let (twin, clients) = UnixStream::pair().unwrap();
        let capabilities = Capabilities {
            twin_socket: true,
            twin_socket_fd: Some(1),
            ..able()
        };
        // The first descriptor is for nobody.
        peer.agree(capabilities, &[clients.as_fd(), clients.as_fd()]);
        drop(clients);
        let mut twin = Peer::new(twin);
        dma_while_a_call_waits(&mut peer, &mut twin);
        // A reply may be lost when the other socket ends.
        is_answered.recv().unwrap();
        // If one of the sockets ends, so does the other.
        drop(twin);
        assert_eq!(peer.stream.read(&mut [0]).unwrap(), 0);
    });
    let options = ClientOptions::default();
    let client = Client::connect(ours, Arc::clone(&memory), options).unwrap();
    client.reset().unwrap();
    answered.send(()).unwrap();
    assert_eq!(memory.0.lock().unwrap()[100..5100], [7; 5000]);
    server.join().unwrap();
    assert!(matches!(client.reset(), Err(ClientError::Lost(_))));
}
