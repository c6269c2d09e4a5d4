//! Schedules against `transformers`' own.

use rlhf_train::LrSchedule;
use rlhf_train::lr_schedule::DecayShape;
use tch::{Kind, Tensor};

use crate::golden_io::{Case, run};

#[test]
fn h_lr() {
    run(&["h/lr/"], |case| {
        let Some((schedule, warmup)) = schedule(case) else {
            return false;
        };
        let (lr, total) = (
            case.number("lr").unwrap(),
            case.number("total").unwrap() as u64,
        );
        let steps = Vec::<i64>::try_from(case.input("steps")).unwrap();
        let factors: Vec<f64> = steps
            .iter()
            .map(|&s| schedule.factor(s as u64, warmup, total))
            .collect();
        // As factors of the peak: a tolerance beside 5e-5 would say nothing.
        let got = Tensor::from_slice(&factors);
        let expected = case.output("lr").to_kind(Kind::Double) / lr;
        case.compare("lr", &got, &expected, 1e-12);
        true
    });
}

/// The schedule that a case names, with its warm-up.
fn schedule(case: &Case<'_>) -> Option<(LrSchedule, u64)> {
    let lr = case.number("lr").unwrap();
    let warmup = case.number("warmup").unwrap() as u64;
    let knobs = case.setting("kwargs").as_object().unwrap();
    let knob = |name: &str| knobs.get(name).and_then(serde_json::Value::as_f64);
    // A knob that nobody here knows would go unnoticed.
    let known = [
        "num_cycles",
        "power",
        "lr_end",
        "min_lr",
        "min_lr_rate",
        "warmup_lr_rate",
        "num_decay_steps",
        "num_stable_steps",
        "decay_type",
        "min_lr_ratio",
    ];
    if knobs.keys().any(|k| !known.contains(&k.as_str())) {
        return None;
    }
    let floor = knob("min_lr_rate").or(knob("min_lr").map(|m| m / lr));
    let schedule = match case.text("name")? {
        // transformers' `constant` knows no warm-up.
        "constant" => return Some((LrSchedule::Constant {}, 0)),
        "constant_with_warmup" => LrSchedule::Constant {},
        "linear" => LrSchedule::Linear {},
        "cosine" if knobs.is_empty() => LrSchedule::Cosine { min_ratio: 0.0 },
        "cosine_with_min_lr" if knob("num_cycles").is_none() => {
            LrSchedule::Cosine { min_ratio: floor? }
        }
        "cosine_warmup_with_min_lr" if knob("num_cycles").is_none() => {
            LrSchedule::CosineFromFloor {
                min_ratio: floor?,
                warmup_ratio: knob("warmup_lr_rate")?,
            }
        }
        "cosine_with_restarts" => LrSchedule::CosineRestarts {
            cycles: knob("num_cycles")? as u32,
        },
        "polynomial" => LrSchedule::Polynomial {
            power: knob("power")?,
            end_ratio: knob("lr_end")? / lr,
        },
        "inverse_sqrt" if knobs.is_empty() => LrSchedule::InverseSqrt {},
        "warmup_stable_decay" if knob("num_cycles").is_none() => LrSchedule::Wsd {
            decay_steps: knob("num_decay_steps")? as u64,
            stable_steps: knob("num_stable_steps").map(|n| n as u64),
            shape: match knobs.get("decay_type").and_then(|v| v.as_str()) {
                None | Some("cosine") => DecayShape::Cosine,
                Some("linear") => DecayShape::Linear,
                Some("1-sqrt") => DecayShape::OneMinusSqrt,
                Some(_) => return None,
            },
            min_ratio: knob("min_lr_ratio").unwrap_or(0.0),
        },
        _ => return None,
    };
    Some((schedule, warmup))
}
