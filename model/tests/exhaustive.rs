// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every short sequence of operations over a few pages, on the core and on the
//! model.

#[path = "support/sequences.rs"]
mod sequences;
mod support;

use dirty_model::compare;
use sequences::depth;
use support::ops;

/// Compares core and model on every sequence of operations of `alphabet` after
/// `prefix`. Returns how many sequences there are.
fn all_sequences(prefix: &str, alphabet: &str) -> u64 {
    sequences::all(&ops(prefix), &ops(alphabet), |script| {
        if let Err(difference) = compare(script) {
            panic!("{difference}");
        }
    })
}

/// Mappings, tracking, pins and writes of one emulated device: 16 operations.
#[test]
fn an_emulated_device() {
    let alphabet = "map iova=0 size=2p
        map iova=2p size=1p flags=1
        unmap iova=0 size=2p
        unmap iova=0 size=4p flags=1
        unmap flags=2
        start
        stop
        get size=4p fill=255
        get size=4p data=ro
        pin iova=0 n=1
        pin iova=1p n=2 prot=1
        unpin iova=1p n=1
        unpin iova=0 n=3
        rw iova=0x1fff len=2
        fault alloc=1
        fault copy=5";
    let n = all_sequences("new devs=emu0", alphabet);
    assert_eq!(n, 16u64.pow(depth()));
}

/// Groups that are attached and detached, and the dirty scope: 16 operations.
#[test]
fn groups_and_scope() {
    let alphabet = "map iova=0 size=16p
        unmap iova=0 size=16p flags=1
        start
        stop
        get size=16p
        report size=16p pgsize=0x8000 fill=255
        attach dev=xpci0
        detach dev=xpci0
        attach dev=pci0
        detach dev=pci0
        pin dev=xpci0 iova=1p
        pin dev=emu0 iova=3p n=2
        unpin dev=emu0 iova=3p
        unmap flags=6
        map iova=0 size=16p flags=4
        fault map=1";
    let n = all_sequences("new devs=emu0\nmap iova=0 size=16p", alphabet);
    assert_eq!(n, 16u64.pow(depth()));
}

/// A granularity of 64K, latched while groups are attached and detached: 13
/// operations.
#[test]
fn latched_granularity() {
    let alphabet = "map iova=0 size=32p
        map iova=32p size=16p vaddr=mem+1M
        map iova=48p size=1p
        unmap iova=0 size=48p flags=1 pgsize=0x10000
        start
        stop
        get size=64p pgsize=0x10000
        get size=64p
        harvest size=32p pgsize=0x2000 fill=255 words=1
        pin dev=emu0 iova=15p n=2
        unpin dev=emu0 iova=15p
        detach dev=big0
        attach dev=big0";
    let n = all_sequences("new devs=big0,emu0", alphabet);
    assert_eq!(n, 13u64.pow(depth()));
}

/// IOMMUs that track, and devices that write by DMA, also just before an unmap: 17
/// operations.
#[test]
fn iommus_that_track() {
    let alphabet = "map iova=0 size=16p
        unmap iova=0 size=16p
        unmap iova=0 size=16p flags=1
        start
        stop
        get size=16p
        get size=16p data=ro
        harvest size=16p fill=255
        dma dev=xpci0 iova=0x1fff len=2
        dma dev=xpci1 iova=3p
        dma dev=xpci0 iova=5p late=1
        detach dev=xpci0
        attach dev=xpci1
        attach dev=pci0
        detach dev=pci0
        fault track=1
        fault copy=5";
    let prefix = "new devs=emu0,xpci0 iommudirty=1\nmap iova=0 size=16p";
    let n = all_sequences(prefix, alphabet);
    assert_eq!(n, 17u64.pow(depth()));
}
