// SPDX-License-Identifier: GPL-2.0-only
//! Single operations, written as in scripts.

use std::fmt::Display;

use dirty_script::op::{DeviceIndex, DEVICES};

use crate::real::Real;

/// An error as text.
pub(crate) fn text(e: impl Display) -> String {
    e.to_string()
}

/// The device of this name.
pub(crate) fn device(name: &str) -> DeviceIndex {
    DEVICES.iter().position(|d| d.name == name).unwrap_or(0)
}

/// Runs one line, and returns it with its answer.
pub(crate) fn ask(real: &mut Real, line: &str) -> Result<String, String> {
    let cases = dirty_script::parse(line, &mut 65535).map_err(text)?;
    let op = cases.first().and_then(|case| case.lines.first());
    let op = op.ok_or("an empty line")?;
    Ok(format!("{}{}", op.echo, dirty_script::run(real, &op.op)))
}

/// Runs one line; an error unless its answer ends with `end`.
pub(crate) fn expect(real: &mut Real, line: &str, end: &str) -> Result<(), String> {
    let answer = ask(real, line)?;
    match answer.ends_with(end) {
        true => Ok(()),
        false => Err(format!("{answer}, expected {end}")),
    }
}
