// SPDX-License-Identifier: MIT OR Apache-2.0
//! The client of the crate vfio_user, which cloud-hypervisor uses, with our server.
//!
//! It checks neither an error nor the length of a reply, and serves no command of the server: so
//! every call here must succeed, and the memory has a file.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use std::thread;

use adapter_user::emulated::{ConfigSpace, DeviceModel, Dma, Irqs, Settings};
use adapter_user::vfio_user::Server;
use vfio_user::Client;

const PAGE: u64 = 4096;

/// BAR 0 has an IOVA: a write of it copies its 8 bytes there and raises MSI-X 1.
struct Scribe {
    dma: Dma,
    irqs: Irqs,
    config: Mutex<ConfigSpace>,
    register: Mutex<[u8; 8]>,
}

impl DeviceModel for Scribe {
    fn region_size(&self, region: u32) -> u64 {
        match region {
            0 => 8,
            7 => 256,
            _ => 0,
        }
    }
    fn irq_count(&self, index: u32) -> u32 {
        if index == 2 {
            4
        } else {
            0
        }
    }
    fn read(&self, region: u32, offset: u64, data: &mut [u8]) {
        match region {
            7 => self.config.lock().unwrap().read(offset, data),
            _ => data
                .copy_from_slice(&self.register.lock().unwrap()[offset as usize..][..data.len()]),
        }
    }
    fn write(&self, region: u32, offset: u64, data: &[u8]) {
        if region == 7 {
            return self.config.lock().unwrap().write(offset, data);
        }
        let mut register = self.register.lock().unwrap();
        register[offset as usize..][..data.len()].copy_from_slice(data);
        if self
            .dma
            .write(u64::from_le_bytes(*register), &*register)
            .is_ok()
        {
            self.irqs.trigger(2, 1);
        }
    }
    fn reset(&self) {
        *self.register.lock().unwrap() = [0; 8];
    }
    fn quiesce(&self) {
        drop(self.register.lock());
    }
    fn resume(&self) {}
    fn state_size(&self) -> u64 {
        8
    }
    fn save(&self, stream: &mut dyn Write) -> io::Result<()> {
        stream.write_all(&*self.register.lock().unwrap())
    }
    fn load(&self, stream: &mut dyn Read) -> io::Result<()> {
        stream.read_exact(&mut *self.register.lock().unwrap())
    }
}

fn eventfd() -> File {
    // SAFETY: eventfd(2) accesses no memory.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: it is open, and nobody else has it.
    unsafe { File::from_raw_fd(fd) }
}

#[test]
fn attach_regions_interrupts_maps_and_dma() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let server = Server::new(Settings::default(), |dma, irqs| Scribe {
            dma,
            irqs,
            config: Mutex::new(ConfigSpace::new(0x1234, 1, 0x08_8000).with_memory_bar(0, 16)),
            register: Mutex::default(),
        });
        server.serve(listener.accept().unwrap().0)
    });

    let mut client = Client::new(&path).unwrap();
    assert_eq!(client.region(0).unwrap().size, 8);
    assert_eq!(client.region(7).unwrap().size, 256);
    let mut id = [0; 4];
    client.region_read(7, 0, &mut id).unwrap();
    assert_eq!(id, [0x34, 0x12, 1, 0]);
    let irqs = client.get_irq_info(2).unwrap();
    assert_eq!((irqs.index, irqs.count), (2, 4));
    let events = [eventfd(), eventfd()];
    let fds: Vec<_> = events.iter().map(AsRawFd::as_raw_fd).collect();
    client.set_irqs(2, 4 | 32, 0, 2, &fds).unwrap(); // EVENTFD, TRIGGER

    let memory = Arc::new(tempfile::tempfile().unwrap());
    memory.set_len(4 * PAGE).unwrap();
    for k in 0..2 {
        let iova = 0x10_0000 * (k + 1);
        client
            .dma_map(2 * k * PAGE, iova, 2 * PAGE, memory.as_raw_fd())
            .unwrap();
    }
    client.region_write(7, 4, &6u16.to_le_bytes()).unwrap(); // memory and bus master
    let iova = 0x20_0000 + PAGE;
    client.region_write(0, 0, &iova.to_le_bytes()).unwrap();
    let mut count = [0; 8];
    (&events[1]).read_exact(&mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
    let mut written = [0; 8];
    memory.read_exact_at(&mut written, 3 * PAGE).unwrap();
    assert_eq!(u64::from_le_bytes(written), iova);

    // Nothing is written where nothing is mapped any more.
    client.dma_unmap(0x20_0000, 2 * PAGE).unwrap();
    memory.write_all_at(&[0; 8], 3 * PAGE).unwrap();
    client.region_write(0, 0, &iova.to_le_bytes()).unwrap();
    memory.read_exact_at(&mut written, 3 * PAGE).unwrap();
    assert_eq!(written, [0; 8]);
    let mut register = [0; 8];
    client.region_read(0, 0, &mut register).unwrap();
    assert_eq!(u64::from_le_bytes(register), iova);
    client.reset().unwrap();
    client.region_read(0, 0, &mut register).unwrap();
    assert_eq!(register, [0; 8]);

    client.shutdown().unwrap();
    server.join().unwrap().unwrap();
}
