// SPDX-License-Identifier: MIT OR Apache-2.0
//! A row of the table: measured values, and whether they meet the targets.

use crate::limits::{self, Of, Target};
use crate::report::units::{fraction, times, value, Unit};

/// Whose value it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Ours,
    Peer,
    /// What plain copies, fills and words take, or ours without what the row is about.
    Limit,
}

/// The values of one candidate.
struct Values {
    who: Who,
    name: &'static str,
    /// The value of an iteration, one for each round.
    rounds: Vec<f64>,
}

/// What the rounds of one candidate came to, per operation.
#[derive(Clone, Copy)]
pub(crate) struct Value {
    pub(crate) name: &'static str,
    pub(crate) value: f64,
    /// Whether the rounds differ by more than a fifth.
    pub(crate) varies: bool,
}

/// A row of the table.
pub(crate) struct Row {
    pub(crate) group: &'static str,
    pub(crate) case: String,
    pub(crate) size: &'static str,
    pub(crate) unit: Unit,
    /// Operations in an iteration.
    pub(crate) per: u64,
    values: Vec<Values>,
    /// Which of the values of two rounds counts.
    counts: fn(f64, f64) -> f64,
    targets: Vec<&'static Target>,
}

impl Row {
    /// A row with its targets, which are in [`limits`].
    pub(crate) fn new(group: &'static str, case: impl Into<String>, size: &'static str) -> Row {
        let case = case.into();
        Row {
            targets: limits::of(group, &case, size),
            group,
            case,
            size,
            unit: Unit::Nanoseconds,
            per: 1,
            values: Vec::new(),
            counts: f64::min,
        }
    }

    /// A row of bytes.
    pub(crate) fn bytes(case: &'static str, size: &'static str) -> Row {
        let unit = Unit::Bytes;
        let row = Row::new("memory", case, size);
        Row { unit, ..row }
    }

    /// Sets how many operations an iteration has; 1 by default.
    pub(crate) fn per(self, per: usize) -> Row {
        let per = per as u64;
        Row { per, ..self }
    }

    /// Lets the largest value of all rounds count, instead of the smallest.
    pub(crate) fn longest(self) -> Row {
        let counts = f64::max;
        Row { counts, ..self }
    }

    /// The group, the case and the size, which no other row has together.
    pub(crate) fn key(&self) -> (&str, &str, &str) {
        (self.group, &self.case, self.size)
    }

    /// The case and the size.
    pub(crate) fn name(&self) -> String {
        format!("{}, {}", self.case, self.size)
    }

    /// Adds the values of another round.
    pub(crate) fn merge(&mut self, round: Row) {
        for Values { who, name, rounds } in round.values {
            rounds.into_iter().for_each(|v| self.push(who, name, v));
        }
    }

    /// Adds the value of an iteration, of this round or another.
    pub(crate) fn push(&mut self, who: Who, name: &'static str, value: f64) {
        let mut known = self.values.iter_mut();
        match known.find(|v| (v.who, v.name) == (who, name)) {
            Some(known) => known.rounds.push(value),
            None => self.values.push(Values {
                who,
                name,
                rounds: vec![value],
            }),
        }
    }

    fn value(&self, values: &Values) -> Option<Value> {
        let rounds = || values.rounds.iter().copied();
        let value = rounds().reduce(self.counts)?;
        let (least, most) = (rounds().reduce(f64::min)?, rounds().reduce(f64::max)?);
        Some(Value {
            name: values.name,
            value: value / self.per as f64,
            varies: most > 1.2 * least,
        })
    }

    /// The best of one kind.
    pub(crate) fn best(&self, who: Who) -> Option<Value> {
        let values = self.values.iter().filter(|v| v.who == who);
        let values = values.filter_map(|v| self.value(v));
        values.min_by(|a, b| a.value.total_cmp(&b.value))
    }

    /// The value with this name.
    pub(crate) fn named(&self, name: &str) -> Option<Value> {
        let values = self.values.iter().find(|v| v.name == name)?;
        self.value(values)
    }

    pub(crate) fn ours(&self) -> Option<Value> {
        self.best(Who::Ours)
    }

    /// Ours over the best of one kind.
    pub(crate) fn ratio(&self, who: Who) -> Option<f64> {
        Some(self.ours()?.value / self.best(who)?.value)
    }

    pub(crate) fn targets(&self) -> &[&'static Target] {
        &self.targets
    }

    /// The row's targets, and what is reached of each; none if ours or what a target
    /// needs was not measured.
    pub(crate) fn results(&self) -> impl Iterator<Item = Reached> + '_ {
        let targets = self.targets.iter();
        targets.filter_map(|target| self.result(target))
    }

    fn result(&self, target: &'static Target) -> Option<Reached> {
        let (peer, limit) = (self.best(Who::Peer), self.best(Who::Limit));
        let base = match target.of {
            Of::Best => peer?.value.min(limit?.value),
            Of::Limit => limit?.value,
            Of::Named(name) => self.named(name)?.value,
            Of::Nothing => 1.0,
        };
        let reached = self.ours()?.value / base;
        let most = target.most;
        let text = |number: f64, times: &str| match target.of {
            Of::Best => format!("{times} x best"),
            Of::Limit => format!("{times} x limit"),
            Of::Named(name) => format!("{times} x {name}"),
            Of::Nothing => value(self.unit, number),
        };
        Some(Reached {
            reached: text(reached, &times(reached)),
            goal: text(most, &fraction(most)),
            met: reached <= most,
        })
    }
}

/// What a row reached of a target.
pub(crate) struct Reached {
    /// Ours, as the target is given.
    pub(crate) reached: String,
    /// The target.
    pub(crate) goal: String,
    pub(crate) met: bool,
}
