//! Algorithms by name: `preset = "dapo"` fills in what the stage leaves out.
//!
//! Invariant: what a preset sets stands in one file, `recipes/presets.toml`, which `rlhf recipes presets` prints. A
//! key that makes the algorithm what it is (`pinned`) cannot be set to something else.

use rlhf::{Usage, shipped, usage};
use toml::{Table, Value};

/// Fills `stage` in with the preset that it names, if any, and takes the name out.
pub(super) fn apply(stage: &mut Table, kind: &str, place: &str) -> Result<Option<String>, Usage> {
    let name = match stage.remove("preset") {
        None => return Ok(None),
        Some(Value::String(name)) => name,
        Some(other) => {
            let what = format!("`preset` is {other}, expected a name");
            return Err(usage(what, place, "write preset = \"…\""));
        }
    };
    let mut all: Table = toml::from_str(shipped::PRESETS)
        .map_err(|e| usage(e.to_string(), "the presets", "this is a mistake here"))?;
    let of_kind = |v: &Value| v.get("kind").and_then(Value::as_str) == Some(kind);
    let Some(Value::Table(mut preset)) = all.remove(&name) else {
        let names: Vec<&str> = all
            .iter()
            .filter(|(_, v)| of_kind(v))
            .map(|(n, _)| n.as_str())
            .collect();
        return Err(usage(
            format!("no preset named `{name}`"),
            place,
            format!(
                "a stage of kind {kind} has the presets {}",
                names.join(", ")
            ),
        ));
    };
    let own = preset.remove("kind");
    let own = own.as_ref().and_then(Value::as_str).unwrap_or_default();
    if own != kind {
        return Err(usage(
            format!("preset `{name}` is for stages of kind {own}, this one is {kind}"),
            place,
            format!("write kind = \"{own}\" and what such a stage needs, or take another preset"),
        ));
    }
    let names = |v: Option<Value>| -> Vec<String> {
        let list = v.and_then(|v| v.try_into::<Vec<String>>().ok());
        list.unwrap_or_default()
    };
    for path in names(preset.remove("pinned")) {
        pinned(stage, &preset, &path, &name, place)?;
    }
    for key in names(preset.remove("required")) {
        if !stage.contains_key(&key) {
            return Err(usage(
                format!("preset `{name}` needs `{key}`"),
                place,
                format!("add it; `rlhf recipes presets` says what `{name}` is"),
            ));
        }
    }
    fill(stage, preset);
    if name == "dapo" {
        clip_higher(stage, place)?;
    }
    fixed_length(stage);
    Ok(Some(name))
}

fn at<'t>(table: &'t Table, path: &str) -> Option<&'t Value> {
    let mut keys = path.split('.');
    let first = table.get(keys.next()?)?;
    keys.try_fold(first, |v, key| v.get(key))
}

/// Refuses a stage that sets the key `path` to something else than the preset.
fn pinned(stage: &Table, preset: &Table, path: &str, name: &str, place: &str) -> Result<(), Usage> {
    let Some(given) = at(stage, path) else {
        return Ok(());
    };
    let what = match at(preset, path) {
        Some(own) if own == given => return Ok(()),
        Some(own) => format!("preset `{name}` has {path} = {own}, the stage says {given}"),
        None => format!("preset `{name}` has no {path}, the stage says {given}"),
    };
    Err(usage(
        what,
        place,
        format!(
            "leave {path} out, or take another preset or none: with another {path} it is no `{name}`"
        ),
    ))
}

/// DAPO without clip-higher is not DAPO.
fn clip_higher(stage: &Table, place: &str) -> Result<(), Usage> {
    let bound = |side: &str| at(stage, &format!("loss.clip.{side}")).and_then(Value::as_float);
    match (bound("epsilon_low"), bound("epsilon_high")) {
        (Some(low), Some(high)) if high <= low => Err(usage(
            format!(
                "preset `dapo` clips higher above than below, the stage has {low} below and {high} above"
            ),
            place,
            "raise loss.clip.epsilon_high, or take preset = \"bnpo\"",
        )),
        _ => Ok(()),
    }
}

/// Adds what is missing. Tables of one `kind` (or none) are filled in key by key, others are left as they are.
fn fill(stage: &mut Table, preset: Table) {
    for (key, value) in preset {
        match (stage.get_mut(&key), value) {
            (None, value) => drop(stage.insert(key, value)),
            (Some(Value::Table(own)), Value::Table(value))
                if own.get("kind").is_none_or(|k| Some(k) == value.get("kind")) =>
            {
                fill(own, value);
            }
            _ => {}
        }
    }
}

/// A fixed length without a number is the longest completion.
fn fixed_length(stage: &mut Table) {
    let most = at(stage, "rollouts.sampling.max_new_tokens").cloned();
    let reduction = stage
        .get_mut("loss")
        .and_then(|l| l.get_mut("reduction"))
        .and_then(Value::as_table_mut);
    if let (Some(r), Some(most)) = (reduction, most)
        && r.get("kind").and_then(Value::as_str) == Some("fixed_length")
    {
        r.entry("length").or_insert(most);
    }
}
