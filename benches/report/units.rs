// SPDX-License-Identifier: MIT OR Apache-2.0
//! Values and ratios as text.

/// What a row's values are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Nanoseconds,
    Bytes,
}

/// A value with its unit.
pub(crate) fn value(unit: Unit, value: f64) -> String {
    match unit {
        Unit::Nanoseconds => time(value),
        Unit::Bytes if value < 10_000.0 => format!("{} B", times(value)),
        Unit::Bytes => format!("{} KiB", times(value / 1024.0)),
    }
}

/// A time that is given in nanoseconds, in the unit that suits it.
fn time(ns: f64) -> String {
    let units = [(1e9, "s"), (1e6, "ms"), (1e3, "us"), (1.0, "ns")];
    let unit = units.into_iter().find(|(unit, _)| ns >= *unit);
    let (unit, name) = unit.unwrap_or((1.0, "ns"));
    format!("{} {name}", times(ns / unit))
}

/// A factor; one below a half is written as 1/n where that is exact.
pub(crate) fn fraction(value: f64) -> String {
    let whole = (1.0 / value).round();
    if whole > 2.0 && (value * whole - 1.0).abs() < 1e-9 {
        format!("1/{whole}")
    } else {
        value.to_string()
    }
}

/// A number with about three digits.
pub(crate) fn times(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 0.1 => format!("{v:.2}"),
        v => format!("{v:.4}"),
    }
}
