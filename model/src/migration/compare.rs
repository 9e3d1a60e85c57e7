// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compares the core with the model, operation by operation.

use arbitrary::{Arbitrary, Unstructured};

use super::gen::{Sequence, Step};
use super::region::{compare_region, RegionSequence};
use super::{Core, Naive};

/// Makes a sequence out of bytes and runs it: the first bit says whether by ioctls or
/// by the region.
///
/// # Errors
///
/// As [`compare`].
pub fn run(bytes: &[u8]) -> Result<(), String> {
    let Some((first, rest)) = bytes.split_first() else {
        return Ok(());
    };
    let mut u = Unstructured::new(rest);
    let made = match first & 1 {
        0 => Sequence::arbitrary(&mut u).map(|made| compare(&made)),
        _ => RegionSequence::arbitrary(&mut u).map(|made| compare_region(&made)),
    };
    made.map_err(|e| e.to_string())?
}

/// Runs a sequence on the core's machine and on the model. Each operation must give
/// the same answer, do the same transitions, and end in the same state.
///
/// # Errors
///
/// The first disagreement, and the operations up to it.
pub fn compare(sequence: &Sequence) -> Result<(), String> {
    let mut core = Core::new(sequence.features);
    let mut model = Naive::new(sequence.features);
    for (at, step) in sequence.steps.iter().enumerate() {
        let op = match step {
            Step::Fail {
                after,
                errno,
                breaks,
            } => {
                core.fail(*after, *errno, *breaks);
                model.fail(*after, *errno, *breaks);
                continue;
            }
            Step::Op(op) => op,
        };
        let ours = (core.run(op), core.transitions(), core.state());
        let theirs = (model.run(op), model.transitions(), model.state());
        if ours != theirs {
            let script = &sequence.steps[..=at];
            let features = sequence.features;
            return Err(format!(
                "features {features}\n{script:#?}\ncore:  {ours:?}\nmodel: {theirs:?}"
            ));
        }
    }
    Ok(())
}
