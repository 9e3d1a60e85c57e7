// SPDX-License-Identifier: GPL-2.0-only
//! Compares three transcripts of one script: the real driver's, the module's and
//! the userspace container's.

use std::collections::BTreeMap;
use std::fs;

use dirty_script::Line;

use crate::linux::Linux;

/// The most differences that are shown; the others are counted.
const SHOWN: usize = 10;

/// Lines that may differ, the real driver's and ours, by case.
type Listed = BTreeMap<String, Vec<(String, String)>>;

/// The list of `adapter-user/tests/data/differences.txt`.
fn listed(text: &str) -> Listed {
    let mut listed = Listed::new();
    let (mut case, mut real) = (String::new(), "");
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("case ") {
            case = rest.split(" : ").next().unwrap_or(rest).to_string();
        } else if let Some(rest) = line.strip_prefix("- ") {
            real = rest;
        } else if let Some(rest) = line.strip_prefix("+ ") {
            let pair = (real.to_string(), rest.to_string());
            listed.entry(case.clone()).or_default().push(pair);
        }
    }
    listed
}

/// The result of a comparison.
#[derive(Default)]
struct Count {
    operations: u64,
    /// Lines in which all transcripts agree.
    equal: u64,
    /// The real driver has the bits that U1 and U8 add, and no others.
    defects: u64,
    /// The list has this difference.
    listed: u64,
    /// The real driver answers something else.
    unexplained: u64,
    /// The module and the userspace container disagree.
    ours: u64,
    shown: usize,
}

impl Count {
    fn show(&mut self, text: &str) {
        self.shown += 1;
        if self.shown <= SHOWN {
            println!("{text}");
        }
    }
}

/// The lines of a transcript, without indentation.
fn lines(path: &str) -> Result<Vec<String>, String> {
    let text = fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    Ok(text.lines().map(|l| l.trim().to_string()).collect())
}

/// Compares the transcripts of `script`; `real` or `replay` is `-` if there is none.
pub(crate) fn run(
    script: &str,
    real: &str,
    ours: &str,
    replay: &str,
    list: Option<&str>,
) -> Result<(), String> {
    let text = fs::read_to_string(script).map_err(|e| format!("{script}: {e}"))?;
    let cases = dirty_script::parse(&text, &mut 65535).map_err(|e| format!("{script}, {e}"))?;
    let list = match list {
        Some(path) => fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?,
        None => String::new(),
    };
    let mut list = listed(&list);
    let ours = lines(ours)?;
    let or_ours = |path| match path {
        "-" => Ok(ours.clone()),
        path => lines(path),
    };
    let (real, replay) = (or_ours(real)?, or_ours(replay)?);
    let mut at = 0;
    let mut count = Count::default();
    let line_at = |lines: &[String], at: usize| -> String {
        lines.get(at).map_or("<end>", String::as_str).to_string()
    };
    for case in &cases {
        let title = case.title.clone().unwrap_or_default();
        if case.title.is_some() {
            at += 1;
        }
        let name = title.strip_prefix("case ").unwrap_or_default();
        let mut pairs = list.remove(name).unwrap_or_default();
        let mut linux = Linux::new(case.entry_limit);
        for Line { echo, op } in &case.lines {
            let (ideal, defective) = linux.step(op);
            let expected = |reply| format!("{echo}{reply}").trim().to_string();
            let (ideal, defective) = (expected(ideal), expected(defective));
            let (real, ours) = (line_at(&real, at), line_at(&ours, at));
            let replay = line_at(&replay, at);
            at += 1;
            count.operations += 1;
            if ours != replay || ours != ideal {
                count.ours += 1;
                count.show(&format!(
                    "{title}: ours\n  module  {ours}\n  replay  {replay}\n  model   {ideal}"
                ));
            }
            let pair = pairs.iter().position(|p| p.0 == real && p.1 == ours);
            if real == ours && (real == defective || pair.is_none()) {
                count.equal += 1;
            } else if let Some(pair) = pair {
                pairs.remove(pair);
                count.listed += 1;
            } else if real == defective {
                count.defects += 1;
            } else {
                count.unexplained += 1;
                count.show(&format!(
                    "{title}: real\n  real    {real}\n  module  {ours}\n  defects {defective}"
                ));
            }
        }
    }
    for (name, transcript) in [("real", &real), ("module", &ours), ("replay", &replay)] {
        if transcript.len() != at {
            let len = transcript.len();
            return Err(format!("{script}: {name} has {len} lines, not {at}"));
        }
    }
    let Count {
        operations,
        equal,
        defects,
        listed,
        unexplained,
        ours,
        ..
    } = count;
    let name = script.rsplit('/').next().unwrap_or(script);
    println!(
        "{name:<22} {operations:>8} {equal:>8} {defects:>8} {listed:>8} {unexplained:>8} {ours:>8}"
    );
    match unexplained + ours {
        0 => Ok(()),
        n => Err(format!("{name}: {n} lines differ")),
    }
}
