// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compares the core with the model, operation by operation.

use super::gen::{Sequence, Step};
use super::{Core, Naive};

/// Runs a sequence on the core's machine and on the model. Each operation must give
/// the same answer, do the same transitions, and end in the same state.
///
/// # Errors
///
/// The first disagreement, and the operations up to it.
pub fn compare(sequence: &Sequence) -> Result<(), String> {
    let mut core = Core::new(sequence.features);
    let mut model = Naive::new(sequence.features);
    let mut script = format!("features {}\n", sequence.features);
    for step in &sequence.steps {
        let op = match step {
            Step::Fail {
                after,
                errno,
                breaks,
            } => {
                script += &format!("the device fails after {after}: {errno}, breaks: {breaks}\n");
                core.fail(*after, *errno, *breaks);
                model.fail(*after, *errno, *breaks);
                continue;
            }
            Step::Op(op) => op,
        };
        script += &format!("{op}\n");
        let ours = (core.run(op), core.transitions(), core.state());
        let theirs = (model.run(op), model.transitions(), model.state());
        if ours != theirs {
            return Err(format!("{script}core:  {ours:?}\nmodel: {theirs:?}"));
        }
    }
    Ok(())
}
