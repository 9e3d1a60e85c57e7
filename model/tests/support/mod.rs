// SPDX-License-Identifier: MIT OR Apache-2.0
//! Helpers that the tests share.

use dirty_script::op::Op;
use dirty_script::parse;

/// The operations of a script.
pub(crate) fn ops(script: &str) -> Vec<Op> {
    let cases = parse(script, &mut 65535).expect("a script");
    let lines = cases.into_iter().flat_map(|case| case.lines);
    lines.map(|line| line.op).collect()
}
