//! A `tch` module of one's own, trained by a preference loss alone:
//! `cargo run -p rlhf-dpo --example own_module --no-default-features`.
//!
//! The model gives one of four answers to each of three prompts; answer 2 is always the preferred one.
#![allow(clippy::print_stdout, reason = "an example")]

use rlhf_dpo::loss::{PairLogprobs, PairValues, PreferenceLoss};
use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let vars = nn::VarStore::new(Device::Cpu);
    let model = nn::linear(vars.root(), 3, 4, nn::LinearConfig::default());
    let prompts = Tensor::eye(3, (Kind::Float, Device::Cpu));
    let chosen = Tensor::from_slice(&[2i64, 2, 2]);
    let rejected = Tensor::from_slice(&[0i64, 1, 3]);
    // log π(answer | prompt); of a language model's completions it is the sum over their tokens.
    let logprobs = || {
        let all = model.forward(&prompts).log_softmax(-1, Kind::Float);
        let of = |answer: &Tensor| all.gather(1, &answer.unsqueeze(1), false).squeeze_dim(1);
        PairValues::new(&of(&chosen), &of(&rejected))
    };
    let reference = tch::no_grad(logprobs)?;
    let loss = PreferenceLoss::Ipo { beta: 0.2 };
    let mut optimizer = nn::Adam::default().build(&vars, 0.1)?;
    for step in 0..=50 {
        let out = loss.compute(&PairLogprobs::new(&logprobs()?, &reference).into())?;
        let mean = &out.loss.sum / out.loss.weight;
        optimizer.backward_step(&mean);
        if step % 10 == 0 {
            let accuracy = out.accuracies().mean(Kind::Float).double_value(&[]);
            println!(
                "step {step}: loss {:.4}, accuracy {accuracy}",
                mean.double_value(&[])
            );
        }
    }
    Ok(())
}
