// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table as bars, in groups with an axis each.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::row::{Row, Who};
use crate::report::units::{times, value};

const OURS: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const PEER: RGBColor = RGBColor(0x9a, 0x9a, 0x9a);
const MET: RGBColor = RGBColor(0x2c, 0x8a, 0x3c);
const MISSED: RGBColor = RGBColor(0xc8, 0x2c, 0x2c);
const TEXT: RGBColor = RGBColor(0x20, 0x20, 0x20);
const LINE: RGBColor = RGBColor(0xe0, 0xe0, 0xe0);

const WIDTH: i32 = 1200;
/// Heights of the legend, of a group's title and axis, and of what is below it.
const LEGEND: i32 = 56;
const HEAD: i32 = 44;
const FOOT: i32 = 16;
/// Heights of a row of two bars, and of a bar.
const ROW: i32 = 32;
const BAR: i32 = 9;
/// Left edges: of the scale, which ends where values begin, and of targets.
const SCALE: i32 = 300;
const VALUES: i32 = 700;
const TARGETS: i32 = 890;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

/// Draws ours and the best peer of each row as multiples of the row's limit, or
/// of the peer if no limit was measured. What a row is measured against is the
/// line at 1, where its bars start, and has no bar itself.
pub(crate) fn draw(rows: &[Row], path: &Path) -> Drawn {
    let groups = || rows.chunk_by(|a, b| a.group == b.group);
    let all = LEGEND + groups().map(height).sum::<i32>();
    let area = SVGBackend::new(path, (WIDTH as u32, all as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    legend(&area)?;
    let mut top = LEGEND;
    for group in groups() {
        draw_group(&area, group, top)?;
        top += height(group);
    }
    area.present()?;
    Ok(())
}

fn height(group: &[Row]) -> i32 {
    HEAD + ROW * group.len() as i32 + FOOT
}

fn legend(area: &Area<'_>) -> Drawn {
    let title = "Time and memory beside the best peer and the machine's limit; left is better";
    text(area, title, (16, 16), 16, TEXT, HPos::Left)?;
    for (x, color, name) in [(16, OURS, "ours"), (80, PEER, "best peer")] {
        bar(area, (x, x + 14), 34, color)?;
        text(area, name, (x + 20, 38), 12, TEXT, HPos::Left)?;
    }
    let base = "Bars start at 1 x: the limit, or the best peer where no limit is measured.";
    text(area, base, (180, 38), 12, TEXT, HPos::Left)
}

fn draw_group(area: &Area<'_>, rows: &[Row], top: i32) -> Drawn {
    let Some(first) = rows.first() else {
        return Ok(());
    };
    let scale = Scale::of(rows);
    let (axis, bottom) = (top + HEAD - 12, top + height(rows) - FOOT);
    text(area, first.group, (16, axis), 16, TEXT, HPos::Left)?;
    for power in scale.first..=scale.last {
        let ratio = 10f64.powi(power);
        let x = scale.at(ratio);
        let color = if power == 0 { TEXT } else { LINE };
        area.draw(&PathElement::new([(x, axis + 8), (x, bottom)], color))?;
        let label = format!("{ratio} x");
        text(area, &label, (x, axis), 11, TEXT, HPos::Center)?;
    }
    for (row, top) in rows.iter().zip((top + HEAD..).step_by(ROW as usize)) {
        draw_row(area, row, &scale, top)?;
    }
    Ok(())
}

fn draw_row(area: &Area<'_>, row: &Row, scale: &Scale, top: i32) -> Drawn {
    let name = format!("{}, {}", row.case, row.size);
    let middle = top + ROW / 2;
    text(area, &name, (SCALE - 12, middle), 12, TEXT, HPos::Right)?;

    let base = base(row);
    let lines = [(Who::Ours, OURS), (Who::Peer, PEER)];
    for ((who, color), y) in lines.into_iter().zip([top + 5, top + 18]) {
        let Some((name, v)) = row.best(who).filter(|_| base.is_none_or(|b| b.who != who)) else {
            continue;
        };
        let mut label = format!("{name} {}", value(row.unit, v));
        if let Some(base) = &base {
            let ratio = v / base.value;
            label += &format!(", {} x", times(ratio));
            // At least a hair, so that a bar can be seen.
            let (from, to) = (scale.at(1.0), scale.at(ratio));
            bar(area, (from.min(to) - 1, from.max(to) + 1), y, color)?;
        }
        let place = (VALUES + 16, y + BAR / 2);
        text(area, &label, place, 11, TEXT, HPos::Left)?;
    }
    if let Some(Base { name, value: v, .. }) = base {
        let label = format!("1 x = {name} {}", value(row.unit, v));
        text(area, &label, (TARGETS, top + 9), 11, TEXT, HPos::Left)?;
    }
    if let Some(met) = row.met() {
        let color = if met { MET } else { MISSED };
        let goal = format!("target {}, {}", row.goal(), row.verdict());
        text(area, &goal, (TARGETS, top + 22), 11, color, HPos::Left)?;
    }
    Ok(())
}

/// What a row is measured against.
#[derive(Clone, Copy)]
struct Base {
    who: Who,
    name: &'static str,
    value: f64,
}

fn base(row: &Row) -> Option<Base> {
    let base = |who| {
        let (name, value) = row.best(who)?;
        Some(Base { who, name, value })
    };
    base(Who::Limit).or_else(|| base(Who::Peer))
}

/// The powers of ten at the ends of a group's axis.
struct Scale {
    first: i32,
    last: i32,
}

impl Scale {
    /// Holds every bar of the group, and a factor of ten on both sides of 1.
    fn of(rows: &[Row]) -> Scale {
        let mut scale = Scale { first: -1, last: 1 };
        for row in rows {
            let Some(base) = base(row) else { continue };
            for who in [Who::Ours, Who::Peer] {
                let Some((_, v)) = row.best(who) else {
                    continue;
                };
                let power = (v / base.value).log10();
                scale.first = scale.first.min(power.floor() as i32);
                scale.last = scale.last.max(power.ceil() as i32);
            }
        }
        scale
    }

    /// Where a ratio is.
    fn at(&self, ratio: f64) -> i32 {
        let powers = f64::from(self.last - self.first);
        let part = (ratio.log10() - f64::from(self.first)) / powers;
        SCALE + (f64::from(VALUES - SCALE) * part.clamp(0.0, 1.0)) as i32
    }
}

fn bar(area: &Area<'_>, ends: (i32, i32), y: i32, color: RGBColor) -> Drawn {
    area.draw(&Rectangle::new(
        [(ends.0, y), (ends.1, y + BAR)],
        color.filled(),
    ))?;
    Ok(())
}

fn text(area: &Area<'_>, text: &str, at: (i32, i32), size: i32, color: RGBColor, x: HPos) -> Drawn {
    let font = ("sans-serif", size).into_font().color(&color);
    let style = font.pos(Pos::new(x, VPos::Center));
    area.draw(&Text::new(text, at, style))?;
    Ok(())
}
