// SPDX-License-Identifier: MIT OR Apache-2.0
//! The picture of a migration: the pages and bytes of each round, as SVG. It has the names of the
//! table's columns.

use std::error::Error;
use std::fs;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::outcome::{Found, Round, Summary};
use super::report::milliseconds;
use super::units::{count, size, MIB};

const SIZE: (u32, u32) = (960, 720);
const INK: RGBColor = RGBColor(0x33, 0x33, 0x33);
const GRID: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);
const BARS: RGBColor = RGBColor(0x56, 0xb4, 0xe9);
const LAST_BAR: RGBColor = RGBColor(0xd5, 0x5e, 0x00);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const DIRTY: RGBColor = INK;
/// The colours of [`Found::NAMES`].
const FOUND: [RGBColor; 4] = [
    RGBColor(0, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0),
    RGBColor(0, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
];

/// A line of the upper chart.
struct Series {
    name: String,
    color: RGBColor,
    /// The round's number, and its pages.
    points: Vec<(f64, f64)>,
}

impl Series {
    /// Pages of those rounds that have any; a log scale cannot show 0.
    fn new(
        name: String,
        color: RGBColor,
        rounds: &[Round],
        pages: impl Fn(&Round) -> Option<u64>,
    ) -> Self {
        let points = rounds
            .iter()
            .filter_map(|round| Some((f64::from(round.number), pages(round)?)))
            .filter(|(_, pages)| *pages > 0)
            .map(|(number, pages)| (number, pages as f64))
            .collect();
        Self {
            name,
            color,
            points,
        }
    }
}

/// What the upper chart shows: the pages to send, and who found them.
fn all_series(summary: &Summary<'_>) -> Vec<Series> {
    let rounds = &summary.outcome.rounds;
    let lost = summary.args.lose.and_then(Found::place);
    let dirty = Series::new("dirty".into(), DIRTY, rounds, |round| Some(round.dirty));
    let found = (0..).zip(Found::NAMES).zip(FOUND);
    let found = found.map(|((place, name), color)| {
        let lost = if lost == Some(place) { " (lost)" } else { "" };
        Series::new(format!("found by {name}{lost}"), color, rounds, |round| {
            Some(round.found?.counts()[place])
        })
    });
    [dirty].into_iter().chain(found).collect()
}

/// Draws `summary` into the file `path`.
pub(super) fn draw(path: &Path, summary: &Summary<'_>) -> Result<(), Box<dyn Error>> {
    let mut svg = String::new();
    draw_svg(&mut svg, summary)?;
    fs::write(path, svg)?;
    Ok(())
}

fn draw_svg(svg: &mut String, summary: &Summary<'_>) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let verdict = match summary.verdict.differing {
        0 => "equal".into(),
        pages => format!("{} pages differ", count(pages)),
    };
    let title = format!(
        "Live migration of {}: {} rounds, downtime {:.0} ms, {verdict}",
        size(summary.args.memory),
        summary.outcome.rounds.len(),
        milliseconds(summary.outcome.downtime),
    );
    let root = root.margin(10, 0, 0, 0);
    let mut root = root.titled(&title, ("sans-serif", 22).into_font().color(&INK))?;
    if let Some(lose) = summary.args.lose {
        let font = ("sans-serif", 16).into_font().color(&LAST_BAR);
        root = root.titled(&lose.sentence(), font)?;
    }
    let (upper, lower) = root.split_vertically(400);
    let rounds = &summary.outcome.rounds;
    draw_pages(&upper, rounds, all_series(summary))?;
    draw_bytes(&lower, rounds)?;
    root.present()?;
    Ok(())
}

fn draw_pages(area: &Area<'_>, rounds: &[Round], all: Vec<Series>) -> Result<(), Box<dyn Error>> {
    let shown = || all.iter().flat_map(|series| &series.points);
    let most = shown().map(|(_, pages)| *pages).fold(1.0, f64::max);
    let least = shown().map(|(_, pages)| *pages).fold(most, f64::min);
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
    for Series {
        name,
        color,
        points,
    } in all
    {
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
        .y_desc("MiB (orange: guest stopped)")
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

/// The label of a round: its number, or `stop` for the last one.
fn x_label(x: f64, rounds: &[Round]) -> String {
    let round = rounds.iter().find(|round| f64::from(round.number) == x);
    match round {
        Some(round) if round.last => "stop".into(),
        Some(round) => round.number.to_string(),
        None => String::new(),
    }
}
