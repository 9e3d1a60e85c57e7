// SPDX-License-Identifier: MIT OR Apache-2.0
//! A Unix socket by which a test drives devices beside the guest: `VFIO_PRELOAD_CONTROL`
//! names it. A line in, a line out.
//!
//! | command | answer |
//! |---|---|
//! | `get DEVICE OFFSET` | the 32-bit register of BAR 0 |
//! | `set DEVICE OFFSET VALUE` | `ok`; as a write of the guest |
//! | `lose get`, `unmap`, `log` or `nothing` | `ok`; the dirty bits of these answers are lost from now on |
//! | `lose device` | `ok`; as if a device in another process marked nothing that it writes |
//! | `fail NAME ERRNO` | `ok`; the next ioctl of this name in the trace fails |
//! | `status` | how many devices are open, and how many pages are charged |

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Once};
use std::thread;

use adapter_user::charged_pages;
use adapter_user::emulated::DeviceFile;
use adapter_user::Errno;
use vfio_engine::without_signals;

use crate::faults;
use crate::remote::Remote;
use crate::trace::trace;

/// An open device, in this process or in another. The offsets are those of its file.
pub(crate) trait Driven: Send + Sync {
    fn name(&self) -> &str;
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<usize, Errno>;
    fn write(&self, offset: u64, data: &[u8]) -> Result<usize, Errno>;
}

macro_rules! driven {
    ($($device:ident)*) => {$(
        impl Driven for $device {
            fn name(&self) -> &str {
                $device::name(self)
            }
            fn read(&self, offset: u64, data: &mut [u8]) -> Result<usize, Errno> {
                $device::read(self, offset, data)
            }
            fn write(&self, offset: u64, data: &[u8]) -> Result<usize, Errno> {
                $device::write(self, offset, data)
            }
        }
    )*};
}
driven! { DeviceFile Remote }

/// Returns the open devices.
type Open = fn() -> Vec<Arc<dyn Driven>>;

/// Starts to listen, unless it does so already.
pub(crate) fn listen(open: Open) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let Some(path) = std::env::var_os("VFIO_PRELOAD_CONTROL").map(PathBuf::from) else {
            return;
        };
        let listener = match UnixListener::bind(&path) {
            Ok(listener) => listener,
            Err(error) => {
                eprintln!(
                    "vfio-preload: no control socket at {}: {error}",
                    path.display()
                );
                return;
            }
        };
        let thread = thread::Builder::new().name("vfio-control".into());
        let run = move || {
            for stream in listener.incoming().flatten() {
                serve(&stream, open);
            }
        };
        let started = without_signals(|| thread.spawn(run));
        if let Err(error) = started {
            eprintln!("vfio-preload: no thread for the control socket: {error}");
        }
    });
}

fn serve(mut stream: &UnixStream, open: Open) {
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let answer = run(&line, open).unwrap_or_else(|error| format!("error: {error}"));
        trace!("control {line}: {answer}");
        if stream.write_all(format!("{answer}\n").as_bytes()).is_err() {
            return;
        }
    }
}

fn run(line: &str, open: Open) -> Result<String, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let device = |name: &str| {
        let device = open().into_iter().find(|device| device.name() == name);
        device.ok_or_else(|| format!("no device {name} is open"))
    };
    match words[..] {
        ["get", name, offset] => {
            let mut register = [0; 4];
            let done = device(name)?.read(number(offset)?, &mut register);
            done.map_err(|errno| errno.to_string())?;
            return Ok(u32::from_le_bytes(register).to_string());
        }
        ["set", name, offset, value] => {
            let value = u32::try_from(number(value)?).map_err(|error| error.to_string())?;
            let done = device(name)?.write(number(offset)?, &value.to_le_bytes());
            done.map_err(|errno| errno.to_string())?;
        }
        ["lose", what] => faults::lose(what)?,
        ["fail", name, errno] => {
            let errno = i32::try_from(number(errno)?).map_err(|error| error.to_string())?;
            faults::fail_next(name, errno);
        }
        ["status"] => {
            let (open, charged) = (open().len(), charged_pages());
            return Ok(format!("open={open} charged={charged}"));
        }
        _ => return Err(format!("no such command: {line}")),
    }
    Ok("ok".into())
}

fn number(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    number.map_err(|error| format!("{text}: {error}"))
}
