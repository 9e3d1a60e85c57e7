// SPDX-License-Identifier: MIT OR Apache-2.0
//! A server: a device for clients that connect by a socket.

mod session; // one client's device, message by message

mod link; // a client behind a socket

mod inbox; // who reads, and commands that were not handled yet

mod memory; // the client's memory, as the device reaches it

mod carry; // pages whose contents go with the device's state
mod files; // the client's files in this process
mod logging; // the device's log
mod view; // files that are mapped, and their mappings in the container

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use dirty_core::Errno;
use vfio_user_wire::{Capabilities, Header, Verdict};

use self::inbox::{Message, Read};
use self::link::{Answer, Link};
pub use self::memory::Remote;
pub use self::session::{Handled, Session};
use crate::emulated::{DeviceModel, Dma, Irqs, MigrationVersion, Settings};
use crate::vfio_user::socket::Socket;

/// Makes a device's model when a client connects.
type Make = dyn Fn(Dma, Irqs) -> Arc<dyn DeviceModel> + Send + Sync;

/// Serves a device to clients, by the vfio-user protocol.
///
/// Each client gets a device of its own, which is made when it connects and closed when it
/// goes. The device is the same [`DeviceModel`] that a
/// [`DeviceGroup`](crate::emulated::DeviceGroup) has, with its migration, its log and its
/// interrupts. Two things differ:
///
/// - The device does DMA only while the bus-master bit of its command register is set, as the
///   hardware does: see [`Dma`]. The reply to the write that clears the bit comes when all DMA
///   has ended.
/// - A client may map memory without a file. The device then reads and writes it by messages to
///   the client, each of which takes until the client answers. Such memory cannot be pinned:
///   [`Dma::pin`] fails with [`Error::Unmapped`](crate::Error::Unmapped).
///
/// Files that cannot shrink (F_SEAL_SHRINK) are accessed directly. All others, among them those
/// of huge pages, are accessed by system calls, so that a client which truncates its file gets
/// an error, and not this process a signal.
///
/// ```no_run
/// use std::os::unix::net::UnixListener;
/// use adapter_user::emulated::{DeviceModel, Dma, Features, MigrationVersion, Settings};
/// use adapter_user::vfio_user::Server;
/// # fn run<M: DeviceModel + 'static>(make: fn(Dma) -> M) -> std::io::Result<()> {
/// let settings = Settings {
///     migration: MigrationVersion::V2(Features::default()),
///     own_log: true,
/// };
/// let server = Server::new(settings, move |dma, _irqs| make(dma));
/// let listener = UnixListener::bind("device.sock")?;
/// loop {
///     let (client, _) = listener.accept()?;
///     if let Err(error) = server.serve(client) {
///         eprintln!("the client is gone: {error}");
///     }
/// }
/// # }
/// ```
pub struct Server {
    settings: Settings,
    make: Box<Make>,
    carry: Option<u64>,
    deadline: Duration,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("settings", &self.settings)
            .field("carry", &self.carry)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Creates a server. `make` is called for each client, with the guest memory that the device
    /// reaches and the interrupts that it raises.
    ///
    /// The protocol has no version 1 of migration: a device with
    /// [`MigrationVersion::V1`] does not migrate.
    #[must_use]
    pub fn new<M: DeviceModel + 'static>(
        mut settings: Settings,
        make: impl Fn(Dma, Irqs) -> M + Send + Sync + 'static,
    ) -> Self {
        if settings.migration == MigrationVersion::V1 {
            settings.migration = MigrationVersion::None;
        }
        Server {
            settings,
            make: Box::new(move |dma, irqs| Arc::new(make(dma, irqs))),
            carry: None,
            deadline: Duration::from_secs(10),
        }
    }

    /// Puts the contents of the pages that the device wrote into the device's state, up to
    /// `budget` bytes of pages.
    ///
    /// This is a safety net for clients that migrate the device and do not use its log: without
    /// it, what the device writes during the migration is lost. It costs downtime, since all
    /// pages that the device has ever written are read and sent while the guest is stopped:
    /// about 0.8 s for 100 MiB.
    ///
    /// Pages that a report has told to the client are left out, and pages that the device wrote
    /// before the client started the log. The contents are read only when the device has
    /// stopped, and written only when the other device leaves RESUMING: it must have all
    /// mappings by then.
    ///
    /// The change to STOP_COPY fails, rather than to lose a page: with ENOSPC if there are more
    /// pages than the budget allows, and with EFAULT if one cannot be read, or its mapping has
    /// gone. A start of the log for all addresses makes a change possible again. The stream as a
    /// whole has at most 1 GiB.
    #[must_use]
    pub fn with_carry(mut self, budget: u64) -> Self {
        self.carry = Some(budget);
        self
    }

    /// Sets how long the client may take to answer a command of the server, which is 10 s
    /// otherwise. The device's access fails then.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    fn capabilities(&self) -> Capabilities {
        let migrates = self.settings.migration != MigrationVersion::None;
        session::capabilities(migrates || self.settings.own_log)
    }

    /// Opens a device for a client that is reached by other means than a socket.
    ///
    /// # Errors
    ///
    /// ENOMEM.
    pub fn session(&self, remote: Arc<dyn Remote>) -> Result<Session, Errno> {
        Session::open(self, remote)
    }

    /// Serves one client, until it goes or the connection cannot go on. The device is closed
    /// when this returns, the client's memory is unmapped, and no thread is left.
    ///
    /// A program that wants to end a connection keeps a clone of the socket, and shuts it down.
    ///
    /// # Errors
    ///
    /// - [`ErrorKind::UnexpectedEof`] if the stream ends inside a message.
    /// - [`ErrorKind::InvalidData`], with an error of `vfio-user-wire`, for a message after which
    ///   the connection cannot go on; for a reply to no command; for more descriptors than were
    ///   agreed; and for a client that sends commands without end while the device waits for it.
    /// - Those of the socket, and of the device if it cannot be opened.
    pub fn serve(&self, client: UnixStream) -> io::Result<()> {
        let link = Arc::new(Link::new(client, self.deadline));
        let session = Session::open(self, Arc::new(Arc::clone(&link)));
        let session = session.map_err(|errno| io::Error::from_raw_os_error(errno.0))?;
        let served = serve(&link, session);
        link.shutdown();
        served
    }
}

/// The descriptors of a message, at most.
fn most_fds(wire: &vfio_user_wire::Server) -> usize {
    // VERSION takes none; they are received, so that it can be refused.
    let agreed = wire.agreed();
    agreed.map_or(1, |agreed| agreed.max_receive_fds as usize)
}

/// What one reads from a socket.
enum Got {
    Message(Message),
    /// A header after which the connection cannot go on.
    Refused(Header, vfio_user_wire::Error),
    /// The end of the stream.
    End,
}

/// Reads one message.
fn read(socket: &Socket, wire: &vfio_user_wire::Server) -> io::Result<Got> {
    let (mut head, mut fds) = ([0; Header::SIZE], Vec::new());
    match socket.receive(&mut head, &mut fds, most_fds(wire)) {
        Ok(true) => {}
        Ok(false) => return Ok(Got::End),
        // The client has gone, and did not read everything.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Got::End),
        Err(error) => return Err(error),
    }
    let header = match wire.header(&head) {
        Ok(header) => header,
        Err(error) => return Ok(Got::Refused(Header::from_bytes(&head), error)),
    };
    let mut payload = vec![0; header.payload()];
    if !payload.is_empty() && !socket.receive(&mut payload, &mut fds, most_fds(wire))? {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    Ok(Got::Message(Message {
        header,
        payload,
        fds,
    }))
}

fn invalid(error: vfio_user_wire::Error) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}

/// Handles a command and sends its reply.
fn handle(
    link: &Link,
    session: &mut Session,
    command: Message,
    out: &mut Vec<u8>,
) -> io::Result<()> {
    let Message {
        header,
        payload,
        fds,
    } = command;
    let handled = session.handle(&header, &payload, fds, out);
    if !out.is_empty() {
        let fd = handled.fd.as_ref().map(AsFd::as_fd);
        match link.main.send(out, fd.as_slice(), None) {
            // The client has gone. Whoever reads learns of it, too.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            sent => sent?,
        }
    }
    match handled.close {
        Some(error) => Err(invalid(error)),
        None => Ok(()),
    }
}

fn serve(link: &Arc<Link>, session: Session) -> io::Result<()> {
    // Dropped after `_end`: the device may wait for the client until then.
    let mut session = session;
    let mut out = Vec::new();
    // No other message is read before the first one is agreed on.
    match read(&link.main, session.wire())? {
        Got::End => return Ok(()),
        Got::Message(command) => handle(link, &mut session, command, &mut out)?,
        Got::Refused(header, error) => {
            if error.verdict() == Verdict::AnswerAndClose {
                let refused = header.refuse(error.errno());
                link.main.send(&refused.to_bytes(), &[], None)?;
            }
            return Err(invalid(error));
        }
    }
    let wire = &session.wire().clone();
    thread::scope(|scope| {
        let _end = EndOfWork(link);
        scope.spawn(|| {
            link.inbox.stand_in(|| read_main(link, wire));
            link.close_calls(); // also if the client sends too much
        });
        if let Some(twin) = link.twin.get() {
            scope.spawn(|| read_twin(link, twin, wire));
        }
        while let Some(command) = link.inbox.next(|| read_main(link, wire)) {
            handle(link, &mut session, command, &mut out)?;
        }
        link.inbox.end()
    })
}

/// Commands are handled until this is dropped, also by a panic of the device. Then no thread
/// reads any more, and none waits for a reply.
struct EndOfWork<'a>(&'a Link);

impl Drop for EndOfWork<'_> {
    fn drop(&mut self) {
        self.0.close_calls();
        self.0.inbox.close();
        self.0.shutdown();
    }
}

/// Reads the main socket, where commands and replies come.
fn read_main(link: &Link, wire: &vfio_user_wire::Server) -> Read {
    let end = match read(&link.main, wire) {
        Ok(Got::Message(message)) if message.header.is_reply() => match answer(link, message) {
            Ok(()) => return Read::Reply,
            Err(error) => Err(error),
        },
        Ok(Got::Message(message)) => return Read::Command(message),
        Ok(Got::Refused(_, error)) => Err(invalid(error)), // after VERSION all of them close
        Ok(Got::End) => Ok(()),
        Err(error) => Err(error),
    };
    // Nobody waits for a client that is not heard any more. What it has sent is handled.
    link.close_calls();
    Read::End(end)
}

/// Reads the second socket, where only replies come. Its end is that of the connection.
fn read_twin(link: &Link, twin: &Socket, wire: &vfio_user_wire::Server) {
    while let Ok(Got::Message(message)) = read(twin, wire) {
        if !message.header.is_reply() || answer(link, message).is_err() {
            break;
        }
    }
    link.close_calls();
    link.shutdown();
}

fn answer(link: &Link, message: Message) -> io::Result<()> {
    let answer = Answer {
        header: message.header,
        payload: message.payload,
    };
    let known = link.answer(answer);
    known.map_err(|_| invalid(vfio_user_wire::Error::WrongReply))
}
