// SPDX-License-Identifier: GPL-2.0-only
//! `dirty-core` as a VFIO IOMMU backend, in place of `vfio_iommu_type1`.
//!
//! [`backend`] has VFIO's operations, and the container behind a [`lock`]. [`host`] is
//! the kernel as the core's host, [`missing`] waits for user memory without the lock,
//! and [`memory`] is where the core's memory comes from. The C files are for kernel
//! interfaces that have no Rust binding.

mod backend;
mod host;
mod lock;
mod memory;
mod missing;
mod sys;

use kernel::prelude::*;

module! {
    type: Module,
    name: "vfio_iommu_dirty",
    authors: ["The vfio-dirty authors"],
    description: "VFIO type1 IOMMU backend with exact dirty-page tracking",
    license: "GPL",
}

struct Module;

impl kernel::Module for Module {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        // SAFETY: the operations are static, and unregistered before they go.
        kernel::error::to_result(unsafe { sys::dirty_register() })?;
        Ok(Module)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: registered by `init`.
        unsafe { sys::dirty_unregister() };
    }
}
