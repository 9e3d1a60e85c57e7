// SPDX-License-Identifier: MIT OR Apache-2.0
//! Emulated VFIO devices for an unmodified program.
//!
//! With this library in `LD_PRELOAD`, a program finds `/dev/vfio/vfio`, groups and devices
//! that do not exist. They are those of `adapter_user::emulated`, in the program's own
//! process, or devices of vfio-user servers. README.md says how to use it.

// Each file uses only files below it.
mod interpose; // the functions of libc that the program calls

mod files; // the program's descriptors
mod watch; // what ioctls are traced, made to fail, or lose

mod world; // which groups and devices there are

mod control; // a socket by which a test drives devices

mod container; // a container, and the devices in other processes that it has
mod remote; // a device in another process

mod backing; // the file behind memory
mod faults; // what is to fail or to be lost
mod mappings; // what a program has mapped
mod trace; // a file of what happened
mod user; // the program's memory
