// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device's own thread, which writes without being told, as a network card does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use adapter_user::emulated::Dma;

use super::places::Places;

/// How many writes it makes before it looks whether it shall stop.
const BATCH: u64 = 64;

pub(super) struct Stream {
    inner: Mutex<Inner>,
    /// Somebody waits for the lock, so that the thread gives it up.
    wanted: AtomicBool,
    /// Told when there is something to do.
    wake: Condvar,
}

/// What the stream is doing. All but `paused` and `since` is part of the device's state.
#[derive(Clone, Copy, Default)]
pub(super) struct Inner {
    pub(super) on: bool,
    pub(super) places: Places,
    /// Writes a second, or 0 for as many as it can.
    pub(super) rate: u64,
    /// How many writes were made, refused ones among them.
    pub(super) sequence: u64,
    pub(super) refused: u64,
    paused: bool,
    /// When it began to count by `rate`, and at which write.
    since: Option<(Instant, u64)>,
}

impl Stream {
    /// Starts the thread. It ends when nobody else has the stream.
    pub(super) fn start(dma: Dma) -> Arc<Stream> {
        let stream = Arc::new(Stream {
            inner: Mutex::default(),
            wanted: AtomicBool::new(false),
            wake: Condvar::new(),
        });
        let weak = Arc::downgrade(&stream);
        // Without a thread the device writes only what it is told, which the user sees.
        drop(thread::Builder::new().spawn(move || run(&weak, &dma)));
        stream
    }

    /// No write is under way while the caller has this.
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.wanted.store(true, Ordering::Relaxed);
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        self.wanted.store(false, Ordering::Relaxed);
        inner
    }

    /// Changes what the stream does.
    pub(super) fn change(&self, change: impl FnOnce(&mut Inner)) {
        let mut inner = self.lock();
        change(&mut inner);
        inner.since = None;
        drop(inner);
        self.wake.notify_all();
    }

    /// No write is under way when it returns, and none begins until `go_on`.
    pub(super) fn pause(&self) {
        self.change(|inner| inner.paused = true);
    }

    pub(super) fn go_on(&self) {
        self.change(|inner| inner.paused = false);
    }

    pub(super) fn reset(&self) {
        self.change(|inner| {
            *inner = Inner {
                paused: inner.paused,
                ..Inner::default()
            }
        });
    }
}

fn run(stream: &Weak<Stream>, dma: &Dma) {
    while let Some(stream) = stream.upgrade() {
        let inner = stream.inner.lock();
        let mut inner = inner.unwrap_or_else(PoisonError::into_inner);
        if inner.paused || !inner.on {
            // It wakes up now and then, to find that the device has gone.
            drop(stream.wake.wait_timeout(inner, Duration::from_millis(50)));
            continue;
        }
        let due = inner.due();
        let refused = inner.refused;
        for _ in 0..due.min(BATCH) {
            if stream.wanted.load(Ordering::Relaxed) {
                break;
            }
            inner.write(dma);
        }
        let idle = due == 0 || inner.refused != refused;
        drop(inner);
        match idle {
            true => thread::sleep(Duration::from_micros(200)),
            false => thread::yield_now(),
        }
    }
}

impl Inner {
    /// How many writes shall be made now.
    fn due(&mut self) -> u64 {
        if self.rate == 0 {
            return BATCH;
        }
        let now = Instant::now();
        let (since, first) = *self.since.get_or_insert((now, self.sequence));
        let due = (now - since).as_secs_f64() * self.rate as f64;
        (due as u64).saturating_sub(self.sequence.saturating_sub(first))
    }

    fn write(&mut self, dma: &Dma) {
        let written = self.places.write_random(dma, self.sequence);
        self.sequence = self.sequence.wrapping_add(1);
        self.refused = self.refused.wrapping_add(u64::from(written.is_err()));
    }
}
