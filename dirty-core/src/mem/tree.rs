// SPDX-License-Identifier: MIT OR Apache-2.0
//! An ordered map from u64: the owner of an intrusive red-black tree.
//!
//! `intrusive-collections` links nodes. This module owns them, so that the rest
//! of the core sees only references. It is a tree and not a table because order
//! matters: callers ask for ranges and neighbours.
#![allow(unsafe_code)]

use core::hint;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use core::ptr::{self, NonNull};

use intrusive_collections::{
    intrusive_adapter, rbtree, Bound, KeyAdapter, RBTree, RBTreeLink, UnsafeRef,
};

use crate::error::NoMemory;
use crate::host::Memory;
use crate::mem;

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

/// INVARIANT: every node in `tree` came from `mem::into_raw` with `mem`, is in
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
    pub(crate) fn insert(
        &mut self,
        key: u64,
        value: impl FnOnce() -> T,
    ) -> Result<&mut T, NoMemory> {
        debug_assert!(self.get(key).is_none());
        let node = mem::into_raw(&self.mem, || Node {
            link: RBTreeLink::new(),
            key,
            value: value(),
        })?;
        // SAFETY: the node was just written.
        let linked = unsafe { node.as_ref() }.link.is_linked();
        // SAFETY: its link is new. This lets the compiler drop the check in
        // `insert`, which would panic.
        unsafe { hint::assert_unchecked(!linked) };
        // SAFETY: the node lives until this tree removes it.
        self.tree
            .insert(unsafe { UnsafeRef::from_raw(node.as_ptr()) });
        // SAFETY: `&mut self` is borrowed by the result.
        Ok(unsafe { value_mut(node) })
    }

    pub(crate) fn remove(&mut self, key: u64) -> Option<Taken<T, M>> {
        let node = self.tree.find_mut(&key).remove()?;
        Taken::new(node, &self.mem)
    }

    /// Removes the first entry that is not `before`, if it is `wanted`. All entries
    /// are looked at in ascending order from the last one whose key is at most `key`
    /// on, or else from the first of all.
    pub(crate) fn remove_first(
        &mut self,
        key: u64,
        before: impl Fn(&T) -> bool,
        wanted: impl Fn(&T) -> bool,
    ) -> Option<Taken<T, M>> {
        let mut cursor = self.tree.upper_bound_mut(Bound::Included(&key));
        if cursor.is_null() {
            cursor.move_next(); // to the first of all
        }
        while before(&cursor.get()?.value) {
            cursor.move_next();
        }
        if !wanted(&cursor.get()?.value) {
            return None;
        }
        let node = cursor.remove()?;
        Taken::new(node, &self.mem)
    }

    pub(crate) fn get(&self, key: u64) -> Option<&T> {
        self.tree.find(&key).get().map(|n| &n.value)
    }

    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let node = self.tree.find_mut(&key).get_ptr()?;
        // SAFETY: `&mut self` is borrowed by the result.
        Some(unsafe { value_mut(node) })
    }

    /// The last entry whose key is at most `key`.
    pub(crate) fn floor(&self, key: u64) -> Option<&T> {
        let cursor = self.tree.upper_bound(Bound::Included(&key));
        cursor.get().map(|n| &n.value)
    }

    /// As [`floor`](Tree::floor), to change it.
    pub(crate) fn floor_mut(&mut self, key: u64) -> Option<&mut T> {
        let node = self.tree.upper_bound(Bound::Included(&key)).get_ptr()?;
        // SAFETY: `&mut self` is borrowed by the result.
        Some(unsafe { value_mut(node) })
    }

    /// The entries in ascending order, from the last one whose key is at most
    /// `key` (or else the first of all) through the first one for which `last` is
    /// true. Nothing after that is read.
    pub(crate) fn range(&self, key: u64, last: impl Fn(&T) -> bool) -> impl Iterator<Item = &T> {
        let mut cursor = self.cursor(key);
        let end = self.tree.cursor();
        core::iter::from_fn(move || {
            let value = &cursor.get()?.value;
            match last(value) {
                true => cursor = end.clone(),
                false => cursor.move_next(),
            }
            Some(value)
        })
    }

    /// As [`range`](Tree::range), to change them.
    pub(crate) fn range_mut<F: Fn(&T) -> bool>(&mut self, key: u64, last: F) -> RangeMut<'_, T, F> {
        RangeMut {
            cursor: self.cursor(key),
            end: self.tree.cursor(),
            last,
            exclusive: PhantomData,
        }
    }

    /// The last entry whose key is at most `key`, or else the first of all.
    fn cursor(&self, key: u64) -> rbtree::Cursor<'_, NodeAdapter<T>> {
        let mut cursor = self.tree.upper_bound(Bound::Included(&key));
        if cursor.is_null() {
            cursor.move_next(); // to the first of all
        }
        cursor
    }
}

impl<T, M: Memory> Drop for Tree<T, M> {
    fn drop(&mut self) {
        while let Some(node) = self.tree.front_mut().remove() {
            drop(Taken::new(node, &self.mem));
        }
    }
}

/// A value that has left its tree, in its old place.
///
/// INVARIANT: the node came from `mem::into_raw` with `mem`, is in no tree, and is
/// reachable through this `Taken` only.
pub(crate) struct Taken<T, M: Memory> {
    node: NonNull<Node<T>>,
    mem: M,
}

impl<T, M: Memory> Taken<T, M> {
    /// `node` was in a tree over `mem`, and is unlinked.
    fn new(node: UnsafeRef<Node<T>>, mem: &M) -> Option<Self> {
        let node = NonNull::new(UnsafeRef::into_raw(node))?;
        let mem = mem.clone();
        Some(Taken { node, mem })
    }
}

impl<T, M: Memory> Deref for Taken<T, M> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: by the invariant; borrowed as long as `self`.
        &unsafe { self.node.as_ref() }.value
    }
}

impl<T, M: Memory> DerefMut for Taken<T, M> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: by the invariant; borrowed as long as `self`, exclusively.
        &mut unsafe { self.node.as_mut() }.value
    }
}

impl<T, M: Memory> Drop for Taken<T, M> {
    fn drop(&mut self) {
        // SAFETY: by the invariant, and dropped once.
        unsafe { mem::drop_raw(&self.mem, self.node) };
    }
}

pub(crate) struct RangeMut<'a, T, F> {
    /// Made from `&'a mut Tree`, so nobody else sees the tree during `'a`.
    cursor: rbtree::Cursor<'a, NodeAdapter<T>>,
    end: rbtree::Cursor<'a, NodeAdapter<T>>,
    last: F,
    exclusive: PhantomData<&'a mut T>,
}

impl<'a, T, F: Fn(&T) -> bool> Iterator for RangeMut<'a, T, F> {
    type Item = &'a mut T;

    fn next(&mut self) -> Option<&'a mut T> {
        let node = self.cursor.get_ptr()?;
        // SAFETY: each node is passed once, and moving on reads only links.
        let value = unsafe { value_mut(node) };
        match (self.last)(value) {
            true => self.cursor = self.end.clone(),
            false => self.cursor.move_next(),
        }
        Some(value)
    }
}

/// # Safety
///
/// `node` is in a tree that is borrowed exclusively for `'a`, and no other
/// reference to its value exists. (Its link stays shared with its neighbours.)
unsafe fn value_mut<'a, T>(node: NonNull<Node<T>>) -> &'a mut T {
    // SAFETY: in bounds of a live node; no reference is made.
    let value = unsafe { ptr::addr_of_mut!((*node.as_ptr()).value) };
    // SAFETY: the caller's promise.
    unsafe { &mut *value }
}
