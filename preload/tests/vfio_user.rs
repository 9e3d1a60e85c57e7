// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device of a vfio-user server. The server is in this process; a second one of this program,
//! with the library preloaded, uses the device as a VMM does.

mod support;

use std::ffi::c_ulong;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use adapter_user::emulated::{
    ConfigSpace, DeviceModel, Features, Irqs, MigrationVersion, Settings,
};
use adapter_user::vfio_user::Server;
use support::{device, ioctl, preloaded};
use vfio_engine::Engine;

const PAGE: u64 = 4096;
/// Where the tests map memory, and how much.
const IOVA: u64 = 0x10_0000;
const SIZE: u64 = 64 * PAGE;

// ---- the server

fn settings() -> Settings {
    let features = Features {
        p2p: true,
        pre_copy: true,
    };
    Settings {
        migration: MigrationVersion::V2(features),
        own_log: true,
    }
}

fn engine() -> Server {
    let unmarked = |_, _: &[u8]| Err("not here".into());
    Server::new(settings(), move |dma, _| {
        Engine::new(dma, Box::new(unmarked), |what| eprintln!("{what}"))
    })
}

/// A device that raises the MSI whose number is written to it.
struct Bell {
    irqs: Irqs,
    config: Mutex<ConfigSpace>,
}

impl DeviceModel for Bell {
    fn region_size(&self, region: u32) -> u64 {
        match region {
            0 => 16,
            7 => 256,
            _ => 0,
        }
    }
    fn irq_count(&self, index: u32) -> u32 {
        if index == 1 {
            4
        } else {
            0
        }
    }
    fn read(&self, _: u32, offset: u64, data: &mut [u8]) {
        self.config.lock().unwrap().read(offset, data);
    }
    fn write(&self, region: u32, _: u64, data: &[u8]) {
        if region == 0 {
            self.irqs.trigger(1, data[0].into());
        }
    }
    fn reset(&self) {}
    fn quiesce(&self) {}
    fn resume(&self) {}
    fn state_size(&self) -> u64 {
        0
    }
    fn save(&self, _: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }
    fn load(&self, _: &mut dyn Read) -> io::Result<()> {
        Ok(())
    }
}

fn bell() -> Server {
    Server::new(settings(), |_, irqs| Bell {
        irqs,
        config: Mutex::new(ConfigSpace::new(0x1234, 0x0d3b, 0x08_8000)),
    })
}

/// Serves clients, and ends their connections at a connection to the second socket.
fn serve(server: Server, folder: &Path) {
    let listener = UnixListener::bind(folder.join("device")).unwrap();
    let end = UnixListener::bind(folder.join("end")).unwrap();
    let clients = Arc::new(Mutex::new(Vec::<UnixStream>::new()));
    let all = Arc::clone(&clients);
    let server = Arc::new(server);
    thread::spawn(move || {
        for client in listener.incoming().map(Result::unwrap) {
            all.lock().unwrap().push(client.try_clone().unwrap());
            let server = Arc::clone(&server);
            thread::spawn(move || server.serve(client));
        }
    });
    thread::spawn(move || {
        for _told in end.incoming().map(Result::unwrap) {
            for client in clients.lock().unwrap().drain(..) {
                client.shutdown(Shutdown::Both).unwrap();
            }
        }
    });
}

/// Runs `part` of test `name` in a process that has the library and the device.
fn with_server(name: &str, server: fn() -> Server, tracking: &str, part: fn()) {
    if std::env::var_os("PRELOADED").is_some() {
        return part();
    }
    let folder = tempfile::tempdir().unwrap();
    serve(server(), folder.path());
    let socket = folder.path().join("device");
    let devices = format!(
        "42:dev0=vfio-user:{0},43:dev0=vfio-user:{0}",
        socket.display()
    );
    let end = folder.path().join("end");
    let variables = [
        ("VFIO_PRELOAD_DEVICES", devices.as_str()),
        ("VFIO_PRELOAD_TRACKING", tracking),
        ("END", end.to_str().unwrap()),
    ];
    let output = preloaded(name, &variables);
    assert!(
        output.status.success() && String::from_utf8_lossy(&output.stdout).contains("1 passed"),
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Has the server end the connection, and waits until it has.
fn end_connection(device: RawFd) {
    UnixStream::connect(std::env::var_os("END").unwrap()).unwrap();
    while register(device, STATUS).is_ok() {
        thread::yield_now();
    }
}

// ---- the program's memory

/// Memory of the program, of `SIZE` bytes.
struct Memory(*mut u8);

impl Memory {
    /// `file`: of a file that another process can map.
    fn new(file: bool) -> Memory {
        let (fd, flags) = match file {
            true => {
                // SAFETY: the name ends with a zero.
                let fd = unsafe { libc::memfd_create(c"ram".as_ptr(), libc::MFD_ALLOW_SEALING) };
                // SAFETY: it accesses no memory.
                assert_eq!(unsafe { libc::ftruncate(fd, SIZE as i64) }, 0);
                (fd, libc::MAP_SHARED)
            }
            false => (-1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
        };
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: it maps new memory.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), SIZE as usize, prot, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Memory(at.cast())
    }

    fn word(&self, page: u64) -> u32 {
        // SAFETY: the word is in the memory, which the device writes too.
        unsafe {
            self.0
                .add((page * PAGE) as usize)
                .cast::<u32>()
                .read_volatile()
        }
    }

    fn map(&self, container: &File, iova: u64) -> Result<i32, i32> {
        let map = [32 | 3 << 32, self.0 as u64, iova, SIZE];
        ioctl(container.as_raw_fd(), 0x3b71, map.as_ptr() as c_ulong)
    }
}

fn unmap(container: &File, iova: u64) -> Result<i32, i32> {
    let mut unmap = [24, iova, SIZE];
    ioctl(container.as_raw_fd(), 0x3b72, unmap.as_mut_ptr() as c_ulong)
}

fn unmap_dirty(container: &File, iova: u64) -> Result<u64, i32> {
    let mut bitmap = 0u64;
    let mut unmap = [48 | 1 << 32, iova, SIZE, PAGE, 8, &raw mut bitmap as u64];
    ioctl(container.as_raw_fd(), 0x3b72, unmap.as_mut_ptr() as c_ulong).map(|_| bitmap)
}

/// START (1) or STOP (2) of the container's tracking.
fn track(container: &File, flags: u64) -> Result<i32, i32> {
    let track = [8 | flags << 32];
    ioctl(container.as_raw_fd(), 0x3b75, track.as_ptr() as c_ulong)
}

fn get_bitmap(container: &File, iova: u64) -> Result<u64, i32> {
    let mut bitmap = 0u64;
    let mut get = [48 | 4 << 32, iova, SIZE, PAGE, 8, &raw mut bitmap as u64];
    ioctl(container.as_raw_fd(), 0x3b75, get.as_mut_ptr() as c_ulong).map(|_| bitmap)
}

// ---- the device

const STATUS: u64 = 0x1c;
const MAILBOX: u64 = 0x28;

fn pread(fd: RawFd, offset: u64) -> Result<u32, i32> {
    let mut word = 0u32;
    // SAFETY: the word has 4 bytes.
    match unsafe { libc::pread64(fd, (&raw mut word).cast(), 4, offset as i64) } {
        4 => Ok(word),
        _ => Err(io::Error::last_os_error().raw_os_error().unwrap()),
    }
}

fn pwrite(fd: RawFd, offset: u64, word: u32) -> Result<(), i32> {
    // SAFETY: the word has 4 bytes.
    match unsafe { libc::pwrite64(fd, (&raw const word).cast(), 4, offset as i64) } {
        4 => Ok(()),
        _ => Err(io::Error::last_os_error().raw_os_error().unwrap()),
    }
}

fn register(device: RawFd, at: u64) -> Result<u32, i32> {
    pread(device, at)
}

/// Lets the device do DMA.
fn bus_master(device: RawFd) {
    pwrite(device, (7 << 40) + 4, 6).unwrap();
}

/// Has the engine write `value` to the first word of a page: whether it could.
fn dma_write(device: RawFd, iova: u64, value: u32) -> bool {
    for (at, value) in [iova as u32, 0, 4, 1, 0, value, 1].into_iter().enumerate() {
        pwrite(device, 4 * at as u64, value).unwrap();
    }
    register(device, STATUS) == Ok(1)
}

/// VFIO_DEVICE_FEATURE: `feature` has the flags too, and `data` comes back.
fn feature<const N: usize>(device: RawFd, feature: u64, data: [u64; N]) -> Result<[u64; N], i32> {
    let mut arg = vec![(8 + 8 * N as u64) | feature << 32];
    arg.extend(data);
    ioctl(device, 0x3b75, arg.as_mut_ptr() as c_ulong)?;
    Ok(arg[1..].try_into().unwrap())
}

const GET: u64 = 1 << 16;
const SET: u64 = 1 << 17;

/// Changes the migration state. A data file comes back if a transfer begins.
fn set_state(device: RawFd, state: u64) -> Result<Option<File>, i32> {
    let [answer] = feature(device, SET | 2, [state])?;
    let fd = (answer >> 32) as i32;
    // SAFETY: the descriptor is new, and nobody else has it.
    Ok((fd >= 0).then(|| unsafe { File::from_raw_fd(fd) }))
}

fn state(device: RawFd) -> u64 {
    feature(device, GET | 2, [0]).unwrap()[0] & 0xffff_ffff
}

// ---- tests

#[test]
fn memory_that_was_mapped_before_and_after() {
    with_server(
        "memory_that_was_mapped_before_and_after",
        engine,
        "container",
        || {
            let (container, _group, device) = device();
            let device = device.as_raw_fd();
            assert_eq!(pread(device, 7 << 40), Ok(0x0d3a_1234));
            bus_master(device);
            for (k, file) in [true, false].into_iter().enumerate() {
                let (memory, iova) = (Memory::new(file), IOVA + k as u64 * SIZE);
                assert!(!dma_write(device, iova, 7), "nothing is mapped");
                memory.map(&container, iova).unwrap();
                assert_eq!(memory.map(&container, iova), Err(libc::EEXIST));
                assert!(dma_write(device, iova + PAGE, 7));
                assert_eq!((memory.word(0), memory.word(1)), (0, 7));
                assert_eq!(unmap(&container, iova + PAGE), Err(libc::EINVAL));
                assert!(dma_write(device, iova + PAGE, 8), "it is mapped as before");
                unmap(&container, iova).unwrap();
                assert!(!dma_write(device, iova + PAGE, 9), "it was unmapped");
                assert_eq!(memory.word(1), 8);
                // A device that is opened now gets it.
                memory.map(&container, iova).unwrap();
            }
            let other = support::other_device(&container, 43);
            let other = other.1.as_raw_fd();
            bus_master(other);
            assert!(dma_write(other, IOVA, 1) && dma_write(other, IOVA + SIZE, 2));
        },
    );
}

#[test]
fn what_the_device_writes_is_in_the_container_s_bitmaps() {
    with_server(
        "what_the_device_writes_is_in_the_container_s_bitmaps",
        engine,
        "container",
        || {
            let (container, _group, device) = device();
            let device = device.as_raw_fd();
            bus_master(device);
            for (k, file) in [true, false].into_iter().enumerate() {
                let (memory, iova) = (Memory::new(file), IOVA + k as u64 * SIZE);
                memory.map(&container, iova).unwrap();
                assert!(dma_write(device, iova, 1), "before tracking: not reported");
                track(&container, 1).unwrap();
                track(&container, 1).unwrap();

                assert_eq!(get_bitmap(&container, iova), Ok(0));
                assert!(dma_write(device, iova + 3 * PAGE, 1));
                assert!(dma_write(device, iova + 63 * PAGE, 1));
                assert_eq!(get_bitmap(&container, iova), Ok(1 << 3 | 1 << 63));
                assert_eq!(get_bitmap(&container, iova), Ok(0));
                assert!(dma_write(device, iova + 5 * PAGE, 1));
                // An answer that fails loses nothing.
                let bad = [48 | 4 << 32, iova, SIZE, PAGE, 8, 16];
                let failed = ioctl(container.as_raw_fd(), 0x3b75, bad.as_ptr() as c_ulong);
                assert_eq!(failed, Err(libc::EFAULT));
                assert_eq!(get_bitmap(&container, iova), Ok(1 << 5));
                // The device's log is the container's: the program finds none.
                assert_eq!(feature(device, SET | 7, []), Err(libc::ENOTTY));
                assert!(dma_write(device, iova + 6 * PAGE, 1));
                assert_eq!(unmap_dirty(&container, iova), Ok(1 << 6));
                memory.map(&container, iova).unwrap();
                assert!(dma_write(device, iova + 7 * PAGE, 1));
                assert_eq!(get_bitmap(&container, iova).unwrap() & 1 << 7, 1 << 7);
                track(&container, 2).unwrap();
            }
        },
    );
}

#[test]
fn what_a_device_wrote_before_it_closed_is_reported() {
    with_server(
        "what_a_device_wrote_before_it_closed_is_reported",
        engine,
        "container",
        || {
            let (container, _group, first) = device();
            let memory = Memory::new(true);
            memory.map(&container, IOVA).unwrap();
            track(&container, 1).unwrap();
            get_bitmap(&container, IOVA).unwrap();
            let (_group, other) = support::other_device(&container, 43);
            bus_master(other.as_raw_fd());
            assert!(dma_write(other.as_raw_fd(), IOVA + PAGE, 1));
            drop(other);
            assert_eq!(get_bitmap(&container, IOVA), Ok(1 << 1));
            drop(first);
        },
    );
}

#[test]
fn the_device_s_own_log() {
    with_server("the_device_s_own_log", engine, "device", || {
        let (container, _group, device) = device();
        let device = device.as_raw_fd();
        bus_master(device);
        let (file, private) = (Memory::new(true), Memory::new(false));
        file.map(&container, IOVA).unwrap();
        private.map(&container, IOVA + SIZE).unwrap();
        let report = || {
            let mut bitmap = [0u64; 2];
            let data = [IOVA, 2 * SIZE, PAGE, bitmap.as_mut_ptr() as u64];
            feature(device, GET | 8, data).map(|_| bitmap)
        };
        assert_eq!(report(), Err(libc::EINVAL), "it is off");
        let ranges = [IOVA, 2 * SIZE];
        let start = || {
            let data = [PAGE, 1, ranges.as_ptr() as u64];
            feature(device, SET | 6, data)
        };
        start().unwrap();
        assert_eq!(start(), Err(libc::EINVAL), "it is on");
        assert_eq!(report(), Ok([0, 0]));
        assert!(dma_write(device, IOVA + PAGE, 1) && dma_write(device, IOVA + SIZE, 1));
        assert_eq!(report(), Ok([1 << 1, 1 << 0]));
        assert_eq!(report(), Ok([0, 0]));
        // What was written to a mapping that has gone is told, once.
        assert!(dma_write(device, IOVA + 2 * PAGE, 1));
        unmap(&container, IOVA).unwrap();
        assert_eq!(report(), Ok([1 << 2, 0]));
        assert_eq!(report(), Ok([0, 0]));
        feature(device, SET | 7, []).unwrap();
        assert_eq!(report(), Err(libc::EINVAL), "it is off again");
    });
}

#[test]
fn the_state_moves() {
    with_server("the_state_moves", engine, "container", || {
        let (container, _group, device) = device();
        let (_other_group, other) = support::other_device(&container, 43);
        let (from, to) = (device.as_raw_fd(), other.as_raw_fd());
        // STOP_COPY and P2P: nobody could tell how much is left in the pre-copy phase.
        assert_eq!(feature(from, GET | 1, [0]), Ok([1 | 2]));
        assert_eq!(set_state(from, 6).err(), Some(libc::EINVAL));
        assert!(feature(from, GET | 9, [0]).unwrap()[0] > 0);
        pwrite(from, MAILBOX, 0xfeed).unwrap();
        let mut file = set_state(from, 3).unwrap().unwrap();
        assert_eq!(
            file.write(&[0]).unwrap_err().raw_os_error(),
            Some(libc::EBADF)
        );
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert!(set_state(from, 1).unwrap().is_none());
        assert_eq!(
            file.read(&mut [0]).unwrap_err().raw_os_error(),
            Some(libc::ENODEV)
        );
        let mut file = set_state(to, 4).unwrap().unwrap();
        file.write_all(&bytes).unwrap();
        assert_eq!((state(from), state(to)), (1, 4));
        set_state(to, 2).unwrap();
        assert_eq!(register(to, MAILBOX), Ok(0xfeed));
        // A state that is none is refused, and a reset mends the device.
        let mut file = set_state(to, 4).unwrap().unwrap();
        file.write_all(b"no state").unwrap();
        assert_eq!(set_state(to, 2).err(), Some(libc::EINVAL));
        assert_eq!(state(to), 0, "ERROR");
        ioctl(to, 0x3b6f, 0).unwrap();
        assert_eq!((state(to), register(to, MAILBOX)), (2, Ok(0)));
    });
}

#[test]
fn interrupts() {
    with_server("interrupts", bell, "container", || {
        let (_container, _group, device) = device();
        let device = device.as_raw_fd();
        let mut info = [16u32, 0, 1, 0];
        ioctl(device, 0x3b6d, info.as_mut_ptr() as c_ulong).unwrap();
        assert_eq!(info[3], 4);
        let eventfds: Vec<OwnedFd> = (0..3)
            .map(|_| {
                // SAFETY: it accesses no memory.
                let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) };
                // SAFETY: the descriptor is new, and nobody else has it.
                unsafe { OwnedFd::from_raw_fd(fd) }
            })
            .collect();
        let fd = |k: usize| eventfds[k].as_raw_fd() as u32;
        // Number 2 has none.
        let set = [36, 4 | 32, 1, 0, 4, fd(0), fd(1), u32::MAX, fd(2)];
        ioctl(device, 0x3b6e, set.as_ptr() as c_ulong).unwrap();
        for number in [0, 1, 1, 2, 3] {
            pwrite(device, 0, number).unwrap();
        }
        let counts: Vec<u64> = eventfds
            .iter()
            .map(|fd| {
                let mut count = [0; 8];
                File::from(fd.try_clone().unwrap())
                    .read_exact(&mut count)
                    .unwrap();
                u64::from_ne_bytes(count)
            })
            .collect();
        assert_eq!(counts, [1, 2, 1]);
        let bad = [20, 4 | 32, 1, 0, 4];
        assert_eq!(
            ioctl(device, 0x3b6e, bad.as_ptr() as c_ulong),
            Err(libc::EINVAL)
        );
    });
}

#[test]
fn a_server_that_goes() {
    with_server("a_server_that_goes", engine, "container", || {
        let (container, group, device) = device();
        let fd = device.as_raw_fd();
        bus_master(fd);
        let memory = Memory::new(true);
        memory.map(&container, IOVA).unwrap();
        track(&container, 1).unwrap();
        get_bitmap(&container, IOVA).unwrap();
        assert!(dma_write(fd, IOVA + PAGE, 1));
        end_connection(fd);
        let gone = Err(libc::ENOTCONN);
        assert_eq!(register(fd, STATUS), gone);
        assert_eq!(get_bitmap(&container, IOVA), Err(libc::ENOTCONN));
        assert_eq!(set_state(fd, 3).err(), Some(libc::ENOTCONN));
        assert_eq!(ioctl(fd, 0x3b6f, 0), Ok(0), "there is nothing to reset");
        set_state(fd, 1).unwrap(); // it writes nothing
        assert_eq!(set_state(fd, 4).err(), Some(libc::ENOTCONN));
        // Nobody knows what it wrote, so it may be all. The container goes on.
        assert_eq!(unmap_dirty(&container, IOVA), Ok(u64::MAX));
        memory.map(&container, IOVA).unwrap();
        track(&container, 2).unwrap();
        assert_eq!(track(&container, 1), Err(libc::ENOTCONN));
        drop(device);
        track(&container, 1).unwrap();
        let again = support::get_device(&group);
        assert_eq!(pread(again.as_raw_fd(), 7 << 40), Ok(0x0d3a_1234));
        bus_master(again.as_raw_fd());
        assert!(dma_write(again.as_raw_fd(), IOVA + 2 * PAGE, 1));
        assert_eq!(get_bitmap(&container, IOVA), Ok(1 << 2));
    });
}

#[test]
fn no_server() {
    if std::env::var_os("PRELOADED").is_some() {
        let (_container, group) = support::group(42);
        assert_eq!(support::try_get_device(&group), Err(libc::ENOENT));
        return;
    }
    let device = ("VFIO_PRELOAD_DEVICES", "42:dev0=vfio-user:/nowhere/device");
    let output = preloaded("no_server", &[device]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}"
    );
}
