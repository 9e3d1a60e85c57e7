// SPDX-License-Identifier: GPL-2.0-only
//! An empty stand-in for the crate of functions that compilers call. The kernel has
//! `memcpy` and its like, and `check` fails if the module needs any other.
#![allow(internal_features)]
#![feature(compiler_builtins)]
#![compiler_builtins]
#![no_builtins]
#![no_std]
