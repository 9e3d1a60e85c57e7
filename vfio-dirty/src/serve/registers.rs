// SPDX-License-Identifier: MIT OR Apache-2.0
//! The registers of the sample device, which whoever drives it needs too.
//!
//! BAR 0 has 4 KiB of little-endian registers of 64 bits. A read or write takes a whole one.
//!
//! | offset | register | |
//! |---|---|---|
//! | 0x00 | IOVA | the first place |
//! | 0x08 | STRIDE | bytes from one place to the next |
//! | 0x10 | COUNT | how many places |
//! | 0x18 | LENGTH | bytes written at a place: a multiple of 8, at most 4096 |
//! | 0x20 | RATE | writes a second that the stream makes, or 0 for as many as it can |
//! | 0x28 | SEED | chooses what is written, and in which order |
//! | 0x30 | COMMAND | 1 WRITE: write each place once. 2 STREAM: write places by itself, in random order. 3 END: end that |
//! | 0x38 | STATUS | of the last command: 1 done, 2 failed |
//! | 0x40 | SEQUENCE | how many writes the stream has made (read-only) |
//! | 0x48 | REFUSED | how many of these were to places that are not mapped (read-only) |
//!
//! A write of COMMAND returns when the command is done. STREAM takes the registers as they are
//! then.

pub(crate) const IOVA: u64 = 0x00;
pub(crate) const STRIDE: u64 = 0x08;
pub(crate) const COUNT: u64 = 0x10;
pub(crate) const LENGTH: u64 = 0x18;
pub(crate) const RATE: u64 = 0x20;
pub(crate) const SEED: u64 = 0x28;
pub(crate) const COMMAND: u64 = 0x30;
pub(crate) const STATUS: u64 = 0x38;
pub(crate) const SEQUENCE: u64 = 0x40;
pub(crate) const REFUSED: u64 = 0x48;

pub(crate) const WRITE: u64 = 1;
pub(crate) const STREAM: u64 = 2;
pub(crate) const END: u64 = 3;

pub(crate) const DONE: u64 = 1;
pub(crate) const FAILED: u64 = 2;
