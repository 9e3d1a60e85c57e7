// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a QEMU of a case is started with.

use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::case::{Case, Place, Story, Tracking};
use crate::guest::Guests;
use crate::qemu::{sysfs, Version};
use crate::Result;

/// The group of the first device.
pub(crate) const GROUP: usize = 42;

/// The arguments of a case, and its environment.
pub(crate) fn arguments(command: &mut Command, case: &Case, guests: &Guests) -> Result<()> {
    command.args([
        "-nodefaults",
        "-display",
        "none",
        "-accel",
        "tcg",
        "-m",
        &format!("{}M", case.memory),
    ]);
    command.args([
        "-machine",
        if case.from == case.to {
            "q35"
        } else {
            "pc-q35-10.0"
        },
    ]);
    if case.shared {
        let memory = format!("memory-backend-memfd,id=m,size={}M,share=on", case.memory);
        command.args(["-object", &memory, "-machine", "memory-backend=m"]);
    }
    command.args(case.arguments);
    guests.arguments(command, case.guest)?;
    command.env("VFIO_PRELOAD_MIGRATION", case.migration);
    command.env("VFIO_PRELOAD_GROUP", case.group);
    let tracking = match case.tracking {
        Tracking::Container => "container",
        Tracking::Device => "device",
    };
    command.env("VFIO_PRELOAD_TRACKING", tracking);
    Ok(())
}

/// The devices of a case, of which one in another process is at `socket`.
pub(crate) fn devices(
    command: &mut Command,
    case: &Case,
    folder: &Path,
    socket: &Path,
) -> Result<()> {
    if case.place == Place::Stock {
        let socket = json!({"path": socket, "type": "unix"});
        let device = json!({"driver": "vfio-user-pci", "id": "dev0", "socket": socket});
        command.arg("-device").arg(device.to_string());
        return Ok(());
    }
    let migrates = match case.from {
        Version::V7 => "x-enable-migration",
        Version::V10 | Version::V11 => "enable-migration",
    };
    let mut devices = Vec::new();
    for k in 0..case.devices {
        let (group, name) = (GROUP + k, format!("dev{k}"));
        let place = sysfs(folder, group, &name)?;
        devices.push(match case.place {
            Place::Server => format!("{group}:{name}=vfio-user:{}", socket.display()),
            _ => format!("{group}:{name}"),
        });
        if case.story == Story::Unplug {
            continue; // it is plugged in later
        }
        command.arg("-device");
        command.arg(format!(
            "vfio-pci,id={name},sysfsdev={},{migrates}=on",
            place.display()
        ));
    }
    command.env("VFIO_PRELOAD_DEVICES", devices.join(","));
    Ok(())
}
