// SPDX-License-Identifier: MIT OR Apache-2.0
//! Replies, deadlines, floods and storms.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use adapter_user::{Error, Prot};
use rustix::net::{recvmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use vfio_user_wire::{Capabilities, Header};

use crate::{bytes_at, connect, memfd, world, world_with, Closed, DOORBELL, PAGE, RW};

const DMA_READ: u16 = 11;
const DMA_WRITE: u16 = 12;

/// A write to a register, of which the client wants no reply.
fn posted(client: &mut crate::Client, offset: u64, data: &[u8]) -> Vec<u8> {
    let mut payload = offset.to_ne_bytes().to_vec();
    payload.extend(0u32.to_ne_bytes());
    payload.extend((data.len() as u32).to_ne_bytes());
    payload.extend(data);
    client.message(10, 0x10, &payload)
}

#[test]
fn a_long_access_is_split() {
    let mut world = connect(|server| server);
    world.client.version(Capabilities {
        max_data_xfer_size: 4096,
        ..Capabilities::default()
    });
    world.client.bus_master(true);
    world.client.map((0, 8 * PAGE), RW, None).unwrap();
    let dma = world.toy.dma.clone();
    let device = thread::spawn(move || {
        let data: Vec<u8> = (0..10_000u32).map(|k| k as u8).collect();
        dma.write(100, &data).unwrap();
        let mut read = vec![0; 10_000];
        dma.read(100, &mut read).unwrap();
        assert_eq!(read, data);
    });
    for command in [
        DMA_WRITE, DMA_WRITE, DMA_WRITE, DMA_READ, DMA_READ, DMA_READ,
    ] {
        let (header, payload) = world.client.receive().unwrap();
        assert_eq!(header.command, command);
        assert!(payload.len() <= 16 + 4096);
        let reply = world.client.serve(&header, &payload);
        world.client.send(&reply, &[]);
    }
    device.join().unwrap();
}

/// The device's access fails, and the connection goes on. The late reply is dropped.
#[test]
fn a_reply_that_never_comes() {
    let mut world = world_with(|server| server.with_deadline(Duration::from_millis(50)));
    world.client.map((0, PAGE), RW, None).unwrap();
    assert_eq!(world.toy.dma.write(0, &[1]), Err(Error::BadAddress));
    let (header, payload) = world.client.receive().unwrap();
    let reply = world.client.serve(&header, &payload);
    world.client.send(&reply, &[]);
    assert!(world
        .client
        .raw(4, &[16u32, 0, 0, 0].map(u32::to_ne_bytes).concat())
        .is_ok());
    world.client.send(&reply, &[]);
    assert_eq!(
        world.client.receive().unwrap_err(),
        Closed,
        "twice is once too often"
    );
}

/// The device waits for a reply inside of a command, while the client sends more commands.
#[test]
fn the_reader_does_not_wait_for_the_device() {
    let mut world = world();
    world.client.map((0, PAGE), RW, None).unwrap();
    let message = posted(&mut world.client, DOORBELL, &[0; 8]);
    world.client.send(&message, &[]);
    let (header, payload) = world.client.receive().unwrap();
    assert_eq!(header.command, DMA_WRITE);
    // More than the socket and the queue without a wait have room for.
    for k in 0..30_000u64 {
        let message = posted(&mut world.client, 0, &k.to_le_bytes());
        world.client.send(&message, &[]);
    }
    assert!(world.toy.busy.load(Ordering::SeqCst));
    let reply = world.client.serve(&header, &payload);
    world.client.send(&reply, &[]);
    world
        .client
        .raw(4, &[16u32, 0, 0, 0].map(u32::to_ne_bytes).concat())
        .unwrap();
    assert_eq!(*world.toy.last.lock().unwrap(), Some(Ok(())));
    assert_eq!(
        world.toy.registers.lock().unwrap()[..8],
        29_999u64.to_le_bytes()
    );
}

#[test]
fn a_flood_instead_of_a_reply_ends_the_connection() {
    let mut world = world();
    world.client.map((0, PAGE), RW, None).unwrap();
    let message = posted(&mut world.client, DOORBELL, &[0; 8]);
    world.client.send(&message, &[]);
    assert_eq!(world.client.receive().unwrap().0.command, DMA_WRITE);
    let message = posted(&mut world.client, 0, &[1; 8]);
    let many = message.repeat(1000);
    for _ in 0..1000 {
        world.client.send(&many, &[]);
    }
    let ended = world.join().unwrap_err();
    assert_eq!(ended.kind(), ErrorKind::InvalidData);
    assert!(ended.to_string().contains("without end"), "{ended}");
    assert_eq!(
        *world.toy.last.lock().unwrap(),
        Some(Err(Error::BadAddress))
    );
}

/// A device that is slow, and waits for nobody, is no reason to read on.
#[test]
fn a_flood_of_a_slow_device_is_held_back() {
    let mut world = world();
    let registers = Arc::clone(&world.toy);
    let held = registers.registers.lock().unwrap();
    world.client.socket.set_nonblocking(true).unwrap();
    let many = posted(&mut world.client, 0, &[1; 8]).repeat(100);
    let mut sent = 0;
    let mut waits = 0;
    while waits < 50 {
        match std::io::Write::write(&mut world.client.socket, &many[sent % many.len()..]) {
            Ok(n) => (sent, waits) = (sent + n, 0),
            Err(_) => {
                waits += 1;
                thread::sleep(Duration::from_millis(2));
            }
        }
    }
    assert!(sent < 8 << 20, "{sent} bytes were taken");
    drop(held);
    world.client.socket.set_nonblocking(false).unwrap();
    let rest = &many[sent % many.len()..].to_vec();
    world.client.send(rest, &[]);
    world
        .client
        .raw(4, &[16u32, 0, 0, 0].map(u32::to_ne_bytes).concat())
        .unwrap();
}

#[test]
fn a_client_that_goes_while_the_device_waits_for_it() {
    let mut world = world();
    world.client.map((0, PAGE), RW, None).unwrap();
    let file = memfd(PAGE, false);
    world
        .client
        .map((PAGE, PAGE), RW, Some((&file, 0)))
        .unwrap();
    let dma = world.toy.dma.clone();
    let device = thread::spawn(move || dma.write(0, &[1]));
    assert_eq!(world.client.receive().unwrap().0.command, DMA_WRITE);
    let message = posted(&mut world.client, DOORBELL, &[0; 8]);
    world.client.send(&message, &[]);
    assert_eq!(world.client.receive().unwrap().0.command, DMA_WRITE);
    let toy = Arc::clone(&world.toy);
    world.end().unwrap();
    assert_eq!(device.join().unwrap(), Err(Error::BadAddress));
    for iova in [0, PAGE] {
        assert_eq!(toy.dma.write(iova, &[1]), Err(Error::UnknownDevice));
    }
}

/// The server's commands go by the second socket, and their replies come by it.
#[test]
fn the_second_socket() {
    let mut world = connect(|server| server);
    let capabilities = Capabilities {
        max_msg_fds: 8,
        twin_socket: true,
        ..Capabilities::default()
    };
    let client = vfio_user_wire::Client::new(capabilities);
    let mut out = [0; 1024];
    let len = client.version().write(1, false, &mut out).unwrap();
    world.client.id = 1;
    world.client.send(&out[..len], &[]);
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut reply = [0; 1024];
    let mut parts = [std::io::IoSliceMut::new(&mut reply)];
    let got = recvmsg(
        &world.client.socket,
        &mut parts,
        &mut control,
        RecvFlags::empty(),
    )
    .unwrap();
    let text = String::from_utf8_lossy(&reply[..got.bytes]).into_owned();
    assert!(
        text.contains("\"twin_socket\":{\"supported\":true,\"fd_index\":0}"),
        "{text}"
    );
    let fds: Vec<_> = control
        .drain()
        .flat_map(|part| match part {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        })
        .collect();
    let [twin] = <[_; 1]>::try_from(fds).unwrap();
    let mut twin = UnixStream::from(twin);
    world.client.bus_master(true);
    world.client.map((0, PAGE), RW, None).unwrap();
    let message = posted(&mut world.client, DOORBELL, &[0; 8]);
    world.client.send(&message, &[]);
    let mut head = [0; 16];
    twin.read_exact(&mut head).unwrap();
    let header = Header::from_bytes(&head);
    assert_eq!(header.command, DMA_WRITE);
    let mut payload = vec![0; header.payload()];
    twin.read_exact(&mut payload).unwrap();
    let reply = world.client.serve(&header, &payload);
    std::io::Write::write_all(&mut twin, &reply).unwrap();
    world
        .client
        .raw(4, &[16u32, 0, 0, 0].map(u32::to_ne_bytes).concat())
        .unwrap();
    assert_eq!(*world.toy.last.lock().unwrap(), Some(Ok(())));
    // A command does not belong there.
    std::io::Write::write_all(&mut twin, &world.client.message(4, 0, &[0; 16])).unwrap();
    assert_eq!(world.client.receive().unwrap_err(), Closed);
    assert!(world.join().is_ok(), "as if the client had gone");
}

/// After the reply to an unmap the device writes no byte there, and what it wrote before is
/// reported.
#[test]
fn unmaps_in_a_storm_of_writes() {
    for (sealed, pinned) in [(true, false), (false, false), (true, true)] {
        let mut world = world();
        let file = memfd(16 * PAGE, sealed);
        world.client.start(PAGE, &[]).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let storms: Vec<_> = (0..2u8)
            .map(|k| {
                let (stop, dma) = (Arc::clone(&stop), world.toy.dma.clone());
                thread::spawn(move || {
                    let mut value = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        value += 1;
                        let iova = (value % 16) * PAGE + 8 * u64::from(k);
                        let data = value.to_le_bytes();
                        let _ = match pinned {
                            true => dma
                                .pin(iova, 8, Prot::WRITE)
                                .and_then(|pin| pin.write(0, &data)),
                            false => dma.write(iova, &data),
                        };
                    }
                })
            })
            .collect();
        let mut before = bytes_at(&file, 0, 16 * 4096);
        for _ in 0..100 {
            world
                .client
                .map((0, 16 * PAGE), RW, Some((&file, 0)))
                .unwrap();
            thread::sleep(Duration::from_micros(200));
            world.client.unmap(0, 16 * PAGE).unwrap();
            let now = bytes_at(&file, 0, 16 * 4096);
            let dirty = world.client.report(0, 16 * PAGE, PAGE).unwrap();
            for page in 0..16usize {
                let bytes = page * 4096..(page + 1) * 4096;
                let changed = before[bytes.clone()] != now[bytes];
                assert!(!changed || dirty.contains(&(page as u64)), "page {page}");
            }
            thread::sleep(Duration::from_micros(100));
            assert!(
                bytes_at(&file, 0, 16 * 4096) == now,
                "a write after the unmap"
            );
            before = now;
        }
        stop.store(true, Ordering::Relaxed);
        for storm in storms {
            storm.join().unwrap();
        }
    }
}

/// The reply to the write that ends bus mastering comes after the last write.
#[test]
fn bus_mastering_ends_in_a_storm_of_writes() {
    let mut world = world();
    let file = memfd(PAGE, true);
    world.client.map((0, PAGE), RW, Some((&file, 0))).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let storm = thread::spawn({
        let (stop, toy) = (Arc::clone(&stop), Arc::clone(&world.toy));
        move || {
            let mut pin = None;
            for value in 0u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let _ = toy.write(8 * (value % 8), &value.to_le_bytes());
                // Through a pin that it keeps, and by no means careful.
                let kept = pin.get_or_insert_with(|| toy.dma.pin(64, 8, Prot::WRITE));
                match kept {
                    Ok(guard) if guard.write(0, &value.to_le_bytes()).is_ok() => {}
                    _ => pin = None,
                }
            }
        }
    });
    for _ in 0..200 {
        world.client.bus_master(false);
        let now = bytes_at(&file, 0, 128);
        thread::sleep(Duration::from_micros(100));
        assert_eq!(bytes_at(&file, 0, 128), now);
        world.client.bus_master(true);
        thread::sleep(Duration::from_micros(100));
    }
    assert_ne!(bytes_at(&file, 0, 128), [0; 128]);
    stop.store(true, Ordering::Relaxed);
    storm.join().unwrap();
}
