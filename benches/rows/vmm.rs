// SPDX-License-Identifier: MIT OR Apache-2.0
//! Four threads mark the memory of a guest at a time, as its CPUs and devices do.

use adapter_user::guest::Tracker;
use adapter_user::DirtyBits;
use rand::Rng;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

use crate::data::{random, GIB_64};
use crate::harness::{in_threads, Bench};
use crate::host::PAGE;
use crate::report::row::{Row, Who};
use crate::sets::{Atomic, PageSet};

const THREADS: usize = 4;

pub(crate) fn run(bench: &mut Bench) {
    for (case, n) in [("mark", 1), ("mark of 512 pages", 512)] {
        let mut row = Row::new("vmm", format!("4 threads, {case}"), GIB_64.name);
        let tracker = Tracker::new(None);
        let bits = tracker.add_slot(0, 0, None, GIB_64.pages * PAGE);
        let bits = bits.expect("memory for a bitmap");
        tracker.start().expect("the kernel has membarrier(2)");
        mark(bench, &mut row, Who::Ours, "ours", n, &bits);
        let bitmap = Atomic::new(GIB_64.pages).0;
        mark(bench, &mut row, Who::Peer, Atomic::NAME, n, &bitmap);
        bench.add(row);
    }
}

/// Something in which threads mark bytes from an offset on.
trait Marks: Sync {
    fn mark(&self, offset: u64, len: u64);

    fn is_dirty(&self, offset: u64) -> bool;
}

impl Marks for DirtyBits {
    fn mark(&self, offset: u64, len: u64) {
        DirtyBits::mark(self, offset, len).expect("inside");
    }

    fn is_dirty(&self, offset: u64) -> bool {
        self.dirty_at(offset as usize)
    }
}

impl Marks for AtomicBitmap {
    fn mark(&self, offset: u64, len: u64) {
        self.mark_dirty(offset as usize, len as usize);
    }

    fn is_dirty(&self, offset: u64) -> bool {
        self.dirty_at(offset as usize)
    }
}

/// Times marks of `n` pages from four threads at a time.
fn mark(bench: &mut Bench, row: &mut Row, who: Who, name: &'static str, n: u64, set: &impl Marks) {
    let setup = || {
        let mut rng = random(n);
        let last = GIB_64.pages - n;
        let mut pages = || (0..1 << 18).map(|_| rng.random_range(0..=last)).collect();
        let pages: [Vec<u64>; THREADS] = std::array::from_fn(|_| pages());
        set.mark(pages[0][0] * PAGE, n * PAGE);
        for page in pages[0][0]..pages[0][0] + n {
            assert!(set.is_dirty(page * PAGE), "{name}: a mark");
        }
        pages
    };
    bench.time_on(row, who, name, setup, |pages, b| {
        b.iter_custom(|iters| {
            let each = (iters as usize).div_ceil(THREADS);
            in_threads(THREADS, |k| {
                for page in pages[k].iter().cycle().take(each) {
                    set.mark(page * PAGE, n * PAGE);
                }
            })
        });
    });
}
