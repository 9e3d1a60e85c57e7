// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table in docs/errors.md has the errors that the code has.

use adapter_user::Error;

const ERRORS: &str = include_str!("../../docs/errors.md");

#[test]
fn the_errno_table_is_the_code_s() {
    let mut expected: Vec<String> = Error::ALL
        .iter()
        .map(|e| format!("| {} | `{e:?}` | {e} |", e.errno()))
        .collect();
    let mut found: Vec<String> = ERRORS
        .lines()
        .filter(|line| line.starts_with("| E"))
        .map(str::to_string)
        .collect();
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}
