// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the tests share.

use dirty_script::op::Op;
use dirty_script::parse;

/// Operations of a script, one a line.
pub(crate) fn ops(script: &str) -> Vec<Op> {
    let cases = parse(script, &mut 65535).expect("a script");
    let lines = cases.into_iter().flat_map(|case| case.lines);
    lines.map(|line| line.op).collect()
}
