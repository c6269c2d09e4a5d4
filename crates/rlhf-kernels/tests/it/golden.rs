//! Log-probabilities, AdamW and clipping against TRL's and PyTorch's own numbers.

use rlhf_kernels::kl::{Divergence, KlOptions, Logits, SampledKl};
use rlhf_kernels::optim::{AdamWConfig, Norm, Optimizer, OptimizerConfig, clip_grad_norm_by};
use rlhf_kernels::{Head, LogprobOptions, entropy, linear_kl, linear_logprobs, token_logprobs};
use tch::{Kind, Tensor};

use crate::golden_io::{Case, gradient, run};

/// Reductions over a vocabulary, in f64.
const OVER_VOCABULARY: f64 = 1e-10;

#[test]
fn a_logprobs() {
    run(&["a/"], |case| {
        match case.name() {
            "a/degenerate" => degenerate(case),
            "a/topk_index" => topk_index(case),
            "a/row_mask" => row_mask(case),
            "a/bf16" => bf16(case),
            _ if case.after("a/logp_entropy/").is_some() => logits(case),
            _ if case.after("a/linear/").is_some() => linear(case),
            _ => return false,
        }
        true
    });
}

fn check(case: &Case<'_>, output: &str, got: &Tensor) {
    let expected = case.output(output);
    let got = got.view_as(&expected).to_kind(Kind::Double);
    // Entropies of rows with one possible word: 10⁻³⁰, of which the reference itself has lost parts.
    if expected.abs().max().double_value(&[]) < 1e-20 {
        assert!(
            got.abs().max().double_value(&[]) < 1e-20,
            "{} {output}",
            case.name()
        );
        return;
    }
    case.compare(output, &got, &expected, OVER_VOCABULARY);
}

/// Rows and their ids.
fn rows(case: &Case<'_>) -> (Tensor, Tensor) {
    let logits = case.input("logits");
    let v = logits.size().pop().unwrap();
    (logits.reshape([-1, v]), case.input("ids").flatten(0, -1))
}

fn logits(case: &Case<'_>) {
    let (logits, ids) = rows(case);
    let leaf = logits.set_requires_grad(true);
    let z = &leaf / case.number("temperature").unwrap();
    let (logp, h) = (token_logprobs(&z, &ids).unwrap(), entropy(&z).unwrap());
    let weighted =
        |x: &Tensor, cotangent: &str| (x * case.input(cotangent).flatten(0, -1)).sum(case.kind);
    check(case, "logp", &logp);
    check(
        case,
        "grad_logits_from_logp",
        &gradient(&weighted(&logp, "cot_logp"), &leaf),
    );
    // TRL's entropy is NaN where a logit is −∞; the file then holds the right one beside it.
    let suffix = if case.has("entropy_rederived") {
        "_rederived"
    } else {
        ""
    };
    check(case, &format!("entropy{suffix}"), &h);
    let grad = gradient(&weighted(&h, "cot_entropy"), &leaf);
    check(case, &format!("grad_logits_from_entropy{suffix}"), &grad);
}

/// A chosen id at −∞ gives −∞, a row of −∞ NaN.
fn degenerate(case: &Case<'_>) {
    let (logits, ids) = rows(case);
    let got = token_logprobs(&logits, &ids).unwrap();
    let expected = case.output("logp").flatten(0, -1);
    assert!(bool::try_from(got.isnan().eq_tensor(&expected.isnan()).all()).unwrap());
    assert!(bool::try_from(got.isneginf().eq_tensor(&expected.isneginf()).all()).unwrap());
    let finite = expected.isfinite();
    case.compare(
        "logp",
        &got.masked_select(&finite),
        &expected.masked_select(&finite),
        OVER_VOCABULARY,
    );
}

/// Several ids a row: the row repeated.
fn topk_index(case: &Case<'_>) {
    let (logits, ids) = rows(case);
    let k = case.input("ids").size().pop().unwrap();
    let logits = logits.repeat_interleave_self_int(k, 0, None);
    check(case, "logp", &token_logprobs(&logits, &ids).unwrap());
}

/// A row that is not wanted is not computed at all: the rest, laid into zeros.
fn row_mask(case: &Case<'_>) {
    let (logits, ids) = rows(case);
    let wanted = case
        .mask("row_mask")
        .flatten(0, -1)
        .nonzero()
        .squeeze_dim(1);
    let (kept, kept_ids) = (
        logits.index_select(0, &wanted),
        ids.index_select(0, &wanted),
    );
    let spread = |x: Tensor| {
        ids.zeros_like()
            .to_kind(case.kind)
            .index_copy(0, &wanted, &x)
    };
    check(
        case,
        "logp",
        &spread(token_logprobs(&kept, &kept_ids).unwrap()),
    );
    check(case, "entropy", &spread(entropy(&kept).unwrap()));
}

/// bf16 logits are summed in f32, so they lie near the truth and not near TRL's bf16.
fn bf16(case: &Case<'_>) {
    let (logits, ids) = rows(case);
    check(case, "logp_true", &token_logprobs(&logits, &ids).unwrap());
    check(case, "entropy_true", &entropy(&logits).unwrap());
    if case.kind == Kind::Float {
        let narrow = logits.to_kind(Kind::BFloat16);
        check(case, "logp_true", &token_logprobs(&narrow, &ids).unwrap());
        check(case, "entropy_true", &entropy(&narrow).unwrap());
    }
}

fn linear(case: &Case<'_>) {
    let scale = case.number("logit_scale").unwrap();
    let hidden = (case.input("hidden") * scale).set_requires_grad(true);
    let weight = case.input("weight").set_requires_grad(true);
    let bias = case
        .has("grad_bias_from_logp")
        .then(|| case.input("bias").set_requires_grad(true));
    let head = Head {
        weight: &weight,
        bias: bias.as_ref(),
    };
    let options = LogprobOptions {
        temperature: case.number("temperature").unwrap(),
        softcap: case.number("softcap"),
        entropy: true,
        top1: true,
        moments: true,
        chunk_rows: Some(4),
        ..Default::default()
    };
    let out = linear_logprobs(&hidden, head, &case.input("ids"), &options).unwrap();
    let moments = out.moments.unwrap();
    check(case, "log_sum_sq_probs", &moments.log_sum_sq_probs);
    check(case, "mean_logits", &moments.mean_logits);
    check(case, "is_top1", &out.top1.unwrap().agrees);
    for (name, value) in [
        ("logp", &out.logprobs),
        ("entropy", out.entropy.as_ref().unwrap()),
    ] {
        check(case, name, value);
        let loss = (value * case.input(&format!("cot_{name}"))).sum(case.kind);
        let grad = |leaf| gradient(&loss, leaf);
        check(
            case,
            &format!("grad_hidden_from_{name}"),
            &(grad(&hidden) * scale),
        );
        check(case, &format!("grad_weight_from_{name}"), &grad(&weight));
        if let Some(bias) = &bias {
            check(case, &format!("grad_bias_from_{name}"), &grad(bias));
        }
    }
}

/// Whole divergences from given logits: hidden states through an identity as head.
#[test]
fn b_kl() {
    run(&["b/"], |case| {
        let rows = |name: &str| {
            let t = case.input(name);
            let v = t.size().pop().unwrap();
            t.reshape([-1, v])
        };
        let (policy, reference) = (rows("policy_logits"), rows("ref_logits"));
        let ids = case.input("ids").flatten(0, -1);
        let mask = case.mask("mask").flatten(0, -1);
        let leaf = policy.set_requires_grad(true);
        let eye = Tensor::eye(leaf.size()[1], (case.kind, leaf.device()));
        let logp = token_logprobs(&leaf, &ids).unwrap();
        let ref_logp = token_logprobs(&reference, &ids).unwrap();
        check(case, "logp", &logp);
        check(case, "ref_logp", &ref_logp);
        let exact = |divergence| {
            let options = KlOptions {
                chunk_rows: Some(4),
                ..KlOptions::new(divergence)
            };
            linear_kl(
                Logits::new(&leaf, &eye),
                Logits::new(&reference, &eye),
                &options,
            )
            .unwrap()
        };
        let sampled = |e: SampledKl| e.estimate(&logp, &ref_logp).unwrap();
        for (name, value) in [
            ("k1", sampled(SampledKl::K1)),
            ("k2", sampled(SampledKl::K2)),
            ("k3", sampled(SampledKl::K3)),
            ("kl_exact", exact(Divergence::Reverse)),
            ("kl_exact_reverse_args", exact(Divergence::Forward)),
        ] {
            check(case, name, &value);
            let grad = gradient(&value.sum(case.kind), &leaf);
            check(case, &format!("grad_policy_logits_{name}"), &grad);
            let mean = format!("masked_mean_{name}");
            if case.has(&mean) {
                check(case, &mean, &value.masked_select(&mask).mean(case.kind));
            }
        }
        true
    });
}

/// The schedules of this section (`h/lr/`) belong to the training crate.
#[test]
fn h_optim() {
    run(&["h/adamw/", "h/clip/"], |case| {
        if case.after("h/adamw/").is_some() {
            adamw(case);
        } else {
            clip(case);
        }
        true
    });
}

fn adamw(case: &Case<'_>) {
    let parameter = case.input("p0").set_requires_grad(true);
    let beta = |i: usize| case.setting("betas")[i].as_f64().unwrap();
    let config = AdamWConfig {
        beta1: beta(0),
        beta2: beta(1),
        eps: case.number("eps").unwrap(),
        weight_decay: case.number("weight_decay").unwrap(),
        ..AdamWConfig::default()
    };
    let config = if case.setting("amsgrad").as_bool() == Some(true) {
        OptimizerConfig::AmsGrad(config)
    } else {
        OptimizerConfig::AdamW(config)
    };
    let mut optim = Optimizer::new(vec![("p".into(), parameter.shallow_clone())], config);
    let grads = case.input("grads");
    let mut path = Vec::new();
    for t in 0..grads.size()[0] {
        optim.zero_grad();
        (&parameter * grads.get(t)).sum(case.kind).backward();
        optim.step(case.number("lr").unwrap()).unwrap();
        path.push(parameter.detach().copy());
    }
    case.check("params", &Tensor::stack(&path, 0));
    for (name, state) in optim.state() {
        match name.as_str() {
            "exp_avg.p" => case.check("exp_avg", &state),
            "exp_avg_sq.p" => case.check("exp_avg_sq", &state),
            "step.p" => assert_eq!(state.double_value(&[0]), grads.size()[0] as f64),
            _ => assert_eq!(name, "max_exp_avg_sq.p"),
        }
    }
}

fn clip(case: &Case<'_>) {
    let grads = case.input("grads").narrow(0, 0, 3) * case.number("scale").unwrap();
    let parts: Vec<Tensor> = grads.unbind(0);
    // Infinity is no number in JSON.
    let norm = if case.number("norm_type") == Some(2.0) {
        Norm::Two
    } else {
        Norm::Max
    };
    let size = clip_grad_norm_by(&parts, case.number("max_norm").unwrap(), norm).unwrap();
    case.check("total_norm", &Tensor::from(size));
    case.check("clipped", &Tensor::stack(&parts, 0));
}
