// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vfio-dirty serve` as a user runs it, and its device as a client drives it.

#[path = "../src/serve/registers.rs"]
#[allow(dead_code)] // not all of them are of use here
mod registers;

use std::fs;
use std::io::{BufRead, BufReader, Lines};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use adapter_user::vfio_user::{Client, ClientError, ClientOptions, DmaMemory};
use adapter_user::{Errno, GuestMemory, PageSize, Prot};
use dirty_core::migration::State;

use registers::*;

const PAGE: u64 = 4096;

struct NoMessages;

impl DmaMemory for NoMessages {
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }
}

/// A server's process, which ends with this value.
struct Server {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Server {
    fn start(path: &Path) -> Server {
        let mut process = command(path).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut server = Server { process, lines };
        assert_eq!(server.line(), format!("serving on {}", path.display()));
        server
    }

    fn line(&mut self) -> String {
        self.lines.next().unwrap().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn command(path: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-dirty"));
    command.args(["serve", "--socket"]).arg(path);
    command
}

/// A client whose device may do DMA.
fn connect(path: &Path) -> Client {
    let socket = UnixStream::connect(path).unwrap();
    let client = Client::connect(socket, NoMessages, ClientOptions::default()).unwrap();
    client.write_region(7, 4, &[6, 0]).unwrap();
    client
}

fn get(client: &Client, register: u64) -> u64 {
    let mut bytes = [0; 8];
    client.read_region(0, register, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn command_of(client: &Client, places: [u64; 4], command: u64) -> u64 {
    for (register, value) in [IOVA, STRIDE, COUNT, LENGTH].into_iter().zip(places) {
        client
            .write_region(0, register, &value.to_le_bytes())
            .unwrap();
    }
    client
        .write_region(0, COMMAND, &command.to_le_bytes())
        .unwrap();
    get(client, STATUS)
}

fn dirty(client: &Client, size: u64) -> u64 {
    let mut words = [0];
    let page = PageSize::new(PAGE).unwrap();
    client.read_log(0, size, page, &mut words).unwrap();
    words[0]
}

#[test]
fn clients_come_one_after_another() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let mut server = Server::start(&path);
    for _ in 0..2 {
        let client = connect(&path);
        assert_eq!(server.line(), "a client is connected");
        assert_eq!(get(&client, IOVA), 0);
        client.write_region(0, IOVA, &[1; 8]).unwrap();
        drop(client);
        assert_eq!(server.line(), "the client has gone");
    }
    // One that is no client.
    drop(UnixStream::connect(&path).unwrap());
    assert_eq!(server.line(), "a client is connected");
    assert_eq!(server.line(), "the client has gone");
    connect(&path);
}

#[test]
fn the_device_writes_and_logs_and_moves() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (folder.path().join("one"), folder.path().join("other"));
    let _servers = (Server::start(&one), Server::start(&other));
    let (source, destination) = (connect(&one), connect(&other));
    let memory = GuestMemory::new(16 * PAGE).unwrap();
    for client in [&source, &destination] {
        let file = Some((memory.as_fd(), 0));
        client.map(0, memory.len(), Prot::READ_WRITE, file).unwrap();
    }
    let page = PageSize::new(PAGE).unwrap();
    source.start_logging(&[], page).unwrap();

    // It writes pages 2 and 4, and says what it cannot do.
    let places = [2 * PAGE + 8, 2 * PAGE, 2, 16];
    assert_eq!(command_of(&source, places, WRITE), DONE);
    assert_eq!(dirty(&source, memory.len()), 0b10100);
    let mut bytes = [0; 32];
    memory.read(2 * PAGE, &mut bytes).unwrap();
    assert_eq!(bytes[..8], [0; 8]);
    assert_ne!(bytes[8..24], [0; 16]);
    assert_eq!(bytes[24..], [0; 8]);
    assert_eq!(dirty(&source, memory.len()), 0);
    for bad in [
        [0, PAGE, 17, 16],
        [0, PAGE, 0, 16],
        [0, PAGE, 1, 12],
        [0, PAGE, 1, 8192],
        [u64::MAX - 8, 0, 1, 16],
    ] {
        assert_eq!(command_of(&source, bad, WRITE), FAILED, "{bad:?}");
    }
    assert_eq!(command_of(&source, places, 99), FAILED);
    dirty(&source, memory.len());

    // By itself it writes all of its places, of which half are not mapped.
    let places = [8 * PAGE, PAGE, 16, 8];
    assert_eq!(command_of(&source, places, STREAM), DONE);
    while dirty(&source, memory.len()) == 0 || get(&source, REFUSED) == 0 {}
    source.set_state(State::StopCopy).unwrap();
    let count = get(&source, SEQUENCE);
    let mut state = [0; 4096];
    let size = source.read_state(&mut state).unwrap();
    destination.set_state(State::Resuming).unwrap();
    destination.write_state(&state[..size]).unwrap();
    destination.set_state(State::Stop).unwrap();
    assert_eq!(get(&destination, SEQUENCE), count);
    assert_eq!(get(&destination, COUNT), 16);
    destination.set_state(State::Running).unwrap();
    while get(&destination, SEQUENCE) == count {}
    assert_eq!(command_of(&destination, places, END), DONE);
    let count = get(&destination, SEQUENCE);
    assert_eq!(get(&destination, SEQUENCE), count);

    // A state of something else is refused, and the device can be reset.
    destination.set_state(State::Resuming).unwrap();
    state[size - 300] ^= 1;
    state[16] ^= 1;
    destination.write_state(&state[..size]).unwrap();
    let refused = destination.set_state(State::Running);
    assert!(matches!(
        refused,
        Err(ClientError::Refused(_, Errno::EINVAL))
    ));
    assert_eq!(destination.state().unwrap(), State::Error);
    destination.reset().unwrap();
    assert_eq!(destination.state().unwrap(), State::Running);
    assert_eq!(get(&destination, SEQUENCE), 0);
}

fn fails(path: &Path) -> Output {
    let output = command(path).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    output
}

#[test]
fn a_path_in_use_is_refused_and_one_left_behind_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    // A listener of this process would outlive its drop in a child that another test
    // has just forked.
    let server = Server::start(&path);
    let text = String::from_utf8(fails(&path).stderr).unwrap();
    assert!(text.contains("name another path with --socket"), "{text}");
    drop(server);
    drop(Server::start(&path));
    drop(Server::start(&path));

    let file = folder.path().join("file");
    fs::write(&file, "text").unwrap();
    fails(&file);
    assert_eq!(fs::read_to_string(&file).unwrap(), "text");
    fails(&folder.path().join("no/such/folder"));
}
