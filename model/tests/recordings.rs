// SPDX-License-Identifier: MIT OR Apache-2.0
//! The naive model answers as the recorded Linux driver did, and so does the core
//! where user memory is absent.

use std::collections::BTreeMap;
use std::fs;

use dirty_model::Naive;
use dirty_script::sim::Sim;
use dirty_script::{parse, run, System};

#[path = "../../adapter-user/tests/support/recorded.rs"]
mod recorded;

use recorded::{data, table_scripts, unpacked, TRACES};

/// Runs a script, each case on a new system, and calls `take` with each line of
/// the transcript.
fn transcript<S: System>(
    new: impl Fn() -> S,
    script: &str,
    entry_limit: &mut u32,
    take: &mut dyn FnMut(String),
) {
    for case in parse(script, entry_limit).expect("script") {
        let mut system = new();
        system.set_entry_limit(case.entry_limit);
        if let Some(title) = case.title {
            take(title);
        }
        for line in &case.lines {
            let reply = run(&mut system, &line.op);
            take(format!("  {}{reply}", line.echo));
        }
    }
}

fn random_traces_equal_an_ideal_driver<S: System>(new: impl Fn() -> S) {
    let mut lines = 0;
    for name in TRACES {
        let script = unpacked(&format!("traces/{name}.vt.gz"));
        let ideal = unpacked(&format!("traces/{name}.ideal.gz"));
        let mut ideal = ideal.lines();
        transcript(&new, &script, &mut 65535, &mut |line| {
            lines += 1;
            assert_eq!(Some(line.as_str()), ideal.next(), "{name}, line {lines}");
        });
        assert_eq!(ideal.next(), None, "{name}");
    }
    assert_eq!(lines, 229_500);
}

#[test]
fn the_model_answers_as_an_ideal_driver() {
    random_traces_equal_an_ideal_driver(Naive::default);
}

#[test]
fn the_core_answers_as_an_ideal_driver_where_pages_are_absent() {
    random_traces_equal_an_ideal_driver(Sim::with_absent_pages);
}

/// The lines that Linux answered, with those of `differences.txt` replaced.
fn expected() -> Vec<String> {
    let listed = fs::read_to_string(data("differences.txt")).expect("list");
    let mut pairs: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
    let mut name = "";
    let mut linux = "";
    for line in listed.lines() {
        if let Some(rest) = line.strip_prefix("case ") {
            name = rest.split(" : ").next().expect("name");
        } else if let Some(line) = line.strip_prefix("- ") {
            linux = line;
        } else if let Some(line) = line.strip_prefix("+ ") {
            pairs.entry(name).or_default().push((linux, line));
        }
    }
    let mut lines = Vec::new();
    let mut here = Vec::new().into_iter().peekable();
    for line in unpacked("behaviour-73.txt.gz").lines() {
        if let Some(name) = line.strip_prefix("case ") {
            assert_eq!(here.next(), None, "before {name}");
            here = pairs
                .remove(name)
                .unwrap_or_default()
                .into_iter()
                .peekable();
        }
        match here.next_if(|(linux, _)| *linux == line.trim()) {
            Some((_, other)) => lines.push(format!("  {other}")),
            None => lines.push(line.to_string()),
        }
    }
    assert_eq!(here.next(), None);
    assert!(pairs.is_empty(), "{pairs:?}");
    lines
}

fn tables_equal_linux_but_for_the_listed_differences<S: System>(new: impl Fn() -> S) {
    let expected = expected();
    let mut lines = expected.iter();
    let mut entry_limit = 65535;
    let mut case = String::new();
    let mut wrong = Vec::new();
    for path in table_scripts() {
        let script = fs::read_to_string(path).expect("script");
        transcript(&new, &script, &mut entry_limit, &mut |line| {
            if line.starts_with("case ") {
                case.clone_from(&line);
            }
            let expected = lines.next().map_or("", |line| line.trim_end());
            if expected != line.trim_end() {
                wrong.push(format!("{case}\n-{expected}\n+{line}\n"));
            }
        });
    }
    assert_eq!(lines.next(), None);
    assert!(wrong.is_empty(), "{}", wrong.concat());
}

#[test]
fn the_model_answers_the_tables_as_linux() {
    tables_equal_linux_but_for_the_listed_differences(Naive::default);
}

#[test]
fn the_core_answers_the_tables_as_linux_where_pages_are_absent() {
    tables_equal_linux_but_for_the_listed_differences(Sim::with_absent_pages);
}

/// Rule D8: where Linux crashes, UNMAP_DMA fails and changes nothing.
#[test]
fn a_device_that_will_not_unpin_makes_unmap_busy() {
    let script = fs::read_to_string(data("scripts/t9b-nounpin.vt")).expect("script");
    let script = script + "stat\nnounpin v=0\nunmap iova=0 size=4p flags=1\n";
    let mut lines = Vec::new();
    transcript(Naive::default, &script, &mut 65535, &mut |line| {
        lines.push(line);
    });
    assert_eq!(
        lines[lines.len() - 5..],
        [
            "  unmap iova=0 size=4p => -1 EBUSY size=0x4000",
            "  get iova=0 size=4p => 0 ok bm=1,0",
            "  stat => dma_unmap_calls=11 last=0+0x4000 pinned=1",
            "  nounpin v=0 => 0 ok",
            "  unmap iova=0 size=4p flags=1 => 0 ok size=0x4000 bm=1,0",
        ]
    );
}
