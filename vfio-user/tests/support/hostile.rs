// SPDX-License-Identifier: MIT OR Apache-2.0
//! Any bytes as what a peer sends. The property test and the fuzz target share it.

use vfio_user_wire::{
    Capabilities, Client, Error, FeatureAnswer, Header, Migration, Reply, Request, Server, Verdict,
    HEADROOM,
};

const MAX: u32 = 1 << 16;

/// What became of a connection.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The error number that each message got, 0 for none.
    pub(crate) answers: Vec<u32>,
    /// Why the connection was closed, if it was.
    pub(crate) closed: Option<Error>,
}

fn capabilities() -> Capabilities {
    Capabilities {
        max_data_xfer_size: MAX,
        migration: Some(Migration::default()),
        write_multiple: true,
        twin_socket: true,
        ..Capabilities::default()
    }
}

/// A server reads `bytes` as a stream; each message but VERSION comes with `fds`
/// descriptors.
pub(crate) fn to_server(bytes: &[u8], fds: usize) -> Outcome {
    let mut server = Server::new(capabilities());
    converse(bytes, |head, rest| {
        let limit = if server.agreed().is_some() { MAX } else { 0 };
        let header = server.header(head).map_err(|e| (None, e))?;
        assert!(header.payload() + Header::SIZE <= (limit + HEADROOM) as usize);
        let payload = rest.get(..header.payload()).unwrap_or(rest);
        let read = if header.is_reply() {
            reply(&header, payload)
        } else {
            let fds = if header.command == 1 { 0 } else { fds };
            let request = server.request(&header, payload, fds);
            request.map(|request| again(&request, fds, payload.len()))
        };
        read.map(|()| header.payload())
            .map_err(|error| (Some(header.payload()), error))
    })
}

/// A client that has agreed on a version reads `bytes` as a stream.
pub(crate) fn to_client(bytes: &[u8]) -> Outcome {
    let (mut server, mut client) = (Server::new(capabilities()), Client::new(capabilities()));
    let mut message = [0; 512];
    let len = client.version().write(1, false, &mut message).unwrap();
    let header = server.header(message.first_chunk().unwrap()).unwrap();
    server.request(&header, &message[16..len], 0).unwrap();
    let version = server.agreed().unwrap().reply(None);
    client.accept(&Reply::Version(version), 0).unwrap();
    converse(bytes, |head, rest| {
        let header = client.header(head).map_err(|e| (None, e))?;
        assert!(header.payload() + Header::SIZE <= (MAX + HEADROOM) as usize);
        let payload = rest.get(..header.payload()).unwrap_or(rest);
        let read = if header.is_reply() {
            reply(&header, payload)
        } else {
            let request = client.request(&header, payload);
            request.map(|request| again(&request, 0, payload.len()))
        };
        read.map(|()| header.payload())
            .map_err(|error| (Some(header.payload()), error))
    })
}

/// Hands out messages until the bytes or the connection end. `receive` returns the
/// length of the payload.
fn converse(
    mut bytes: &[u8],
    mut receive: impl FnMut(&[u8; 16], &[u8]) -> Result<usize, (Option<usize>, Error)>,
) -> Outcome {
    let mut outcome = Outcome::default();
    while let Some((head, rest)) = bytes.split_first_chunk() {
        let payload = match receive(head, rest) {
            Ok(payload) => {
                outcome.answers.push(0);
                Some(payload)
            }
            Err((payload, error)) => {
                if error.verdict() != Verdict::Close {
                    let refusal = Header::from_bytes(head).refuse(error.errno());
                    assert_eq!(refusal.failure(), Some(error.errno()));
                    outcome.answers.push(error.errno());
                }
                if error.verdict() != Verdict::Answer {
                    outcome.closed = Some(error);
                    return outcome;
                }
                payload
            }
        };
        // An error that leaves the connection open comes after the header was taken.
        bytes = rest.get(payload.unwrap()..).unwrap_or_default();
    }
    outcome
}

/// A request that was read and is written is the same when it is read again.
fn again(request: &Request<'_>, fds: usize, payload: usize) {
    let mut message = vec![0; payload + 512];
    let len = request.write(1, true, &mut message).unwrap();
    assert_eq!(request.write(1, true, &mut message[..len - 1]).ok(), None);
    let header = Header::from_bytes(message.first_chunk().unwrap());
    assert_eq!(header.payload(), len - Header::SIZE);
    assert!(!header.wants_reply());
    let read = Request::read(request.command(), &message[16..len], fds, MAX);
    assert_eq!(read, Ok(*request));
    match request {
        Request::RegionWriteMulti(writes) => assert_eq!(writes.iter().count(), writes.len()),
        Request::Feature(feature) => {
            feature.call(MAX).unwrap();
            // What a server answers fits the request.
            let mut data = [0; 64];
            let state = FeatureAnswer::Migration(1);
            if let Ok(reply) = feature.reply(state, &mut data) {
                let _ = reply.answer(feature);
            }
        }
        _ => {}
    }
}

/// The same for a reply.
fn reply(header: &Header, payload: &[u8]) -> Result<(), Error> {
    let reply = Reply::read(header, payload)?;
    let mut message = vec![0; payload.len() + 512];
    let len = reply.write(1, &mut message).unwrap();
    let header = Header::from_bytes(message.first_chunk().unwrap());
    assert_eq!(Reply::read(&header, &message[16..len]), Ok(reply));
    if let Reply::GetRegionIoFds(io, regions) = reply {
        assert!(regions.iter().count() <= io.count as usize);
    }
    Ok(())
}

/// Both sides read the bytes; the server also after a VERSION, with descriptors.
pub(crate) fn both(bytes: &[u8]) {
    to_server(bytes, 0);
    to_client(bytes);
    let mut hello = Vec::from([0; 512]);
    let version = Client::new(capabilities()).version();
    let len = version.write(1, false, &mut hello).unwrap();
    hello.truncate(len);
    hello.extend_from_slice(bytes);
    to_server(&hello, 1);
}
