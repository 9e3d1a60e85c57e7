// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table, as text and as Markdown.

use std::fmt::Write;

use crate::report::row::{Row, Who};
use crate::report::units::{times, value};

const HEAD: [&str; 10] = [
    "group",
    "what",
    "size",
    "ours",
    "best peer",
    "limit",
    "x peer",
    "x limit",
    "target",
    "result",
];

fn cells(row: &Row) -> [String; 10] {
    let best = |who| match row.best(who) {
        Some((name, v)) => format!("{} ({name})", value(row.unit, v)),
        None => String::new(),
    };
    let ratio = |who| row.ratio(who).map(times).unwrap_or_default();
    [
        row.group.to_owned(),
        row.case.clone(),
        row.size.to_owned(),
        row.ours().map(|v| value(row.unit, v)).unwrap_or_default(),
        best(Who::Peer),
        best(Who::Limit),
        ratio(Who::Peer),
        ratio(Who::Limit),
        row.goal(),
        row.verdict(),
    ]
}

/// Aligned columns.
pub(crate) fn text(rows: &[Row]) -> String {
    let lines = lines(rows);
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max();
    let mut text = String::new();
    for line in &lines {
        let mut out = String::new();
        for (column, cell) in line.iter().enumerate() {
            let width = width(column).unwrap_or(0);
            let _ = write!(out, "{cell:width$}  ");
        }
        text.push_str(out.trim_end());
        text.push('\n');
    }
    text + &summary(rows)
}

pub(crate) fn markdown(rows: &[Row]) -> String {
    let mut lines = lines(rows).into_iter();
    let mut text = String::new();
    let mut add = |line: &[String]| {
        let _ = writeln!(text, "| {} |", line.join(" | "));
    };
    add(&lines.next().unwrap_or_default());
    add(&HEAD.map(|_| "---".to_owned()));
    lines.for_each(|line| add(&line));
    text + "\n" + &summary(rows)
}

fn lines(rows: &[Row]) -> Vec<[String; 10]> {
    let head = HEAD.map(str::to_owned);
    [head].into_iter().chain(rows.iter().map(cells)).collect()
}

fn summary(rows: &[Row]) -> String {
    let count = |met| rows.iter().filter(|row| row.met() == Some(met)).count();
    let (met, missed) = (count(true), count(false));
    format!("{met} of {} targets met\n", met + missed)
}
