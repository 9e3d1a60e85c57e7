// SPDX-License-Identifier: MIT OR Apache-2.0
//! Spans and events for the crate `tracing`, if the feature `tracing` is on. Otherwise
//! these functions do nothing.

use std::fmt::Display;

#[cfg(feature = "tracing")]
mod on {
    use super::Display;

    /// The span of one take.
    pub(crate) fn take() -> tracing::span::EnteredSpan {
        tracing::debug_span!("take").entered()
    }

    /// The span in which one source is asked.
    pub(crate) fn source(name: &str) -> tracing::span::EnteredSpan {
        tracing::debug_span!("source", name).entered()
    }

    /// What a source has told.
    pub(crate) fn told(bytes: u64) {
        tracing::debug!(bytes, "told");
    }

    /// Memory is told as dirty as a whole. `what` says more about the cause.
    pub(crate) fn wholly_dirty(why: &str, bytes: u64, what: &dyn Display) {
        tracing::warn!(why, bytes, what = %what, "wholly dirty");
    }
}

#[cfg(not(feature = "tracing"))]
mod on {
    use super::Display;

    /// In place of a span.
    pub(crate) struct NoSpan;

    pub(crate) fn take() -> NoSpan {
        NoSpan
    }

    pub(crate) fn source(_: &str) -> NoSpan {
        NoSpan
    }

    pub(crate) fn told(_: u64) {}
    pub(crate) fn wholly_dirty(_: &str, _: u64, _: &dyn Display) {}
}

pub(crate) use on::{source, take, told, wholly_dirty};
