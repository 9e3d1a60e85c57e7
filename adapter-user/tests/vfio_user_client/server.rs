// SPDX-License-Identifier: MIT OR Apache-2.0
//! The client beside the server of this crate.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use adapter_user::emulated::uapi::{VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_PCI_MSIX_IRQ_INDEX};
use adapter_user::emulated::{
    ConfigSpace, DeviceModel, Dma, Features, IrqData, Irqs, MigrationVersion, Settings,
};
use adapter_user::guest::{IovaRange, Report, Tracker};
use adapter_user::vfio_user::{Client, ClientError, ClientOptions, DmaMemory, Server};
use adapter_user::{DirtyBits, Errno, GuestMemory, PageSize, Prot};
use dirty_core::migration::State;

const PAGE: u64 = 4096;
const BASE: PageSize = PageSize::new(PAGE).unwrap();

/// BAR 0 has 1 MiB: the first 8 bytes are an IOVA to which the next write of 8 bytes at offset 8
/// goes; a write at 16 raises MSI-X 1.
struct Toy {
    dma: Dma,
    irqs: Irqs,
    config: Mutex<ConfigSpace>,
    bar: Mutex<Vec<u8>>,
}

const BAR: usize = 1 << 20;

impl DeviceModel for Toy {
    fn region_size(&self, region: u32) -> u64 {
        match region {
            0 => BAR as u64,
            7 => 256,
            _ => 0,
        }
    }

    fn irq_count(&self, index: u32) -> u32 {
        if index == VFIO_PCI_MSIX_IRQ_INDEX {
            4
        } else {
            0
        }
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) {
        match region {
            0 => data.copy_from_slice(&self.bar.lock().unwrap()[offset as usize..][..data.len()]),
            _ => self.config.lock().unwrap().read(offset, data),
        }
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) {
        if region != 0 {
            return self.config.lock().unwrap().write(offset, data);
        }
        let mut bar = self.bar.lock().unwrap();
        bar[offset as usize..][..data.len()].copy_from_slice(data);
        match offset {
            8 => {
                let iova = u64::from_le_bytes(bar[..8].try_into().unwrap());
                let written = self.dma.write(iova, data);
                bar[24] = u8::from(written.is_err());
            }
            16 => drop(self.irqs.trigger(VFIO_PCI_MSIX_IRQ_INDEX, 1)),
            _ => {}
        }
    }

    fn reset(&self) {
        self.bar.lock().unwrap().fill(0);
    }

    fn quiesce(&self) {
        drop(self.bar.lock());
    }

    fn resume(&self) {}

    fn state_size(&self) -> u64 {
        BAR as u64
    }

    fn save(&self, to: &mut dyn Write) -> io::Result<()> {
        to.write_all(&self.bar.lock().unwrap())
    }

    fn load(&self, from: &mut dyn Read) -> io::Result<()> {
        from.read_exact(&mut self.bar.lock().unwrap())
    }
}

/// Guest memory, and a client whose server is another thread.
struct Vmm {
    memory: Arc<GuestMemory>,
    tracker: Tracker,
    client: Option<Client>,
    server: Option<JoinHandle<io::Result<()>>>,
}

/// What the server reaches by messages: IOVAs are guest addresses.
struct Marked(Arc<GuestMemory>, DirtyBits);

impl DmaMemory for Marked {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.0.read(iova, data).map_err(|_| Errno::EFAULT)
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        self.0.write(iova, data).map_err(|_| Errno::EFAULT)?;
        let marked = self.1.mark(iova, data.len() as u64);
        marked.map_err(|_| Errno::EFAULT)
    }
}

const SIZE: u64 = 64 * PAGE;

impl Vmm {
    fn new(options: ClientOptions, settings: Settings) -> Vmm {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let server = Server::new(settings, |dma, irqs| {
                let config = ConfigSpace::new(0x1234, 0x5678, 0x08_8000);
                Toy {
                    dma,
                    irqs,
                    config: Mutex::new(config.with_memory_bar(0, BAR as u32)),
                    bar: Mutex::new(vec![0; BAR]),
                }
            });
            server.serve(theirs)
        });
        let memory = Arc::new(GuestMemory::new(SIZE).unwrap());
        let tracker = Tracker::new(None);
        let bits = tracker.add_slot(0, 0, None, SIZE).unwrap();
        let marked = Marked(Arc::clone(&memory), bits);
        let client = Client::connect(ours, marked, options).unwrap();
        client.write_region(7, 4, &[6, 0]).unwrap();
        Vmm {
            memory,
            tracker,
            client: Some(client),
            server: Some(server),
        }
    }

    fn client(&self) -> &Client {
        self.client.as_ref().unwrap()
    }

    /// Maps the memory at IOVA `iova`: `size` bytes from guest address `gpa` on.
    fn map(&self, iova: u64, gpa: u64, size: u64) {
        let file = Some((self.memory.as_fd(), gpa));
        let mapped = self.client().map(iova, size, Prot::READ_WRITE, file);
        mapped.unwrap();
    }

    /// Lets the device write 8 bytes. Returns whether it could.
    fn device_writes(&self, iova: u64, data: [u8; 8]) -> bool {
        let client = self.client();
        client.post_region(0, 0, &iova.to_le_bytes()).unwrap();
        client.write_region(0, 8, &data).unwrap();
        let mut failed = [1];
        client.read_region(0, 24, &mut failed).unwrap();
        failed == [0]
    }

    /// The dirty pages of a take.
    fn take(&self) -> Vec<u64> {
        let mut report = Report::new();
        self.tracker.take(&mut report).unwrap();
        let ranges = report.ranges(PAGE).unwrap();
        let pages = ranges.flat_map(|range| range.gpa / PAGE..(range.gpa + range.size) / PAGE);
        pages.collect()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // The tracker's log is a handle, too.
        self.tracker = Tracker::new(None);
        self.client = None;
        let served = self.server.take().unwrap().join();
        if !thread::panicking() {
            served.unwrap().unwrap();
        }
    }
}

const ALL: Settings = Settings {
    migration: MigrationVersion::V2(Features {
        p2p: false,
        pre_copy: false,
    }),
    own_log: true,
};

fn vmm() -> Vmm {
    Vmm::new(ClientOptions::default(), ALL)
}

fn small() -> ClientOptions {
    ClientOptions {
        max_data_xfer_size: 4096,
        ..ClientOptions::default()
    }
}

#[test]
fn a_device_is_described_and_reset() {
    let vmm = vmm();
    let client = vmm.client();
    let info = client.device_info().unwrap();
    assert_eq!((info.num_regions, info.num_irqs), (9, 5));
    let region = client.region_info(0).unwrap();
    assert_eq!((region.size, region.flags & 3), (BAR as u64, 3));
    assert!(region.file.is_none() && region.capabilities.is_empty());
    assert_eq!(client.irq_info(2).unwrap().count, 4);
    assert!(matches!(client.irq_info(9), Err(ClientError::Refused(..))));
    assert!(client.agreed().twin_socket);

    client.write_region(0, 100, b"text").unwrap();
    client.reset().unwrap();
    let mut text = [1; 4];
    client.read_region(0, 100, &mut text).unwrap();
    assert_eq!(text, [0; 4]);
}

/// A BAR in parts of 4096 bytes.
#[test]
fn large_accesses_are_split() {
    let vmm = Vmm::new(small(), ALL);
    let client = vmm.client();
    let data: Vec<u8> = (0..100_000u32).map(|k| k as u8 ^ (k >> 8) as u8).collect();
    client.write_region(0, 4097, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.read_region(0, 4097, &mut back).unwrap();
    assert_eq!(back, data);
    let beyond = client.read_region(0, BAR as u64 - 10, &mut back[..20]);
    assert!(
        matches!(beyond, Err(ClientError::Refused(..))),
        "{beyond:?}"
    );
}

/// An eventfd that does not wait.
fn eventfd() -> OwnedFd {
    // SAFETY: it has no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    assert!(fd >= 0);
    // SAFETY: it is ours and open.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[test]
fn interrupts_arrive_by_eventfds() {
    let vmm = vmm();
    let client = vmm.client();
    let fds = [eventfd(), eventfd()];
    let data = [Some(fds[0].as_fd()), Some(fds[1].as_fd())];
    let set = |start, count, data| {
        let index = VFIO_PCI_MSIX_IRQ_INDEX;
        client.set_irqs(VFIO_IRQ_SET_ACTION_TRIGGER, index, start, count, data)
    };
    let mut file = File::from(fds[1].try_clone().unwrap());
    let mut count = || {
        let mut bytes = [0; 8];
        file.read(&mut bytes)
            .map(|_| u64::from_ne_bytes(bytes))
            .ok()
    };
    set(0, 2, IrqData::Eventfds(&data)).unwrap();
    client.write_region(0, 16, &[1]).unwrap();
    assert_eq!(count(), Some(1));
    set(1, 2, IrqData::Bool(&[1, 0])).unwrap();
    assert_eq!(count(), Some(1));
    set(1, 1, IrqData::None).unwrap();
    assert_eq!(count(), Some(1));
    set(1, 1, IrqData::Eventfds(&[None])).unwrap();
    client.write_region(0, 16, &[1]).unwrap();
    assert_eq!(count(), None);
    let beyond = set(4, 1, IrqData::None);
    assert!(matches!(beyond, Err(ClientError::Refused(..))));
}

/// Mapped memory, memory by messages, memory that is not there; and a command register that
/// forbids all of it.
#[test]
fn the_device_reaches_what_is_mapped() {
    let vmm = vmm();
    let client = vmm.client();
    vmm.map(0, 0, 8 * PAGE);
    client
        .map(8 * PAGE, 8 * PAGE, Prot::READ_WRITE, None)
        .unwrap();
    assert!(vmm.device_writes(PAGE, *b"by mmap!"));
    assert!(vmm.device_writes(9 * PAGE, *b"message!"));
    assert!(!vmm.device_writes(16 * PAGE, *b"nowhere!"));
    for (at, text) in [(PAGE, b"by mmap!"), (9 * PAGE, b"message!")] {
        let mut bytes = [0; 8];
        vmm.memory.read(at, &mut bytes).unwrap();
        assert_eq!(&bytes, text);
    }
    client.write_region(7, 4, &[2, 0]).unwrap();
    assert!(!vmm.device_writes(PAGE, *b"no write"));
    client.write_region(7, 4, &[6, 0]).unwrap();
    client.unmap(0, 8 * PAGE).unwrap();
    assert!(!vmm.device_writes(PAGE, *b"no write"));
    assert!(vmm.device_writes(9 * PAGE, *b"message!"));
    client.unmap_all().unwrap();
    assert!(!vmm.device_writes(9 * PAGE, *b"no write"));
    let again = client.unmap(0, 8 * PAGE);
    assert!(matches!(again, Err(ClientError::Refused(..))), "{again:?}");
}

/// One take has what went by mmap, what went by messages, and what went through a mapping that is
/// gone.
#[test]
fn a_take_has_every_write() {
    let vmm = vmm();
    let client = vmm.client();
    let view = vmm.tracker.iova_view();
    vmm.tracker.add_log("toy", &view, 0, client.log()).unwrap();
    client.start_logging(&[], BASE).unwrap();
    vmm.tracker.start().unwrap();
    view.map(0, 0, 32 * PAGE).unwrap();
    vmm.map(0, 0, 16 * PAGE);
    client
        .map(16 * PAGE, 16 * PAGE, Prot::READ_WRITE, None)
        .unwrap();

    assert!(vmm.device_writes(3 * PAGE - 4, [1; 8]));
    assert!(vmm.device_writes(20 * PAGE, [2; 8]));
    assert_eq!(vmm.take(), [2, 3, 20]);
    assert!(vmm.take().is_empty());

    // A window, to pages 40 to 43 and then to 50 to 53.
    let window = 1 << 40;
    view.map(window, 40 * PAGE, 4 * PAGE).unwrap();
    vmm.map(window, 40 * PAGE, 4 * PAGE);
    assert!(vmm.device_writes(window + PAGE, [3; 8]));
    client.unmap(window, 4 * PAGE).unwrap();
    view.unmap(window, 4 * PAGE).unwrap();
    view.map(window, 50 * PAGE, 4 * PAGE).unwrap();
    vmm.map(window, 50 * PAGE, 4 * PAGE);
    assert!(vmm.device_writes(window + 2 * PAGE, [4; 8]));
    let dirty = vmm.take();
    assert!(dirty.contains(&41) && dirty.contains(&52), "{dirty:?}");
    assert!(
        dirty.iter().all(|page| [41, 42, 51, 52].contains(page)),
        "{dirty:?}"
    );
    assert!(vmm.take().is_empty());
    client.stop_logging().unwrap();
    let mut report = Report::new();
    assert!(vmm.tracker.take(&mut report).is_err());
    assert!(report.pages() >= 36);
}

/// With 4096 bytes of bitmap in a message, 4 GiB of IOVAs take 32 reports.
#[test]
fn a_large_log_is_read_in_parts() {
    let vmm = Vmm::new(small(), ALL);
    let client = vmm.client();
    let far = (4 << 30) - PAGE;
    vmm.map(0, 0, PAGE);
    vmm.map(far, PAGE, PAGE);
    let range = IovaRange {
        iova: 0,
        size: 4 << 30,
    };
    client.start_logging(&[range], BASE).unwrap();
    let again = client.start_logging(&[], BASE);
    assert!(matches!(again, Err(ClientError::Refused(..))), "{again:?}");
    assert!(vmm.device_writes(0, [1; 8]));
    assert!(vmm.device_writes(far, [1; 8]));
    let mut words = vec![0; (4 << 30) / PAGE as usize / 64];
    client.read_log(0, 4 << 30, BASE, &mut words).unwrap();
    assert_eq!(words.first(), Some(&1));
    assert_eq!(words.last(), Some(&(1 << 63)));
    assert_eq!(words.iter().filter(|word| **word != 0).count(), 2);
}

#[test]
fn a_device_without_a_log_says_so() {
    let settings = Settings {
        own_log: false,
        ..ALL
    };
    let vmm = Vmm::new(ClientOptions::default(), settings);
    assert_eq!(vmm.client().has_log(), Ok(false));
    let started = vmm.client().start_logging(&[], BASE);
    assert!(matches!(started, Err(ClientError::NoLog(_))), "{started:?}");
}

#[test]
fn a_device_that_does_not_migrate_says_so() {
    let settings = Settings {
        migration: MigrationVersion::None,
        own_log: true,
    };
    let vmm = Vmm::new(ClientOptions::default(), settings);
    let client = vmm.client();
    assert_eq!(client.has_log(), Ok(true));
    let features = client.migration_features();
    assert!(
        matches!(features, Err(ClientError::Refused(..))),
        "{features:?}"
    );
}

/// 1 MiB of state, by messages of 1 MiB and of 4096 bytes.
#[test]
fn a_state_moves_to_another_server() {
    let (from, to) = (vmm(), Vmm::new(small(), ALL));
    assert_eq!(from.client().migration_features(), Ok(Features::default()));
    assert_eq!(from.client().state(), Ok(State::Running));
    from.client().write_region(0, 5000, b"moves").unwrap();
    from.client().set_state(State::StopCopy).unwrap();
    let (mut state, mut part) = (Vec::new(), vec![0; 300_000]);
    loop {
        let size = from.client().read_state(&mut part).unwrap();
        state.extend_from_slice(&part[..size]);
        if size < part.len() {
            break;
        }
    }
    assert!(state.len() > BAR);
    to.client().set_state(State::Resuming).unwrap();
    to.client().write_state(&state).unwrap();
    to.client().set_state(State::Running).unwrap();
    let mut text = [0; 5];
    to.client().read_region(0, 5000, &mut text).unwrap();
    assert_eq!(&text, b"moves");
    let early = to.client().read_state(&mut part);
    assert!(matches!(early, Err(ClientError::Refused(..))), "{early:?}");
}

/// A write by a message waits for the client, which serves it while four threads call.
#[test]
fn messages_are_served_while_many_calls_wait() {
    let vmm = vmm();
    let client = vmm.client();
    client.map(0, SIZE, Prot::READ_WRITE, None).unwrap();
    thread::scope(|scope| {
        for thread in 0..4u64 {
            scope.spawn(move || {
                for k in 0..200u64 {
                    // The IOVA is whichever thread's was last.
                    let iova = (thread * 8 + k % 8) * PAGE;
                    client.write_region(0, 0, &iova.to_le_bytes()).unwrap();
                    client.write_region(0, 8, &[1; 8]).unwrap();
                }
            });
        }
    });
    let mut failed = [1];
    client.read_region(0, 24, &mut failed).unwrap();
    assert_eq!(failed, [0]);
}
