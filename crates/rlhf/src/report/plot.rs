//! Plots as inline SVG whose colours are the page's CSS variables, so that they follow light and dark.

use anyhow::anyhow;
use plotters::prelude::*;

const AXIS: RGBColor = RGBColor(1, 1, 1);
const GRID: RGBColor = RGBColor(2, 2, 2);
/// Placeholders for the page's `--s0` … `--s4`.
const SERIES: [RGBColor; 5] = [
    RGBColor(3, 3, 3),
    RGBColor(4, 4, 4),
    RGBColor(5, 5, 5),
    RGBColor(6, 6, 6),
    RGBColor(7, 7, 7),
];
const WIDTH: u32 = 420;
const HEIGHT: u32 = 240;

/// Points of a curve, at most this many.
const MAX_POINTS: usize = 600;

/// A named series with its points.
pub(crate) struct Series<'a> {
    pub(crate) points: &'a [(f64, f64)],
    pub(crate) colour: usize,
}

/// A point with a name and a vertical interval.
pub(crate) struct Marked {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) colour: usize,
}

/// Curves over steps: the points thin, their moving average bold.
pub(crate) fn lines(series: &[Series<'_>]) -> anyhow::Result<String> {
    let all = series.iter().flat_map(|s| s.points.iter().copied());
    let Some(frame) = frame(all) else {
        return Ok(String::new());
    };
    draw(frame, ("step", ""), |chart| {
        for s in series {
            let colour = SERIES[s.colour % SERIES.len()];
            let points = thin(s.points);
            chart
                .draw_series(LineSeries::new(
                    points.iter().copied(),
                    colour.mix(0.35).stroke_width(1),
                ))
                .map_err(failed)?;
            chart
                .draw_series(LineSeries::new(smooth(&points), colour.stroke_width(2)))
                .map_err(failed)?;
        }
        Ok(())
    })
}

/// Paths (reward against KL, say) with marked end points.
pub(crate) fn paths(
    series: &[Series<'_>],
    marked: &[Marked],
    axes: (&str, &str),
) -> anyhow::Result<String> {
    let ends = marked.iter().flat_map(|m| [(m.x, m.low), (m.x, m.high)]);
    let Some(frame) = frame(
        series
            .iter()
            .flat_map(|s| s.points.iter().copied())
            .chain(ends),
    ) else {
        return Ok(String::new());
    };
    draw(frame, axes, |chart| {
        for s in series {
            let colour = SERIES[s.colour % SERIES.len()];
            chart
                .draw_series(LineSeries::new(
                    smooth(&thin(s.points)),
                    colour.stroke_width(2),
                ))
                .map_err(failed)?;
        }
        for m in marked {
            let colour = SERIES[m.colour % SERIES.len()];
            let whisker = [(m.x, m.low), (m.x, m.high)];
            chart
                .draw_series(LineSeries::new(whisker, colour.stroke_width(1)))
                .map_err(failed)?;
            chart
                .draw_series([Circle::new((m.x, m.y), 4, colour.filled())])
                .map_err(failed)?;
        }
        Ok(())
    })
}

fn failed<E: std::error::Error>(e: E) -> anyhow::Error {
    anyhow!("drawing: {e}")
}

type Frame = (std::ops::Range<f64>, std::ops::Range<f64>);

/// Ranges that hold all finite points with a little room; `None` when there are none.
fn frame(points: impl Iterator<Item = (f64, f64)>) -> Option<Frame> {
    let (mut x, mut y) = (
        (f64::INFINITY, f64::NEG_INFINITY),
        (f64::INFINITY, f64::NEG_INFINITY),
    );
    for p in points.filter(|p| p.0.is_finite() && p.1.is_finite()) {
        x = (x.0.min(p.0), x.1.max(p.0));
        y = (y.0.min(p.1), y.1.max(p.1));
    }
    let room = |(a, b): (f64, f64)| {
        let pad = if b > a {
            0.04 * (b - a)
        } else {
            a.abs().max(1.0) * 0.1
        };
        (a - pad)..(b + pad)
    };
    (x.0 <= x.1).then(|| (room(x), room(y)))
}

type Chart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

fn draw(
    frame: Frame,
    axes: (&str, &str),
    body: impl FnOnce(&mut Chart<'_, '_>) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(6)
            .x_label_area_size(34)
            .y_label_area_size(48)
            .build_cartesian_2d(frame.0, frame.1)
            .map_err(failed)?;
        let style = ("sans-serif", 11).into_font().color(&AXIS);
        chart
            .configure_mesh()
            .x_labels(6)
            .y_labels(5)
            .x_desc(axes.0)
            .y_desc(axes.1)
            .label_style(style.clone())
            .axis_desc_style(style)
            .axis_style(GRID)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .x_label_formatter(&|v| tick(*v))
            .y_label_formatter(&|v| tick(*v))
            .draw()
            .map_err(failed)?;
        body(&mut chart)?;
        area.present().map_err(failed)?;
    }
    Ok(themed(&svg))
}

/// A tick's label: short, whatever the size of the number.
fn tick(v: f64) -> String {
    match v.abs() {
        0.0 => "0".into(),
        a if !(1e-3..1e5).contains(&a) => format!("{v:.0e}"),
        a if a >= 100.0 => format!("{v:.0}"),
        a if a >= 1.0 => format!("{}", (v * 10.0).round() / 10.0),
        _ => format!("{}", (v * 1000.0).round() / 1000.0),
    }
}

/// Lets the page's style decide on size and colours.
fn themed(svg: &str) -> String {
    let fixed = format!("width=\"{WIDTH}\" height=\"{HEIGHT}\"");
    let mut out = svg.replacen(&fixed, "width=\"100%\" role=\"img\"", 1);
    out = out
        .replace("#010101", "var(--muted)")
        .replace("#020202", "var(--line)");
    for (i, c) in SERIES.iter().enumerate() {
        out = out.replace(
            &format!("#{:02X}{:02X}{:02X}", c.0, c.1, c.2),
            &format!("var(--s{i})"),
        );
    }
    // Presentation attributes do not read variables; style properties do.
    for attribute in ["fill", "stroke"] {
        for name in ["muted", "line", "s0", "s1", "s2", "s3", "s4"] {
            out = out.replace(
                &format!("{attribute}=\"var(--{name})\""),
                &format!("style=\"{attribute}:var(--{name})\""),
            );
        }
    }
    out
}

fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let stride = points.len().div_ceil(MAX_POINTS).max(1);
    points
        .iter()
        .copied()
        .filter(|p| p.0.is_finite() && p.1.is_finite())
        .step_by(stride)
        .collect()
}

/// A centred moving average over a tenth of the points.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half = points.len() / 20;
    (0..points.len())
        .map(|i| {
            let window = &points[i.saturating_sub(half)..(i + half + 1).min(points.len())];
            let mean =
                |f: fn(&(f64, f64)) -> f64| window.iter().map(f).sum::<f64>() / window.len() as f64;
            (points[i].0, mean(|p| p.1))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_follow_the_page_and_survive_odd_numbers() {
        let points: Vec<(f64, f64)> = (0..5000)
            .map(|i| (f64::from(i), (f64::from(i) / 100.0).sin()))
            .collect();
        let svg = lines(&[Series {
            points: &points,
            colour: 1,
        }])
        .unwrap();
        assert!(
            svg.contains("var(--s1)") && svg.contains("viewBox") && !svg.contains("#040404"),
            "{}",
            &svg[..300]
        );
        assert!(svg.len() < 60_000);
        assert_eq!(
            lines(&[Series {
                points: &[],
                colour: 0
            }])
            .unwrap(),
            ""
        );
        assert_eq!(
            lines(&[Series {
                points: &[(0.0, f64::NAN)],
                colour: 0
            }])
            .unwrap(),
            ""
        );
        assert!(
            lines(&[Series {
                points: &[(0.0, 3.0)],
                colour: 0
            }])
            .unwrap()
            .contains("<svg")
        );
    }
}
