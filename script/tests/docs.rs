// SPDX-License-Identifier: MIT OR Apache-2.0
//! `docs/scripts.md` against the code: its scripts answer what it shows, and
//! its tables name every operation, as the parser takes it.

use std::fmt::Write as _;
use std::fs;

use dirty_script::sim::Sim;
use dirty_script::{parse, run, System};

fn document() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/scripts.md");
    fs::read_to_string(path).expect("docs/scripts.md")
}

/// The fenced blocks of a language, in order.
fn blocks<'a>(document: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("\n```{language}\n");
    let after = document.split(fence.as_str()).skip(1);
    after
        .map(|rest| rest.split_once("```").expect("the end of a block").0)
        .collect()
}

/// What a script answers on the simulated host.
fn transcript(script: &str) -> String {
    let mut text = String::new();
    for case in parse(script, &mut 65535).expect("a script") {
        let mut sim = Sim::default();
        sim.set_entry_limit(case.entry_limit);
        if let Some(title) = case.title {
            writeln!(text, "{title}").expect("a string takes any text");
        }
        for line in case.lines {
            let reply = run(&mut sim, &line.op);
            writeln!(text, "  {}{reply}", line.echo).expect("a string takes any text");
        }
        sim.close();
    }
    text
}

#[test]
fn the_scripts_answer_what_the_document_shows() {
    let document = document();
    let scripts = blocks(&document, "vt");
    let answers = blocks(&document, "text");
    assert!(!scripts.is_empty());
    assert_eq!(scripts.len(), answers.len(), "each script has its answers");
    for (script, answers) in scripts.into_iter().zip(answers) {
        assert_eq!(transcript(script), answers);
    }
}

#[test]
fn the_tables_have_every_operation() {
    let document = document();
    let (_, tables) = document.split_once("\n## Operations\n").expect("tables");
    let (tables, _) = tables.split_once("\n## ").expect("the next section");
    let mut shown: Vec<&str> = Vec::new();
    for row in tables.lines().filter_map(|line| line.strip_prefix("| `")) {
        let (line, _) = row.split_once('`').expect("the end of an operation");
        // The rows of the bitmap's arguments are single words.
        if !line.contains('=') && !["vmlck", "hugemem"].contains(&line) {
            continue;
        }
        let parsed = parse(line, &mut 65535);
        assert!(parsed.is_ok(), "{line}: {parsed:?}");
        shown.push(line.split(' ').next().expect("a name"));
    }
    // The parser lists what it knows.
    let unknown = parse("frobnicate", &mut 65535).expect_err("no operation");
    let (_, names) = unknown.reason.split_once('(').expect("a list");
    let (names, _) = names.split_once(')').expect("the list's end");
    for name in names.split(", ") {
        assert!(shown.contains(&name), "{name} is in no table");
    }
}
