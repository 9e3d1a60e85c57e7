// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the memory behind an IOVA is.

use std::process;
use std::sync::Arc;

use dirty_core::host::Mm;

use super::memory::GuestMemory;

/// Where the memory of a page is.
#[derive(Clone)]
pub(super) enum Place {
    /// At this byte of guest memory.
    Memory(Arc<GuestMemory>, u64),
    /// At this address of this process.
    Process(u64),
}

/// This process as an address space.
pub(super) fn own_mm() -> Mm {
    Mm(u64::from(process::id()))
}
