// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every sequence of a few operations.

use std::{env, thread};

/// Calls `check` with every sequence of [`depth`] operations of `alphabet`, each after
/// `prefix`. Returns how many sequences there are.
pub(crate) fn all<T: Clone + Sync>(
    prefix: &[T],
    alphabet: &[T],
    check: impl Fn(&[T]) + Sync,
) -> u64 {
    let count = (alphabet.len() as u64).pow(depth());
    let from = |first: u64, step: u64| {
        let mut script = prefix.to_vec();
        for number in (first..count).step_by(step as usize) {
            script.truncate(prefix.len());
            let mut rest = number;
            for _ in 0..depth() {
                let digit = rest % alphabet.len() as u64;
                script.push(alphabet[digit as usize].clone());
                rest /= alphabet.len() as u64;
            }
            check(&script);
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| from(0, 2));
        scope.spawn(|| from(1, 2));
    });
    count
}

/// Operations in a sequence: DIRTY_DEPTH if it is set, else 5, or 4 in a build
/// without optimisation.
pub(crate) fn depth() -> u32 {
    let default = if cfg!(debug_assertions) { 4 } else { 5 };
    match env::var("DIRTY_DEPTH") {
        Ok(depth) => depth.parse().expect("DIRTY_DEPTH is a number"),
        Err(_) => default,
    }
}
