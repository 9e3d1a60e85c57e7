// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ten rows of the README: what a VMM's author cares about, beside what a VMM
//! uses today. `benches/publish` puts them there.

use std::fmt::Write;

use crate::report::row::{Row, Value};
use crate::report::summary;
use crate::report::units::{times, value};

/// A row of the README.
struct Line {
    /// What is done, in words.
    what: &'static str,
    /// The group, the case and the size of the row.
    row: (&'static str, &'static str, &'static str),
    /// The name of the value beside ours.
    beside: &'static str,
}

#[rustfmt::skip]
const LINES: [Line; 10] = [
    line("a device's write of 64 bytes through vm-memory, tracked",
        ("vmm", "write, tracker on", "64 and 8 bytes"), "AtomicBitmap"),
    line("mark a page that threads share, 64 GiB",
        ("mark", "one page, shared", "64 GiB"), "AtomicBitmap"),
    line("mark 512 pages that threads share, 64 GiB",
        ("mark", "512 pages, shared", "64 GiB"), "AtomicBitmap"),
    line("mark a page by IOVA among 65,535 mappings of a virtual IOMMU",
        ("mappings", "view: mark by IOVA", "65535"), "RwLock<BTreeMap> + AtomicBitmap"),
    line("mark all of 1 TiB",
        ("mark", "a whole range, exclusive", "1 TiB"), "roaring"),
    line("a round of 64 GiB with 1 % dirty: KVM's log and the VMM's writes, as ranges",
        ("round", "1 %", "64 GiB"), "cloud-hypervisor's"),
    line("a round of 1 TiB with 0.01 % dirty",
        ("round", "0.01 %", "1 TiB"), "cloud-hypervisor's"),
    line("a dense report of 1 TiB, copied and cleared",
        ("get", "dense by words", "1 TiB"), "memcpy"),
    line("the same with 10 million pinned pages",
        ("pins", "get of 1 TiB, dense by words", "1e7"), "BTreeMap"),
    line("map and unmap in a container with 65,535 mappings",
        ("mappings", "container: map + unmap", "65535"), "BTreeMap"),
];

const fn line(
    what: &'static str,
    row: (&'static str, &'static str, &'static str),
    beside: &'static str,
) -> Line {
    Line { what, row, beside }
}

/// The rows as Markdown; an error that names what was not measured.
pub(crate) fn markdown(rows: &[Row]) -> Result<String, String> {
    let ahead = summary::ahead(rows);
    let mut text = format!("{ahead} {}.\n\n", summary::met(rows));
    text += "| what | ours | today | ours / today |\n|---|---|---|---|\n";
    for Line { what, row, beside } in LINES {
        let found = rows.iter().find(|known| known.key() == row);
        let values = found.and_then(|row| Some((row.unit, row.ours()?, row.named(beside)?)));
        let (unit, ours, today) = values.ok_or(format!("{row:?}: no row with {beside}"))?;
        let cell = |Value { value: v, .. }| value(unit, v);
        let ratio = times(ours.value / today.value);
        let (ours, today) = (cell(ours), cell(today));
        let _ = writeln!(text, "| {what} | {ours} | {beside} {today} | {ratio} |");
    }
    Ok(text)
}
