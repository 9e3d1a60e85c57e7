// SPDX-License-Identifier: GPL-2.0-only
//! What the module uses of the kernel's own `kernel` crate, with the same contracts,
//! for kernels that are built without Rust. `support.c` has the C half.
#![no_std]

pub mod alloc;
pub mod error;
mod module;
mod print;

pub use module::{Module, ThisModule};
pub use print::warn;

pub mod ffi {
    pub use core::ffi::{c_int, c_uint, c_void};
    pub type c_long = isize;
    pub type c_ulong = usize;
}

pub mod page {
    /// x86-64 has no other; `support.c` compares.
    pub const PAGE_SHIFT: usize = 12;
    pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
}

pub mod prelude {
    pub use crate::alloc::{KBox, KVec};
    pub use crate::error::code::*;
    pub use crate::error::{Error, Result};
    pub use crate::{module, pr_warn, ThisModule};
}

/// `check` fails if this is linked, because then a panic can be reached.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: it stops the kernel's thread, as BUG() does.
    unsafe { core::arch::asm!("ud2", options(noreturn)) }
}
