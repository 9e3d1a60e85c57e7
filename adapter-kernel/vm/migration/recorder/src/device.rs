// SPDX-License-Identifier: GPL-2.0-only
//! A real VFIO device, its data files, and operations on them.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use dirty_model::migration::{Op, Place, PATTERN};
use nix::errno::Errno;
use nix::libc;

use crate::logging::Call;
use crate::pages::Pages;

const VFIO_SET_IOMMU: u64 = 0x3b66;
const VFIO_GROUP_SET_CONTAINER: u64 = 0x3b68;
const VFIO_GROUP_GET_DEVICE_FD: u64 = 0x3b6a;
const VFIO_DEVICE_RESET: u64 = 0x3b6f;
const VFIO_DEVICE_FEATURE: u64 = 0x3b75;
const TYPE1V2: usize = 3;
const GET: u64 = 1 << 16;
const SET: u64 = 1 << 17;

/// An ioctl whose argument is a value, or an address.
fn ioctl(fd: RawFd, nr: u64, arg: usize) -> Result<i32, Errno> {
    // SAFETY: the kernel checks what it is given, and writes only to the argument,
    // whose memory nothing else uses meanwhile.
    Errno::result(unsafe { libc::ioctl(fd, nr, arg) })
}

/// The device, and what keeps it open.
struct Opened {
    device: OwnedFd,
    _group: File,
    _container: File,
}

impl Opened {
    fn new(mdev: &str) -> io::Result<Opened> {
        let group = fs::read_link(format!("/sys/bus/mdev/devices/{mdev}/iommu_group"))?;
        let group = group.file_name().unwrap_or_default().to_owned();
        let open = |path: &str| File::options().read(true).write(true).open(path);
        let container = open("/dev/vfio/vfio")?;
        let group = open(&format!("/dev/vfio/{}", group.to_string_lossy()))?;
        let fd = container.as_raw_fd();
        ioctl(
            group.as_raw_fd(),
            VFIO_GROUP_SET_CONTAINER,
            (&raw const fd) as usize,
        )?;
        ioctl(fd, VFIO_SET_IOMMU, TYPE1V2)?;
        let name = format!("{mdev}\0");
        let device = ioctl(
            group.as_raw_fd(),
            VFIO_GROUP_GET_DEVICE_FD,
            name.as_ptr() as usize,
        )?;
        // The sample driver keeps its state when its file is closed.
        ioctl(device, VFIO_DEVICE_RESET, 0)?;
        // SAFETY: the kernel has just opened it for us.
        let device = unsafe { OwnedFd::from_raw_fd(device) };
        Ok(Opened {
            device,
            _group: group,
            _container: container,
        })
    }
}

/// A data file, and what was read of it.
#[derive(Default)]
struct Data {
    file: Option<File>,
    taken: Vec<u8>,
}

pub(crate) struct Device {
    mdev: String,
    opened: Option<Opened>,
    files: Vec<Data>,
    pages: Pages,
    /// What an argument points to.
    ranges: Pages,
}

/// The fields of an argument one after another.
fn argument(words: &[u32]) -> [u8; 64] {
    let mut bytes = [0; 64];
    for (at, word) in bytes.chunks_exact_mut(4).zip(words) {
        at.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// As [`argument`], for fields of 64 bits.
fn longs(words: &[u64]) -> [u8; 64] {
    let mut bytes = [0; 64];
    for (at, word) in bytes.chunks_exact_mut(8).zip(words) {
        at.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

fn long(bytes: &[u8; 64], n: usize) -> u64 {
    u64::from_ne_bytes(bytes[8 * n..8 * n + 8].try_into().expect("8 bytes"))
}

fn word(bytes: &[u8; 64], n: usize) -> u32 {
    u32::from_ne_bytes(bytes[4 * n..4 * n + 4].try_into().expect("4 bytes"))
}

fn text(answer: Result<i32, Errno>) -> String {
    match answer {
        Ok(0) => "ok".into(),
        Ok(n) => n.to_string(),
        Err(errno) => format!("{errno:?}"),
    }
}

fn count(answer: io::Result<usize>) -> String {
    match answer {
        Ok(n) => n.to_string(),
        Err(e) => format!("{:?}", Errno::from_raw(e.raw_os_error().unwrap_or(0))),
    }
}

impl Device {
    pub(crate) fn open(mdev: &str) -> io::Result<Device> {
        Ok(Device {
            mdev: mdev.into(),
            opened: Some(Opened::new(mdev)?),
            files: Vec::new(),
            pages: Pages::new()?,
            ranges: Pages::new()?,
        })
    }

    fn fd(&self) -> RawFd {
        let opened = self.opened.as_ref().expect("an open device");
        opened.device.as_raw_fd()
    }

    fn file(&mut self, number: usize) -> Option<&mut File> {
        self.files.get_mut(number)?.file.as_mut()
    }

    /// Runs a call of DMA logging.
    pub(crate) fn log(&mut self, call: &Call) -> io::Result<String> {
        let fd = self.fd();
        let ioctl = |addr| ioctl(fd, VFIO_DEVICE_FEATURE, addr);
        match call {
            Call::Start {
                page,
                count,
                at,
                from,
                ranges,
            } => {
                let words = ranges.iter().flat_map(|(iova, length)| [*iova, *length]);
                let bytes = longs(&words.collect::<Vec<_>>());
                let start = |ranges: usize| {
                    let head = 32 | (SET | 6) << 32;
                    let words = [head, *page, (*count).into(), ranges as u64];
                    self.pages.with(*at, &longs(&words), ioctl)
                };
                let (done, _) = self.ranges.with(*from, &bytes, start)?;
                let (answer, after) = done?;
                let mut text = text(answer);
                if at.readable() >= 32 {
                    text += &format!(" {:#x}", long(&after, 1));
                }
                Ok(text)
            }
            Call::Report {
                page,
                iova,
                length,
                at,
            } => {
                let report = |bitmap: usize| {
                    let head = 40 | (GET | 8) << 32;
                    let words = [head, *iova, *length, *page, bitmap as u64];
                    self.pages.with(Place::Mem, &longs(&words), ioctl)
                };
                let (done, _) = self.ranges.with(*at, &[0; 64], report)?;
                Ok(text(done?.0))
            }
        }
    }

    /// Runs an operation. A data file that is not open answers EBADF.
    pub(crate) fn run(&mut self, op: &Op) -> io::Result<String> {
        let bad = || format!("{:?}", Errno::EBADF);
        Ok(match *op {
            Op::Feature {
                n,
                flags,
                argsz,
                at,
                state,
            } => {
                let bytes = argument(&[argsz, n | flags, state, PATTERN]);
                let fd = self.fd();
                let act = |addr| ioctl(fd, VFIO_DEVICE_FEATURE, addr);
                let (answer, after) = self.pages.with(at, &bytes, act)?;
                let mut text = text(answer);
                if at.readable() >= 16 {
                    let set = answer.is_ok() && n | flags == 0x2_0002;
                    text += &match word(&after, 3) {
                        PATTERN => format!(" {:#x} -", word(&after, 2)),
                        fd if set && fd != u32::MAX => {
                            // SAFETY: the kernel has just opened it for us.
                            let file = unsafe { File::from_raw_fd(fd as RawFd) };
                            self.files.push(Data {
                                file: Some(file),
                                ..Data::default()
                            });
                            format!(" {:#x} f{}", word(&after, 2), self.files.len() - 1)
                        }
                        other => format!(" {:#x} {other:#x}", word(&after, 2)),
                    };
                }
                text
            }
            Op::Precopy {
                file,
                nr,
                argsz,
                flags,
                at,
            } => {
                let words = [argsz, flags, PATTERN, PATTERN, PATTERN, PATTERN];
                let bytes = argument(&words);
                let fd = self.file(file).map(|file| file.as_raw_fd());
                let act = |addr| match fd {
                    Some(fd) => ioctl(fd, nr.into(), addr),
                    None => Err(Errno::EBADF),
                };
                let (answer, after) = self.pages.with(at, &bytes, act)?;
                let mut text = text(answer);
                if at.readable() >= 24 {
                    for n in 1..6 {
                        text += &match word(&after, n) {
                            PATTERN => " -".into(),
                            word => format!(" {word:#x}"),
                        };
                    }
                }
                text
            }
            Op::Read { file, len } => {
                let mut bytes = vec![0; len];
                match self.file(file) {
                    Some(open) => {
                        let answer = open.read(&mut bytes);
                        if let Ok(n) = answer {
                            self.files[file].taken.extend(&bytes[..n]);
                        }
                        count(answer)
                    }
                    None => bad(),
                }
            }
            Op::Write { file, len } => match self.file(file) {
                Some(file) => count(file.write(&vec![0; len])),
                None => bad(),
            },
            Op::Copy { from, to } => {
                let bytes = self.files.get(from).map(|data| data.taken.clone());
                match self.file(to) {
                    Some(file) => count(file.write(&bytes.unwrap_or_default())),
                    None => bad(),
                }
            }
            Op::Close { file } => match self.file(file) {
                Some(_) => {
                    self.files[file].file = None;
                    text(Ok(0))
                }
                None => bad(),
            },
            Op::Reset => text(ioctl(self.fd(), VFIO_DEVICE_RESET, 0)),
            Op::Reopen => {
                self.files.iter_mut().for_each(|data| data.file = None);
                self.opened = None;
                self.opened = Some(Opened::new(&self.mdev)?);
                text(Ok(0))
            }
        })
    }
}
