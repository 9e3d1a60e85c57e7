// SPDX-License-Identifier: MIT OR Apache-2.0
//! adapter-user's vfio-user client with the sample server of libvfio-user, whose path is the
//! argument: `samples/server.c`.
//!
//! The device has a timer in BAR 0. When it expires, the device raises INTx, writes four
//! kilobytes by the second mapping that it got, and as many by messages to the first. BAR 1
//! is memory. Both are its state.

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use adapter_user::emulated::uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
use adapter_user::emulated::IrqData;
use adapter_user::guest::{Report, Tracker};
use adapter_user::vfio_user::{Client, ClientOptions, DmaMemory};
use adapter_user::{Errno, PageSize, Prot};
use dirty_core::migration::State;
use nix::sys::memfd::{memfd_create, MFdFlags};

const PAGE: u64 = 4096;
/// Where the device writes by messages, and where by a mapping.
const BY_MESSAGES: u64 = 0x10 * PAGE;
const MAPPED: u64 = 0x40 * PAGE;

type Done<T = ()> = Result<T, Box<dyn Error>>;

/// The page that the device writes by messages.
#[derive(Default)]
struct Page {
    bytes: Mutex<Vec<u8>>,
    written: Condvar,
}

impl DmaMemory for Page {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        let at = iova.checked_sub(BY_MESSAGES).ok_or(Errno::EFAULT)? as usize;
        let bytes = self.bytes.lock().unwrap();
        let from = bytes.get(at..at + data.len()).ok_or(Errno::EFAULT)?;
        data.copy_from_slice(from);
        Ok(())
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let at = iova.checked_sub(BY_MESSAGES).ok_or(Errno::EFAULT)?;
        let mut bytes = self.bytes.lock().unwrap();
        if at != bytes.len() as u64 || at + data.len() as u64 > PAGE {
            return Err(Errno::EFAULT); // the device writes one piece after another
        }
        bytes.extend_from_slice(data);
        self.written.notify_all();
        Ok(())
    }
}

/// A server, which ends with this.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn connect(program: &str, socket: &Path, memory: Arc<Page>) -> Done<(Server, Client)> {
    let server = Server(Command::new(program).arg(socket).spawn()?);
    let end = Instant::now() + Duration::from_secs(10);
    let stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > end => return Err(error.into()),
            Err(_) => sleep(Duration::from_millis(10)),
        }
    };
    let client = Client::connect(stream, memory, ClientOptions::default())?;
    Ok((server, client))
}

fn eventfd() -> Done<OwnedFd> {
    // SAFETY: eventfd(2) accesses no memory.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: it is open, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(what: &str, holds: bool) -> Done {
    match holds {
        true => {
            println!("  {what}");
            Ok(())
        }
        false => Err(format!("it does not hold: {what}").into()),
    }
}

fn main() -> Done {
    let program = std::env::args().nth(1).ok_or("say where the server is")?;
    let folder = std::env::temp_dir().join(format!("vfio-user-interop-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let done = run(&program, &folder);
    std::fs::remove_dir_all(&folder)?;
    done
}

fn run(program: &str, folder: &Path) -> Done {
    let page = Arc::new(Page::default());
    let (mut server, client) = connect(program, &folder.join("source"), Arc::clone(&page))?;
    let info = client.device_info()?;
    check(
        "9 regions and 5 kinds of interrupts",
        (info.num_regions, info.num_irqs) == (9, 5),
    )?;
    check("BAR 0 has 8 bytes", client.region_info(0)?.size == 8)?;
    check("BAR 1 has 16 KiB", client.region_info(1)?.size == 4 * PAGE)?;
    check("there is one INTx", client.irq_info(0)?.count == 1)?;
    check("a ROM there is not", client.region_info(6)?.size == 0)?;

    // The guest's memory, a tracker of it, and the device.
    let memory = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC)?);
    memory.set_len(16 * PAGE)?;
    let tracker = Tracker::new(None);
    tracker.add_slot(0, 0, None, 16 * PAGE)?;
    let view = tracker.iova_view();
    view.map(MAPPED, 4 * PAGE, PAGE)?;
    client.map(BY_MESSAGES, PAGE, Prot::READ_WRITE, None)?;
    let file = Some((memory.as_fd(), 4 * PAGE));
    client.map(MAPPED, PAGE, Prot::READ_WRITE, file)?;
    let size = PageSize::new(PAGE).ok_or("a page size")?;
    check(
        "the log has pages of 4 KiB",
        client.start_logging(&[], size)? == size,
    )?;
    tracker.add_log("device", &view, 0, client.log())?;
    tracker.start()?;
    let mut report = Report::new();
    tracker.take(&mut report)?;
    check("nothing is dirty yet", report.pages() == 0)?;

    // The timer expires.
    let event = eventfd()?;
    let eventfds = [Some(event.as_fd())];
    client.set_irqs(
        VFIO_IRQ_SET_ACTION_TRIGGER,
        0,
        0,
        1,
        IrqData::Eventfds(&eventfds),
    )?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    client.write_region(1, 0, &[7; 64])?;
    client.write_region(0, 0, &(now + 1).to_le_bytes())?;
    let mut count = [0; 8];
    File::from(event.try_clone()?).read_exact(&mut count)?;
    check(
        "the device has raised its interrupt",
        u64::from_ne_bytes(count) == 1,
    )?;
    let bytes = page.bytes.lock().unwrap();
    let wait = page
        .written
        .wait_timeout_while(bytes, Duration::from_secs(10), |bytes| {
            bytes.len() < PAGE as usize
        });
    let expected: Vec<u8> = (0..4).flat_map(|k| [b'A' + k; 1024]).collect();
    check("it has written by messages", *wait.unwrap().0 == expected)?;
    let mut bytes = vec![0; PAGE as usize];
    memory.read_exact_at(&mut bytes, 4 * PAGE)?;
    check("it has written through its mapping", bytes == expected)?;
    tracker.take(&mut report)?;
    let only = |report: &Report| report.slot(0) == Some(&[1 << 4]);
    check("the tracker has that page, and no other", only(&report))?;
    report.clear();
    tracker.take(&mut report)?;
    check("and tells it once", report.pages() == 0)?;

    // What a mapping that is gone had is no longer in this server's log: it counts as dirty.
    client.unmap(MAPPED, PAGE)?;
    view.unmap(MAPPED, PAGE)?;
    tracker.take(&mut report)?;
    check("what was unmapped counts as dirty", only(&report))?;
    client.stop_logging()?;

    // The device moves.
    check(
        "it migrates by pre-copy",
        client.migration_features()?.pre_copy,
    )?;
    client.set_state(State::StopCopy)?;
    let mut state = Vec::new();
    let mut piece = [0; 4096];
    loop {
        match client.read_state(&mut piece)? {
            0 => break,
            n => state.extend_from_slice(&piece[..n]),
        }
    }
    check(
        "its state has both BARs",
        state.len() as u64 == 4 * PAGE + 8,
    )?;
    client.set_state(State::Stop)?;
    let (_there, destination) = connect(program, &folder.join("destination"), page)?;
    destination.set_state(State::Resuming)?;
    destination.write_state(&state)?;
    destination.set_state(State::Running)?;
    let mut bar = [0; 64];
    destination.read_region(1, 0, &mut bar)?;
    check("BAR 1 has arrived", bar == [7; 64])?;
    check("the device runs", destination.state()? == State::Running)?;

    // A server that dies.
    server.0.kill()?;
    let start = Instant::now();
    let lost = client.device_info().is_err();
    check(
        "a call to a killed server fails at once",
        lost && start.elapsed() < Duration::from_secs(2),
    )?;
    view.map(MAPPED, 4 * PAGE, PAGE)?;
    let lost = tracker.take(&mut report).is_err();
    check("and so does a report of the tracker", lost)?;
    Ok(())
}
