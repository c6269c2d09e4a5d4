//! Plots as inline SVG whose colours are the page's CSS variables, so that they follow light and dark.
//!
//! Invariant: whatever the numbers (none, one, not finite, a million) there is a plot or `None`, never
//! a panic; an SVG's size depends on [`BUCKETS`], not on the length of a run.

use anyhow::anyhow;
use plotters::prelude::*;

/// Everything is drawn this much larger than shown: the backend knows whole pixels only.
const SCALE: u32 = 4;
const FONT: u32 = 12;

/// A long curve is drawn with at most this many points (twice that for its envelope).
const BUCKETS: usize = 240;

/// Stands for the page's `--muted` and `--line`; replaced in [`themed`].
const TEXT: RGBColor = RGBColor(1, 1, 1);
const GRID: RGBColor = RGBColor(2, 2, 2);
/// How many colours the page has: `--c0` (the baseline's grey) … `--c6`.
pub(crate) const COLOURS: usize = 7;

type Point = (f64, f64);

/// Width and height in pixels, when shown unscaled.
type Size = (u32, u32);
/// One of many.
const SMALL: Size = (280, 165);
/// One of two.
pub(crate) const LARGE: Size = (420, 250);

/// What a plot shows. Points that are not finite are left out.
#[derive(Clone, Debug)]
pub(crate) enum Mark {
    /// A thin line.
    Thin(Vec<Point>, usize),
    /// A bold line.
    Bold(Vec<Point>, usize),
    /// Dots of a radius in pixels.
    Dots(Vec<Point>, usize, u32),
    /// A vertical interval at `x`.
    Whisker {
        x: f64,
        low: f64,
        high: f64,
        colour: usize,
    },
    /// A dashed line of reference. It does not widen the axes.
    Reference(Point, Point),
}

/// An axis: its name, and its range if not the data's.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Axis<'a> {
    pub(crate) label: &'a str,
    pub(crate) range: Option<(f64, f64)>,
}

impl<'a> Axis<'a> {
    /// An axis over the data's range.
    pub(crate) fn named(label: &'a str) -> Self {
        Self { label, range: None }
    }
}

/// A curve over steps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Series<'a> {
    pub(crate) points: &'a [Point],
    pub(crate) colour: usize,
}

/// A drawn plot of curves.
#[derive(Clone, Debug)]
pub(crate) struct Curves {
    pub(crate) svg: String,
    /// The largest and smallest value, where they lie so far out that the axis was cut.
    pub(crate) beyond: Option<(f64, f64)>,
}

/// Curves over steps: every value thin, the moving average bold.
pub(crate) fn curves(series: &[Series<'_>], about: &str) -> anyhow::Result<Option<Curves>> {
    let finite: Vec<(Vec<Point>, usize)> = series
        .iter()
        .map(|s| (finite(s.points), s.colour))
        .filter(|s| !s.0.is_empty())
        .collect();
    let mut values: Vec<f64> = finite
        .iter()
        .flat_map(|s| s.0.iter().map(|p| p.1))
        .collect();
    values.sort_by(f64::total_cmp);
    let Some(((low, high), cut)) = limits(&values) else {
        return Ok(None);
    };
    let last = finite
        .iter()
        .flat_map(|s| s.0.iter().map(|p| p.0))
        .fold(f64::NEG_INFINITY, f64::max);
    let first = finite
        .iter()
        .flat_map(|s| s.0.iter().map(|p| p.0))
        .fold(f64::INFINITY, f64::min);
    let mut marks = Vec::new();
    for (points, colour) in &finite {
        let clamped: Vec<Point> = points.iter().map(|p| (p.0, p.1.clamp(low, high))).collect();
        if clamped.len() < 8 {
            marks.push(Mark::Dots(clamped.clone(), *colour, 3));
            marks.push(Mark::Bold(clamped, *colour));
        } else if is_smooth(&clamped) {
            marks.push(Mark::Bold(envelope(&clamped), *colour));
        } else {
            marks.push(Mark::Thin(envelope(&clamped), *colour));
            marks.push(Mark::Bold(thinned(&smooth(&clamped)), *colour));
        }
    }
    let x = Axis {
        label: "",
        range: (last > first).then_some((first, last)),
    };
    let y = Axis {
        label: "",
        range: Some(padded(low, high)),
    };
    let beyond = cut.then(|| (values[0], values[values.len() - 1]));
    Ok(draw(&marks, SMALL, x, y, about)?.map(|svg| Curves { svg, beyond }))
}

/// Whether neighbours lie on a line, nearly: a schedule, say. Its average would only blur it.
fn is_smooth(points: &[Point]) -> bool {
    let (low, high) = points
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |a, p| {
            (a.0.min(p.1), a.1.max(p.1))
        });
    let bend: f64 = points
        .windows(3)
        .map(|w| (w[1].1 - 0.5 * (w[0].1 + w[2].1)).abs())
        .sum();
    bend <= 0.005 * (high - low) * points.len() as f64
}

/// The range of sorted values, without the outermost percent when that lies far out; and whether.
fn limits(sorted: &[f64]) -> Option<(Point, bool)> {
    let (low, high) = (*sorted.first()?, *sorted.last()?);
    let at = |q: f64| sorted[((sorted.len() - 1) as f64 * q).round() as usize];
    let (p1, p99) = (at(0.01), at(0.99));
    let room = 4.0 * (p99 - p1);
    if sorted.len() < 50 || room <= 0.0 || (high <= p99 + room && low >= p1 - room) {
        return Some(((low, high), false));
    }
    Some(((low.max(p1 - 0.1 * room), high.min(p99 + 0.1 * room)), true))
}

/// Draws marks; `None` when no point is finite.
pub(crate) fn draw(
    marks: &[Mark],
    size: Size,
    x: Axis<'_>,
    y: Axis<'_>,
    about: &str,
) -> anyhow::Result<Option<String>> {
    let (mut xs, mut ys) = (Vec::new(), Vec::new());
    for mark in marks {
        let points = match mark {
            Mark::Thin(p, _) | Mark::Bold(p, _) | Mark::Dots(p, _, _) => finite(p),
            Mark::Whisker { x, low, high, .. } => finite(&[(*x, *low), (*x, *high)]),
            Mark::Reference(..) => Vec::new(),
        };
        xs.extend(points.iter().map(|p| p.0));
        ys.extend(points.iter().map(|p| p.1));
    }
    let (Some(xr), Some(yr)) = (
        x.range.or_else(|| spread(&xs)),
        y.range.or_else(|| spread(&ys)),
    ) else {
        return Ok(None);
    };
    if xs.is_empty() {
        return Ok(None);
    }
    let mut svg = String::new();
    {
        let area =
            SVGBackend::with_string(&mut svg, (size.0 * SCALE, size.1 * SCALE)).into_drawing_area();
        let room = |label: &str, without: u32| {
            SCALE
                * if label.is_empty() {
                    without
                } else {
                    without + FONT + 4
                }
        };
        let y_room = if has_exponent(yr) { 52 } else { 44 };
        let mut chart = ChartBuilder::on(&area)
            .margin_top(SCALE * 6)
            .margin_right(SCALE * 10)
            .x_label_area_size(room(x.label, 20))
            .y_label_area_size(room(y.label, y_room))
            .build_cartesian_2d(xr.0..xr.1, yr.0..yr.1)
            .map_err(failed)?;
        let style = ("sans-serif", FONT * SCALE * 5 / 4)
            .into_font()
            .color(&TEXT);
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(6)
            .y_labels(5)
            .x_desc(x.label)
            .y_desc(y.label)
            .label_style(style.clone())
            .axis_desc_style(style)
            .axis_style(GRID.stroke_width(SCALE))
            .bold_line_style(GRID.stroke_width(SCALE))
            .light_line_style(TRANSPARENT)
            .set_all_tick_mark_size(SCALE * 4)
            .x_label_formatter(&|v| tick(*v, xr))
            .y_label_formatter(&|v| tick(*v, yr))
            .draw()
            .map_err(failed)?;
        for mark in marks {
            paint(&mut chart, mark)?;
        }
        area.present().map_err(failed)?;
    }
    Ok(Some(themed(&svg, size, about)))
}

type Chart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

fn paint(chart: &mut Chart<'_, '_>, mark: &Mark) -> anyhow::Result<()> {
    match mark {
        Mark::Thin(points, c) => {
            let style = placeholder(*c).mix(0.3).stroke_width(SCALE);
            chart
                .draw_series(LineSeries::new(finite(points), style))
                .map_err(failed)?;
        }
        Mark::Bold(points, c) => {
            let style = placeholder(*c).stroke_width(2 * SCALE);
            chart
                .draw_series(LineSeries::new(finite(points), style))
                .map_err(failed)?;
        }
        Mark::Dots(points, c, radius) => {
            let style = if *radius < 3 {
                placeholder(*c).mix(0.45)
            } else {
                placeholder(*c).mix(1.0)
            };
            let dots = finite(points)
                .into_iter()
                .map(|p| Circle::new(p, radius * SCALE, style.filled()));
            chart.draw_series(dots).map_err(failed)?;
        }
        Mark::Whisker {
            x,
            low,
            high,
            colour,
        } => {
            let style = placeholder(*colour).stroke_width(3 * SCALE / 2);
            chart
                .draw_series(LineSeries::new(finite(&[(*x, *low), (*x, *high)]), style))
                .map_err(failed)?;
        }
        Mark::Reference(from, to) => {
            let (dash, gap) = (4 * SCALE as i32, 4 * SCALE as i32);
            let ends = finite(&[*from, *to]);
            chart
                .draw_series(DashedLineSeries::new(
                    ends,
                    dash as u32,
                    gap as u32,
                    TEXT.mix(0.7).stroke_width(SCALE),
                ))
                .map_err(failed)?;
        }
    }
    Ok(())
}

fn failed<E: std::error::Error>(e: E) -> anyhow::Error {
    anyhow!("drawing: {e}")
}

/// The colour that [`themed`] replaces by `var(--c…)`.
fn placeholder(colour: usize) -> RGBColor {
    RGBColor(3 + (colour % COLOURS) as u8, 3, 3)
}

fn finite(points: &[Point]) -> Vec<Point> {
    // Numbers near the ends of f64 overflow when a range is made of them.
    points
        .iter()
        .copied()
        .filter(|p| p.0.abs() < 1e300 && p.1.abs() < 1e300)
        .collect()
}

fn spread(values: &[f64]) -> Option<Point> {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (low <= high).then(|| padded(low, high))
}

/// A range with a little room on both sides; much room around a constant. What is never negative
/// starts at 0 at the least.
fn padded(low: f64, high: f64) -> Point {
    let largest = low.abs().max(high.abs());
    let pad = match high - low {
        span if span > 1e-9 * largest => 0.06 * span,
        _ if largest > 0.0 => 0.5 * largest,
        _ => 1.0,
    };
    (
        if low >= 0.0 {
            (low - pad).max(0.0)
        } else {
            low - pad
        },
        high + pad,
    )
}

/// Whether the labels of a range are written as 1e5.
fn has_exponent((low, high): Point) -> bool {
    !(1e-3..1e5).contains(&low.abs().max(high.abs()))
}

/// A tick's label, with as many decimals as the range asks for.
fn tick(v: f64, (low, high): Point) -> String {
    let span = high - low;
    if v.abs() < span * 1e-9 {
        return "0".into();
    }
    if has_exponent((low, high)) {
        return format!("{v:.1e}").replace(".0e", "e").replace('-', "−");
    }
    let decimals = (1.0 - (span / 8.0).log10().floor()).clamp(0.0, 7.0) as usize;
    let text = format!("{v:.decimals$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    text.replace('-', "−")
}

/// Lets the page's style decide on size and colours.
fn themed(svg: &str, size: Size, about: &str) -> String {
    let fixed = format!(
        "<svg width=\"{}\" height=\"{}\"",
        size.0 * SCALE,
        size.1 * SCALE
    );
    let about = super::html::escape(about);
    let mut out = svg.replacen(
        &fixed,
        &format!("<svg class=\"plot\" role=\"img\" aria-label=\"{about}\""),
        1,
    );
    out = out
        .replacen(" xmlns=\"http://www.w3.org/2000/svg\"", "", 1)
        .replace(" font-family=\"sans-serif\"", "");
    let mut named = vec![(TEXT, "muted".to_owned()), (GRID, "line".to_owned())];
    named.extend((0..COLOURS).map(|i| (placeholder(i), format!("c{i}"))));
    for (c, name) in named {
        for attribute in ["fill", "stroke"] {
            // Not every browser reads variables in presentation attributes; all do in style.
            let from = format!("{attribute}=\"#{:02X}{:02X}{:02X}\"", c.0, c.1, c.2);
            out = out.replace(&from, &format!("style=\"{attribute}:var(--{name})\""));
        }
    }
    out.replace(" opacity=\"1\"", "")
        .replace(" stroke=\"none\" stroke-width=\"1\"", "")
        .replace('\n', "")
}

/// At most `BUCKETS` points and the last one.
fn thinned(points: &[Point]) -> Vec<Point> {
    let stride = points.len().div_ceil(BUCKETS).max(1);
    let mut out: Vec<Point> = points.iter().copied().step_by(stride).collect();
    if points.len() % stride != 1 % stride {
        out.extend(points.last());
    }
    out
}

/// The lowest and the highest point of each bucket, in order: thinning that keeps every spike.
fn envelope(points: &[Point]) -> Vec<Point> {
    if points.len() <= 2 * BUCKETS {
        return points.to_vec();
    }
    let mut out = Vec::with_capacity(2 * BUCKETS);
    for bucket in points.chunks(points.len().div_ceil(BUCKETS)) {
        let by_value = |a: &&Point, b: &&Point| a.1.total_cmp(&b.1);
        let (Some(low), Some(high)) = (
            bucket.iter().min_by(by_value),
            bucket.iter().max_by(by_value),
        ) else {
            continue;
        };
        if low.0 <= high.0 {
            out.extend([*low, *high])
        } else {
            out.extend([*high, *low])
        }
    }
    out
}

/// A centred moving average over about a tenth of the points, at least five; at the ends over what
/// there is of them.
pub(crate) fn smooth(points: &[Point]) -> Vec<Point> {
    let half = (points.len() / 20).max(2);
    let mut sums = vec![0.0];
    for p in points {
        sums.push(sums[sums.len() - 1] + p.1);
    }
    (0..points.len())
        .map(|i| {
            let (from, to) = (i.saturating_sub(half), (i + half + 1).min(points.len()));
            (points[i].0, (sums[to] - sums[from]) / (to - from) as f64)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(points: &[Point]) -> Option<Curves> {
        curves(&[Series { points, colour: 1 }], "a curve").unwrap()
    }

    #[test]
    fn plots_take_the_page_s_colours() {
        let points: Vec<Point> = (0..500)
            .map(|i| (f64::from(i), (f64::from(i) / 100.0).sin()))
            .collect();
        let svg = one(&points).unwrap().svg;
        assert!(
            svg.contains("var(--c1)") && svg.contains("var(--muted)") && svg.contains("viewBox"),
            "{svg}"
        );
        assert!(!svg.contains("#0") && !svg.contains("http"), "{svg}");
    }

    #[test]
    fn odd_numbers_draw_or_give_nothing() {
        assert!(one(&[]).is_none() && one(&[(0.0, f64::NAN), (f64::NAN, 1.0)]).is_none());
        for points in [
            vec![(0.0, 3.0)],
            vec![(5.0, 0.0), (5.0, 0.0)],
            vec![
                (0.0, f64::INFINITY),
                (1.0, 2.0),
                (2.0, f64::NAN),
                (3.0, 1e-12),
            ],
            vec![(0.0, -1e308), (1.0, 1e308), (2.0, 1.0)],
            vec![(0.0, 1e299), (1.0, -1e299)],
            vec![(0.0, 7.0 + 1e-15), (1.0, 7.0)],
        ] {
            assert!(
                one(&points).is_some_and(|c| c.svg.contains("</svg>")),
                "{points:?}"
            );
        }
        assert!(
            draw(
                &[Mark::Reference((0.0, 0.0), (1.0, 1.0))],
                LARGE,
                Axis::default(),
                Axis::default(),
                ""
            )
            .unwrap()
            .is_none()
        );
    }

    #[test]
    fn a_long_run_is_thinned_but_keeps_its_spikes() {
        let mut points: Vec<Point> = (0..1_000_000).map(|i| (f64::from(i), 1.0)).collect();
        points[777_777].1 = 2.0;
        assert_eq!(thinned(&points).last(), points.last());
        let seen = envelope(&points);
        assert!(seen.len() <= 2 * BUCKETS && seen.contains(&(777_777.0, 2.0)));
        assert!(seen.is_sorted_by(|a, b| a.0 <= b.0));
        assert!(one(&points).unwrap().svg.len() < 60_000);
    }

    #[test]
    fn an_outlier_does_not_flatten_a_curve() {
        let mut values: Vec<f64> = (0..1000).map(|i| f64::from(i) / 1000.0).collect();
        assert_eq!(limits(&values), Some(((0.0, 0.999), false)));
        values.push(1e6);
        let ((low, high), cut) = limits(&values).unwrap();
        assert!(cut && low == 0.0 && high < 2.0, "{low} {high}");
    }

    #[test]
    fn the_average_by_hand() {
        // Two to each side: (0+3+3)/3, (0+3+3+0)/4, (0+3+3+0+9)/5, (3+3+0+9)/4, (3+0+9)/3.
        let points: Vec<Point> = [0.0, 3.0, 3.0, 0.0, 9.0]
            .iter()
            .enumerate()
            .map(|(i, v)| (i as f64, *v))
            .collect();
        let means: Vec<f64> = smooth(&points).iter().map(|p| p.1).collect();
        assert_eq!(means, [2.0, 1.5, 3.0, 3.75, 4.0]);
    }

    #[test]
    fn a_schedule_is_not_blurred() {
        let ramp: Vec<Point> = (0..100)
            .map(|i| (f64::from(i), f64::from(i.min(10))))
            .collect();
        let noisy: Vec<Point> = (0..100).map(|i| (f64::from(i), f64::from(i % 2))).collect();
        assert!(is_smooth(&ramp) && !is_smooth(&noisy) && is_smooth(&[(0.0, 1.0); 9]));
        assert_eq!(
            (padded(0.02, 0.02), padded(0.0, 0.0), padded(-1.0, 1.0)),
            ((0.01, 0.03), (0.0, 1.0), (-1.12, 1.12))
        );
    }

    #[test]
    fn ticks_are_short() {
        assert_eq!(tick(0.25, (0.0, 1.0)), "0.25");
        assert_eq!(tick(200.0, (0.0, 400.0)), "200");
        assert_eq!(tick(-1.5, (-2.0, 2.0)), "−1.5");
        assert_eq!(tick(2.5e-4, (0.0, 3e-4)), "2.5e−4");
        assert_eq!(tick(1e-18, (-1.0, 1.0)), "0");
    }
}
