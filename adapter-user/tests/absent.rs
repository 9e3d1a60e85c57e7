// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ioctls whose memory comes late or not at all: who waits meanwhile, and what they
//! answer. The pages come by userfaultfd.

use std::fs;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use adapter_user::uapi::*;
use adapter_user::{
    Container, Device, Error, Group, GroupId, GuestMemory, IommuType, Options, Prot,
};
use nix::sys::mman::{mmap_anonymous, munmap, MapFlags, ProtFlags};

#[path = "support/userfault.rs"]
mod userfault;

use userfault::{page, Userfault};

const PAGE: u64 = 4096;
const SIZE: u64 = 64 * PAGE;
/// Where the second mapping is, and the third, of missing memory.
const SECOND: u64 = 16 << 20;
const THIRD: u64 = 32 << 20;
/// How often to look at something that must come to an end: two minutes.
const LOOKS: u32 = 6000;
/// How often a thread must be found asleep before it counts as waiting.
const ASLEEP: u32 = 50;

fn look() {
    thread::sleep(Duration::from_millis(20));
}

/// A container with a device and mappings. Tracking is on, and page 3 is dirty.
struct Setup {
    container: Container,
    device: Arc<Device>,
    /// The first page is missing; the second is there.
    pages: Userfault,
    at: u64,
    memory: Arc<GuestMemory>,
}

impl Setup {
    fn new() -> Setup {
        let len = NonZeroUsize::new(2 * PAGE as usize).expect("not 0");
        let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: new memory, of which nobody has a reference.
        let new = unsafe { mmap_anonymous(None, len, rw, MapFlags::MAP_PRIVATE) };
        let at = new.expect("memory").as_ptr() as u64;
        let pages = Userfault::new(at, 2 * PAGE).expect(
            "userfaultfd: run this test as root, or set vm.unprivileged_userfaultfd to 1 (sysctl)",
        );
        pages.give(at + PAGE, &page(&[])).expect("a page");

        let container = Container::new(Options::default());
        let group = GroupId(1);
        container.add_group(Group::emulated(group)).expect("group");
        container.set_iommu(IommuType::Type1v2).expect("type1v2");
        let on_unmap = |device: &Device, iova, size| device.unpin_range(iova, size);
        let device = container.open_device(group, Some(Box::new(on_unmap)));
        let device = device.expect("device");
        let memory = Arc::new(GuestMemory::new(2 * SIZE).expect("memory"));
        let map = |iova, offset| container.map(iova, &memory, offset, SIZE, Prot::READ_WRITE);
        map(0, 0).expect("map");
        map(SECOND, SIZE).expect("map");
        // SAFETY: the memory stays until the container is gone, and nobody has a
        // reference to it.
        unsafe { container.map_process(THIRD, at, 2 * PAGE, Prot::READ_WRITE) }.expect("map");
        start(&container).expect("START");
        device.write(3 * PAGE, &[1]).expect("write");
        Setup {
            container,
            device,
            pages,
            at,
            memory,
        }
    }

    /// Waits until the first page is asked for.
    fn asked<T>(&self, work: &Work<T>) {
        for _ in 0..LOOKS {
            if let Some(page) = self.pages.asked().expect("an event") {
                assert_eq!(page, self.at);
                return;
            }
            assert!(!work.thread.is_finished(), "it needs no page");
            look();
        }
        panic!("no page was asked for");
    }

    /// Starts the call of a case, which waits for the first page.
    fn block(&self, case: &Case) -> Work<Result<u32, Error>> {
        let (container, at, nr) = (self.container.clone(), self.at, case.nr);
        let mut arg = (case.arg)(at);
        let in_page = case.in_page;
        let work = Work::start(move || match in_page {
            // SAFETY: nobody else uses these pages but the kernel for the test.
            true => unsafe { container.ioctl(nr, at) },
            false => ioctl(&container, nr, &mut arg),
        });
        self.asked(&work);
        work
    }

    /// What is left to report of the first mapping.
    fn left(&self) -> u64 {
        let mut bits = 0u64;
        get(&self.container, 0, &mut bits).expect("GET");
        bits
    }

    /// The first word of page `k` of what was missing.
    fn word(&self, k: u64) -> u64 {
        // SAFETY: the page is there, and whoever wrote to it is done.
        unsafe { ((self.at + k * PAGE) as *const u64).read_volatile() }
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        let _ = self.container.unmap(THIRD, 2 * PAGE);
        if let Some(at) = std::ptr::NonNull::new(self.at as *mut _) {
            // SAFETY: nobody uses the memory any more.
            let _ = unsafe { munmap(at, 2 * PAGE as usize) };
        }
    }
}

/// A thread.
struct Work<T> {
    thread: JoinHandle<T>,
    id: Arc<AtomicI32>,
}

impl<T: Send + 'static> Work<T> {
    fn start(run: impl FnOnce() -> T + Send + 'static) -> Work<T> {
        let id = Arc::new(AtomicI32::new(0));
        let own = Arc::clone(&id);
        let thread = thread::spawn(move || {
            own.store(nix::unistd::gettid().as_raw(), Ordering::Relaxed);
            run()
        });
        Work { thread, id }
    }

    fn end(self, name: &str) -> T {
        for _ in 0..LOOKS {
            if self.thread.is_finished() {
                return self.thread.join().expect("no panic");
            }
            look();
        }
        panic!("{name}: does not end");
    }

    /// Looks until the thread has ended or sleeps; whether it sleeps.
    fn waits(&self) -> bool {
        let mut asleep = 0;
        while asleep < ASLEEP && !self.thread.is_finished() {
            look();
            let file = format!("/proc/self/task/{}/stat", self.id.load(Ordering::Relaxed));
            let stat = fs::read_to_string(file).unwrap_or_default();
            let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
            asleep = if state.starts_with('S') {
                asleep + 1
            } else {
                0
            };
        }
        asleep == ASLEEP
    }
}

fn ioctl(container: &Container, nr: u32, arg: &mut [u64]) -> Result<u32, Error> {
    // SAFETY: the argument is this thread's, and so is the bitmap that it names.
    unsafe { container.ioctl(nr, arg.as_mut_ptr() as u64) }
}

fn start(container: &Container) -> Result<u32, Error> {
    let flags = u64::from(VFIO_IOMMU_DIRTY_PAGES_FLAG_START) << 32;
    ioctl(container, VFIO_IOMMU_DIRTY_PAGES, &mut [8 | flags])
}

/// The argument of a GET of one mapping.
fn get_arg(iova: u64, bitmap: u64) -> Vec<u64> {
    let flags = u64::from(VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP) << 32;
    vec![48 | flags, iova, SIZE, PAGE, 8, bitmap]
}

fn get(container: &Container, iova: u64, bits: &mut u64) -> Result<u32, Error> {
    let mut arg = get_arg(iova, std::ptr::from_mut(bits) as u64);
    ioctl(container, VFIO_IOMMU_DIRTY_PAGES, &mut arg)
}

/// An ioctl that needs a missing page.
struct Case {
    name: &'static str,
    nr: u32,
    /// Its argument, where the missing page has this address.
    arg: fn(u64) -> Vec<u64>,
    /// Whether the page has the argument. Else it has the bitmap.
    in_page: bool,
    /// The page whose first word then has the bits of pages 3 and 9.
    bits: Option<u64>,
    /// What is left to report of the first mapping, unless that is gone.
    left: Option<u64>,
    /// How many bytes an unmap of this range then has, and if the call failed.
    unmap: (u64, u64),
    bytes: u64,
    bytes_refused: u64,
}

const BITS: u64 = 1 << 3 | 1 << 9;
const MAPPED: u64 = 1 << 43;

#[rustfmt::skip]
const CASES: [Case; 6] = [
    Case { name: "argument of MAP", nr: VFIO_IOMMU_MAP_DMA, in_page: true,
        arg: |at| vec![32 | 3 << 32, at, MAPPED, PAGE], bits: None, left: Some(BITS),
        unmap: (MAPPED, PAGE), bytes: PAGE, bytes_refused: 0 },
    Case { name: "argument of UNMAP", nr: VFIO_IOMMU_UNMAP_DMA, in_page: true,
        arg: |_| vec![24, 0, SIZE], bits: None, left: None,
        unmap: (0, SIZE), bytes: 0, bytes_refused: SIZE },
    Case { name: "argument of DIRTY_PAGES", nr: VFIO_IOMMU_DIRTY_PAGES, in_page: true,
        arg: |at| get_arg(0, at + PAGE), bits: Some(1), left: Some(0),
        unmap: (0, SIZE), bytes: SIZE, bytes_refused: SIZE },
    Case { name: "argument of GET_INFO", nr: VFIO_IOMMU_GET_INFO, in_page: true,
        arg: |_| vec![4096], bits: None, left: Some(BITS),
        unmap: (0, SIZE), bytes: SIZE, bytes_refused: SIZE },
    Case { name: "bitmap of GET", nr: VFIO_IOMMU_DIRTY_PAGES, in_page: false,
        arg: |at| get_arg(0, at), bits: Some(0), left: Some(0),
        unmap: (0, SIZE), bytes: SIZE, bytes_refused: SIZE },
    Case { name: "bitmap of UNMAP", nr: VFIO_IOMMU_UNMAP_DMA, in_page: false,
        arg: |at| vec![48 | 1 << 32, 0, SIZE, PAGE, 8, at], bits: Some(0), left: None,
        unmap: (0, SIZE), bytes: 0, bytes_refused: SIZE },
];

/// An operation beside; `None` is right.
type Other = fn(&Container, &Device, &Arc<GuestMemory>) -> Option<String>;

/// Whether a result is the expected one.
fn is<T: std::fmt::Debug + PartialEq>(result: T, expected: T) -> Option<String> {
    (result != expected).then(|| format!("{result:?}, expected {expected:?}"))
}

/// The other operations, each in a thread of its own.
const OTHERS: [(&str, Other); 8] = [
    ("pin", |_, device, _| {
        let pinned = device.pin_pages(SECOND + 5 * PAGE, Prot::READ_WRITE, &mut [0]);
        device.unpin_pages(SECOND + 5 * PAGE, 1);
        is(pinned, Ok(()))
    }),
    ("GET_INFO", |container, _, _| {
        let mut arg = [24, 0, 0];
        is(ioctl(container, VFIO_IOMMU_GET_INFO, &mut arg), Ok(0))
    }),
    ("MAP and UNMAP", |container, _, memory| {
        let mapped = container.map(1 << 40, memory, 0, PAGE, Prot::READ_WRITE);
        is((mapped, container.unmap(1 << 40, PAGE)), (Ok(()), Ok(PAGE)))
    }),
    ("CHECK_EXTENSION", |container, _, _| {
        // SAFETY: the argument is a number.
        is(unsafe { container.ioctl(VFIO_CHECK_EXTENSION, 3) }, Ok(1))
    }),
    ("write", |_, device, _| {
        is(device.write(SECOND + 7 * PAGE, &[1; 64]), Ok(()))
    }),
    ("START", |container, _, _| is(start(container), Ok(0))),
    ("GET", |container, _, _| {
        is(get(container, SECOND, &mut 0), Ok(0))
    }),
    ("UNMAP", |container, _, _| {
        is(container.unmap(1 << 41, PAGE), Ok(0))
    }),
];

/// Starts the other operations.
fn others(setup: &Setup) -> Vec<(&'static str, Work<Option<String>>)> {
    let start = |(name, other): (&'static str, Other)| {
        let (container, device) = (setup.container.clone(), Arc::clone(&setup.device));
        let memory = Arc::clone(&setup.memory);
        let work = Work::start(move || other(&container, &device, &memory));
        (name, work)
    };
    OTHERS.map(start).into()
}

#[test]
#[ignore = "needs root or vm.unprivileged_userfaultfd=1"]
fn nobody_waits_for_the_page_of_another_ioctl() {
    for case in &CASES {
        let setup = Setup::new();
        let blocked = setup.block(case);
        for (name, work) in others(&setup) {
            assert_eq!(work.end(name), None, "{name} beside {}", case.name);
        }
        setup.device.write(9 * PAGE, &[1]).expect("write");
        assert!(!blocked.thread.is_finished(), "{}", case.name);
        let words = if case.in_page {
            (case.arg)(setup.at)
        } else {
            vec![]
        };
        setup.pages.give(setup.at, &page(&words)).expect("a page");
        assert_eq!(blocked.end(case.name), Ok(0), "{}", case.name);
        let bits = case.bits.map_or(BITS, |k| setup.word(k));
        assert_eq!(bits, BITS, "{}", case.name);
        if let Some(left) = case.left {
            assert_eq!(setup.left(), left, "{}", case.name);
        }
        let (iova, size) = case.unmap;
        let unmapped = setup.container.unmap(iova, size);
        assert_eq!(unmapped, Ok(case.bytes), "{}", case.name);
    }
}

#[test]
#[ignore = "needs root or vm.unprivileged_userfaultfd=1"]
fn a_page_that_cannot_be_had_loses_nothing() {
    for case in &CASES {
        let setup = Setup::new();
        let blocked = setup.block(case);
        setup.device.write(9 * PAGE, &[1]).expect("write");
        setup.pages.refuse(setup.at).expect("poison");
        assert_eq!(
            blocked.end(case.name),
            Err(Error::BadAddress),
            "{}",
            case.name
        );
        assert_eq!(setup.left(), BITS, "{}", case.name);
        let (iova, size) = case.unmap;
        let unmapped = setup.container.unmap(iova, size);
        assert_eq!(unmapped, Ok(case.bytes_refused), "{}", case.name);
    }
}

/// What `Device::write` says of itself. It also shows that the first test could fail.
#[test]
#[ignore = "needs root or vm.unprivileged_userfaultfd=1"]
fn ioctls_wait_for_the_page_of_a_device_s_write() {
    let setup = Setup::new();
    let device = Arc::clone(&setup.device);
    let blocked = Work::start(move || device.write(THIRD, &[7; 64]));
    setup.asked(&blocked);
    let container = setup.container.clone();
    let info = Work::start(move || ioctl(&container, VFIO_IOMMU_GET_INFO, &mut [24, 0, 0]));
    assert!(info.waits(), "GET_INFO does not wait for the write");
    setup.pages.give(setup.at, &page(&[])).expect("a page");
    assert_eq!(blocked.end("write"), Ok(()));
    assert_eq!(info.end("GET_INFO"), Ok(0));
    assert_eq!(setup.word(0), u64::from_ne_bytes([7; 8]));
}
