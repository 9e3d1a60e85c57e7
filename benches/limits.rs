// SPDX-License-Identifier: MIT OR Apache-2.0
//! The targets: the most that a row may take, as a multiple of another value in it.

/// The most that ours may be, as a multiple of something.
#[derive(Debug)]
pub(crate) struct Target {
    group: &'static str,
    /// The row's case. One that ends with `*` stands for all that begin so.
    case: &'static str,
    /// The row's size, or [`ANY`].
    size: &'static str,
    pub(crate) most: f64,
    pub(crate) of: Of,
}

/// What a target is a multiple of.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Of {
    /// The best of the peers and limits.
    Best,
    Limit,
    Named(&'static str),
    /// Of one: the target is a value in the row's unit.
    Nothing,
}

use Of::{Best, Limit, Named, Nothing};

/// Every size.
const ANY: &str = "*";

const ATOMIC: Of = Named("AtomicBitmap");
const ROARING: Of = Named("roaring");
const TREE: Of = Named("BTreeMap");

const MILLISECOND: f64 = 1e6;

#[rustfmt::skip]
const TARGETS: &[Target] = &[
    target("mark", "one page, exclusive", ANY, 1.5, Named("plain words")),
    target("mark", "one page, shared", ANY, 1.0, ATOMIC),
    target("mark", "512 pages, exclusive", ANY, 1.2, Best),
    target("mark", "512 pages, shared", ANY, 1.0 / 30.0, ATOMIC),
    target("mark", "512 aligned pages, exclusive", ANY, 1.2, Best),
    target("mark", "512 aligned pages, shared", ANY, 1.0 / 30.0, ATOMIC),
    target("mark", "a whole range, *", ANY, 0.25, ROARING),

    target("get", "full lines", ANY, 0.6, Named("memcpy")),
    target("get", "full lines, bit offset 13", ANY, 0.6, Named("memcpy")),
    target("get", "dense by words", ANY, 1.15, Named("memcpy")),
    target("get", "dense by words, bit offset 13", "1 GiB", 2.5, Named("memcpy")),
    target("get", "dense by words, bit offset 13", "64 GiB", 2.5, Named("memcpy")),
    target("get", "dense by words, bit offset 13", "1 TiB", 1.3, Named("memcpy")),
    target("get", "dense by words, bit offset 13", "8 TiB", 1.3, Named("memcpy")),
    target("get", "clean, zeroed words", ANY, 0.01, Limit),
    target("get", "0.01 % scattered, zeroed words", ANY, 0.1, Limit),
    target("get", "1 % in 2 MiB runs, zeroed words", ANY, 0.05, Limit),
    target("get", "clean, ioctl", ANY, 0.35, Limit),
    target("get", "0.01 % scattered, ioctl", ANY, 0.4, Limit),
    target("get", "1 % in 2 MiB runs, ioctl", ANY, 0.4, Limit),

    target("pins", "pin, random", ANY, 0.45, TREE),
    target("pins", "unpin, random", "1e5", 1.1, TREE),
    target("pins", "unpin, random", "1e7", 0.45, TREE),
    target("pins", "lookup, random", ANY, 0.45, TREE),
    target("pins", "pin, sequential", ANY, 0.5, TREE),
    target("pins", "get of 1 TiB, *", ANY, 1.3, Named("no pins")),
    target("memory", "a pin, *", ANY, 28.0, Nothing),

    target("rescale", "coarsen *", ANY, 2.0, Limit),
    target("rescale", "refine 1 to 16", ANY, 4.0, Limit),
    target("rescale", "refine 1 to 512", ANY, 2.0, Limit),

    target("walk", "pages, 0.01 %", ANY, 2.0, ROARING),
    target("walk", "pages, 1 %", ANY, 2.0, ROARING),
    target("walk", "pages, 10 %", ANY, 1.1, Named("fixedbitset")),
    target("walk", "pages, 50 %", ANY, 1.1, Named("fixedbitset")),
    target("walk", "runs, 0.01 %", ANY, 2.0, ROARING),
    target("walk", "runs, 1 %", ANY, 1.0, ROARING),
    target("walk", "runs, 10 %", ANY, 1.0, ROARING),
    target("walk", "runs, 50 %", ANY, 1.0, ROARING),
    target("walk", "runs, huge pages", ANY, 0.6, ROARING),
    target("walk", "runs, a whole range", ANY, 1.5, ROARING),
    target("walk", "runs, dense by words", ANY, 3.0, ROARING),

    target("mappings", "container: map + unmap", ANY, 2.0, TREE),
    target("mappings", "container: get of one", ANY, 2.0, TREE),
    target("mappings", "view: mark by IOVA", ANY, 1.2, TREE),
    target("mappings", "log: mark by IOVA", ANY, 1.2, TREE),
    target("mappings", "view: add + remove", ANY, 6.0, Named("among 64")),
    target("mappings", "log: add + remove", ANY, 6.0, Named("among 64")),
    target("mappings", "log: add of all", ANY, 2.0, TREE),
    target("mappings", "log: map, mark, unmap", ANY, 2.0, TREE),
    target("mappings", "log: map, mark, unmap", ANY, 1.1, Named("twice half as many")),
    target("mappings", "view: harvest, a 4 GiB mapping gone", ANY, 2.0, Named("without it")),

    target("start", "no pins", ANY, 1.1, ATOMIC),
    target("start", "1e5 pins", ANY, 2.0, Named("zeroed allocation")),
    target("memory", "a tracked GiB, no pins", ANY, 1.03, Named("one bitmap")),

    target("vmm", "write, tracker off", ANY, 1.1, Named("a flag")),
    target("vmm", "write, tracker on", ANY, 0.7, ATOMIC),
    target("vmm", "take of 32 GiB*", ANY, 1.0, ATOMIC),
    target("vmm", "4 threads, *", ANY, 1.1, ATOMIC),
    target("vmm", "container: mark*", ANY, 1.0, ATOMIC),
    target("vmm", "container: report, *", ANY, 0.2, ATOMIC),
    target("vmm", "container: longest report, *", ANY, 10.0 * MILLISECOND, Nothing),
    target("round", "*", ANY, 0.7, Named("cloud-hypervisor's")),

    target("vfio-user", "write of 64 bytes, logged", ANY, 0.1, Named("message")),
    target("vfio-user", "map and unmap, 65,534 there", ANY, 2.0, Limit),
    target("vfio-user", "65,535 maps", ANY, 2.0, Limit),
];

const fn target(
    group: &'static str,
    case: &'static str,
    size: &'static str,
    most: f64,
    of: Of,
) -> Target {
    Target {
        group,
        case,
        size,
        most,
        of,
    }
}

impl Target {
    fn is_for(&self, group: &str, case: &str, size: &str) -> bool {
        let is = |pattern: &str, text: &str| match pattern.strip_suffix('*') {
            Some(start) => text.starts_with(start),
            None => text == pattern,
        };
        self.group == group && is(self.case, case) && is(self.size, size)
    }

    /// The rows that it is for, in words.
    pub(crate) fn rows(&self) -> String {
        format!("{}: {}, {}", self.group, self.case, self.size)
    }
}

/// The targets of a row.
pub(crate) fn of(group: &str, case: &str, size: &str) -> Vec<&'static Target> {
    let targets = TARGETS.iter();
    targets.filter(|t| t.is_for(group, case, size)).collect()
}

/// The targets of which no row has the group, case and size.
pub(crate) fn without_row<'a>(
    rows: impl Iterator<Item = (&'a str, &'a str, &'a str)> + Clone,
) -> impl Iterator<Item = &'static Target> {
    let has_row = move |t: &&Target| !rows.clone().any(|(g, c, s)| t.is_for(g, c, s));
    TARGETS.iter().filter(has_row)
}
