// SPDX-License-Identifier: MIT OR Apache-2.0
use super::*;
use std::cell::RefCell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::Arc;
use std::thread;

/// Slots that open at once, slots that open now and then, and a `RwLock`.
const WAYS: [u64; 3] = [0, 20, NEVER];

/// A value that is wrong while it is changed: two numbers that else are the same.
#[derive(Default)]
struct Pair(AtomicU64, AtomicU64);

impl Pair {
    fn check(&self) -> u64 {
        let (a, b) = (self.0.load(Relaxed), self.1.load(Relaxed));
        assert_eq!(a, b, "somebody changes what another reads");
        a
    }
}

#[test]
fn nobody_reads_while_another_writes() {
    const WRITES: u64 = 100;
    for way in WAYS {
        let lock = Lock::opens_after(way, Pair::default());
        let done = AtomicBool::new(false);
        let marks = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !done.load(Relaxed) {
                        for _ in 0..100 {
                            lock.read(Pair::check);
                            marks.fetch_add(1, Relaxed);
                        }
                    }
                });
            }
            // Threads that end, whose slots others get.
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    thread::scope(|scope| {
                        scope.spawn(|| (0..3).map(|_| lock.read(Pair::check)).max());
                    });
                }
            });
            let writers = [0, 1].map(|_| {
                scope.spawn(|| {
                    for _ in 0..WRITES {
                        let pair = lock.write();
                        pair.0.fetch_add(1, Relaxed);
                        thread::yield_now();
                        pair.1.fetch_add(1, Relaxed);
                        drop(pair);
                        thread::yield_now();
                    }
                })
            });
            let ended = writers.map(|writer| writer.join());
            done.store(true, Relaxed);
            assert!(ended.iter().all(Result::is_ok));
        });
        assert_eq!(lock.read(Pair::check), 2 * WRITES);
        assert_ne!(marks.into_inner(), 0);
    }
}

/// What is in the slot of this thread.
fn inside() -> Option<u64> {
    slot::own().map(|slot| slot.inside.load(Relaxed))
}

#[test]
fn a_thread_enters_by_its_slot_once_it_has_entered_by_turn() {
    let lock = Lock::opens_after(2, 7);
    (0..2).for_each(|_| lock.read(|_| ()));
    assert_eq!(inside(), Some(0), "the second has opened the slots");
    lock.read(|_| assert_ne!(inside(), Some(0)));
    assert_eq!(inside(), Some(0));
    *lock.write() += 1;
    // Somebody has excluded since, so the entries are counted anew.
    lock.read(|value| assert_eq!((*value, inside()), (8, Some(0))));
}

#[test]
fn without_a_barrier_nobody_has_a_slot() {
    let lock = Lock::opens_after(NEVER, 7);
    thread::scope(|scope| {
        scope.spawn(|| {
            (0..2 * OFTEN).for_each(|_| lock.read(|_| ()));
            assert_eq!(inside(), None);
        });
    });
}

#[test]
fn two_locks_and_one_lock_twice() {
    let (one, two) = (Lock::opens_after(1, 1), Lock::opens_after(1, 2));
    one.read(|_| two.read(|_| ()));
    one.read(|outer| {
        let key = inside();
        assert_ne!(key, Some(0));
        two.read(|inner| assert_eq!((inside(), outer, inner), (key, &1, &2)));
        one.read(|inner| assert_eq!((inside(), inner), (key, &1)));
        *two.write() = 4;
        assert_eq!(inside(), key);
    });
    *one.write() = 3;
    assert_eq!(one.read(|one| two.read(|two| (*one, *two))), (3, 4));
}

#[test]
fn a_panic_inside_lets_others_in() {
    for way in WAYS {
        let lock = Lock::opens_after(way, 0);
        for _ in 0..3 {
            let read = catch_unwind(AssertUnwindSafe(|| {
                lock.read(|_| std::panic::resume_unwind(Box::new("a callback's bug")));
            }));
            assert!(read.is_err());
            let written = catch_unwind(AssertUnwindSafe(|| {
                *lock.write() += 1;
                let _writer = lock.write();
                std::panic::resume_unwind(Box::new("another"));
            }));
            assert!(written.is_err());
        }
        assert_eq!(lock.read(|value| *value), 3);
    }
}

#[test]
fn a_reader_that_is_not_running_is_waited_for_asleep() {
    let lock = Lock::opens_after(1, 0);
    let (inside, go_on) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            lock.read(|_| ());
            lock.read(|value| {
                inside.store(true, Relaxed);
                while !go_on.load(Relaxed) {
                    thread::park();
                }
                assert_eq!(*value, 0);
            });
        });
        while !inside.load(Relaxed) {
            thread::yield_now();
        }
        let writer = scope.spawn(|| *lock.write() = 1);
        // It sleeps now, or is about to. Either way it must be woken.
        thread::sleep(std::time::Duration::from_millis(20));
        let waits = !writer.is_finished();
        go_on.store(true, Relaxed);
        reader.thread().unpark();
        assert!(waits, "somebody is inside");
    });
    assert_eq!(lock.read(|value| *value), 1);
}

thread_local! {
    static LATE: RefCell<Option<Late>> = const { RefCell::new(None) };
}

/// Reads when its thread ends.
struct Late(Arc<Lock<u64>>);

impl Drop for Late {
    fn drop(&mut self) {
        assert_eq!(self.0.read(|value| *value), 5);
    }
}

#[test]
fn a_destructor_of_a_thread_may_read() {
    let lock = Arc::new(Lock::opens_after(1, 5));
    for slot_first in [true, false] {
        let lock = Arc::clone(&lock);
        let thread = thread::spawn(move || {
            let touch = || (0..2).for_each(|_| lock.read(|_| ()));
            if slot_first {
                touch();
            }
            LATE.set(Some(Late(Arc::clone(&lock))));
            touch();
        });
        thread.join().expect("no panic");
    }
    assert_eq!(*lock.write(), 5);
}
