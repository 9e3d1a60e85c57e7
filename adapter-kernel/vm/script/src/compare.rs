// SPDX-License-Identifier: GPL-2.0-only
//! Compares three transcripts of one script: the real driver's, the module's and
//! the userspace container's.

use std::collections::BTreeMap;
use std::fs;

use dirty_script::Line;

use crate::linux::Linux;
use crate::older::Rule;

/// The most differences that are shown; the others are counted.
const SHOWN: usize = 10;

/// What may differ.
#[derive(Default)]
struct Listed {
    /// By case: the real driver's line and the module's.
    pairs: BTreeMap<String, Vec<(String, String)>>,
    /// By case: lines in which this kernel's real driver and the module agree, and the
    /// model, which follows Linux 7.3, does not.
    both: BTreeMap<String, Vec<String>>,
    /// What may differ in any case.
    rules: Vec<Rule>,
}

impl Listed {
    /// Reads `adapter-user/tests/data/differences.txt`, or a file of `vm/differences`.
    fn read(&mut self, path: &str) -> Result<(), String> {
        let text = fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
        let (mut case, mut real) = (String::new(), "");
        for line in text.lines() {
            let before_colon = |rest: &str| rest.split(" : ").next().unwrap_or(rest).to_string();
            if let Some(rest) = line.strip_prefix("case ") {
                case = before_colon(rest);
            } else if let Some(rest) = line.strip_prefix("rule ") {
                let name = before_colon(rest);
                let rule = Rule::parse(&name);
                self.rules
                    .push(rule.ok_or_else(|| format!("{path}: there is no rule {name}"))?);
            } else if let Some(rest) = line.strip_prefix("- ") {
                real = rest;
            } else if let Some(rest) = line.strip_prefix("+ ") {
                let pair = (real.to_string(), rest.to_string());
                self.pairs.entry(case.clone()).or_default().push(pair);
            } else if let Some(rest) = line.strip_prefix("= ") {
                let both = self.both.entry(case.clone()).or_default();
                both.push(rest.to_string());
            }
        }
        Ok(())
    }
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

/// Compares the transcripts of `script`; `real` or `replay` is `-` if there is none. The
/// lists say what may differ.
pub(crate) fn run(
    script: &str,
    real: &str,
    ours: &str,
    replay: &str,
    lists: &[&str],
) -> Result<(), String> {
    let text = fs::read_to_string(script).map_err(|e| format!("{script}: {e}"))?;
    let cases = dirty_script::parse(&text, &mut 65535).map_err(|e| format!("{script}, {e}"))?;
    let mut listed = Listed::default();
    for list in lists {
        listed.read(list)?;
    }
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
        let mut pairs = listed.pairs.remove(name).unwrap_or_default();
        let mut both = listed.both.remove(name).unwrap_or_default();
        let mut linux = Linux::new(case.entry_limit);
        for Line { echo, op } in &case.lines {
            let (ideal, defective) = linux.step(op);
            let expected = |reply| format!("{echo}{reply}").trim().to_string();
            let (ideal, defective) = (expected(ideal), expected(defective));
            let (real, ours) = (line_at(&real, at), line_at(&ours, at));
            let replay = line_at(&replay, at);
            at += 1;
            count.operations += 1;
            if real == ours {
                let agreed = both.iter().position(|l| *l == ours);
                if let Some(agreed) = agreed {
                    both.remove(agreed);
                    count.listed += 1;
                    continue;
                }
                if listed.rules.iter().any(|r| r.explains_both(&ours, &ideal)) {
                    count.listed += 1;
                    continue;
                }
            }
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
            } else if listed.rules.iter().any(|r| r.explains(&real, &ours)) {
                count.listed += 1;
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
