// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rows that are measured, and what is made of them: tables and bars.

use row::Row;

pub(crate) mod chart;
pub(crate) mod row;
pub(crate) mod speed;
pub(crate) mod summary;
pub(crate) mod table;
pub(crate) mod units;

/// The rows of each group, in the order in which the groups were measured.
fn groups(rows: &[Row]) -> Vec<(&'static str, Vec<&Row>)> {
    let mut groups: Vec<(&'static str, Vec<&Row>)> = Vec::new();
    for row in rows {
        match groups.iter_mut().find(|(group, _)| *group == row.group) {
            Some((_, rows)) => rows.push(row),
            None => groups.push((row.group, vec![row])),
        }
    }
    groups
}
