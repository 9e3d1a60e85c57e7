// SPDX-License-Identifier: MIT OR Apache-2.0
//! A row of the table: measured values and targets.

use crate::report::units::{fraction, times, value, Unit};

/// Whose value it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Ours,
    Peer,
    /// The machine's: what plain copies, fills and words take.
    Limit,
}

/// The most that ours may be, as a multiple of something.
pub(crate) struct Target {
    most: f64,
    of: Of,
}

#[derive(Clone, Copy)]
enum Of {
    /// The best of the peers and limits.
    Best,
    BestPeer,
    Limit,
    Named(&'static str),
    /// Of one: the most is a value in the row's unit.
    Nothing,
}

/// A row of the table.
pub(crate) struct Row {
    pub(crate) group: &'static str,
    pub(crate) case: String,
    pub(crate) size: &'static str,
    pub(crate) unit: Unit,
    /// Operations in an iteration.
    pub(crate) per: u64,
    /// Whose value, its name, and the value of an iteration.
    values: Vec<(Who, &'static str, f64)>,
    /// Which of the values of two rounds counts.
    counts: fn(f64, f64) -> f64,
    targets: Vec<Target>,
}

impl Row {
    pub(crate) fn new(group: &'static str, case: impl Into<String>, size: &'static str) -> Row {
        Row {
            group,
            case: case.into(),
            size,
            unit: Unit::Nanoseconds,
            per: 1,
            values: Vec::new(),
            counts: f64::min,
            targets: Vec::new(),
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

    fn target(mut self, most: f64, of: Of) -> Row {
        self.targets.push(Target { most, of });
        self
    }

    /// Adds a target: at most `most` times the best limit.
    pub(crate) fn of_limit(self, most: f64) -> Row {
        self.target(most, Of::Limit)
    }

    /// Adds a target: at most `most` times the best peer.
    pub(crate) fn of_peers(self, most: f64) -> Row {
        self.target(most, Of::BestPeer)
    }

    /// Adds a target: at most `most` times the best of limits and peers.
    pub(crate) fn of_best(self, most: f64) -> Row {
        self.target(most, Of::Best)
    }

    /// Adds a target: at most `most` times the value with this name.
    pub(crate) fn of(self, name: &'static str, most: f64) -> Row {
        self.target(most, Of::Named(name))
    }

    /// Adds a target: at most `most` nanoseconds or bytes.
    pub(crate) fn at_most(self, most: f64) -> Row {
        self.target(most, Of::Nothing)
    }

    /// Lets the largest value of all rounds count, instead of the smallest.
    pub(crate) fn longest(self) -> Row {
        let counts = f64::max;
        Row { counts, ..self }
    }

    /// Whether both rows measure the same thing.
    pub(crate) fn is(&self, other: &Row) -> bool {
        (self.group, &self.case, self.size) == (other.group, &other.case, other.size)
    }

    /// Adds the values of another round.
    pub(crate) fn merge(&mut self, round: Row) {
        for (who, name, value) in round.values {
            self.push(who, name, value);
        }
    }

    /// Adds the value of an iteration, of this round or another.
    pub(crate) fn push(&mut self, who: Who, name: &'static str, value: f64) {
        let mut known = self.values.iter_mut();
        match known.find(|(w, n, _)| (*w, *n) == (who, name)) {
            Some((.., known)) => *known = (self.counts)(*known, value),
            None => self.values.push((who, name, value)),
        }
    }

    /// The name and the value, per operation, of the best of one kind.
    pub(crate) fn best(&self, who: Who) -> Option<(&'static str, f64)> {
        let values = self.values.iter().filter(|(w, _, _)| *w == who);
        let best = values.min_by(|a, b| a.2.total_cmp(&b.2));
        best.map(|(_, name, value)| (*name, value / self.per as f64))
    }

    pub(crate) fn ours(&self) -> Option<f64> {
        self.best(Who::Ours).map(|(_, value)| value)
    }

    /// Ours over the best of one kind.
    pub(crate) fn ratio(&self, who: Who) -> Option<f64> {
        Some(self.ours()? / self.best(who)?.1)
    }

    /// What a target is measured against.
    fn base(&self, of: Of) -> Option<f64> {
        let peer = self.best(Who::Peer).map(|(_, value)| value);
        let limit = self.best(Who::Limit).map(|(_, value)| value);
        match of {
            Of::Best => Some(peer?.min(limit?)),
            Of::BestPeer => peer,
            Of::Limit => limit,
            Of::Named(name) => {
                let named = self.values.iter().find(|(_, n, _)| *n == name);
                named.map(|(_, _, value)| value / self.per as f64)
            }
            Of::Nothing => Some(1.0),
        }
    }

    /// The targets in words.
    pub(crate) fn goal(&self) -> String {
        let goals = self.targets.iter().map(|target| {
            let times = fraction(target.most);
            match target.of {
                Of::Best => format!("{times} x best"),
                Of::BestPeer => format!("{times} x peer"),
                Of::Limit => format!("{times} x limit"),
                Of::Named(name) => format!("{times} x {name}"),
                Of::Nothing => value(self.unit, target.most),
            }
        });
        goals.collect::<Vec<_>>().join(", ")
    }

    /// Ours as a multiple of what each target names; `None` if something was not
    /// measured.
    fn reached(&self) -> Option<Vec<f64>> {
        let ours = self.ours()?;
        let targets = self.targets.iter();
        let reached = targets.map(|target| Some(ours / self.base(target.of)?));
        reached.collect()
    }

    /// Whether all targets are met; `None` without a target, or if something
    /// it needs was not measured.
    pub(crate) fn met(&self) -> Option<bool> {
        let reached = self.reached()?;
        let mut both = self.targets.iter().zip(&reached);
        (!reached.is_empty()).then(|| both.all(|(target, reached)| *reached <= target.most))
    }

    /// Whether the targets are met, in words and with the multiples reached.
    pub(crate) fn verdict(&self) -> String {
        let verdict = match self.met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => return String::new(),
        };
        let reached = self.reached().unwrap_or_default();
        let reached = self.targets.iter().zip(reached);
        // What a target of nothing else reached is ours, which the row shows anyway.
        let relative = reached.filter(|(target, _)| !matches!(target.of, Of::Nothing));
        let relative: Vec<String> = relative.map(|(_, reached)| times(reached)).collect();
        if relative.is_empty() {
            return verdict.to_owned();
        }
        format!("{verdict}: {}", relative.join(", "))
    }
}
