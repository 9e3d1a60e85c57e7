// SPDX-License-Identifier: MIT OR Apache-2.0
//! The picture of a migration: pages and bytes of each round, as SVG.

use std::error::Error;
use std::fs;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::precopy::{Found, Round};
use super::report::{milliseconds, Report};
use super::units::{count, size, MIB};

const SIZE: (u32, u32) = (960, 720);
const INK: RGBColor = RGBColor(0x33, 0x33, 0x33);
const GRID: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);
const BARS: RGBColor = RGBColor(0x56, 0xb4, 0xe9);
const LAST_BAR: RGBColor = RGBColor(0xd5, 0x5e, 0x00);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A line of the upper picture: its name, its colour, and its pages in a round.
type Series = (&'static str, RGBColor, fn(&Round) -> Option<u64>);

const SERIES: [Series; 5] = [
    ("to send", INK, |round| Some(round.dirty)),
    ("found by PAGEMAP_SCAN", RGBColor(0, 0x72, 0xb2), |round| {
        found(round, |found| found.cpu)
    }),
    (
        "found by GET_BITMAP: RAM",
        RGBColor(0xd5, 0x5e, 0),
        |round| found(round, |found| found.device),
    ),
    (
        "found by GET_BITMAP: windows",
        RGBColor(0, 0x9e, 0x73),
        |round| found(round, |found| found.windows),
    ),
    ("found by UNMAP_DMA", RGBColor(0xcc, 0x79, 0xa7), |round| {
        found(round, |found| found.unmap)
    }),
];

fn found(round: &Round, pick: fn(&Found) -> u64) -> Option<u64> {
    round.found.as_ref().map(pick)
}

/// Draws `report` into the file `path`.
pub(super) fn draw(path: &Path, report: &Report<'_>) -> Result<(), Box<dyn Error>> {
    let mut svg = String::new();
    draw_svg(&mut svg, report)?;
    fs::write(path, svg)?;
    Ok(())
}

fn draw_svg(svg: &mut String, report: &Report<'_>) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let verdict = match report.verdict.differing {
        0 => "equal".into(),
        pages => format!("{} pages differ", count(pages)),
    };
    let title = format!(
        "Live migration of {}: {} rounds, downtime {:.0} ms, {verdict}",
        size(report.args.memory),
        report.outcome.rounds.len(),
        milliseconds(report.outcome.downtime),
    );
    let root = root.margin(10, 0, 0, 0);
    let root = root.titled(&title, ("sans-serif", 22).into_font().color(&INK))?;
    let (upper, lower) = root.split_vertically(400);
    let rounds = &report.outcome.rounds;
    draw_pages(&upper, rounds)?;
    draw_bytes(&lower, rounds)?;
    root.present()?;
    Ok(())
}

fn draw_pages(area: &Area<'_>, rounds: &[Round]) -> Result<(), Box<dyn Error>> {
    let shown = || {
        let of_round = |round| SERIES.iter().filter_map(move |(_, _, pages)| pages(round));
        rounds.iter().flat_map(of_round).filter(|pages| *pages > 0)
    };
    let most = shown().max().unwrap_or(1) as f64;
    let least = shown().min().unwrap_or(1) as f64;
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(84)
        .build_cartesian_2d(x_range(rounds), (least / 3.0..most * 3.0).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(("sans-serif", 14).into_font().color(&INK))
        .x_labels(rounds.len() + 1)
        .x_label_formatter(&|x| x_label(*x, rounds))
        .y_desc("pages (log scale)")
        .y_label_formatter(&|y| count(*y as u64))
        .draw()?;
    for (name, color, pages) in SERIES {
        let points: Vec<_> = rounds
            .iter()
            .filter_map(|round| Some((f64::from(round.number), pages(round)?)))
            .filter(|(_, pages)| *pages > 0) // which a log scale cannot show
            .map(|(number, pages)| (number, pages as f64))
            .collect();
        let style = color.stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        chart.draw_series(
            points
                .into_iter()
                .map(|at| Circle::new(at, 3, color.filled())),
        )?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(12)
        .background_style(WHITE)
        .border_style(GRID)
        .label_font(("sans-serif", 14).into_font().color(&INK))
        .draw()?;
    Ok(())
}

fn draw_bytes(area: &Area<'_>, rounds: &[Round]) -> Result<(), Box<dyn Error>> {
    let mib = |round: &Round| round.sent.bytes as f64 / MIB as f64;
    let most = rounds.iter().map(mib).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(48)
        .y_label_area_size(84)
        .build_cartesian_2d(x_range(rounds), 0.0..most * 1.15)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(("sans-serif", 14).into_font().color(&INK))
        .x_labels(rounds.len() + 1)
        .x_label_formatter(&|x| x_label(*x, rounds))
        .x_desc("round")
        .y_desc("MiB sent (orange: guest stopped)")
        .y_labels(6)
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()?;
    chart.draw_series(rounds.iter().map(|round| {
        let x = f64::from(round.number);
        let color = if round.last { LAST_BAR } else { BARS };
        Rectangle::new([(x - 0.35, 0.0), (x + 0.35, mib(round))], color.filled())
    }))?;
    if rounds.len() <= 12 {
        let above = Pos::new(HPos::Center, VPos::Bottom);
        let style = ("sans-serif", 13).into_font().color(&INK).pos(above);
        chart.draw_series(rounds.iter().map(|round| {
            let text = format!("{:.0} ms", milliseconds(round.time));
            let at = (f64::from(round.number), mib(round) + most * 0.02);
            Text::new(text, at, style.clone())
        }))?;
    }
    Ok(())
}

fn x_range(rounds: &[Round]) -> std::ops::Range<f64> {
    0.5..rounds.len() as f64 + 0.5
}

/// Whole rounds have a label, the last one has a name.
fn x_label(x: f64, rounds: &[Round]) -> String {
    let round = rounds.iter().find(|round| f64::from(round.number) == x);
    match round {
        Some(round) if round.last => "stop".into(),
        Some(round) => round.number.to_string(),
        None => String::new(),
    }
}
