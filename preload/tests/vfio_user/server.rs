// SPDX-License-Identifier: MIT OR Apache-2.0
//! The servers, which are in the process of the test.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use adapter_user::emulated::{
    ConfigSpace, DeviceModel, Features, Irqs, MigrationVersion, Settings,
};
use adapter_user::vfio_user::Server;
use vfio_engine::Engine;

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

pub(crate) fn engine() -> Server {
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

pub(crate) fn bell() -> Server {
    Server::new(settings(), |_, irqs| Bell {
        irqs,
        config: Mutex::new(ConfigSpace::new(0x1234, 0x0d3b, 0x08_8000)),
    })
}

/// Serves clients, and ends their connections at a connection to the second socket.
pub(crate) fn serve(server: Server, folder: &Path) {
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
