// SPDX-License-Identifier: MIT OR Apache-2.0
//! All of vfio-user-wire, with messages from outside.

use vfio_user_wire::wire::MigState;
use vfio_user_wire::{
    Capabilities, Client, Error, FeatureAnswer, FeatureCall, Header, Reply, Request, Server,
};

use crate::{fill, word};

fn serve(server: &mut Server, header: &Header, payload: &[u8]) -> Result<usize, Error> {
    let (mut out, mut data) = ([0; 512], [0; 512]);
    let request = server.request(header, payload, word() as usize)?;
    let mut done = request.write(1, word() != 0, &mut out).unwrap_or(0);
    match request {
        Request::RegionWriteMulti(writes) => done ^= writes.iter().count(),
        Request::Feature(feature) => {
            if let FeatureCall::StartLogging { ranges, .. } = feature.call(word() as u32)? {
                done ^= ranges.iter().count();
            }
            let reply = feature.reply(FeatureAnswer::Started(word()), &mut data);
            if let Ok(reply) = reply {
                reply.answer(&feature)?;
            }
        }
        _ => {}
    }
    if let Some(agreed) = server.agreed() {
        let reply = Reply::Version(agreed.reply(Some(word() as u32)));
        done ^= reply.write(1, &mut out).unwrap_or(0);
        reply.check(&request)?;
    }
    Ok(done)
}

fn receive(client: &mut Client, header: &Header, payload: &[u8]) -> Result<usize, Error> {
    let (mut out, mut data) = ([0; 512], [0; 512]);
    let reply = Reply::read(header, payload)?;
    let mut done = reply.write(1, &mut out).unwrap_or(0);
    if let Reply::GetRegionIoFds(_, regions) = reply {
        done ^= regions.iter().count();
    }
    client.accept(&reply, word() as usize)?;
    let state = MigState {
        device_state: word() as u32,
        data_fd: 0,
    };
    if let Ok(request) = FeatureCall::SetState(state).request(&mut data) {
        reply.check(&Request::Feature(request))?;
    }
    client.request(header, payload)?;
    Ok(done)
}

#[no_mangle]
pub extern "C" fn vfio_user_calls() -> usize {
    let capabilities = Capabilities {
        max_data_xfer_size: word() as u32,
        twin_socket: word() != 0,
        ..Capabilities::default()
    };
    let (mut server, mut client) = (Server::new(capabilities), Client::new(capabilities));
    let mut done = 0;
    while word() != 0 {
        let (mut head, mut payload) = ([0; 16], [0; 256]);
        let _ = (fill(&mut head), fill(&mut payload));
        let payload = payload.get(word() as usize..).unwrap_or_default();
        if let Ok(header) = server.header(&head) {
            done ^= serve(&mut server, &header, payload).unwrap_or(header.payload());
        }
        if let Ok(header) = client.header(&head) {
            done ^= receive(&mut client, &header, payload).unwrap_or(header.payload());
        }
    }
    done
}
