//! Reads folders of golden cases: a `manifest.json` beside safetensors files.
//!
//! A case holds inputs, settings, outputs in f64 and how far the peer's own f32 run lies from them.
//! The folder is `RLHF_GOLDEN`, or the crate's own small copy.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::device::device;

/// A case, to be computed in f64 or f32.
pub(crate) struct Case<'a> {
    json: &'a Value,
    tensors: &'a HashMap<String, Tensor>,
    pub(crate) kind: Kind,
    failures: &'a RefCell<Vec<String>>,
}

impl Case<'_> {
    pub(crate) fn name(&self) -> &str {
        self.json["case"].as_str().unwrap()
    }

    /// The rest of the case's name after `prefix`, if it begins so.
    pub(crate) fn after(&self, prefix: &str) -> Option<&str> {
        self.name().strip_prefix(prefix)
    }

    /// An input; floats in the kind of this run.
    pub(crate) fn input(&self, name: &str) -> Tensor {
        let t = &self.tensors[self.json["inputs"][name]
            .as_str()
            .unwrap_or_else(|| panic!("{}: no input {name}", self.name()))];
        if t.is_floating_point() {
            t.to_kind(self.kind)
        } else {
            t.copy()
        }
    }

    pub(crate) fn mask(&self, name: &str) -> Tensor {
        self.input(name).to_kind(Kind::Bool)
    }

    pub(crate) fn setting(&self, name: &str) -> &Value {
        &self.json["hyper"][name]
    }

    pub(crate) fn number(&self, name: &str) -> Option<f64> {
        self.setting(name).as_f64()
    }

    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.setting(name).as_str()
    }

    /// The names of all settings.
    pub(crate) fn settings(&self) -> Vec<&str> {
        let names = self.json["hyper"].as_object().unwrap().keys();
        names.map(String::as_str).collect()
    }

    /// The names of all outputs.
    pub(crate) fn outputs(&self) -> Vec<&str> {
        let names = self.json["outputs"].as_object().unwrap().keys();
        names.map(String::as_str).collect()
    }

    pub(crate) fn has(&self, output: &str) -> bool {
        !self.json["outputs"][output].is_null()
    }

    /// The reference output in f64.
    pub(crate) fn output(&self, name: &str) -> Tensor {
        let key = self.json["outputs"][name]["key"]
            .as_str()
            .unwrap_or_else(|| panic!("{}: no output {name}", self.name()));
        self.tensors[key].to_kind(Kind::Double)
    }

    /// Compares with the reference: f64 to 1e-12 of the largest entry (or of 1), f32 to four times the
    /// peer's own rounding.
    pub(crate) fn check(&self, output: &str, got: &Tensor) {
        self.compare(output, got, &self.output(output), 1e-12);
    }

    /// [`Case::check`] of a small difference of numbers as large as `scale`, which f32 has rounded.
    pub(crate) fn check_difference(&self, output: &str, got: &Tensor, scale: f64) {
        if self.kind == Kind::Double {
            return self.check(output, got);
        }
        let error = (host(got) - host(&self.output(output)))
            .abs()
            .max()
            .double_value(&[]);
        if error.is_nan() || error > 1e-6 * scale {
            self.failures.borrow_mut().push(format!(
                "{} {output} Float: differs by {error:.3e} at {scale:.3e}",
                self.name()
            ));
        }
    }

    /// [`Case::check`] where the reference's mask is true.
    pub(crate) fn check_at(&self, output: &str, got: &Tensor, mask: &Tensor) {
        self.compare(output, got, &self.output(output).masked_select(mask), 1e-12);
    }

    /// Compares with a reference derived from an output.
    pub(crate) fn compare(&self, output: &str, got: &Tensor, reference: &Tensor, tolerance: f64) {
        let peer = self.json["outputs"][output]["peer_f32_max_abs_err"]
            .as_f64()
            .unwrap_or(0.0);
        let (got, reference) = (host(got), host(reference));
        let fail = |what: String| {
            self.failures.borrow_mut().push(format!(
                "{} {output} {:?}: {what}",
                self.name(),
                self.kind
            ));
        };
        if got.size() != reference.size() {
            return fail(format!(
                "is {:?}, expected {:?}",
                got.size(),
                reference.size()
            ));
        }
        if got.numel() == 0 {
            return fail("is empty".into());
        }
        let largest = reference.abs().max().double_value(&[]);
        let bound = match self.kind {
            Kind::Double => tolerance * largest.max(1.0),
            _ if device() == Device::Cpu => (4.0 * peer).max(1e-6 * largest),
            // The peer ran on the CPU; a GPU's functions round in other places, and libtorch's AdamW there takes
            // 1 − β₂ in f32.
            _ => (16.0 * peer).max(2e-5 * largest),
        };
        let error = (&got - &reference).abs().max().double_value(&[]);
        if error.is_nan() || error > bound {
            fail(format!("differs by {error:.3e}, allowed {bound:.3e}"));
        }
    }
}

/// Python writes NaN and Infinity into JSON: outside of strings they become null.
fn without_nan(json: &str) -> String {
    let even = |i: usize| i.is_multiple_of(2);
    let parts = json.split('"').enumerate().map(|(i, part)| {
        if even(i) {
            part.replace("-Infinity", "null")
                .replace("Infinity", "null")
                .replace("NaN", "null")
        } else {
            part.to_owned()
        }
    });
    parts.collect::<Vec<_>>().join("\"")
}

/// Runs every case whose name begins with one of `sections` through `compute`, in f64 and in f32.
/// `compute` says false for a case that it does not know. Prints how many ran and the names of the
/// unknown, which it gives back; panics if any differs or none ran.
pub(crate) fn run(sections: &[&str], compute: impl Fn(&Case<'_>) -> bool) -> BTreeSet<String> {
    let folder = std::env::var_os("RLHF_GOLDEN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
        PathBuf::from,
    );
    let manifest = without_nan(&std::fs::read_to_string(folder.join("manifest.json")).unwrap());
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    let mut files: HashMap<String, HashMap<String, Tensor>> = HashMap::new();
    let failures = RefCell::new(Vec::new());
    let (mut ran, mut unknown) = (0, BTreeSet::new());
    for json in manifest["cases"].as_array().unwrap() {
        let name = json["case"].as_str().unwrap();
        if !sections.iter().any(|s| name.starts_with(s)) {
            continue;
        }
        let file = json["file"].as_str().unwrap();
        let tensors = files.entry(file.to_owned()).or_insert_with(|| {
            Tensor::read_safetensors(folder.join(file))
                .unwrap()
                .into_iter()
                .map(|(name, t)| (name, t.to_device(device())))
                .collect()
        });
        let known = [Kind::Double, Kind::Float].map(|kind| {
            compute(&Case {
                json,
                tensors,
                kind,
                failures: &failures,
            })
        });
        if known[0] {
            ran += 1;
        } else {
            unknown.insert(name.to_owned());
        }
    }
    println!(
        "golden {sections:?}: {ran} cases ran, {} unknown",
        unknown.len()
    );
    for name in &unknown {
        println!("  unknown: {name}");
    }
    let failures = failures.into_inner();
    assert!(
        failures.is_empty(),
        "{} differ:\n{}",
        failures.len(),
        failures.join("\n")
    );
    assert!(
        ran > 0,
        "no case of {sections:?} ran in {}",
        folder.display()
    );
    unknown
}

/// In f64 on the CPU, without its graph.
fn host(t: &Tensor) -> Tensor {
    t.detach().to_kind(Kind::Double).to_device(Device::Cpu)
}

/// The gradient of a scalar with respect to `leaf`.
pub(crate) fn gradient(scalar: &Tensor, leaf: &Tensor) -> Tensor {
    Tensor::run_backward(&[scalar], &[leaf], true, false).remove(0)
}
