// SPDX-License-Identifier: MIT OR Apache-2.0
//! Records of the pinned pages of a guest of 1 TiB: the core's and the peers'.

use std::collections::BTreeMap;

use dirty_core::Dest;
use intrusive_collections::{intrusive_adapter, KeyAdapter, RBTree, RBTreeLink};

use crate::data::{zeroed, TIB_1};
use crate::guest::Guest;
use crate::host::live;

/// Pinned pages and their bitmap.
pub(crate) trait Pins {
    const NAME: &'static str;

    /// No pins.
    fn new() -> Self;

    fn pin(&mut self, page: u64) -> u64;

    /// Pins many pages, all at once where that is faster.
    fn fill(&mut self, pages: &[u64]) {
        for page in pages {
            self.pin(*page);
        }
    }

    /// The pfn of a pinned page.
    fn lookup(&mut self, page: u64) -> u64;

    /// Undoes what a lookup did.
    fn forget(&mut self, _page: u64) {}

    fn unpin(&mut self, page: u64);

    /// Pins a run of pages, as many as fit `pfns`.
    fn pin_run(&mut self, first: u64, pfns: &mut [u64]) {
        for (page, pfn) in (first..).zip(pfns) {
            *pfn = self.pin(page);
        }
    }

    /// Marks every page.
    fn mark_all(&mut self);

    /// Dirty and pinned pages; dirty ones are cleared.
    fn get(&mut self, out: &mut [u64]);

    /// Bytes of `n` pins without bitmaps; `None` where that is not known.
    fn bytes(&self, n: usize) -> Option<usize>;
}

pub(crate) struct Ours {
    guest: Guest,
    /// Bytes of the core without pins.
    before: usize,
}

impl Pins for Ours {
    const NAME: &'static str = "ours";

    fn new() -> Self {
        let guest = Guest::tracking(&[TIB_1.pages]);
        let before = live();
        Ours { guest, before }
    }

    fn pin(&mut self, page: u64) -> u64 {
        let mut pfns = [0];
        self.guest.pin(page, &mut pfns);
        pfns[0]
    }

    /// Pins the page again, which looks it up and counts: the core has no lookup.
    fn lookup(&mut self, page: u64) -> u64 {
        self.pin(page)
    }

    fn forget(&mut self, page: u64) {
        self.unpin(page);
    }

    fn unpin(&mut self, page: u64) {
        self.guest.unpin(page, 1);
    }

    fn pin_run(&mut self, first: u64, pfns: &mut [u64]) {
        self.guest.pin(first, pfns);
    }

    fn mark_all(&mut self) {
        self.guest.mark(0, TIB_1.pages);
    }

    fn get(&mut self, out: &mut [u64]) {
        self.guest.get(0, TIB_1.pages, Dest::Words(out));
    }

    fn bytes(&self, _: usize) -> Option<usize> {
        Some(live() - self.before)
    }
}

struct Node {
    link: RBTreeLink,
    page: u64,
    pfn: u64,
    refs: u32,
}

impl Node {
    fn new(page: u64) -> Box<Node> {
        Box::new(Node {
            link: RBTreeLink::new(),
            page,
            pfn: page,
            refs: 1,
        })
    }
}

intrusive_adapter!(NodeAdapter = Box<Node>: Node { link => RBTreeLink });

impl<'a> KeyAdapter<'a> for NodeAdapter {
    type Key = u64;

    fn get_key(&self, node: &'a Node) -> u64 {
        node.page
    }
}

/// A report as Linux makes it: copy, clear, and pinned pages are dirty again.
fn take(dirty: &mut [u64], out: &mut [u64], pinned: impl Iterator<Item = u64>) {
    out.copy_from_slice(dirty);
    dirty.fill(0);
    pinned.for_each(|page| set(dirty, page));
}

/// Marks a page dirty. As in Linux, a page that was pinned since the last report
/// is dirty too.
fn set(dirty: &mut [u64], page: u64) {
    dirty[page as usize / 64] |= 1 << (page % 64);
}

/// One node a page, as in Linux.
pub(crate) struct Tree {
    tree: RBTree<NodeAdapter>,
    dirty: Vec<u64>,
}

impl Pins for Tree {
    const NAME: &'static str = "RBTree";

    fn new() -> Self {
        Tree {
            tree: RBTree::new(NodeAdapter::new()),
            dirty: zeroed(TIB_1.words()),
        }
    }

    fn pin(&mut self, page: u64) -> u64 {
        self.tree.insert(Node::new(page));
        set(&mut self.dirty, page);
        page
    }

    /// Allocates the nodes in the order of `pages`, as single pins would.
    fn fill(&mut self, pages: &[u64]) {
        let mut nodes: Vec<Box<Node>> = pages.iter().map(|page| Node::new(*page)).collect();
        nodes.sort_unstable_by_key(|node| node.page);
        for node in nodes {
            self.tree.back_mut().insert_after(node);
        }
    }

    fn lookup(&mut self, page: u64) -> u64 {
        let node = self.tree.find(&page);
        node.get().expect("a pinned page").pfn
    }

    fn unpin(&mut self, page: u64) {
        let node = self.tree.find_mut(&page).remove();
        let refs = node.expect("a pinned page").refs;
        assert_eq!(refs, 1);
    }

    fn mark_all(&mut self) {
        self.dirty.fill(!0);
    }

    fn get(&mut self, out: &mut [u64]) {
        take(&mut self.dirty, out, self.tree.iter().map(|node| node.page));
    }

    fn bytes(&self, n: usize) -> Option<usize> {
        Some(n * size_of::<Node>())
    }
}

/// The standard library's.
pub(crate) struct Map {
    map: BTreeMap<u64, (u64, u32)>,
    dirty: Vec<u64>,
}

impl Pins for Map {
    const NAME: &'static str = "BTreeMap";

    fn new() -> Self {
        Map {
            map: BTreeMap::new(),
            dirty: zeroed(TIB_1.words()),
        }
    }

    fn pin(&mut self, page: u64) -> u64 {
        self.map.insert(page, (page, 1));
        set(&mut self.dirty, page);
        page
    }

    /// Builds full nodes, which is better than what single pins leave.
    fn fill(&mut self, pages: &[u64]) {
        self.map = pages.iter().map(|page| (*page, (*page, 1))).collect();
    }

    fn lookup(&mut self, page: u64) -> u64 {
        self.map.get(&page).expect("a pinned page").0
    }

    fn unpin(&mut self, page: u64) {
        let (_, refs) = self.map.remove(&page).expect("a pinned page");
        assert_eq!(refs, 1);
    }

    fn mark_all(&mut self) {
        self.dirty.fill(!0);
    }

    fn get(&mut self, out: &mut [u64]) {
        take(&mut self.dirty, out, self.map.keys().copied());
    }

    fn bytes(&self, _: usize) -> Option<usize> {
        None
    }
}
