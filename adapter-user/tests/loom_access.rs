// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads access the pages of a pin while another takes them away. `loom` runs every
//! order of their steps. The source is the crate's own, with loom's atomics.

#[path = "../src/container/access.rs"]
#[allow(unreachable_pub)]
mod access;

mod atomic {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
}

use access::Access;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

/// What is accessed: loom fails if two threads do so without an order.
struct Page {
    access: Access,
    bytes: [UnsafeCell<u32>; 2],
}

fn write(page: &Page, k: usize) -> bool {
    let Some(_inside) = page.access.enter() else {
        return false;
    };
    // SAFETY: loom checks that nobody else has it now.
    page.bytes[k].with_mut(|byte| unsafe { *byte += 1 });
    true
}

/// Closes, waits if told to, and returns what is there and what was written.
fn run(wait: bool) {
    let page = Arc::new(Page {
        access: Access::new(),
        bytes: [UnsafeCell::new(0), UnsafeCell::new(0)],
    });
    let writers = [0, 1].map(|k| {
        let page = Arc::clone(&page);
        thread::spawn(move || u32::from(write(&page, k)))
    });
    page.access.close();
    while wait && !page.access.is_empty() {
        thread::yield_now();
    }
    // SAFETY: loom checks that nobody writes it now.
    let seen = [0, 1].map(|k| page.bytes[k].with(|byte| unsafe { *byte }));
    let written = writers.map(|writer| writer.join().expect("no panic"));
    assert_eq!(seen, written, "a write came after the pages had gone");
    assert!(!write(&page, 0));
}

#[test]
fn nobody_writes_after_the_pages_have_gone() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3); // all orders take half a minute
    model.check(|| run(true));
}

/// These tests can fail.
#[test]
#[should_panic]
fn without_waiting_somebody_does() {
    loom::model(|| run(false));
}
