// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table, as text and as Markdown.

use std::fmt::Write;

use crate::report::row::{Row, Value, Who};
use crate::report::units::{times, value};
use crate::report::{groups, summary};

const HEAD: [&str; 9] = [
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

/// The legend of a table.
const NOTE: &str = "A ~ marks a time that differs by more than 20 % between rounds.";

fn cells(row: &Row) -> [String; 9] {
    let cell = |v: Value| {
        let about = if v.varies { "~ " } else { "" };
        let value = value(row.unit, v.value);
        match v.name {
            "ours" => format!("{about}{value}"),
            name => format!("{about}{value} ({name})"),
        }
    };
    let best = |who| row.best(who).map(cell).unwrap_or_default();
    let ratio = |who| row.ratio(who).map(times).unwrap_or_default();
    let verdict = |met| if met { "met" } else { "MISSED" };
    let goals: Vec<_> = row.results().map(|r| r.goal).collect();
    let results = row
        .results()
        .map(|r| format!("{}: {}", verdict(r.met), r.reached));
    [
        row.case.clone(),
        row.size.to_owned(),
        best(Who::Ours),
        best(Who::Peer),
        best(Who::Limit),
        ratio(Who::Peer),
        ratio(Who::Limit),
        goals.join(", "),
        results.collect::<Vec<_>>().join(", "),
    ]
}

/// Aligned columns, a heading for each group, and the summary.
pub(crate) fn text(rows: &[Row]) -> String {
    let mut text = format!("{}\n{NOTE}\n", summary::ahead(rows));
    let head = HEAD.map(str::to_owned);
    let lines = [head].into_iter().chain(rows.iter().map(cells));
    let lines: Vec<_> = lines.collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let widths: [usize; 9] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let mut add = |line: &[String; 9]| {
        let mut out = String::new();
        for (cell, width) in line.iter().zip(widths) {
            let _ = write!(out, "{cell:width$}  ");
        }
        let _ = writeln!(text, "{}", out.trim_end());
    };
    add(&lines[0]);
    for (group, rows) in groups(rows) {
        let mut heading: [String; 9] = Default::default();
        heading[0] = format!("--- {group}");
        add(&heading);
        rows.into_iter().map(cells).for_each(|line| add(&line));
    }
    for line in summary::missed(rows) {
        let _ = writeln!(text, "MISSED {line}");
    }
    text + &summary::met(rows) + "\n"
}

/// A section for each group, with its picture.
pub(crate) fn markdown(rows: &[Row]) -> String {
    let list = |title: String, lines: Vec<String>| {
        let lines = lines.iter().map(|line| format!("- {line}\n"));
        format!("{title}\n\n{}\n", lines.collect::<String>())
    };
    let mut text = list(summary::ahead(rows), summary::rows_behind(rows));
    text += &list(summary::met(rows) + "; missed are:", summary::missed(rows));
    text += NOTE;
    text += "\n";
    for (group, rows) in groups(rows) {
        let _ = write!(text, "\n## {group}\n\n![{group}, as bars]({group}.svg)\n\n");
        let mut add = |line: [String; 9]| {
            let _ = writeln!(text, "| {} |", line.join(" | "));
        };
        add(HEAD.map(str::to_owned));
        add(HEAD.map(|_| "---".to_owned()));
        rows.into_iter().map(cells).for_each(add);
    }
    text
}
