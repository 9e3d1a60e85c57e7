// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compares the program with what the running Linux driver answered.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

#[path = "../../adapter-user/tests/support/recorded.rs"]
mod recorded;

use recorded::{data, table_scripts, unpacked, TRACES};

fn replay() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-dirty"));
    command.arg("replay");
    command
}

/// Runs scripts on the simulated host, which fuzzing and property tests use.
fn simulate() -> Command {
    let mut command = replay();
    command.arg("--simulate");
    command
}

fn text(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

/// Runs a script from standard input.
fn run_script(script: &str) -> Output {
    run_on(replay(), script)
}

fn run_on(mut command: Command, script: &str) -> Output {
    let mut child = command
        .arg("-")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("spawn");
    let mut stdin = child.stdin.take().expect("stdin");
    stdin.write_all(script.as_bytes()).expect("write");
    drop(stdin);
    child.wait_with_output().expect("wait")
}

/// All five random traces, 229,500 lines, have no difference.
#[test]
fn random_traces_equal_an_ideal_driver() {
    equal_traces(replay());
}

#[test]
fn random_traces_equal_an_ideal_driver_on_the_simulated_host() {
    equal_traces(simulate());
}

fn equal_traces(mut command: Command) {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut lines = 0;
    for name in TRACES {
        let script = dir.path().join(format!("{name}.vt"));
        let ideal = dir.path().join(format!("{name}.ideal"));
        fs::write(&script, unpacked(&format!("traces/{name}.vt.gz"))).expect("write");
        let answers = unpacked(&format!("traces/{name}.ideal.gz"));
        lines += answers.lines().count();
        fs::write(&ideal, answers).expect("write");
        command.arg(script).arg("--expect").arg(ideal);
    }
    assert_eq!(lines, 229_500);
    let output = command.output().expect("run");
    let out = String::from_utf8_lossy(&output.stdout);
    assert_eq!(out, "229500 lines, no difference\n");
    assert!(output.status.success());
}

/// The lines of each case.
fn cases(transcript: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut cases: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut name = "";
    for line in transcript.lines() {
        match line.strip_prefix("case ") {
            Some(title) => {
                name = title;
                assert!(cases.insert(name, Vec::new()).is_none(), "{name} twice");
            }
            None => cases.entry(name).or_default().push(line.trim()),
        }
    }
    cases
}

/// The transcript as this user gets it. Linux was recorded as root, and one case
/// keeps the capability to lock any memory. A user without it gets what Linux
/// answers without it.
fn as_recorded_for_this_user(linux: String) -> String {
    const CAP_IPC_LOCK: u64 = 1 << 14;
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    if effective.expect("CapEff") & CAP_IPC_LOCK != 0 {
        return linux;
    }
    let kept = "keepcap=1\n  map iova=0 size=4p => 0 ok\n  vmlck => 16 kB\n";
    let never = "keepcap=1\n  map iova=0 size=4p => -1 ENOMEM\n  vmlck => 0 kB\n";
    assert_eq!(linux.matches(kept).count(), 1);
    linux.replace(kept, never)
}

/// Every case is equal to Linux, except the lines in `differences.txt`, which
/// differ exactly as it says.
#[test]
fn tables_equal_linux_but_for_the_listed_differences() {
    let linux = unpacked("behaviour-73.txt.gz");
    equal_tables(replay(), &as_recorded_for_this_user(linux));
}

#[test]
fn tables_equal_linux_on_the_simulated_host() {
    equal_tables(simulate(), &unpacked("behaviour-73.txt.gz"));
}

fn equal_tables(mut command: Command, linux: &str) {
    let output = command.args(table_scripts()).output().expect("run");
    let here = text(&output);
    let listed = fs::read_to_string(data("differences.txt")).expect("list");
    let (here, linux) = (cases(&here), cases(linux));
    assert_eq!(linux.len(), 133);
    assert_eq!(
        here.keys().collect::<Vec<_>>(),
        linux.keys().collect::<Vec<_>>()
    );
    let mut found = String::new();
    let mut rows: BTreeMap<&str, &str> = BTreeMap::new();
    for line in listed.lines().filter_map(|l| l.strip_prefix("case ")) {
        let (name, row) = line.split_once(" : ").expect("`case NAME : D-ROW`");
        for d in row.split(' ') {
            let number = d.strip_prefix('D').and_then(|n| n.parse::<u32>().ok());
            assert!(number.is_some_and(|n| (1..=11).contains(&n)), "{line}");
        }
        rows.insert(name, row);
    }
    for (name, expected) in &linux {
        let lines = &here[name];
        assert_eq!(lines.len(), expected.len(), "{name}");
        let differing: Vec<_> = expected.iter().zip(lines).filter(|(a, b)| a != b).collect();
        match rows.remove(name) {
            None => assert!(differing.is_empty(), "case {name}: {differing:#?}"),
            Some(_) => assert!(!differing.is_empty(), "case {name} is listed and equal"),
        }
        for (a, b) in differing {
            found += &format!("{name}\n- {a}\n+ {b}\n");
        }
    }
    assert!(rows.is_empty(), "no such cases: {rows:?}");
    assert_eq!(found, by_case(&listed));
}

/// The listed pairs of lines, ordered by case.
fn by_case(listed: &str) -> String {
    let mut pairs: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut name = "";
    for line in listed.lines().filter(|l| !l.starts_with('#')) {
        match line.strip_prefix("case ") {
            Some(rest) => name = rest.split(" : ").next().unwrap_or(rest),
            None => pairs.entry(name).or_default().push(line),
        }
    }
    let mut out = String::new();
    for (name, lines) in pairs {
        for pair in lines.chunks(2) {
            out += &format!("{name}\n{}\n", pair.join("\n"));
        }
    }
    out
}

/// Where Linux crashes, UNMAP_DMA fails and changes nothing (D8).
#[test]
fn a_device_that_will_not_unpin_makes_unmap_busy() {
    let script = fs::read_to_string(data("scripts/t9b-nounpin.vt")).expect("script");
    let out = text(&run_script(
        &(script + "stat\nnounpin v=0\nunmap iova=0 size=4p flags=1\n"),
    ));
    let answers: Vec<&str> = out.lines().rev().take(5).map(str::trim).collect();
    assert_eq!(
        answers,
        [
            "unmap iova=0 size=4p flags=1 => 0 ok size=0x4000 bm=1,0",
            "nounpin v=0 => 0 ok",
            "stat => dma_unmap_calls=11 last=0+0x4000 pinned=1",
            "get iova=0 size=4p => 0 ok bm=1,0",
            "unmap iova=0 size=4p => -1 EBUSY size=0x4000",
        ]
    );
}

#[test]
fn faults_run_on_the_simulated_host_and_nowhere_else() {
    let script = "new devs=emu0\nmap size=4p\nfault alloc=1\nstart\nstart\nrw iova=0 len=1\n\
                  fault copy=5\nget size=4p\nget size=4p\n";
    let out = text(&run_on(simulate(), script));
    let answers: Vec<&str> = out.lines().skip(2).map(str::trim).collect();
    assert_eq!(
        answers,
        [
            "fault alloc=1 => 0 ok",
            "start => -1 ENOMEM",
            "start => 0 ok",
            "rw iova=0 len=1 => ret=0",
            "fault copy=5 => 0 ok",
            "get size=4p => -1 EFAULT bm=1,0",
            "get size=4p => 0 ok bm=1,0",
        ]
    );
    let output = run_script(script);
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(err.contains("--simulate"), "{err}");
}

#[test]
fn a_difference_is_shown_and_exits_1() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (script, expect) = (dir.path().join("s.vt"), dir.path().join("s.out"));
    fs::write(&script, "new devs=emu0\nstart\n").expect("write");
    fs::write(
        &expect,
        "  new devs=emu0 set_iommu(3)=ok\n  start => -1 EIO\n",
    )
    .expect("write");
    let output = replay().arg(&script).arg("--expect").arg(&expect).output();
    let output = output.expect("run");
    assert_eq!(output.status.code(), Some(1));
    let out = String::from_utf8_lossy(&output.stdout);
    assert!(
        out.contains("line 2\n  expected start => -1 EIO\n  found    start => 0 ok\n"),
        "{out}"
    );
    assert!(out.ends_with("2 lines, 1 different\n"), "{out}");
}

#[test]
fn a_bad_line_exits_2_and_nothing_runs() {
    let output = run_script("new devs=emu0\nstart\nfrobnicate\n");
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(err.contains("-, line 3: expected an operation"), "{err}");
    let missing = replay().arg("/no/such/file").output().expect("run");
    assert_eq!(missing.status.code(), Some(2));
}
