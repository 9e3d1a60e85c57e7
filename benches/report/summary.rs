// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the rows come to: where a peer is ahead, and which targets are missed.

use crate::limits;
use crate::report::row::{Reached, Row, Who};
use crate::report::units::times;

/// How many rows have a peer ahead. Less than 5 % is noise.
pub(crate) fn ahead(rows: &[Row]) -> String {
    let with_peer = rows.iter().filter(|row| row.ratio(Who::Peer).is_some());
    format!(
        "A peer is ahead by more than 5 % in {} of {} rows that have one.",
        behind(rows).count(),
        with_peer.count()
    )
}

/// The rows with a peer ahead, and how far it is.
pub(crate) fn rows_behind(rows: &[Row]) -> Vec<String> {
    let line = |(row, ratio): (&Row, f64)| {
        let peer = row.best(Who::Peer).map_or("", |peer| peer.name);
        let (group, name) = (row.group, row.name());
        format!("{group}: {name}: {} x {peer}", times(ratio))
    };
    behind(rows).map(line).collect()
}

fn behind(rows: &[Row]) -> impl Iterator<Item = (&Row, f64)> {
    let ratios = rows
        .iter()
        .filter_map(|row| Some((row, row.ratio(Who::Peer)?)));
    ratios.filter(|(_, ratio)| *ratio > 1.05)
}

/// How many targets are met.
pub(crate) fn met(rows: &[Row]) -> String {
    let results = || rows.iter().flat_map(Row::results);
    let met = results().filter(|result| result.met).count();
    format!("{met} of {} targets met", results().count())
}

/// The targets that are missed, and what is reached of each.
pub(crate) fn missed(rows: &[Row]) -> Vec<String> {
    let line = |(row, result): (&Row, Reached)| {
        let Reached { reached, goal, .. } = result;
        format!("{}: {}: {reached}, target {goal}", row.group, row.name())
    };
    let results = rows
        .iter()
        .flat_map(|row| row.results().map(move |result| (row, result)));
    results.filter(|(_, r)| !r.met).map(line).collect()
}

/// The targets of which nothing was measured: no row has them, or a row lacks what
/// they need.
pub(crate) fn unmeasured(rows: &[Row]) -> Vec<String> {
    let without_row = limits::without_row(rows.iter().map(Row::key));
    let lacking = rows.iter().flat_map(|row| {
        let missing = row.targets().len() - row.results().count();
        (missing > 0).then(|| format!("{}: {}", row.group, row.name()))
    });
    without_row
        .map(|target| target.rows())
        .chain(lacking)
        .collect()
}
