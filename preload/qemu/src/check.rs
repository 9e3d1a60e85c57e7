// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the two QEMUs and their traces say after a migration.

use crate::case::{Case, Tracking};
use crate::qemu::Qemu;

/// The value of `name=` in a line of a trace, decimal or hexadecimal.
fn field(line: &str, name: &str) -> Option<u64> {
    let mut words = line
        .split_whitespace()
        .map(|word| word.trim_end_matches(','));
    while let Some(word) = words.next() {
        let Some(value) = word
            .strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('='))
        else {
            continue;
        };
        // Older QEMUs print a space after "size=".
        let value = if value.is_empty() {
            words.next()?
        } else {
            value
        };
        return match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => value.parse().ok(),
        };
    }
    None
}

/// A report of dirty pages: IOVA, size in bytes, dirty pages. QEMU 7.2 does not trace those.
type Report = (u64, u64, Option<u64>);

/// What we answered, by our trace.
fn answered(trace: &str, kind: &str) -> Vec<Report> {
    let ours = |line: &str| {
        let (_, line) = line.split_once(' ')?;
        let line = line.strip_prefix(kind)?.strip_prefix(' ')?;
        Some((
            field(line, "iova")?,
            field(line, "size")?,
            Some(field(line, "dirty")?),
        ))
    };
    trace.lines().filter_map(ours).collect()
}

/// What QEMU saw, by its trace.
fn seen(trace: &str) -> Vec<Report> {
    let theirs = |line: &str| {
        let known = ["vfio_container_query_dirty_bitmap", "vfio_get_dirty_bitmap"];
        known.iter().find(|name| line.contains(*name))?;
        let dirty = field(line, "dirty_pages");
        Some((field(line, "iova")?, field(line, "size")?, dirty))
    };
    trace.lines().filter_map(theirs).collect()
}

/// What is wrong with the reports of the source.
pub(crate) fn reports(case: &Case, source: &Qemu) -> Vec<String> {
    let mut wrong = Vec::new();
    let trace = source.text("trace");
    let kind = match case.tracking {
        Tracking::Container => "get",
        Tracking::Device => "report",
    };
    let ours = answered(&trace, kind);
    if ours.is_empty() {
        wrong.push(format!("QEMU never asked by {kind}"));
    }
    // With several devices QEMU counts what all of their logs have.
    if case.devices == 1 || case.tracking == Tracking::Container {
        let theirs = seen(&source.text("qemu-trace"));
        if let Some(first) = first_difference(&ours, &theirs) {
            wrong.push(format!("QEMU's trace differs from the answers: {first}"));
        }
    }
    if case.viommu()
        && !answered(&trace, "unmap")
            .iter()
            .any(|(_, _, dirty)| *dirty != Some(0))
        && !matches!(case.lose, Some("unmap" | "device"))
    {
        wrong.push("no UNMAP had a dirty page".into());
    }
    wrong
}

fn first_difference(ours: &[Report], theirs: &[Report]) -> Option<String> {
    let show = |report: Option<&Report>| match report {
        Some((iova, size, dirty)) => format!("{iova:#x}+{size:#x} dirty={dirty:?}"),
        None => "nothing".into(),
    };
    let longest = ours.len().max(theirs.len());
    let differ = |k: &usize| match (ours.get(*k), theirs.get(*k)) {
        (Some((a, b, _)), Some((c, d, None))) => (a, b) != (c, d),
        (ours, theirs) => ours != theirs,
    };
    (0..longest).find(differ).map(|k| {
        format!(
            "report {k} of {longest}: answered {}, traced {}",
            show(ours.get(k)),
            show(theirs.get(k))
        )
    })
}

/// What is left of the devices of a QEMU that has ended.
pub(crate) fn left(qemu: &Qemu) -> Vec<String> {
    let trace = qemu.text("trace");
    let last = trace.lines().rfind(|line| line.contains(" exit "));
    match last {
        Some(line) if line.ends_with("busy=0 open=0 charged=0") => Vec::new(),
        Some(line) => vec![format!("{} left: {line}", qemu.name)],
        None => vec![format!("{} did not close its devices", qemu.name)],
    }
}

/// How many pages of 4 KiB differ, and the address of the first.
pub(crate) fn difference(a: &[u8], b: &[u8]) -> (usize, Option<usize>) {
    let differ = a.chunks(4096).zip(b.chunks(4096)).enumerate();
    let differ = differ
        .filter(|(_, (a, b))| a != b)
        .map(|(page, _)| page * 4096);
    let differ: Vec<usize> = differ.collect();
    (
        differ.len() + a.len().abs_diff(b.len()).div_ceil(4096),
        differ.first().copied(),
    )
}
