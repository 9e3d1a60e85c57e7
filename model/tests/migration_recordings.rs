// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core's migration machine, and the naive model of it, answer as the recorded
//! kernel did: `vfio_mig_get_next_state` for every pair of states and every set of
//! features, and the sample driver `mtty` for a table and for random operations.
//! `adapter-kernel/vm/migration/record` made the recordings.

use dirty_core::migration::{Features, State};
use dirty_model::migration::{next, Core, Naive, Op};

#[allow(dead_code)]
#[path = "../../adapter-user/tests/support/recorded.rs"]
mod recorded;

use recorded::unpacked;

#[test]
fn every_next_state_is_the_kernel_s() {
    let mut lines = 0;
    for line in unpacked("migration/next.txt.gz").lines() {
        let (question, answer) = line.split_once(" => ").expect("an answer");
        let question: Vec<u32> = question
            .split(' ')
            .map(|word| word.parse().expect("a number"))
            .collect();
        let [bits, from, to] = question[..] else {
            panic!("{line}");
        };
        let answer: i32 = answer.parse().expect("a number");
        let ours = Features::from_bits(bits.into()).and_then(|features| {
            let (from, to) = (State::from_raw(from)?, State::from_raw(to)?);
            Some(
                features
                    .next(from, to)
                    .map(State::raw)
                    .map_err(|e| e.errno()),
            )
        });
        // Without STOP_COPY a device does not migrate; a number beyond the states has
        // no state. Linux answers both with EINVAL.
        let ours = match ours {
            Some(Ok(state)) => state as i32,
            Some(Err(errno)) => -errno.0,
            None => -22,
        };
        assert_eq!(ours, answer, "{line}");
        let model = next(bits.into(), from, to).map_or(-22, |state| state as i32);
        assert_eq!(model, answer, "{line}");
        lines += 1;
    }
    assert_eq!(lines, 8 * 8 * 9);
}

/// Replays a recording, and returns how many operations it has.
fn replay(name: &str, mut run: impl FnMut(&Op) -> String) -> usize {
    let mut lines = 0;
    for line in unpacked(&format!("migration/{name}.txt.gz")).lines() {
        lines += 1;
        let (op, answer) = line.split_once(" => ").expect("an answer");
        let op = op.parse().expect("an operation");
        assert_eq!(run(&op), answer, "{name}, line {lines}: {op}");
    }
    lines
}

#[test]
fn the_core_answers_as_the_kernel_s_driver() {
    let mut core = Core::new(7);
    assert_eq!(replay("table", |op| core.run(op)), 6882);
    let mut core = Core::new(7);
    assert_eq!(replay("random", |op| core.run(op)), 20_000);
}

#[test]
fn the_model_answers_as_the_kernel_s_driver() {
    let mut model = Naive::new(7);
    replay("table", |op| model.run(op));
    let mut model = Naive::new(7);
    replay("random", |op| model.run(op));
}
