// SPDX-License-Identifier: GPL-2.0-only
//! Calls of DMA logging whose ranges and bitmaps matter. The sample driver accepts every
//! log and reports no page, so the answers are those of the kernel's own checks.

use std::collections::HashMap;

use dirty_model::migration::Place;

const TOP: u64 = 1 << 63;

/// Ranges of one START, with what is peculiar to them.
const RANGES: [&[(u64, u64)]; 18] = [
    &[(0, 0x1000)],
    &[(0, 0x1000), (0x1000, 0x1000)],
    &[(0x1000, 0x1000), (0, 0x1000)],
    &[(0, 0x2000), (0x1000, 0x1000)],
    &[(0x1000, 0x1000), (0, 0x10000)],
    &[(0x1000, 0x1000), (0x1000, 0x1000)],
    &[(0, 0)],
    &[(0x1000, 0)],
    &[(0, 0), (0, 0)],
    &[(0x1000, 0), (0x1000, 0x1000)],
    &[(1, 0x1000)],
    &[(0, 0x1001)],
    &[(0x800, 0x800)],
    &[(TOP, TOP)],
    &[(TOP, TOP - 0x1000)],
    &[(TOP + 0x1000, TOP)],
    &[(0, 0x1000), (1, 0x1000), (TOP + 0x1000, TOP)],
    &[(0, 0x1000), (0x1000, TOP), (TOP + 0x1000, TOP)],
];

fn start(page: u64, count: u32, at: Place, from: Place, ranges: &[(u64, u64)]) -> String {
    let ranges: Vec<String> = ranges
        .iter()
        .map(|(a, n)| format!("{a:#x}:{n:#x}"))
        .collect();
    let ranges = ranges.join(",");
    format!("logstart page={page:#x} count={count} at={at} from={from} r={ranges}")
}

/// All of them, each START with a STOP after it.
pub(crate) fn lines() -> Vec<String> {
    let mut starts = Vec::new();
    for ranges in RANGES {
        for page in [0, 1, 3, 0x200, 0x1000, 0x2000, TOP] {
            let count = ranges.len() as u32;
            starts.push(start(page, count, Place::Mem, Place::Mem, ranges));
        }
    }
    for at in Place::ALL {
        for from in Place::ALL {
            for count in [0, 1, 2, 257, u32::MAX] {
                starts.push(start(0x1000, count, at, from, RANGES[1]));
                starts.push(start(0x1000, count, at, from, RANGES[10]));
            }
        }
    }
    let stop = "feature n=7 flags=0x20000 argsz=8 at=mem state=0";
    let mut lines = Vec::new();
    for start in starts {
        lines.extend([start, stop.to_string()]);
    }
    lines.push(start(0x1000, 1, Place::Mem, Place::Mem, RANGES[0]));
    for at in Place::ALL {
        for page in [0, 1, 0x800, 0x1000, 0x1800, 0x2000, TOP] {
            for (iova, length) in [(0, 0x1000), (0, 0x40000), (TOP, TOP), (TOP + 0x1000, TOP)] {
                lines.push(format!(
                    "logreport page={page:#x} iova={iova:#x} length={length:#x} at={at}"
                ));
            }
        }
    }
    lines.push(stop.to_string());
    lines
}

/// A line of this file, as its words say.
pub(crate) enum Call {
    Start {
        page: u64,
        count: u32,
        at: Place,
        from: Place,
        ranges: Vec<(u64, u64)>,
    },
    Report {
        page: u64,
        iova: u64,
        length: u64,
        at: Place,
    },
}

/// Reads a line; `None` if it is of another kind.
pub(crate) fn parse(line: &str) -> Result<Option<Call>, String> {
    let mut words = line.split_whitespace();
    let name = words.next().unwrap_or_default();
    if !["logstart", "logreport"].contains(&name) {
        return Ok(None);
    }
    let fields: HashMap<&str, &str> = words.filter_map(|word| word.split_once('=')).collect();
    let text = |key| fields.get(key).copied().ok_or(format!("{key}= is missing"));
    let value = |text: &str| {
        let parsed = match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => text.parse(),
        };
        parsed.map_err(|e| format!("{text}: {e}"))
    };
    let number = |key| text(key).and_then(value);
    let call = match name {
        "logreport" => Call::Report {
            page: number("page")?,
            iova: number("iova")?,
            length: number("length")?,
            at: text("at")?.parse()?,
        },
        _ => {
            let mut ranges = Vec::new();
            for range in text("r")?.split(',') {
                let (iova, length) = range.split_once(':').ok_or("a range has a colon")?;
                ranges.push((value(iova)?, value(length)?));
            }
            Call::Start {
                page: number("page")?,
                count: number("count")? as u32,
                at: text("at")?.parse()?,
                from: text("from")?.parse()?,
                ranges,
            }
        }
    };
    Ok(Some(call))
}
