// SPDX-License-Identifier: MIT OR Apache-2.0
//! Logs of this crate as logs of the tracker, and the domain that keeps a view, a log
//! and a container in step.

mod logs;
mod random;
mod steps;
mod support;

use support::*;
