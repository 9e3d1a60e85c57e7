// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page sizes, and `normalise`, compared with a model that looks at every pair
//! of pages.

mod support;

use dirty_core::{normalise, Error, Extent, PageSize};
use proptest::prelude::*;
use support::words::{bits, garbage, get, set};

fn size(shift: u32) -> PageSize {
    PageSize::new(1 << shift).expect("a power of two")
}

/// First and last address of page `k`; they may lie beyond 2^64.
fn page(extent: Extent, k: u64) -> (u128, u128) {
    let bytes = u128::from(extent.pgsize.bytes());
    let first = u128::from(extent.iova) + u128::from(k) * bytes;
    (first, first + bytes - 1)
}

/// The error that an extent over `words` words must give.
fn check(extent: Extent, words: usize) -> Result<(), Error> {
    if extent.iova % extent.pgsize.bytes() != 0 {
        return Err(Error::Misaligned);
    }
    if u128::from(extent.bit) + u128::from(extent.npages) > words as u128 * 64 {
        return Err(Error::BitmapSize);
    }
    match extent.npages.checked_sub(1) {
        Some(last) if page(extent, last).1 > u128::from(u64::MAX) => Err(Error::Wraps),
        _ => Ok(()),
    }
}

fn model(src: &[u64], from: Extent, dst: &mut [u64], to: Extent) -> Result<(), Error> {
    check(from, src.len())?;
    check(to, dst.len())?;
    for k in (0..from.npages).filter(|k| get(src, from.bit + k)) {
        let dirty = page(from, k);
        for j in 0..to.npages {
            let other = page(to, j);
            if dirty.0 <= other.1 && other.0 <= dirty.1 {
                set(dst, to.bit + j);
            }
        }
    }
    Ok(())
}

fn compare(src: &[u64], from: Extent, to: Extent, words: usize) -> Result<(), Error> {
    let (mut got, mut expected) = (garbage(words), garbage(words));
    got.iter_mut().for_each(|w| *w &= 0x1111);
    expected.copy_from_slice(&got);
    let result = normalise(src, from, &mut got, to);
    assert_eq!(
        result,
        model(src, from, &mut expected, to),
        "{from:?} {to:?}"
    );
    assert_eq!(got, expected, "{from:?} {to:?}");
    result
}

/// An extent near `focus`. Some are misaligned, too long or wrap.
fn extent(focus: u64) -> impl Strategy<Value = Extent> {
    let bad = prop_oneof![9 => Just(0u64), 1 => 1..9u64];
    (0..64u32, 0..200u64, 0..100u64, 0..100u64, bad).prop_map(
        move |(shift, npages, bit, back, bad)| {
            let pgsize = size(shift);
            let start = focus & !(pgsize.bytes() - 1);
            let iova = start.saturating_sub(back << shift) & !(pgsize.bytes() - 1);
            Extent {
                bit,
                iova: iova.wrapping_add(bad),
                npages,
                pgsize,
            }
        },
    )
}

/// Two extents near each other.
fn extents() -> impl Strategy<Value = (Extent, Extent)> {
    let focus = prop_oneof![0..1u64 << 20, any::<u64>(), u64::MAX - (1 << 20)..=u64::MAX];
    focus.prop_flat_map(|focus| (extent(focus), extent(focus)))
}

/// `n` words: some empty, some full, some with few bits.
fn sparse_words(n: usize, seed: u64) -> Vec<u64> {
    let mut x = seed | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let word = |k: u64| match k % 5 {
        0 => 1u64 << (k / 5 % 64),
        1 => !0,
        2 => k & k >> 7,
        _ => 0,
    };
    (0..n).map(|_| word(next() >> 8)).collect()
}

proptest! {
    /// More than a block of words, at any ratio and any offset, to larger and
    /// to smaller pages.
    #[test]
    fn normalise_by_every_ratio(
        shift in 0..13u32,
        npages in 0..3 * 64 * 512u64,
        skip in 0..5000u64,
        at in prop_oneof![Just((0u64, 0u64)), (0..70u64, 0..70u64)],
        cut in 0..200u64,
        seed in any::<u64>(),
    ) {
        let fine = Extent { bit: at.0, iova: skip, npages, pgsize: size(0) };
        let pages = ((skip + npages).div_ceil(1 << shift) - (skip >> shift)).saturating_sub(cut);
        let coarse = Extent {
            bit: at.1,
            iova: skip >> shift << shift,
            npages: pages,
            pgsize: size(shift),
        };
        let words = |extent: Extent| (extent.bit + extent.npages).div_ceil(64) as usize;
        let page = |k: u64| ((skip + k) >> shift) - (skip >> shift);
        for (from, to, coarsen) in [(fine, coarse, true), (coarse, fine, false)] {
            let src = sparse_words(words(from), seed);
            let mut got = garbage(words(to));
            got.iter_mut().for_each(|w| *w &= 0x1111);
            let mut expected = got.clone();
            for k in (0..npages).filter(|k| page(*k) < pages) {
                let (fine, coarse) = (fine.bit + k, coarse.bit + page(k));
                let (from, to) = if coarsen { (fine, coarse) } else { (coarse, fine) };
                if get(&src, from) {
                    set(&mut expected, to);
                }
            }
            prop_assert_eq!(normalise(&src, from, &mut got, to), Ok(()));
            prop_assert!(got == expected, "{:?} {:?}", from, to);
        }
    }
}

/// A word with few or many bits.
fn words() -> impl Strategy<Value = Vec<u64>> {
    let word = prop_oneof![
        Just(0),
        Just(!0),
        any::<u64>(),
        (0..64u32).prop_map(|k| 1 << k)
    ];
    proptest::collection::vec(word, 0..6)
}

proptest! {
    #[test]
    fn normalise_sets_each_page_that_shares_a_byte(
        src in words(),
        (from, to) in extents(),
        n in 0..6usize,
    ) {
        let _ = compare(&src, from, to, n);
    }

    #[test]
    fn normalise_at_neighbouring_page_sizes(
        src in words(),
        shifts in (0..6u32, 0..6u32),
        at in (0..300u64, 0..300u64),
        bit in (0..70u64, 0..70u64),
        npages in (0..250u64, 0..250u64),
        top in any::<bool>(),
    ) {
        let make = |shift, at: u64, bit, npages| {
            let pgsize = size(shift);
            let base = if top { 0u64.wrapping_sub(512) } else { 0 };
            let iova = base.wrapping_add(at) & !(pgsize.bytes() - 1);
            Extent { bit, iova, npages, pgsize }
        };
        let from = make(shifts.0, at.0, bit.0, npages.0.min(src.len() as u64 * 64));
        let _ = compare(&src, from, make(shifts.1, at.1, bit.1, npages.1), 5);
    }
}

#[test]
fn every_pair_of_shifts() {
    let src = [0x8000_0000_0001_0021, 1];
    for (a, b) in (0..64u32).flat_map(|a| (0..64u32).map(move |b| (a, b))) {
        let make = |shift: u32| Extent {
            bit: 3,
            iova: 0,
            npages: 100.min(1u64.checked_shl(64 - shift).unwrap_or(u64::MAX)),
            pgsize: size(shift),
        };
        assert_eq!(compare(&src, make(a), make(b), 2), Ok(()), "{a} {b}");
    }
}

#[test]
fn an_extent_may_end_with_the_address_space() {
    let pages = |shift: u32, npages: u64| Extent {
        bit: 0,
        iova: 0u64.wrapping_sub(npages << shift),
        npages,
        pgsize: size(shift),
    };
    let mut dst = [0];
    normalise(&[1 << 15], pages(12, 16), &mut dst, pages(13, 8)).expect("coarser");
    assert_eq!(bits(&dst), [7]);
    let mut dst = [0];
    normalise(&[1 << 7], pages(13, 8), &mut dst, pages(12, 16)).expect("finer");
    assert_eq!(bits(&dst), [14, 15]);
    let all = Extent {
        bit: 0,
        iova: 0,
        npages: 2,
        pgsize: size(63),
    };
    let mut dst = [0];
    normalise(&[1 << 15], pages(12, 16), &mut dst, all).expect("everything");
    assert_eq!(bits(&dst), [1]);
}

#[test]
fn one_byte_in_common_is_enough() {
    let extent = |shift, iova, npages| Extent {
        bit: 0,
        iova,
        npages,
        pgsize: size(shift),
    };
    let page = extent(4, 16, 1);
    for (first, expected) in [(12, vec![]), (13, vec![3]), (31, vec![0]), (32, vec![])] {
        let mut dst = [0];
        normalise(&[1], page, &mut dst, extent(0, first, 4)).expect("finer");
        assert_eq!(bits(&dst), expected, "bytes from {first} on");
    }
}

#[test]
fn a_bad_extent_changes_nothing() {
    let good = Extent {
        bit: 0,
        iova: 0x1000,
        npages: 64,
        pgsize: size(12),
    };
    let top = 0u64.wrapping_sub(0x1000);
    let table = [
        (Extent { bit: 1, ..good }, Error::BitmapSize),
        (Extent { npages: 65, ..good }, Error::BitmapSize),
        (
            Extent {
                bit: u64::MAX,
                ..good
            },
            Error::BitmapSize,
        ),
        (
            Extent {
                iova: 0x1001,
                ..good
            },
            Error::Misaligned,
        ),
        (
            Extent {
                pgsize: size(13),
                ..good
            },
            Error::Misaligned,
        ),
        (Extent { iova: top, ..good }, Error::Wraps),
        (
            Extent {
                iova: 0,
                pgsize: size(60),
                ..good
            },
            Error::Wraps,
        ),
        (
            Extent {
                iova: 0,
                pgsize: size(63),
                npages: 3,
                bit: 0,
            },
            Error::Wraps,
        ),
    ];
    for (bad, expected) in table {
        let mut dst = [7];
        assert_eq!(normalise(&[!0], bad, &mut dst, good), Err(expected));
        assert_eq!(normalise(&[!0], good, &mut dst, bad), Err(expected));
        assert_eq!(dst, [7], "{bad:?}");
    }
}

#[test]
fn page_sizes_are_powers_of_two() {
    for shift in 0..64 {
        let bytes = 1u64 << shift;
        let size = PageSize::new(bytes).expect("a power of two");
        assert_eq!((size.bytes(), size.shift()), (bytes, shift));
        assert_eq!(PageSize::smallest(bytes | 1 << 63), Some(size));
        assert_eq!(PageSize::smallest(bytes.wrapping_neg()), Some(size));
        assert!(size.aligns(0) && size.aligns(bytes));
        assert!(shift == 0 || !size.aligns(bytes / 2));
        assert_eq!(size.pages(u64::MAX), u64::MAX >> shift);
    }
    for bytes in [0, 3, 4095, 4097, u64::MAX] {
        assert_eq!(PageSize::new(bytes), None);
    }
    assert_eq!(PageSize::smallest(0), None);
}
