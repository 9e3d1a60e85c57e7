// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a person sees in a terminal of 80 columns.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::{Command, Output};

use nix::pty::{openpty, Winsize};

const COLUMNS: u16 = 80;

/// What the program wrote to a terminal, and the terminal's lines at the end.
struct Screen {
    code: Option<i32>,
    written: String,
    lines: Vec<String>,
}

/// Runs the program in a terminal.
fn show(args: &[&str]) -> Screen {
    let size = Winsize {
        ws_row: 24,
        ws_col: COLUMNS,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let terminal = openpty(Some(&size), None).unwrap();
    let side = || -> OwnedFd { terminal.slave.try_clone().unwrap() };
    let mut child = Command::new(env!("CARGO_BIN_EXE_vfio-dirty"))
        .args(args)
        .env("TERM", "xterm")
        .env_remove("NO_COLOR")
        .stdin(side())
        .stdout(side())
        .stderr(side())
        .spawn()
        .unwrap();
    drop(terminal.slave);
    let mut written = Vec::new();
    // Linux ends the stream with EIO when the last writer has closed the terminal.
    let end = File::from(terminal.master).read_to_end(&mut written);
    assert!(end.is_ok() || end.unwrap_err().raw_os_error() == Some(libc::EIO));

    // A terminal that is high enough to keep every line.
    let mut parser = vt100::Parser::new(1000, COLUMNS, 0);
    parser.process(&written);
    let screen = parser.screen();
    for row in 0..1000 {
        assert!(!screen.row_wrapped(row), "{}", screen.contents());
    }
    Screen {
        code: child.wait().unwrap().code(),
        written: String::from_utf8_lossy(&written).into_owned(),
        lines: screen.contents().lines().map(str::to_owned).collect(),
    }
}

fn migrate(args: &[&str]) -> Screen {
    let busy = [
        "migrate",
        "--memory",
        "64M",
        "--downtime",
        "2",
        "--max-rounds",
        "8",
    ];
    let screen = show(&[&busy[..], args].concat());
    match screen.lines.join(" ").contains("run with --no-cpu") {
        true => show(&[&busy[..], &["--no-cpu"], args].concat()),
        false => screen,
    }
}

fn is_round(line: &str) -> bool {
    let first = line.split_whitespace().next().unwrap_or("");
    first == "stop" || first.parse::<u32>().is_ok_and(|round| round <= 9)
}

#[test]
fn a_migration_fits_the_terminal() {
    let screen = migrate(&[]);
    let text = screen.lines.join("\n");
    assert_eq!(screen.code, Some(0), "{text}");
    assert!(
        screen.written.starts_with("preparing memory: 64 MiB"),
        "{text}"
    );
    // The bar, which is gone at the end.
    assert!(screen.written.contains("preparing memory ["));
    assert!(screen.written.contains("/16384 pages"));
    assert!(!text.contains("/16384 pages"), "{text}");

    let table = screen.lines.iter().skip_while(|l| !l.starts_with("round"));
    let table: Vec<&String> = table.take_while(|line| !line.is_empty()).collect();
    assert!(table.len() >= 3, "{text}");
    for line in &table {
        assert_eq!(line.split_whitespace().count(), 10, "{line}");
        assert_eq!(line.len(), table[0].len(), "{line}");
    }
    assert!(table[1..].iter().all(|line| is_round(line)), "{text}");
    let last = screen.lines.last().unwrap();
    assert_eq!(last, "verdict: all 16,384 pages equal");
}

#[test]
fn a_migration_that_loses_pages_fits_the_terminal() {
    let screen = migrate(&["--lose", "unmap"]);
    let text = screen.lines.join("\n");
    assert_eq!(screen.code, Some(1), "{text}");
    assert!(text.contains("\n--lose unmap threw away the answers of UNMAP_DMA\n"));
    let last = screen.lines.last().unwrap();
    assert!(last.starts_with("verdict: DIFFERENT in "), "{text}");
}

#[test]
fn what_a_machine_can_do_fits_the_terminal() {
    assert_eq!(show(&["info"]).code, Some(0));
}

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vfio-dirty"))
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn help_fits_80_columns_and_lists_only_commands_for_users() {
    for command in [&[][..], &["migrate"], &["replay"], &["info"]] {
        for option in ["--help", "-h"] {
            let args = [command, &[option]].concat();
            let output = run(&args);
            assert_eq!(output.status.code(), Some(0));
            let text = String::from_utf8(output.stdout).unwrap();
            for line in text.lines() {
                assert!(line.chars().count() <= COLUMNS.into(), "{args:?}: {line}");
            }
            assert!(!text.contains("-destination"), "{text}");
            show(&args);
        }
    }
}

#[test]
fn the_version_names_the_program() {
    let output = run(&["--version"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        text,
        concat!("vfio-dirty ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

#[test]
fn a_mistyped_command_suggests_only_commands_for_users() {
    let output = run(&["migrat"]);
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("'migrate'"), "{text}");
    assert!(!text.contains("-destination"), "{text}");
}
