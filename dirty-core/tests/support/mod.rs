// SPDX-License-Identifier: MIT OR Apache-2.0
//! A host without hardware, for tests. It counts everything that it hands out
//! and fails on command. [`rig`] puts a container on it.
#![allow(dead_code, unused_imports)] // each test uses a part of it

pub(crate) mod conditions;
pub(crate) mod host;
pub(crate) mod memory;
pub(crate) mod rig;
pub(crate) mod words;

pub(crate) use host::{Spec, TestHost};
pub(crate) use memory::{Nth, TestMemory};
pub(crate) use rig::{errno, pack, Rig, ARG, BITMAP, PAGE};
