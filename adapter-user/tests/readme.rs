// SPDX-License-Identifier: MIT OR Apache-2.0
//! The README's table of errors is the same as the code's.

use adapter_user::Error;

const README: &str = include_str!("../../README.md");

#[test]
fn the_errno_table_is_the_code_s() {
    let mut expected: Vec<String> = Error::ALL
        .iter()
        .map(|e| format!("| {} | `{e:?}` | {e} |", e.errno()))
        .collect();
    let mut found: Vec<String> = README
        .lines()
        .filter(|line| line.starts_with("| E"))
        .map(str::to_string)
        .collect();
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}
