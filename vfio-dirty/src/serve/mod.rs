// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vfio-dirty serve`: the sample device behind a vfio-user socket.

mod device; // what the device does

mod stream; // its thread

mod places; // where it writes, and what
pub(crate) mod registers;

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use adapter_user::emulated::{MigrationVersion, Settings};
use adapter_user::vfio_user::Server;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use self::device::Engine;
use crate::failure::{cannot, Failure};
use crate::migrate::units;

/// The argument with which the program starts itself as a server. Its socket is standard input.
pub(crate) const SERVER: &str = "serve-stdin";

/// Serve a sample device on a vfio-user socket
///
/// The device is a DMA engine that a client drives by registers: it writes guest memory when it
/// is told to, or by itself. It logs what it writes, and it migrates. Clients may come one after
/// another; each gets a device as new.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
src/serve/registers.rs lists the registers. The device does DMA only after its
driver has set the bus-master bit of the command register.

Examples:
  vfio-dirty serve --socket /run/sample.sock
  qemu-system-x86_64 ... -device \\
    '{\"driver\":\"vfio-user-pci\",\"socket\":{\"type\":\"unix\",\"path\":\"/run/sample.sock\"}}'

It ends when it is killed. Exit status: 1 it cannot serve; 2 bad usage, or the
socket is in use.")]
pub(crate) struct Args {
    /// Where to listen; a socket that nobody listens on is replaced
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// Put the contents of up to so much memory that the device wrote into its state, for clients
    /// that migrate it and do not use its log; this takes downtime
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    carry: Option<u64>,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, Failure> {
    let listener = listen(&args.socket)?;
    let mut server = server();
    if let Some(budget) = args.carry {
        server = server.with_carry(budget);
    }
    line(&format!("serving on {}", args.socket.display()))?;
    for client in listener.incoming() {
        let client = client.map_err(cannot("accept a client"))?;
        line("a client is connected")?;
        match server.serve(client) {
            Ok(()) => line("the client has gone")?,
            Err(cause) => line(&format!("the client has gone: {cause}"))?,
        }
    }
    Ok(ExitCode::SUCCESS) // unreachable: there is always a next client
}

/// Serves one client, if `args` are those with which this program starts a server.
pub(crate) fn connected(args: &[OsString]) -> Option<Result<ExitCode, Failure>> {
    match args {
        [first] if first == SERVER => Some(serve_stdin().map(|()| ExitCode::SUCCESS)),
        _ => None,
    }
}

fn serve_stdin() -> Result<(), Failure> {
    // The kernel kills this process when the client dies. Without that, the closed socket ends it.
    let _ = set_pdeathsig(Signal::SIGKILL);
    let part = |_| Failure::Usage("this is a part of `migrate`: run `serve` instead".into());
    let socket = io::stdin().as_fd().try_clone_to_owned();
    let socket = UnixStream::from(socket.map_err(part)?);
    socket.local_addr().map_err(part)?; // fails if it is no such socket
    server()
        .serve(socket)
        .map_err(cannot("serve the migration's device"))
}

fn server() -> Server {
    let settings = Settings {
        migration: MigrationVersion::V2(Default::default()),
        own_log: true,
    };
    Server::new(settings, |dma, _irqs| Engine::new(dma))
}

fn listen(path: &Path) -> Result<UnixListener, Failure> {
    let refused = |cause: &io::Error| {
        Failure::Usage(format!(
            "cannot listen on {} ({cause}): name another path with --socket",
            path.display()
        ))
    };
    match UnixListener::bind(path) {
        Err(cause) if cause.kind() == ErrorKind::AddrInUse => {
            let socket = fs::symlink_metadata(path);
            let is_socket = socket.is_ok_and(|found| found.file_type().is_socket());
            if !is_socket || UnixStream::connect(path).is_ok() {
                return Err(refused(&cause));
            }
            // A server that was killed has left it.
            fs::remove_file(path).map_err(|cause| refused(&cause))?;
            UnixListener::bind(path).map_err(|cause| refused(&cause))
        }
        listener => listener.map_err(|cause| refused(&cause)),
    }
}

fn line(text: &str) -> Result<(), Failure> {
    match writeln!(io::stdout(), "{text}") {
        // The device is there, whether or not anybody reads about it.
        Err(cause) if cause.kind() == ErrorKind::BrokenPipe => Ok(()),
        printed => printed.map_err(cannot("print the state of the server")),
    }
}
