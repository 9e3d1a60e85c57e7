// SPDX-License-Identifier: MIT OR Apache-2.0
//! The container's tests, with the pages of a host that has pages of 16 KiB. On a host with
//! smaller ones, each page of the container is several of the host's.
#![allow(clippy::duplicate_mod)] // each of them names its page size

#[path = "container.rs"]
mod container;
#[path = "field_devices/main.rs"]
mod field_devices;
#[path = "stress.rs"]
mod stress;
#[path = "stress_domain.rs"]
mod stress_domain;
