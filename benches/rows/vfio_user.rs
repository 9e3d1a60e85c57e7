// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vfio-user device in another thread: a write to memory that it has mapped beside one by a
//! message, and as many maps as a client may have.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use adapter_user::emulated::{ConfigSpace, DeviceModel, Dma, MigrationVersion, Settings};
use adapter_user::vfio_user::{Client, ClientOptions, DmaMemory, Server};
use adapter_user::{Errno, GuestMemory, PageSize, Prot};
use rand::Rng;

use crate::data::random;
use crate::harness::{median, Bench};
use crate::host::PAGE;
use crate::report::row::{Row, Who};

const SIZE: u64 = 256 << 20;
/// Where the memory is that the server reaches by messages.
const MESSAGES: u64 = 1 << 40;
const MAPS: u64 = 65_535;

pub(crate) fn run(bench: &mut Bench) {
    let mut row = Row::new("vfio-user", "write of 64 bytes, logged", "256M");
    let setup = || Device::new(true);
    bench.time_on(&mut row, Who::Ours, "mapped", setup, |device, b| {
        let dma = device.dma.clone();
        b.iter_custom(|iters| device.writes(iters, |at, bytes| dma.write(at, bytes).is_ok()));
    });
    bench.time_on(&mut row, Who::Limit, "message", setup, |device, b| {
        let dma = device.dma.clone();
        b.iter_custom(|iters| {
            device.writes(iters, |at, bytes| dma.write(MESSAGES + at, bytes).is_ok())
        });
    });
    bench.time_on(&mut row, Who::Limit, "plain copy", setup, |device, b| {
        let memory = Arc::clone(&device.memory);
        b.iter_custom(|iters| device.writes(iters, |at, bytes| memory.write(at, bytes).is_ok()));
    });
    bench.add(row);

    let mut one = Row::new("vfio-user", "map and unmap, 65,534 there", "256M");
    let mut all = Row::new("vfio-user", "65,535 maps", "256M");
    let (mut maps, mut trips) = (Vec::new(), Vec::new());
    let setup = || {
        let device = Device::new(false);
        maps.push(timed(|number| device.map_page(number)));
        trips.push(timed(|_| device.ask()));
        let last = device.client.unmap((MAPS - 1) * PAGE, PAGE);
        last.expect("it is there");
        device
    };
    bench.time_on(&mut one, Who::Ours, "ours", setup, |device, b| {
        b.iter(|| {
            device.map_page(MAPS - 1);
            let unmapped = device.client.unmap((MAPS - 1) * PAGE, PAGE);
            unmapped.expect("it is there");
        });
    });
    let setup = || Device::new(false);
    bench.time_on(
        &mut one,
        Who::Limit,
        "two round trips",
        setup,
        |device, b| {
            b.iter(|| {
                device.ask();
                device.ask();
            });
        },
    );
    for (who, name, times) in [
        (Who::Ours, "ours", maps),
        (Who::Limit, "65,535 round trips", trips),
    ] {
        if let Some(median) = median(times) {
            all.push(who, name, median);
        }
    }
    bench.add(one);
    bench.add(all);
}

/// How long `call` takes for each map.
fn timed(call: impl FnMut(u64)) -> Duration {
    let started = Instant::now();
    (0..MAPS).for_each(call);
    started.elapsed()
}

/// A client, and the DMA of its device.
struct Device {
    memory: Arc<GuestMemory>,
    client: Client,
    dma: Dma,
    _server: JoinHandle<io::Result<()>>,
}

impl Device {
    /// If it is `mapped`, the device sees the memory twice, and logs what it writes.
    fn new(mapped: bool) -> Device {
        let (ours, theirs) = UnixStream::pair().expect("a socket");
        let (sender, receiver) = channel();
        let server = thread::spawn(move || {
            let settings = Settings {
                migration: MigrationVersion::None,
                own_log: true,
            };
            let model = move |dma, _| Model::new(&sender, dma);
            Server::new(settings, model).serve(theirs)
        });
        let memory = Arc::new(GuestMemory::new(SIZE).expect("memory"));
        memory.populate().expect("memory");
        let answers = Answers(Arc::clone(&memory));
        let client = Client::connect(ours, answers, ClientOptions::default()).expect("a server");
        let dma = receiver.recv().expect("the device is open");
        client.write_region(7, 4, &[6, 0]).expect("bus master");
        let device = Device {
            memory,
            client,
            dma,
            _server: server,
        };
        if mapped {
            let client = &device.client;
            let file = Some((device.memory.as_fd(), 0));
            let map = |iova, file| client.map(iova, SIZE, Prot::READ_WRITE, file);
            map(0, file).expect("a file");
            map(MESSAGES, None).expect("messages");
            let page = PageSize::new(PAGE).expect("a page size");
            client.start_logging(&[], page).expect("a log");
            device.check(0);
            device.check(MESSAGES);
        }
        device
    }

    /// A message, and its reply.
    fn ask(&self) {
        self.client.device_info().expect("it answers");
    }

    fn map_page(&self, number: u64) {
        let file = Some((self.memory.as_fd(), number * PAGE % SIZE));
        let mapped = self.client.map(number * PAGE, PAGE, Prot::READ_WRITE, file);
        mapped.expect("room for it");
    }

    /// A write arrives and is logged.
    fn check(&self, base: u64) {
        self.dma.write(base + 5 * PAGE, b"bench").expect("mapped");
        let mut bytes = [0; 5];
        self.memory.read(5 * PAGE, &mut bytes).expect("inside");
        assert_eq!(&bytes, b"bench");
        self.memory.write(5 * PAGE, &[0; 5]).expect("inside");
        let (mut words, page) = ([0], PageSize::new(PAGE).expect("a page size"));
        let read = self.client.read_log(base, 64 * PAGE, page, &mut words);
        read.expect("it is on");
        assert_eq!(words, [1 << 5]);
    }

    /// Times writes to random places.
    fn writes(&self, iters: u64, write: impl Fn(u64, &[u8]) -> bool) -> Duration {
        let mut rng = random(iters);
        let places: Vec<u64> = (0..1 << 12)
            .map(|_| rng.random_range(0..SIZE / 64) * 64)
            .collect();
        let bytes = [7; 64];
        let started = Instant::now();
        for (at, _) in places.iter().cycle().zip(0..iters) {
            assert!(write(*at, &bytes));
        }
        started.elapsed()
    }
}

struct Answers(Arc<GuestMemory>);

impl DmaMemory for Answers {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        let read = self.0.read(iova.wrapping_sub(MESSAGES), data);
        read.map_err(|_| Errno::EFAULT)
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let written = self.0.write(iova.wrapping_sub(MESSAGES), data);
        written.map_err(|_| Errno::EFAULT)
    }
}

/// A device that does nothing. The bench has its DMA.
struct Model(Mutex<ConfigSpace>);

impl Model {
    fn new(sender: &Sender<Dma>, dma: Dma) -> Model {
        sender.send(dma).expect("somebody waits");
        Model(Mutex::new(ConfigSpace::new(0x1234, 0x0d3c, 0x08_8000)))
    }
}

impl DeviceModel for Model {
    fn region_size(&self, region: u32) -> u64 {
        match region {
            7 => 256,
            _ => 0,
        }
    }

    fn read(&self, _: u32, offset: u64, data: &mut [u8]) {
        self.0.lock().expect("no panic").read(offset, data);
    }

    fn write(&self, _: u32, offset: u64, data: &[u8]) {
        self.0.lock().expect("no panic").write(offset, data);
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
