// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rows as bars: a picture for each group.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::groups;
use crate::report::row::{Row, Value, Who};
use crate::report::units::{times, value};

const OURS: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const PEER: RGBColor = RGBColor(0x9a, 0x9a, 0x9a);
const MET: RGBColor = RGBColor(0x2c, 0x8a, 0x3c);
const MISSED: RGBColor = RGBColor(0xc8, 0x2c, 0x2c);
const TEXT: RGBColor = RGBColor(0x20, 0x20, 0x20);
const LINE: RGBColor = RGBColor(0xe0, 0xe0, 0xe0);

const WIDTH: i32 = 1200;
/// Where the axis is, where the rows begin, and the height of what is below them.
const AXIS: i32 = 40;
const HEAD: i32 = 54;
const FOOT: i32 = 8;
/// Heights of a row of two bars, and of a bar. With 26 rows, a picture fits a screen.
const ROW: i32 = 30;
const BAR: i32 = 9;
/// Left edges: of the scale, which ends where values begin, and of targets.
const SCALE: i32 = 300;
const VALUES: i32 = 700;
const TARGETS: i32 = 890;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

/// Draws a picture of each group to `dir`: ours and the best peer of each row as
/// multiples of the row's limit, or of the peer if no limit was measured. What a row
/// is measured against is the line at 1, where its bars start, and has no bar itself.
pub(crate) fn draw(rows: &[Row], dir: &Path) -> Drawn {
    for (group, rows) in groups(rows) {
        draw_group(group, &rows, &dir.join(format!("{group}.svg")))?;
    }
    Ok(())
}

fn draw_group(group: &str, rows: &[&Row], path: &Path) -> Drawn {
    let height = HEAD + ROW * rows.len() as i32 + FOOT;
    let area = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    legend(&area, group)?;
    let scale = Scale::of(rows);
    for power in scale.first..=scale.last {
        let ratio = 10f64.powi(power);
        let x = scale.at(ratio);
        let color = if power == 0 { TEXT } else { LINE };
        area.draw(&PathElement::new(
            [(x, AXIS + 8), (x, height - FOOT)],
            color,
        ))?;
        text(
            &area,
            &format!("{ratio} x"),
            (x, AXIS),
            11,
            TEXT,
            HPos::Center,
        )?;
    }
    for (row, top) in rows.iter().zip((HEAD..).step_by(ROW as usize)) {
        draw_row(&area, row, &scale, top)?;
    }
    area.present()?;
    Ok(())
}

fn legend(area: &Area<'_>, group: &str) -> Drawn {
    text(area, group, (16, 16), 16, TEXT, HPos::Left)?;
    for (x, color, name) in [(120, OURS, "ours"), (180, PEER, "best peer")] {
        bar(area, (x, x + 14), 12, color)?;
        text(area, name, (x + 20, 16), 12, TEXT, HPos::Left)?;
    }
    let base = "Left is better. Bars start at 1 x: the limit, or the best peer where no limit is \
        measured. A ~ marks times that vary by more than 20 %.";
    text(area, base, (280, 16), 12, TEXT, HPos::Left)
}

fn draw_row(area: &Area<'_>, row: &Row, scale: &Scale, top: i32) -> Drawn {
    let middle = top + ROW / 2;
    text(
        area,
        &row.name(),
        (SCALE - 12, middle),
        12,
        TEXT,
        HPos::Right,
    )?;

    let base = base(row);
    let lines = [(Who::Ours, OURS), (Who::Peer, PEER)];
    for ((who, color), y) in lines.into_iter().zip([top + 5, top + 18]) {
        let Some(v) = row.best(who).filter(|_| base.is_none_or(|b| b.0 != who)) else {
            continue;
        };
        let mut label = label(row, v);
        if let Some((_, base)) = base {
            let ratio = v.value / base.value;
            label += &format!(", {} x", times(ratio));
            // At least a hair, so that a bar can be seen.
            let (from, to) = (scale.at(1.0), scale.at(ratio));
            bar(area, (from.min(to) - 1, from.max(to) + 1), y, color)?;
        }
        let place = (VALUES + 16, y + BAR / 2);
        text(area, &label, place, 11, TEXT, HPos::Left)?;
    }
    if let Some((_, v)) = base {
        let label = format!("1 x = {}", label(row, v));
        text(area, &label, (TARGETS, top + 9), 11, TEXT, HPos::Left)?;
    }
    let results: Vec<_> = row.results().collect();
    if !results.is_empty() {
        let met = results.iter().all(|result| result.met);
        let (color, verdict) = if met {
            (MET, "met")
        } else {
            (MISSED, "MISSED")
        };
        let goals: Vec<_> = results.iter().map(|r| r.goal.as_str()).collect();
        let goals = format!("target {}, {verdict}", goals.join(", "));
        text(area, &goals, (TARGETS, top + 21), 11, color, HPos::Left)?;
    }
    Ok(())
}

fn label(row: &Row, v: Value) -> String {
    let about = if v.varies { "~ " } else { "" };
    format!("{} {about}{}", v.name, value(row.unit, v.value))
}

/// What a row is measured against.
fn base(row: &Row) -> Option<(Who, Value)> {
    let base = |who| Some((who, row.best(who)?));
    base(Who::Limit).or_else(|| base(Who::Peer))
}

/// The powers of ten at the ends of a group's axis.
struct Scale {
    first: i32,
    last: i32,
}

impl Scale {
    /// Holds every bar of the group, and a factor of ten on both sides of 1.
    fn of(rows: &[&Row]) -> Scale {
        let mut scale = Scale { first: -1, last: 1 };
        for row in rows {
            let Some((_, base)) = base(row) else { continue };
            for who in [Who::Ours, Who::Peer] {
                let Some(v) = row.best(who) else { continue };
                let power = (v.value / base.value).log10();
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
