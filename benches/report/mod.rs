// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rows that are measured, and what is made of them: a table and bars.

pub(crate) mod chart;
pub(crate) mod row;
pub(crate) mod table;
pub(crate) mod units;
