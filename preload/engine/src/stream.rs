// SPDX-License-Identifier: MIT OR Apache-2.0
//! The engine's own thread, which writes without being told, as a network card does.
//!
//! Word number n has the value n, and goes to place n % COUNT of COUNT places that are STRIDE
//! bytes apart. So whoever knows how many words were written knows what each place has.

use std::fmt::Arguments;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use adapter_user::emulated::Dma;

use crate::signals::without_signals;

/// The places that are written to.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) iova: u64,
    pub(super) count: u32,
    pub(super) stride: u64,
}

pub(super) struct Stream {
    inner: Mutex<Inner>,
    /// Told when there is something to do.
    wake: Condvar,
}

#[derive(Default)]
struct Inner {
    on: bool,
    places: Window,
    /// How many words were written.
    sequence: u32,
    paused: bool,
}

impl Stream {
    /// Starts the thread. It ends when nobody else has the stream.
    pub(super) fn start(dma: Dma, say: fn(Arguments<'_>)) -> Arc<Stream> {
        let stream = Arc::new(Stream {
            inner: Mutex::default(),
            wake: Condvar::new(),
        });
        let weak = Arc::downgrade(&stream);
        let thread = thread::Builder::new().name("vfio-stream".into());
        let started = without_signals(|| thread.spawn(move || run(&weak, &dma, say)));
        if let Err(error) = started {
            say(format_args!("no thread for the stream: {error}"));
        }
        stream
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to write: from word 0, or from where it was if the places are the same.
    pub(super) fn begin(&self, window: Window) -> Result<(), String> {
        let size = window.stride.checked_mul(window.count.into());
        if window.count == 0
            || size
                .and_then(|size| window.iova.checked_add(size))
                .is_none()
        {
            return Err("COUNT is 0, or the IOVAs wrap".into());
        }
        let mut inner = self.inner();
        if inner.places != window {
            (inner.places, inner.sequence) = (window, 0);
        }
        inner.on = true;
        drop(inner);
        self.wake.notify_all();
        Ok(())
    }

    /// Stops to write. No write is under way when it returns.
    pub(super) fn end(&self) {
        self.inner().on = false;
    }

    pub(super) fn reset(&self) {
        let mut inner = self.inner();
        let paused = inner.paused;
        *inner = Inner {
            paused,
            ..Inner::default()
        };
    }

    /// As `end`, until `go_on`.
    pub(super) fn pause(&self) {
        self.inner().paused = true;
    }

    pub(super) fn go_on(&self) {
        self.inner().paused = false;
        self.wake.notify_all();
    }

    pub(super) fn sequence(&self) -> u32 {
        self.inner().sequence
    }

    /// Whether it is on, its places, and how many words were written.
    pub(super) fn saved(&self) -> (bool, Window, u32) {
        let inner = self.inner();
        (inner.on, inner.places, inner.sequence)
    }

    pub(super) fn load(&self, on: bool, places: Window, sequence: u32) {
        let mut inner = self.inner();
        inner.on = on && places.count != 0;
        (inner.places, inner.sequence) = (places, sequence);
    }
}

fn run(stream: &Weak<Stream>, dma: &Dma, say: fn(Arguments<'_>)) {
    while let Some(stream) = stream.upgrade() {
        let mut inner = stream.inner();
        let places = inner.places;
        if inner.paused || !inner.on {
            // It wakes up now and then, to find that the device has gone.
            let waited = stream.wake.wait_timeout(inner, Duration::from_millis(100));
            drop(waited);
            continue;
        }
        // The lock is held while it writes, so that `pause` waits for the write.
        let place = u64::from(inner.sequence % places.count);
        let iova = places.iova.wrapping_add(place.wrapping_mul(places.stride));
        match dma.write(iova, &inner.sequence.to_le_bytes()) {
            Ok(()) => inner.sequence = inner.sequence.wrapping_add(1),
            Err(error) => {
                say(format_args!("stream ends at {iova:#x}: {error}"));
                inner.on = false;
            }
        }
        drop(inner);
        thread::sleep(Duration::from_micros(200)); // some thousand words a second
    }
}
