// SPDX-License-Identifier: MIT OR Apache-2.0
//! Serves the sample device on a socket, by the vfio-user protocol:
//!
//! ```sh
//! vfio-engine SOCKET
//! ```
//!
//! Each client gets a device of its own.

use std::fmt::Arguments;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use adapter_user::emulated::{Features, MigrationVersion, Settings};
use adapter_user::vfio_user::Server;
use vfio_engine::Engine;

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let (Some(socket), None) = (words.next(), words.next()) else {
        eprintln!("usage: vfio-engine SOCKET");
        return ExitCode::FAILURE;
    };
    let listener = match UnixListener::bind(&socket) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("{}: {error}", Path::new(&socket).display());
            return ExitCode::FAILURE;
        }
    };
    let features = Features {
        p2p: true,
        pre_copy: true,
    };
    let settings = Settings {
        migration: MigrationVersion::V2(features),
        own_log: true,
    };
    // What a server maps is marked, so there is nothing that this command could do.
    let write_unmarked = |_, _: &[u8]| Err("not behind a socket".to_owned());
    let server = Arc::new(Server::new(settings, move |dma, _| {
        Engine::new(dma, Box::new(write_unmarked), say)
    }));
    for client in listener.incoming() {
        let server = Arc::clone(&server);
        let serve = move |client: UnixStream| {
            if let Err(error) = server.serve(client) {
                say(format_args!("the client is gone: {error}"));
            }
        };
        let started = client.and_then(|client| {
            let thread = thread::Builder::new().name("client".into());
            thread.spawn(move || serve(client))
        });
        if let Err(error) = started {
            say(format_args!("a client is not served: {error}"));
        }
    }
    ExitCode::SUCCESS // unreachable: the socket is listened at for ever
}

fn say(what: Arguments<'_>) {
    eprintln!("{what}");
}
