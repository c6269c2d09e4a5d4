//! What of a policy-gradient stage cannot be together.

use rlhf_policy::advantage::AdvantageEstimator;
use rlhf_policy::collect::Rules;
use rlhf_policy::grpo::OldPolicy;
use rlhf_policy::kl::{KlEstimator, KlPlacement};
use rlhf_policy::loss::{PolicyLoss, Reduction};
use rlhf_policy::reference::ReferencePolicy;

use super::{Grpo, Ppo, RewardPart, Rollouts, SHARED};
use crate::memory::{Memory, WeightsKind};

impl Rollouts {
    /// What is done with rollouts, but for the folders that a run decides on.
    pub(crate) fn rules(&self) -> Rules {
        Rules {
            dynamic: self.dynamic,
            overlong: self.overlong,
            filter_cut: self.filter_cut,
            record: None,
            replay: self.replay.as_ref().map(Into::into),
            ahead: self.ahead,
            greedy: false,
        }
    }
}

pub(super) fn grpo(s: &Grpo, need: &mut dyn FnMut(bool, &str)) {
    let compares = matches!(
        s.advantage,
        AdvantageEstimator::GroupNormalized { .. }
            | AdvantageEstimator::GroupCentered {}
            | AdvantageEstimator::LeaveOneOut {}
            | AdvantageEstimator::MeanNormalized {}
            | AdvantageEstimator::ReinforcePlusPlus {
                group_baseline: true
            }
    );
    need(
        !compares || s.rollouts.group_size > 1,
        "group_size must be at least 2: one completion has no group to compare with",
    );
    need(
        !s.rollouts.reward.is_empty(),
        "rollouts.reward must have at least one part",
    );
    need(
        s.rollouts.dynamic.is_none() || s.rollouts.group_size > 1,
        "rollouts.dynamic looks for groups whose rewards differ: group_size must be at least 2",
    );
    if let AdvantageEstimator::Running { decay } = s.advantage {
        need(
            (0.0..1.0).contains(&decay),
            "advantage.decay must be 0 to below 1",
        );
    }
    need(
        !(s.rollouts.dynamic.is_some() && matches!(s.advantage, AdvantageEstimator::Greedy {})),
        "rollouts.dynamic chooses by contrast within a group, advantage `greedy` needs none; leave one out",
    );
    let length = s.rollouts.sampling.max_new_tokens as u64;
    if let PolicyLoss::Clipped {
        reduction: Reduction::FixedLength { length: fixed },
        ..
    } = s.loss
    {
        need(
            u64::from(fixed) >= length.min(u64::from(u32::MAX)),
            "loss.reduction.length is below rollouts.sampling.max_new_tokens: longer completions would weigh more than 1",
        );
    }
    need(
        !(matches!(s.loss, PolicyLoss::Reinforce { .. }) && s.epochs * s.minibatches as u64 > 1),
        "loss `reinforce` has no ratio to the old policy: only the first step on a batch is right; set epochs = 1 and minibatches = 1, or take another loss",
    );
    need(
        s.kl.estimator != KlEstimator::Exact || s.kl.placement == KlPlacement::InLoss,
        "kl: the exact divergence of a token's distribution does not depend on the token, so it acts in the loss alone: set kl.placement = \"in_loss\"",
    );
    need(s.entropy_coef.is_finite(), "entropy_coef must be a number");
    need(
        !(matches!(s.loss, PolicyLoss::Gmpo { .. }) && s.correction.is_some()),
        "loss `gmpo` has no place for the weights of `correction`; leave one out",
    );
    need(
        !(s.old == OldPolicy::Sampler && s.correction.is_some()),
        "with old = \"sampler\" the ratio mends the mismatch already; leave `correction` out",
    );
    let off_policy = s.rollouts.ahead > 0 && s.old == OldPolicy::Learner && s.correction.is_none();
    need(
        !off_policy,
        "rollouts.ahead learns from an older policy's completions: give `correction` (as { level = \"token\", bound = { kind = \"truncate\", max = 2.0 } }) or old = \"sampler\"",
    );
    need(
        !(s.rollouts.ahead > 0
            && s.old == OldPolicy::Sampler
            && matches!(s.loss, PolicyLoss::Reinforce { .. })),
        "loss `reinforce` has no ratio that could mend rollouts.ahead; give `correction` in the place of old = \"sampler\"",
    );
    need(
        !(s.rollouts.process.is_some()
            && matches!(s.advantage, AdvantageEstimator::MeanNormalized {})),
        "advantage `mean_normalized` has no place for rollouts.process; leave one out",
    );
    if let Some(a) = s.adaptive_kl {
        need(
            a.target > 0.0 && a.horizon > 0.0 && a.target.is_finite() && a.horizon.is_finite(),
            "adaptive_kl.target and horizon must be above 0",
        );
        need(
            s.kl.coef > 0.0,
            "adaptive_kl multiplies kl.coef, which is 0: begin with one above 0",
        );
    }
    need(
        s.kl.coef >= 0.0 && s.kl.coef.is_finite(),
        "kl.coef must be 0 or more",
    );
    need(
        !(s.kl.placement == KlPlacement::InReward
            && s.kl.coef > 0.0
            && matches!(s.advantage, AdvantageEstimator::MeanNormalized {})),
        "advantage `mean_normalized` is for rewards that are not negative, kl in the reward makes them so; put it in the loss",
    );
    reference(s.reference, s.kl.coef, s.max_kl, &s.memory, need);
    charged(s.reference, &s.rollouts, need);
}

pub(super) fn ppo(s: &Ppo, need: &mut dyn FnMut(bool, &str)) {
    need(
        !s.rollouts.reward.is_empty(),
        "rollouts.reward must have at least one part",
    );
    if s.value_model == SHARED {
        need(
            s.value_lr.is_none(),
            "value_lr is for a value model of its own; with value_model = \"shared\" give value_coef",
        );
        need(
            s.value_coef.is_some_and(|c| c > 0.0 && c.is_finite()),
            "value_model = \"shared\" needs value_coef above 0",
        );
    } else {
        need(
            s.value_lr.is_some_and(|lr| lr > 0.0 && lr.is_finite()),
            "value_lr must be there and above 0",
        );
        need(
            s.value_coef.is_none(),
            "value_coef is for value_model = \"shared\"; a value model of its own has value_lr",
        );
    }
    if let Some(p) = &s.ptx {
        need(
            p.batch_size > 0 && p.coef > 0.0 && p.coef.is_finite(),
            "ptx.batch_size and coef must be above 0",
        );
    }
    need(
        s.rollouts.dynamic.is_none() || s.rollouts.group_size > 1,
        "rollouts.dynamic looks for groups whose rewards differ: group_size must be at least 2",
    );
    reference(s.reference, s.kl.coef(), s.max_kl, &s.memory, need);
    charged(s.reference, &s.rollouts, need);
}

/// Online direct alignment draws and scores, and knows nothing of what else rollouts can have.
pub(super) fn online(r: &Rollouts, need: &mut dyn FnMut(bool, &str)) {
    need(
        !r.reward.is_empty(),
        "rollouts.reward must have at least one part",
    );
    let unkept = r.reward.iter().find_map(RewardPart::unkept);
    need(unkept.is_none(), &unkept.unwrap_or_default());
    let others = r.dynamic.is_some()
        || r.overlong.is_some()
        || r.filter_cut
        || r.ahead > 0
        || r.record
        || r.replay.is_some()
        || r.samples.is_some()
        || r.process.is_some()
        || r.shaping.kl_budget.is_some();
    need(
        !others,
        "rollouts: dynamic, overlong, filter_cut, ahead, record, replay, samples, process and shaping.kl_budget are for stages of kind grpo, ppo and opd",
    );
}

fn charged(policy: ReferencePolicy, r: &Rollouts, need: &mut dyn FnMut(bool, &str)) {
    need(
        r.shaping.kl_budget.is_none() || !matches!(policy, ReferencePolicy::None {}),
        "reference `none` measures no KL; leave rollouts.shaping.kl_budget out",
    );
}

fn reference(
    policy: ReferencePolicy,
    coef: f64,
    max_kl: Option<f64>,
    memory: &Memory,
    need: &mut dyn FnMut(bool, &str),
) {
    if let Err(e) = policy.check() {
        need(false, &e.to_string());
    }
    need(
        max_kl.is_none_or(|k| k > 0.0 && k.is_finite()),
        "max_kl must be above 0",
    );
    if matches!(policy, ReferencePolicy::None {}) {
        need(
            coef == 0.0,
            "reference `none` cannot be with a KL penalty; set its coef to 0, or keep a reference",
        );
        need(
            max_kl.is_none(),
            "reference `none` measures no KL; leave max_kl out",
        );
    }
    need(
        !policy.moves() || memory.lora.is_none(),
        "a reference that moves needs weights of its own; with memory.lora it is the model without the adapter",
    );
    need(
        !(matches!(policy, ReferencePolicy::Ema { .. }) && memory.weights != WeightsKind::F32),
        "reference `ema` moves by less than weights of 16 bits can hold; use `sync`",
    );
}
