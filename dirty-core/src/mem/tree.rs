// SPDX-License-Identifier: MIT OR Apache-2.0
//! An ordered map from u64: the owner of an intrusive red-black tree.
//!
//! `intrusive-collections` links nodes. This module owns them, so that the rest
//! of the core sees only references. It is a tree and not a table because order
//! matters: callers ask for neighbours.
#![allow(unsafe_code)]

use core::hint;
use core::ptr::{self, NonNull};

use intrusive_collections::{intrusive_adapter, Bound, KeyAdapter, RBTree, RBTreeLink, UnsafeRef};

use crate::error::NoMemory;
use crate::host::Memory;
use crate::mem::own::Own;

struct Node<T> {
    link: RBTreeLink,
    key: u64,
    value: T,
}

intrusive_adapter!(NodeAdapter<T> = UnsafeRef<Node<T>>: Node<T> { link => RBTreeLink });

impl<'a, T> KeyAdapter<'a> for NodeAdapter<T> {
    type Key = u64;

    fn get_key(&self, node: &'a Node<T>) -> u64 {
        node.key
    }
}

/// INVARIANT: every node in `tree` came from `Own::into_raw` with `mem`, is in
/// no other tree and is reachable through this `Tree` only.
pub(crate) struct Tree<T, M: Memory> {
    tree: RBTree<NodeAdapter<T>>,
    mem: M,
}

// SAFETY: the tree owns its nodes like a map of boxes.
unsafe impl<T: Send, M: Memory + Send> Send for Tree<T, M> {}
// SAFETY: through `&Tree` links are only read, and values are given out as `&T`.
unsafe impl<T: Sync, M: Memory + Sync> Sync for Tree<T, M> {}

impl<T, M: Memory> Tree<T, M> {
    pub(crate) fn new(mem: &M) -> Self {
        Tree {
            tree: RBTree::new(NodeAdapter::new()),
            mem: mem.clone(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tree.is_empty()
    }

    /// Inserts a value under a key that is not in the tree. `value` makes it in its
    /// place, if there is memory.
    pub(crate) fn insert(&mut self, key: u64, value: impl FnOnce() -> T) -> Result<(), NoMemory> {
        debug_assert!(self.get(key).is_none());
        let node = Own::new(&self.mem, || Node {
            link: RBTreeLink::new(),
            key,
            value: value(),
        })?;
        let linked = node.link.is_linked();
        let node = node.into_raw();
        // SAFETY: its link is new. This lets the compiler drop the check in
        // `insert`, which would panic.
        unsafe { hint::assert_unchecked(!linked) };
        // SAFETY: the node lives until this tree removes it.
        self.tree
            .insert(unsafe { UnsafeRef::from_raw(node.as_ptr()) });
        Ok(())
    }

    pub(crate) fn remove(&mut self, key: u64) {
        if let Some(node) = self.tree.find_mut(&key).remove() {
            self.drop_node(node);
        }
    }

    /// Frees a node that has left the tree.
    fn drop_node(&self, node: UnsafeRef<Node<T>>) {
        if let Some(node) = NonNull::new(UnsafeRef::into_raw(node)) {
            // SAFETY: by the invariant, and nothing points to it any more.
            drop(unsafe { Own::from_raw(node, &self.mem) });
        }
    }

    pub(crate) fn get(&self, key: u64) -> Option<&T> {
        self.tree.find(&key).get().map(|n| &n.value)
    }

    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let node = self.tree.find_mut(&key).get_ptr()?;
        // SAFETY: in bounds of a live node; no reference is made. (Its link stays
        // shared with its neighbours.)
        let value = unsafe { ptr::addr_of_mut!((*node.as_ptr()).value) };
        // SAFETY: `&mut self` is borrowed by the result.
        Some(unsafe { &mut *value })
    }

    /// The entries in ascending order, from the first one whose key is at least `key`
    /// on.
    pub(crate) fn from(&self, key: u64) -> impl Iterator<Item = &T> {
        let mut cursor = self.tree.lower_bound(Bound::Included(&key));
        core::iter::from_fn(move || {
            let node = cursor.get()?;
            cursor.move_next();
            Some(&node.value)
        })
    }
}

impl<T, M: Memory> Drop for Tree<T, M> {
    fn drop(&mut self) {
        while let Some(node) = self.tree.front_mut().remove() {
            self.drop_node(node);
        }
    }
}
