// SPDX-License-Identifier: GPL-2.0-only
//! Which driver answers a container.

use std::fs;

use crate::ask::{expect, text};
use crate::real::Real;

const MODULES: [&str; 2] = ["vfio_iommu_type1", "vfio_iommu_dirty"];

/// How many users a module has; 0 if it is not loaded.
fn users(module: &str) -> Result<u64, String> {
    match fs::read_to_string(format!("/sys/module/{module}/refcnt")) {
        Ok(count) => count.trim().parse().map_err(text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(e) => Err(text(e)),
    }
}

/// Prints the name of the module that a container's IOMMU type makes busy.
pub(crate) fn run() -> Result<(), String> {
    let mut real = Real::new(65535).map_err(text)?;
    let before = MODULES.map(users);
    expect(&mut real, "new devs=emu0", "set_iommu(3)=ok")?;
    for (module, before) in MODULES.into_iter().zip(before) {
        if users(module)? != before? {
            println!("{module}");
        }
    }
    Ok(())
}
