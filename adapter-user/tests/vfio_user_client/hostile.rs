// SPDX-License-Identifier: MIT OR Apache-2.0
//! Servers that break the protocol, fall silent, or die: each caller gets an error with its
//! cause, and none waits for ever.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::thread;

use adapter_user::vfio_user::wire::wire::{DmaAccess, RegionAccess};
use adapter_user::vfio_user::wire::{Capabilities, Command, Error, Header, Reply, Request};
use adapter_user::vfio_user::{Client, ClientError, ClientOptions, DmaMemory};
use adapter_user::{Errno, Prot};

use crate::peer::{able, client, impatient, with, Memory, Peer};

/// Asserts that a call fails with `cause`, and all later ones too.
#[track_caller]
fn ends(cause: ClientError, script: impl FnOnce(&mut Peer) + Send + 'static) {
    let (client, server) = client(move |peer| {
        script(peer);
        // The client has ended the connection: nothing more comes.
        let _ = peer.stream.read_to_end(&mut Vec::new());
    });
    let mut data = [0; 4];
    assert_eq!(client.read_region(0, 0, &mut data), Err(cause));
    assert_eq!(client.reset(), Err(cause));
    server.join().unwrap();
}

fn protocol(cause: Error) -> ClientError {
    ClientError::Protocol(cause)
}

#[test]
fn a_reply_that_nobody_waits_for_ends_the_connection() {
    for wrong in [1, 0x7fff] {
        ends(protocol(Error::WrongReply), move |peer| {
            let (mut header, _) = peer.receive();
            header.id = header.id.wrapping_add(wrong);
            peer.refuse(&header, 5);
        });
    }
    // The second reply to a command is one, too.
    let (client, server) = client(|peer| {
        let (header, _) = peer.receive();
        peer.reply(&header, &Reply::Reset);
        peer.reply(&header, &Reply::Reset);
        let _ = peer.stream.read_to_end(&mut Vec::new());
    });
    client.reset().unwrap();
    server.join().unwrap();
    assert_eq!(client.reset(), Err(protocol(Error::WrongReply)));
}

#[test]
fn a_reply_to_another_command_ends_the_connection() {
    ends(protocol(Error::WrongReply), |peer| {
        let (header, _) = peer.receive();
        peer.reply(&header, &Reply::Reset);
    });
    ends(protocol(Error::WrongReply), |peer| {
        let (header, _) = peer.receive();
        peer.reply(&header, &Reply::Failure(Command::Reset, 5));
    });
    // Data of another length, place or region.
    for (offset, region, len) in [(0, 0, 3), (0, 0, 5), (1, 0, 4), (0, 1, 4)] {
        ends(protocol(Error::WrongReply), move |peer| {
            let (header, _) = peer.receive();
            let data = &[0; 8][..len];
            peer.reply(
                &header,
                &Reply::RegionRead {
                    offset,
                    region,
                    data,
                },
            );
        });
    }
}

#[test]
fn a_reply_that_is_cut_short_ends_the_connection() {
    ends(protocol(Error::BadReply), |peer| {
        let (mut header, _) = peer.receive();
        header.flags = 1;
        header.size = 20;
        peer.stream.write_all(&header.to_bytes()).unwrap();
        peer.stream.write_all(&[0; 4]).unwrap();
    });
    // A count beyond the data.
    ends(protocol(Error::BadReply), |peer| {
        let (mut header, _) = peer.receive();
        header.flags = 1;
        header.size = 32;
        let at = RegionAccess {
            offset: 0,
            region: 0,
            count: 4,
        };
        peer.stream.write_all(&header.to_bytes()).unwrap();
        peer.stream.write_all(&at.to_bytes()).unwrap();
    });
}

#[test]
fn a_header_that_is_wrong_ends_the_connection() {
    for (flags, size, cause) in [
        (1, 15, Error::MessageTooShort),
        (1, 0, Error::MessageTooShort),
        (1, (1 << 20) + (64 << 10) + 1, Error::MessageTooLong),
        (1, u32::MAX, Error::MessageTooLong),
        (2, 16, Error::MessageType),
    ] {
        ends(protocol(cause), move |peer| {
            let (header, _) = peer.receive();
            let bad = Header {
                flags,
                size,
                ..header
            };
            peer.stream.write_all(&bad.to_bytes()).unwrap();
        });
    }
}

#[test]
fn more_descriptors_than_agreed_end_the_connection() {
    ends(ClientError::Lost(ErrorKind::InvalidData), |peer| {
        let (header, _) = peer.receive();
        let (one, _other) = UnixStream::pair().unwrap();
        let reply = Reply::Failure(Command::RegionRead, 5);
        peer.reply_with(&header, &reply, &[one.as_fd(); 9]);
    });
}

/// At the end of a message, among its header and among its payload.
#[test]
fn a_server_that_dies_fails_all_who_wait() {
    const CALLERS: usize = 5;
    for bytes in [0, 7, 20] {
        let (client, server) = client(move |peer| {
            let headers: Vec<_> = (0..CALLERS).map(|_| peer.receive().0).collect();
            let mut message = [0; 36];
            let reply = Reply::RegionRead {
                offset: 0,
                region: 0,
                data: &[1; 4],
            };
            reply.write(headers[0].id, &mut message).unwrap();
            peer.stream.write_all(&message[..bytes]).unwrap();
        });
        let callers: Vec<_> = (0..CALLERS)
            .map(|_| {
                let client = client.clone();
                thread::spawn(move || client.read_region(0, 0, &mut [0; 4]))
            })
            .collect();
        for caller in callers {
            let cause = ClientError::Lost(ErrorKind::UnexpectedEof);
            assert_eq!(caller.join().unwrap(), Err(cause));
        }
        server.join().unwrap();
    }
}

/// One reply that never comes ends the connection, for those who would wait for longer too.
#[test]
fn a_server_that_is_silent_fails_all_who_wait() {
    let (client, server) = with(able(), impatient(), &Memory::new(), |peer| {
        let _ = peer.stream.read_to_end(&mut Vec::new());
    });
    let client = client.unwrap();
    let start = Arc::new(Barrier::new(4));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (client, start) = (client.clone(), Arc::clone(&start));
            thread::spawn(move || {
                start.wait();
                client.reset()
            })
        })
        .collect();
    for caller in callers {
        assert_eq!(caller.join().unwrap(), Err(ClientError::Silent));
    }
    assert_eq!(client.reset(), Err(ClientError::Silent));
    server.join().unwrap();
}

/// The socket is full, so not even the command goes out.
#[test]
fn a_server_that_reads_nothing_fails_who_writes() {
    let (stop, stopped) = channel::<()>();
    let (client, server) = with(able(), impatient(), &Memory::new(), move |_| {
        let _ = stopped.recv();
    });
    let client = client.unwrap();
    let write = || client.post_region(0, 0, &[0; 64 << 10]);
    let cause = (0..1000).find_map(|_| write().err());
    assert_eq!(cause, Some(ClientError::Silent));
    drop(stop);
    server.join().unwrap();
}

/// It asks for memory without end, and reads no answer: the client stops to answer at the
/// deadline, with one answer in its hands.
#[test]
fn a_flood_of_commands_ends_the_connection() {
    let (client, server) = with(able(), impatient(), &Memory::new(), |peer| {
        let at = DmaAccess {
            iova: 0,
            count: 32 << 10,
        };
        let mut message = [0; 64];
        let len = Request::DmaRead(at).write(1, false, &mut message).unwrap();
        while peer.stream.write_all(&message[..len]).is_ok() {}
    });
    server.join().unwrap();
    assert_eq!(client.unwrap().reset(), Err(ClientError::Silent));
}

/// A flood of replies ends it at the first.
#[test]
fn a_flood_of_replies_ends_the_connection() {
    let (client, server) = client(|peer| {
        let header = Header {
            command: 13,
            size: 16,
            flags: 1,
            ..Header::default()
        };
        while peer.stream.write_all(&header.to_bytes()).is_ok() {}
    });
    server.join().unwrap();
    assert_eq!(client.reset(), Err(protocol(Error::WrongReply)));
}

/// Connects to a server that answers VERSION by `script`.
fn connect(script: impl FnOnce(&mut Peer) + Send + 'static) -> Result<Client, ClientError> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || script(&mut Peer::new(theirs)));
    let client = Client::connect(ours, Memory::new(), impatient());
    server.join().unwrap();
    client
}

#[test]
fn a_version_that_is_wrong_is_refused() {
    let cause = |script: fn(&mut Peer)| connect(script).unwrap_err();
    let refused = cause(|peer| {
        let (header, _) = peer.receive();
        peer.refuse(&header, 22);
    });
    assert_eq!(
        refused,
        ClientError::Refused(Command::Version, Errno::EINVAL)
    );
    let dead = cause(|peer| drop(peer.receive()));
    assert_eq!(dead, ClientError::Lost(ErrorKind::UnexpectedEof));
    let silent = cause(|peer| drop(peer.stream.read_to_end(&mut Vec::new())));
    assert_eq!(silent, ClientError::Silent);
    let early = cause(|peer| {
        peer.send(&Request::DmaRead(DmaAccess::default()), 0, false);
        peer.receive(); // not gone before the client has sent its message
    });
    assert_eq!(early, protocol(Error::UnexpectedMessage));
    let other = cause(|peer| {
        let (mut header, _) = peer.receive();
        header.id = 1;
        peer.reply(&header, &Reply::Version(version(able())));
    });
    assert_eq!(other, protocol(Error::WrongReply));
    let no_pages = cause(|peer| {
        let (header, _) = peer.receive();
        let capabilities = Capabilities {
            pgsizes: 1 << 21,
            ..able()
        };
        peer.reply(&header, &Reply::Version(version(capabilities)));
    });
    assert_eq!(no_pages, protocol(Error::NoPageSize));
    let no_twin = cause(|peer| {
        let (header, _) = peer.receive();
        let capabilities = Capabilities {
            twin_socket: true,
            twin_socket_fd: Some(0),
            ..able()
        };
        peer.reply(&header, &Reply::Version(version(capabilities)));
    });
    assert_eq!(no_twin, protocol(Error::TwinSocket));
}

/// A second socket that is none fails the connection, not the process.
#[test]
fn a_second_socket_that_is_none_ends_the_connection() {
    let client = connect(|peer| {
        let capabilities = Capabilities {
            twin_socket: true,
            twin_socket_fd: Some(0),
            ..able()
        };
        let file = tempfile::tempfile().unwrap();
        peer.agree(capabilities, &[file.as_fd()]);
        let _ = peer.stream.read_to_end(&mut Vec::new());
    });
    let failed = client.and_then(|client| client.reset());
    assert!(matches!(failed, Err(ClientError::Lost(_))), "{failed:?}");
}

fn version(capabilities: Capabilities) -> adapter_user::vfio_user::wire::Version {
    adapter_user::vfio_user::wire::Version {
        minor: 0,
        capabilities,
    }
}

/// A bug of the VMM's memory, too, is an error for who waits.
#[test]
fn a_memory_that_panics_ends_the_connection() {
    struct Panics;
    impl DmaMemory for Panics {
        fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
            panic!("a bug of the test's memory, on purpose");
        }
        fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
            Ok(())
        }
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let mut peer = Peer::new(theirs);
        peer.agree(able(), &[]);
        peer.receive();
        peer.send(&Request::DmaRead(DmaAccess::default()), 0, false);
        let _ = peer.stream.read_to_end(&mut Vec::new());
    });
    let client = Client::connect(ours, Panics, ClientOptions::default()).unwrap();
    let failed = client.map(0, 0x1000, Prot::READ, None);
    assert_eq!(failed, Err(ClientError::Lost(ErrorKind::ConnectionAborted)));
    server.join().unwrap();
}

/// When the last handle is gone, the connection has ended and nobody reaches the memory.
#[test]
fn the_last_handle_ends_the_connection() {
    let memory = Memory::new();
    let (client, server) = with(able(), ClientOptions::default(), &memory, |peer| {
        assert_eq!(peer.stream.read(&mut [0]).unwrap(), 0);
    });
    let client = client.unwrap();
    let log = client.log();
    drop(client);
    assert_eq!(Arc::strong_count(&memory), 2);
    drop(log);
    assert_eq!(Arc::strong_count(&memory), 1);
    server.join().unwrap();
}
