// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table, as text and as Markdown.

use std::fmt::Write;

use crate::row::{Row, Unit, Who};

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
    "",
];

/// A value with its unit.
pub(crate) fn value(unit: Unit, value: f64) -> String {
    match unit {
        Unit::Nanoseconds => time(value),
        Unit::Bytes if value < 10_000.0 => format!("{} B", times(value)),
        Unit::Bytes => format!("{} KiB", times(value / 1024.0)),
    }
}

/// Nanoseconds.
pub(crate) fn time(ns: f64) -> String {
    let units = [(1e9, "s"), (1e6, "ms"), (1e3, "us"), (1.0, "ns")];
    let unit = units.into_iter().find(|(unit, _)| ns >= *unit);
    let (unit, name) = unit.unwrap_or((1.0, "ns"));
    format!("{} {name}", times(ns / unit))
}

/// A number, or what it is one part of.
pub(crate) fn fraction(value: f64) -> String {
    let whole = (1.0 / value).round();
    if whole > 2.0 && (value * whole - 1.0).abs() < 1e-9 {
        format!("1/{whole}")
    } else {
        value.to_string()
    }
}

/// About three digits.
pub(crate) fn times(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 0.1 => format!("{v:.2}"),
        v => format!("{v:.4}"),
    }
}

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
