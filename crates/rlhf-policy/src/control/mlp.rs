//! Small networks: policies, value functions and reward predictors over observations.

use std::path::Path;

use rlhf_data::seed::{Purpose, Stream};
use rlhf_train::tensors;
use tch::{Kind, Tensor};

use crate::error::{Error, Result, ensure};

/// Linear layers with tanh between them.
#[derive(Debug)]
pub struct Mlp {
    layers: Vec<(Tensor, Tensor)>,
}

impl Mlp {
    /// Layers of the given widths, inputs first. Weights are normal with deviation gain/√inputs, where the gain
    /// is √2, and `last_gain` in the last layer (0.01 makes a policy that begins nearly uniform; Andrychowicz et
    /// al. 2021, arXiv 2006.05990, section 3.2); biases are 0.
    ///
    /// # Errors
    /// With fewer than two widths, or one of 0.
    pub fn new(widths: &[usize], last_gain: f64, seed: u64, kind: Kind) -> Result<Self> {
        ensure(
            widths.len() > 1 && widths.iter().all(|w| *w > 0),
            "network",
            || format!("widths are {widths:?}, expected inputs, any hidden ones, outputs"),
        )?;
        let stream = Stream::new(seed, Purpose::Init);
        let layers = widths.windows(2).enumerate().map(|(layer, w)| {
            let last = layer + 2 == widths.len();
            let gain = if last { last_gain } else { 2f64.sqrt() };
            let scale = gain / (w[0] as f64).sqrt();
            let numbers: Vec<f64> = (0..w[0] * w[1])
                .map(|i| scale * stream.normal_pair(i as u64, layer as u32, 0).0)
                .collect();
            let leaf = |t: Tensor| t.to_kind(kind).set_requires_grad(true);
            let weight = Tensor::from_slice(&numbers).view([w[1] as i64, w[0] as i64]);
            let bias = Tensor::zeros([w[1] as i64], (kind, tch::Device::Cpu));
            (leaf(weight), leaf(bias))
        });
        Ok(Self {
            layers: layers.collect(),
        })
    }

    /// What the network gives: `[M, D]` becomes `[M, outputs]`.
    ///
    /// # Errors
    /// When `x` is of another width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = x.shallow_clone();
        for (i, (weight, bias)) in self.layers.iter().enumerate() {
            if i > 0 {
                x = x.tanh();
            }
            x = x.f_linear(weight, Some(bias))?;
        }
        Ok(x)
    }

    /// The one output of a value function: `[M, D]` becomes `[M]`.
    ///
    /// # Errors
    /// When `x` is of another width or the network has several outputs.
    pub fn scalars(&self, x: &Tensor) -> Result<Tensor> {
        let out = self.forward(x)?;
        ensure(out.size()[1] == 1, "value function", || {
            format!("it has {} outputs, expected one", out.size()[1])
        })?;
        Ok(out.f_squeeze_dim(1)?)
    }

    /// The parameters by name; they share storage.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let named = |(i, (w, b)): (usize, &(Tensor, Tensor))| {
            [
                (format!("layers.{i}.weight"), w.shallow_clone()),
                (format!("layers.{i}.bias"), b.shallow_clone()),
            ]
        };
        self.layers.iter().enumerate().flat_map(named).collect()
    }

    /// How many numbers the parameters are.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        self.layers.iter().map(|(w, b)| w.numel() + b.numel()).sum()
    }

    /// Its type.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.layers.first().map_or(Kind::Float, |l| l.0.kind())
    }

    /// Writes the parameters as safetensors.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        Ok(tensors::save(path, &self.parameters())?)
    }

    /// Reads what [`Mlp::save`] wrote.
    ///
    /// # Errors
    /// When the file is unreadable, or holds no such network.
    pub fn load(path: &Path) -> Result<Self> {
        let mut named = tensors::load(path)?;
        let mut layers = Vec::new();
        while let (Some(w), Some(b)) = (
            named.remove(&format!("layers.{}.weight", layers.len())),
            named.remove(&format!("layers.{}.bias", layers.len())),
        ) {
            layers.push((w.set_requires_grad(true), b.set_requires_grad(true)));
        }
        if layers.is_empty() || !named.is_empty() {
            return Err(Error::Argument {
                op: "network",
                what: format!("{} holds no network of layers", path.display()),
            });
        }
        Ok(Self { layers })
    }
}
