// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table as bars.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::row::{Row, Who};
use crate::units::{times, value};

const OURS: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const PEER: RGBColor = RGBColor(0xa8, 0xa8, 0xa8);
const LIMIT: RGBColor = RGBColor(0xe0, 0x8a, 0x2c);
const MET: RGBColor = RGBColor(0x2c, 0x8a, 0x3c);
const MISSED: RGBColor = RGBColor(0xc8, 0x2c, 0x2c);
const TEXT: RGBColor = RGBColor(0x20, 0x20, 0x20);
const LINE: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);

const WIDTH: i32 = 1180;
const TOP: i32 = 64;
/// Heights of a bar and of a row of three.
const BAR: i32 = 13;
const ROW: i32 = 52;
/// Where the scale begins and ends.
const LEFT: i32 = 350;
const RIGHT: i32 = 870;
/// Powers of ten of its ends.
const FIRST: i32 = -3;
const LAST: i32 = 4;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

/// Draws each row's ours and best peer as multiples of its limit (without one,
/// of the peer): bars start at 1, where the limit is.
pub(crate) fn draw(rows: &[Row], path: &Path) -> Drawn {
    let height = TOP + ROW * rows.len() as i32 + 12;
    let area = SVGBackend::new(path, (WIDTH as u32, height as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let title =
        "Ours (blue) and the best peer (grey) as multiples of the limit (orange): left is better";
    text(&area, title, (16, 18), 15, TEXT, HPos::Left)?;
    for power in FIRST..=LAST {
        let ratio = 10f64.powi(power);
        let color = if power == 0 { TEXT } else { LINE };
        line(&area, at(ratio), TOP - 6, height - 12, color)?;
        let label = format!("{ratio} x");
        text(&area, &label, (at(ratio), TOP - 16), 11, TEXT, HPos::Center)?;
    }
    for (row, top) in rows.iter().zip((TOP..).step_by(ROW as usize)) {
        draw_row(&area, row, top)?;
    }
    area.present()?;
    Ok(())
}

fn draw_row(area: &Area<'_>, row: &Row, top: i32) -> Drawn {
    let name = format!("{}: {}, {}", row.group, row.case, row.size);
    let x = LEFT - 12;
    text(area, &name, (x, top + 10), 12, TEXT, HPos::Right)?;
    let color = if row.met() == Some(true) { MET } else { MISSED };
    let goal = format!("{}: {}", row.goal(), row.verdict());
    if row.met().is_some() {
        text(area, &goal, (x, top + 26), 10, color, HPos::Right)?;
    }

    let bars = [(Who::Ours, OURS), (Who::Peer, PEER), (Who::Limit, LIMIT)];
    let reference = [Who::Limit, Who::Peer, Who::Ours];
    let reference = reference.into_iter().find_map(|who| row.best(who));
    for ((who, color), y) in bars.into_iter().zip((top + 4..).step_by(BAR as usize)) {
        let (Some((name, v)), Some((_, base))) = (row.best(who), reference) else {
            continue;
        };
        // At least a hair, so that a bar can be seen.
        let (from, to) = (at(1.0), at(v / base));
        let ends = [(from.min(to) - 1, y), (from.max(to) + 1, y + BAR - 2)];
        area.draw(&Rectangle::new(ends, color.filled()))?;
        let ratio = times(v / base);
        let label = format!("{name}: {}, {ratio} x", value(row.unit, v));
        let place = (RIGHT + 12, y + BAR / 2);
        text(area, &label, place, 11, TEXT, HPos::Left)?;
    }
    Ok(())
}

/// Where a ratio is.
fn at(ratio: f64) -> i32 {
    let powers = f64::from(LAST - FIRST);
    let part = (ratio.log10() - f64::from(FIRST)) / powers;
    LEFT + (f64::from(RIGHT - LEFT) * part.clamp(0.0, 1.0)) as i32
}

fn line(area: &Area<'_>, x: i32, top: i32, bottom: i32, color: RGBColor) -> Drawn {
    area.draw(&PathElement::new([(x, top), (x, bottom)], color))?;
    Ok(())
}

fn text(area: &Area<'_>, text: &str, at: (i32, i32), size: i32, color: RGBColor, x: HPos) -> Drawn {
    let font = ("sans-serif", size).into_font().color(&color);
    let style = font.pos(Pos::new(x, VPos::Center));
    area.draw(&Text::new(text, at, style))?;
    Ok(())
}
