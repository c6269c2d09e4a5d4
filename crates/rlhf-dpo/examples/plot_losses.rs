//! Draws how hard each loss pulls, into `docs/losses/*.svg`: `cargo run -p rlhf-dpo --example plot_losses`.
//!
//! Every curve is the gradient that the crate itself gives, not a formula written anew. Left out: `sft`, whose
//! pull is constant, and AOT, whose is that of `sigmoid` on sorted columns.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use rlhf_dpo::loss::unpaired::{ThumbWeights, UnpairedLogprobs, UnpairedLoss};
use rlhf_dpo::loss::{Divergence, PairLogprobs, PairValues, Pairs, PreferenceLoss, PreferenceMix};
use tch::{Kind, Tensor};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Points of a curve.
const POINTS: i64 = 81;
const PANEL: (u32, u32) = (250, 170);
const COLUMNS: usize = 4;
const CHOSEN: RGBColor = RGBColor(0x7f, 0xb3, 0xe6);
const REJECTED: RGBColor = RGBColor(0xc4, 0x4e, 0x1c);

/// A loss and its two curves over one axis: −∂L/∂(chosen) and ∂L/∂(rejected).
struct Panel {
    title: String,
    x: Vec<f64>,
    up: Vec<f64>,
    down: Vec<f64>,
}

fn axis(reach: f64) -> Tensor {
    Tensor::linspace(-reach, reach, POINTS, (Kind::Double, tch::Device::Cpu))
}

fn host(t: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::<f64>::try_from(t)?)
}

/// Two completions of so many tokens that move apart evenly about `middle`: their difference is x.
fn pair_panel(
    title: &str,
    mix: &PreferenceMix,
    x: &Tensor,
    middle: f64,
    tokens: f64,
) -> Result<Panel> {
    let leaf = |side: f64| (x * (side / 2.0) + middle).set_requires_grad(true);
    let (chosen, rejected) = (leaf(1.0), leaf(-1.0));
    let column = |v: f64| x.full_like(v);
    let logprobs = PairLogprobs::reference_free(&PairValues::new(&chosen, &rejected)?);
    let pairs = Pairs {
        lengths: Some(PairValues::new(&column(tokens), &column(tokens))?),
        scores: Some(PairValues::new(&column(2.0), &column(0.0))?),
        ..logprobs.into()
    };
    let sum = mix.compute(&pairs)?.loss.sum;
    let slopes = Tensor::run_backward(&[sum], &[&chosen, &rejected], false, false);
    Ok(Panel {
        title: title.to_owned(),
        x: host(x)?,
        up: host(&-&slopes[0])?,
        down: host(&slopes[1])?,
    })
}

/// A completion called good (pulled up) and the same called bad (pushed down).
fn thumb_panel(title: &str, loss: UnpairedLoss, x: &Tensor, baseline: f64) -> Result<Panel> {
    let slope = |good: i64| -> Result<Vec<f64>> {
        let leaf = x.copy().set_requires_grad(true);
        let completions = UnpairedLogprobs {
            logprobs: leaf.shallow_clone(),
            ref_logprobs: x.zeros_like(),
            desirable: Tensor::full([POINTS], good, (Kind::Bool, tch::Device::Cpu)),
        };
        let sum = loss.compute(&completions, baseline)?.loss.sum;
        let slope = Tensor::run_backward(&[sum], &[&leaf], false, false).remove(0);
        host(&(slope * if good == 1 { -1.0 } else { 1.0 }))
    };
    Ok(Panel {
        title: title.to_owned(),
        x: host(x)?,
        up: slope(1)?,
        down: slope(0)?,
    })
}

fn draw_panel<DB: DrawingBackend>(area: &DrawingArea<DB, Shift>, panel: &Panel) -> Result<()>
where
    DB::ErrorType: 'static,
{
    let values = || panel.up.iter().chain(&panel.down).copied();
    let (low, high) = values().fold((0.0, 0.0), |(a, b): (f64, f64), v| (a.min(v), b.max(v)));
    let room = (high - low) * 0.06;
    let reach = panel.x[0].abs();
    let mut chart = ChartBuilder::on(area)
        .margin(6)
        .margin_right(16)
        .caption(&panel.title, ("sans-serif", 13))
        .x_label_area_size(18)
        .y_label_area_size(40)
        .build_cartesian_2d(-reach..reach, low - room..high + room)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(0xdd, 0xdd, 0xdd))
        .x_labels(5)
        .y_labels(4)
        .label_style(("sans-serif", 11))
        .draw()?;
    let points =
        |y: &[f64]| -> Vec<(f64, f64)> { panel.x.iter().copied().zip(y.iter().copied()).collect() };
    chart.draw_series(LineSeries::new(points(&panel.up), CHOSEN.stroke_width(4)))?;
    chart.draw_series(LineSeries::new(
        points(&panel.down),
        REJECTED.stroke_width(1),
    ))?;
    Ok(())
}

fn draw(path: &Path, panels: &[Panel]) -> Result<()> {
    let rows = panels.len().div_ceil(COLUMNS);
    let size = (PANEL.0 * COLUMNS as u32, PANEL.1 * rows as u32);
    let area = SVGBackend::new(path, size).into_drawing_area();
    area.fill(&WHITE)?;
    for (panel, place) in panels.iter().zip(area.split_evenly((rows, COLUMNS))) {
        draw_panel(&place, panel)?;
    }
    Ok(area.present()?)
}

fn main() -> Result<()> {
    let beta = 0.1;
    let sigmoid = |label_smoothing| PreferenceLoss::Sigmoid {
        beta,
        label_smoothing,
    };
    let per_token = PreferenceLoss::SigmoidPerToken {
        beta: 5.0,
        label_smoothing: 0.0,
    };
    let robust = PreferenceLoss::Robust {
        beta,
        label_smoothing: 0.1,
    };
    let exo = PreferenceLoss::ExoPair {
        beta,
        label_smoothing: 0.1,
    };
    let margin: [(&str, PreferenceLoss); 12] = [
        ("sigmoid, β .1", sigmoid(0.0)),
        ("sigmoid, label_smoothing .1", sigmoid(0.1)),
        ("robust, label_smoothing .1", robust),
        (
            "odpo, α 2, scores 2, 0",
            PreferenceLoss::Odpo { beta, alpha: 2.0 },
        ),
        ("hinge", PreferenceLoss::Hinge { beta }),
        ("ipo", PreferenceLoss::Ipo { beta }),
        (
            "ipo_per_token, 10 tokens",
            PreferenceLoss::IpoPerToken { beta },
        ),
        ("sigmoid_per_token, β 5, 10 tokens", per_token),
        ("exo_pair, label_smoothing .1", exo),
        ("discopop", PreferenceLoss::Discopop { beta, tau: 0.05 }),
        (
            "rebel, η 10, scores 2, 0",
            PreferenceLoss::Rebel { eta: 10.0 },
        ),
        (
            "reward_aware, η 1, scores 2, 0",
            PreferenceLoss::RewardAware { beta, eta: 1.0 },
        ),
    ];
    let absolute: [(&str, PreferenceLoss); 7] = [
        ("nca_pair, β .1", PreferenceLoss::NcaPair { beta }),
        ("bco_pair", PreferenceLoss::BcoPair { beta }),
        ("sppo_hard", PreferenceLoss::SppoHard { beta }),
        ("cal_dpo", PreferenceLoss::CalDpo { beta }),
        ("apo_zero", PreferenceLoss::ApoZero { beta }),
        ("apo_down", PreferenceLoss::ApoDown { beta }),
        (
            "dpo_positive, λ 5",
            PreferenceLoss::DpoPositive { beta, lambda: 5.0 },
        ),
    ];
    let cpo = PreferenceLoss::Cpo {
        beta,
        label_smoothing: 0.0,
        nll_coef: 0.1,
    };
    let simpo = PreferenceLoss::Simpo {
        beta: 2.0,
        gamma: 1.0,
        label_smoothing: 0.0,
    };
    let alphapo = PreferenceLoss::Alphapo {
        beta: 2.0,
        gamma: 1.0,
        alpha: 0.25,
    };
    let likelihood: [(&str, PreferenceLoss); 4] = [
        ("orpo, λ .5", PreferenceLoss::Orpo { lambda: 0.5 }),
        ("cpo, β .1, nll_coef .1", cpo),
        ("simpo, β 2, γ 1", simpo),
        ("alphapo, α .25, β 2, γ 1", alphapo),
    ];
    let divergences = [
        ("sigmoid, reverse_kl", Divergence::ReverseKl),
        ("sigmoid, alpha .5", Divergence::Alpha { alpha: 0.5 }),
        ("sigmoid, forward_kl", Divergence::ForwardKl),
        ("sigmoid, jensen_shannon", Divergence::JensenShannon),
    ];
    let weights = ThumbWeights::default();
    let thumbs = [
        ("kto, z 5", UnpairedLoss::Kto { beta, weights }, 5.0),
        ("bco, δ .5", UnpairedLoss::Bco { beta }, 0.5),
        (
            "apo_zero_unpaired",
            UnpairedLoss::ApoZeroUnpaired { beta, weights },
            0.0,
        ),
    ];

    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/losses");
    std::fs::create_dir_all(&folder)?;
    let family = |losses: &[(&str, PreferenceLoss)], reach: f64, middle: f64, tokens: f64| {
        let panel = |(title, loss): &(&str, PreferenceLoss)| {
            pair_panel(title, &(*loss).into(), &axis(reach), middle, tokens)
        };
        losses.iter().map(panel).collect::<Result<Vec<_>>>()
    };
    draw(
        &folder.join("margin.svg"),
        &family(&margin, 40.0, 0.0, 10.0)?,
    )?;
    draw(
        &folder.join("absolute.svg"),
        &family(&absolute, 40.0, 0.0, 10.0)?,
    )?;
    draw(
        &folder.join("likelihood.svg"),
        &family(&likelihood, 2.5, -1.5, 1.0)?,
    )?;
    let panels = divergences.map(|(title, divergence)| {
        let mix = PreferenceMix {
            divergence,
            ..sigmoid(0.0).into()
        };
        pair_panel(title, &mix, &axis(6.0), 0.0, 1.0)
    });
    let panels = panels.into_iter().collect::<Result<Vec<_>>>()?;
    draw(&folder.join("divergences.svg"), &panels)?;
    let panels = thumbs.map(|(title, loss, z)| thumb_panel(title, loss, &axis(40.0), z));
    let panels = panels.into_iter().collect::<Result<Vec<_>>>()?;
    draw(&folder.join("unpaired.svg"), &panels)
}
