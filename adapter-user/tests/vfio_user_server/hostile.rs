// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bad messages, and clients that go in the middle.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;

use vfio_user_wire::Capabilities;

use crate::{connect, memfd, world, Closed, Errno, Failed, World, PAGE, RW};

const VERSION: &[u8] =
    b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576}}\0";

/// Sends messages, each with its size if that is to be wrong, and returns the answers. Ends with
/// the connection.
fn probe(messages: &[(u16, &[u8], Option<u32>)]) -> (Vec<Result<(), Failed>>, World) {
    let mut world = connect(|server| server);
    let mut answers = Vec::new();
    for (command, payload, size) in messages {
        let mut message = world.client.message(*command, 0, payload);
        if let Some(size) = size {
            message[4..8].copy_from_slice(&size.to_ne_bytes());
        }
        world.client.send(&message, &[]);
        let answer = world.client.reply();
        let closed = answer == Err(Closed);
        answers.push(answer.map(drop));
        if closed {
            break;
        }
    }
    (answers, world)
}

fn answers(messages: &[(u16, &[u8], Option<u32>)]) -> Vec<Result<(), Failed>> {
    probe(messages).0
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The ten probes that other servers panic, hang or grow at.
#[test]
fn ten_probes() {
    let info = words(&[16, 0, 0, 0]);
    let (version, info) = ((1, VERSION, None), (4, &info[..], None));
    let ok = || Ok(());
    assert_eq!(answers(&[version, info]), [ok(), ok()], "plain");
    let without = (1, &VERSION[..4], None);
    assert_eq!(answers(&[without, info]), [ok(), ok()], "no JSON");
    let no_nul = (1, &VERSION[..VERSION.len() - 1], None);
    assert_eq!(
        answers(&[no_nul, info]),
        [Err(Errno(22)), Err(Closed)],
        "no NUL"
    );
    let empty = (1, &b"\0\0\x01\0{}\0"[..], None);
    assert_eq!(answers(&[empty, info]), [ok(), ok()], "no capabilities");
    assert_eq!(
        answers(&[version, (4, b"", Some(4))]),
        [ok(), Err(Closed)],
        "msg_size 4"
    );
    let map = words(&[32, 3, 0, 0, 0x1000, 0, 0x1000, 0]);
    let map = (2, &map[..], None);
    assert_eq!(
        answers(&[version, map, map, map, info]),
        [ok(), ok(), Err(Errno(17)), Err(Errno(17)), ok()],
        "EEXIST, twice"
    );
    let feature = words(&[8, 1 | 1 << 18]);
    assert_eq!(
        answers(&[version, (16, &feature, None), info]),
        [ok(), ok(), ok()],
        "DEVICE_FEATURE"
    );
    let multi = [&words(&[1, 0, 0, 0, 0, 4])[..], b"abcd\0\0\0\0"].concat();
    assert_eq!(
        answers(&[version, (15, &multi, None), info]),
        [ok(), ok(), ok()],
        "REGION_WRITE_MULTI"
    );
    let bad = [&words(&[0, 0, 99, 4])[..], b"abcd"].concat();
    assert_eq!(
        answers(&[version, (10, &bad, None), info]),
        [ok(), Err(Errno(22)), ok()],
        "region 99"
    );
    let huge = words(&[0, 0, 7, 1 << 31]);
    assert_eq!(
        answers(&[version, (9, &huge, None), info]),
        [ok(), Err(Errno(22)), ok()],
        "a read of 2 GiB"
    );
}

#[test]
fn a_first_message_that_is_bad_is_answered_and_ends_the_connection() {
    let info = words(&[16, 0, 0, 0]);
    let (got, mut world) = probe(&[(4, &info, None), (4, &info, None)]);
    assert_eq!(got, [Err(Errno(22)), Err(Closed)]);
    assert_eq!(world.join().unwrap_err().kind(), ErrorKind::InvalidData);
    let mut world = connect(|server| server);
    let reply = world.client.message(1, 1, VERSION);
    world.client.send(&reply, &[]);
    assert_eq!(world.client.receive().unwrap_err(), Closed, "a reply");
    assert_eq!(world.join().unwrap_err().kind(), ErrorKind::InvalidData);
}

#[test]
fn a_message_too_large_ends_the_connection() {
    let (got, mut world) = probe(&[
        (1, VERSION, None),
        (9, b"", Some((1 << 20) + (64 << 10) + 1)),
    ]);
    assert_eq!(got, [Ok(()), Err(Closed)]);
    assert_eq!(world.join().unwrap_err().kind(), ErrorKind::InvalidData);
}

#[test]
fn a_client_that_goes_between_messages_or_inside_one() {
    assert!(world().end().is_ok());
    let mut world = world();
    world.client.send(&[0; 9], &[]);
    assert_eq!(world.end().unwrap_err().kind(), ErrorKind::UnexpectedEof);
    assert!(connect(|server| server).end().is_ok(), "before VERSION");
}

#[test]
fn commands_without_a_reply_get_none() {
    let mut world = world();
    let info = words(&[16, 0, 0, 0]);
    for (command, payload) in [(4, &info[..]), (4, b""), (77, b"")] {
        let message = world.client.message(command, 0x10, payload);
        world.client.send(&message, &[]);
    }
    assert!(world.client.raw(4, &info).is_ok());
}

/// The end of a pipe tells when the server has closed its descriptor.
#[test]
fn descriptors_that_are_not_used_are_closed() {
    let mut world = world();
    let info = words(&[16, 0, 0, 0]);
    for (command, payload) in [(4, &info[..]), (2, &words(&[31, 3])[..]), (10, &info[..])] {
        let (mut end, pipe) = std::io::pipe().unwrap();
        let message = world.client.message(command, 0, payload);
        world.client.send(&message, &[pipe.as_fd(), pipe.as_fd()]);
        drop(pipe);
        let _ = world.client.reply();
        assert_eq!(end.read(&mut [0]).unwrap(), 0, "command {command}");
    }
}

#[test]
fn more_descriptors_than_agreed_end_the_connection() {
    let mut world = world();
    let file = memfd(PAGE, true);
    let message = world.client.message(4, 0, &words(&[16, 0, 0, 0]));
    world.client.send(&message, &[file.as_fd(); 33]);
    assert_eq!(world.client.reply().unwrap_err(), Closed);
    assert_eq!(world.join().unwrap_err().kind(), ErrorKind::InvalidData);
}

#[test]
fn a_reply_to_no_command_ends_the_connection() {
    let mut world = world();
    let message = world.client.message(11, 1, &[0; 16]);
    world.client.send(&message, &[]);
    assert_eq!(world.client.receive().unwrap_err(), Closed);
    assert_eq!(world.join().unwrap_err().kind(), ErrorKind::InvalidData);
}

/// A client that closes its side of the stream still gets the replies to what it sent.
#[test]
fn a_half_closed_connection_is_served_to_its_end() {
    let mut world = world();
    let info = words(&[16, 0, 0, 0]);
    for _ in 0..3 {
        let message = world.client.message(4, 0, &info);
        world.client.send(&message, &[]);
    }
    world
        .client
        .socket
        .shutdown(std::net::Shutdown::Write)
        .unwrap();
    for _ in 0..3 {
        assert_eq!(world.client.receive().unwrap().1.len(), 16);
    }
    assert_eq!(world.client.receive().unwrap_err(), Closed);
    assert!(world.join().is_ok());
}

#[test]
fn the_lower_limits_are_agreed_on() {
    let mut world = connect(|server| server);
    let reply = world.client.version(Capabilities {
        max_dma_maps: 1,
        max_data_xfer_size: 8192,
        ..Capabilities::default()
    });
    let text = String::from_utf8_lossy(&reply[4..]).into_owned();
    assert!(
        text.contains("\"max_dma_maps\":1,") && text.contains(":8192"),
        "{text}"
    );
    world.client.map((0, PAGE), RW, None).unwrap();
    assert_eq!(world.client.map((PAGE, PAGE), RW, None), Err(Errno(28)));
    world.client.socket.flush().unwrap();
}
