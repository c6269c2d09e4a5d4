//! Expected gradients by enumeration of every completion.
//!
//! A tabular policy over three tokens; token 0 ends a completion, at most two tokens are drawn. So
//! there are seven completions of one or two tokens (or, with a horizon of one, three of one).
//! J = E_π[r] − β KL(π‖π₀) is known exactly, and so is its gradient.

use rlhf_kernels::{LossSum, Offsets, Ragged};
use rlhf_policy::advantage::{self, AdvantageEstimator, Earned, StdScope, Whitening};
use rlhf_policy::kl::{KlEstimator, KlPenalty, KlPlacement};
use rlhf_policy::loss::ppo::{self, ScorePlace};
use rlhf_policy::loss::{
    Clip, GammaWeight, Gate, KlTerm, PolicyInputs, PolicyLoss, RatioLevel, Reduction, clipped,
};
use tch::{Kind, Tensor};

use crate::device::{device, from_slice};

const BETA: f64 = 0.37;
const COMPLETION: Reduction = Reduction::FixedLength { length: 1 };

/// Log-probs of every token of every completion, laid end to end.
struct Table {
    parameters: Vec<Tensor>,
    completions: Vec<Vec<i64>>,
    logprobs: Tensor,
}

impl Table {
    fn new(first: [f64; 3], second: Option<[f64; 9]>) -> Self {
        let leaf = |x: &[f64]| from_slice(x).set_requires_grad(true);
        let mut parameters = vec![leaf(&first)];
        let root = parameters[0].log_softmax(0, Kind::Double);
        let Some(second) = second else {
            return Self {
                completions: vec![vec![0], vec![1], vec![2]],
                logprobs: root,
                parameters,
            };
        };
        parameters.push(leaf(&second));
        let next = parameters[1]
            .view([3, 3])
            .log_softmax(1, Kind::Double)
            .view([9]);
        let mut completions = vec![vec![0]];
        let mut rows = vec![0];
        for a in 1..3 {
            for b in 0..3 {
                completions.push(vec![a, b]);
                rows.extend([a, 3 + 3 * a + b]);
            }
        }
        let logprobs = Tensor::cat(&[root, next], 0).index_select(0, &from_slice(&rows));
        Self {
            parameters,
            completions,
            logprobs,
        }
    }

    fn offsets(&self) -> Offsets {
        Offsets::from_lengths(
            &self
                .completions
                .iter()
                .map(|c| c.len() as i64)
                .collect::<Vec<_>>(),
        )
        .unwrap()
    }

    /// `[S]` log π(y).
    fn sequences(&self) -> Tensor {
        Ragged::new(self.logprobs.shallow_clone(), self.offsets())
            .unwrap()
            .sum()
    }

    /// Rows of `x`, one for each token of each completion, of the completions in `group`.
    fn select(&self, x: &Tensor, group: &[usize]) -> Ragged {
        let all = self.offsets();
        let rows: Vec<i64> = group
            .iter()
            .flat_map(|&s| all.host()[s]..all.host()[s + 1])
            .collect();
        let lengths: Vec<i64> = group
            .iter()
            .map(|&s| self.completions[s].len() as i64)
            .collect();
        Ragged::new(
            x.index_select(0, &from_slice(&rows)),
            Offsets::from_lengths(&lengths).unwrap(),
        )
        .unwrap()
    }

    fn gradient(&self, of: &Tensor) -> Vec<f64> {
        let parts = Tensor::run_backward(&[of], &self.parameters, true, false);
        parts
            .iter()
            .flat_map(|g| Vec::<f64>::try_from(g).unwrap())
            .collect()
    }
}

struct Problem {
    policy: Table,
    reference: Table,
    rewards: Vec<f64>,
}

impl Problem {
    fn one_token() -> Self {
        Self {
            policy: Table::new([0.3, -0.5, 0.9], None),
            reference: Table::new([-0.2, 0.4, 0.1], None),
            rewards: vec![1.0, -0.7, 0.4],
        }
    }

    fn two_tokens() -> Self {
        Self {
            policy: Table::new(
                [0.3, -0.5, 0.9],
                Some([0.0, 0.0, 0.0, 0.8, -0.1, 0.2, -0.6, 0.5, 1.1]),
            ),
            reference: Table::new(
                [-0.2, 0.4, 0.1],
                Some([0.0, 0.0, 0.0, -0.3, 0.7, 0.0, 0.9, -0.4, 0.2]),
            ),
            rewards: vec![1.0, -0.7, 0.4, 2.0, 0.1, -1.3, 0.6],
        }
    }

    fn probabilities(&self) -> Vec<f64> {
        Vec::<f64>::try_from(&self.policy.sequences().detach().exp()).unwrap()
    }

    /// Σ_t k1 of each completion.
    fn log_ratios(&self) -> Vec<f64> {
        Vec::<f64>::try_from(&(self.policy.sequences() - self.reference.sequences()).detach())
            .unwrap()
    }

    /// −∇(E[r] − β KL): what a loss should have as its gradient.
    fn truth(&self, reward: f64, beta: f64) -> Vec<f64> {
        let log_pi = self.policy.sequences();
        let kl = &log_pi - self.reference.sequences().detach();
        let objective = log_pi.exp() * (from_slice(&self.rewards) * reward - kl * beta);
        self.policy.gradient(&-objective.sum(Kind::Double))
    }

    /// The expected gradient of `loss` over groups of `size` completions drawn independently.
    fn expected(&self, size: u32, loss: impl Fn(&[usize]) -> LossSum) -> Vec<f64> {
        let n = self.policy.completions.len();
        let p = self.probabilities();
        let mut total = Tensor::zeros([], (Kind::Double, device()));
        for code in 0..n.pow(size) {
            let group: Vec<usize> = (0..size).map(|i| code / n.pow(i) % n).collect();
            let out = loss(&group);
            total += out.sum * (group.iter().map(|&s| p[s]).product::<f64>() / out.weight);
        }
        self.policy.gradient(&total)
    }

    /// The loss of a group at ρ = 1, from one advantage for each completion.
    fn surrogate(
        &self,
        group: &[usize],
        advantages: &[f64],
        reduction: Reduction,
        kl: Option<KlPenalty>,
    ) -> LossSum {
        let logprobs = self.policy.select(&self.policy.logprobs, group);
        let per_token = logprobs.broadcast(&from_slice(advantages));
        self.token_surrogate(&logprobs, group, per_token, reduction, kl)
    }

    fn token_surrogate(
        &self,
        logprobs: &Ragged,
        group: &[usize],
        advantages: Tensor,
        reduction: Reduction,
        kl: Option<KlPenalty>,
    ) -> LossSum {
        let old = logprobs.with_values(logprobs.values().detach()).unwrap();
        let advantages = logprobs.with_values(advantages).unwrap();
        let reference = self.reference.select(&self.reference.logprobs, group);
        let inputs = PolicyInputs {
            kl: kl.map(|penalty| KlTerm {
                exact: None,
                ref_logprobs: &reference,
                penalty,
            }),
            ..PolicyInputs::new(logprobs, &old, &advantages)
        };
        clipped::surrogate(&inputs, Clip::symmetric(0.2), RatioLevel::Token, reduction)
            .unwrap()
            .loss
    }

    /// Expected gradient with rewards compared by `estimator`.
    fn by_group(&self, size: u32, estimator: AdvantageEstimator, reduction: Reduction) -> Vec<f64> {
        self.expected(size, |group| {
            let rewards: Vec<f64> = group.iter().map(|&s| self.rewards[s]).collect();
            let advantages = estimator.advantages(&rewards, &[group.len()]).unwrap();
            self.surrogate(group, &advantages, reduction, None)
        })
    }

    /// Expected gradient of a KL penalty alone in the loss.
    fn kl_in_loss(&self, estimator: KlEstimator, placement: KlPlacement) -> Vec<f64> {
        let penalty = KlPenalty {
            estimator,
            placement,
            coef: BETA,
        };
        self.expected(1, |group| {
            self.surrogate(group, &[0.0], COMPLETION, Some(penalty))
        })
    }

    /// β ∇ Σ_prefixes d(prefix) KL at that prefix, with d held; p and q exchanged on request.
    fn kl_at_held_prefixes(&self, exchanged: bool) -> Vec<f64> {
        let tables = |t: &Table| {
            let rows = t
                .parameters
                .iter()
                .map(|p| p.view([-1, 3]))
                .collect::<Vec<_>>();
            Tensor::cat(&rows, 0).log_softmax(1, Kind::Double)
        };
        let (p, q) = (tables(&self.policy), tables(&self.reference).detach());
        let kl = if exchanged {
            q.exp() * (&q - &p)
        } else {
            p.exp() * (&p - &q)
        };
        let at = kl.sum_dim_intlist(&[1i64][..], false, Kind::Double);
        // Row 0 is the root; row 1 + a follows token a, and nothing follows token 0.
        let root = p.get(0).exp().detach();
        let reached = Tensor::cat(&[from_slice(&[1.0, 0.0]), root.narrow(0, 1, 2)], 0);
        self.policy
            .gradient(&((at * reached).sum(Kind::Double) * BETA))
    }
}

fn largest_gap(a: &[f64], b: &[f64]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max)
}

#[track_caller]
fn assert_equal(got: &[f64], expected: &[f64]) {
    assert!(
        expected.iter().any(|x| x.abs() > 1e-2),
        "the expected gradient says nothing: {expected:?}"
    );
    assert!(largest_gap(got, expected) < 1e-12, "{got:?}\n{expected:?}");
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn reinforce_is_unbiased() {
    let problem = Problem::two_tokens();
    let got = problem.expected(1, |g| {
        problem.surrogate(g, &[problem.rewards[g[0]]], COMPLETION, None)
    });
    assert_equal(&got, &problem.truth(1.0, 0.0));
    // A constant baseline changes nothing.
    let based = problem.expected(1, |g| {
        problem.surrogate(g, &[problem.rewards[g[0]] - 5.0], COMPLETION, None)
    });
    assert_equal(&based, &problem.truth(1.0, 0.0));
}

#[test]
fn leave_one_out_is_unbiased() {
    let problem = Problem::two_tokens();
    for size in [2, 3] {
        assert_equal(
            &problem.by_group(size, AdvantageEstimator::LeaveOneOut {}, COMPLETION),
            &problem.truth(1.0, 0.0),
        );
    }
}

#[test]
fn a_greedy_baseline_is_unbiased() {
    let problem = Problem::two_tokens();
    let p = problem.probabilities();
    let best = (0..p.len()).max_by(|&a, &b| p[a].total_cmp(&p[b])).unwrap();
    let got = problem.expected(2, |group| {
        let rewards: Vec<f64> = group.iter().map(|&s| problem.rewards[s]).collect();
        let greedy = [problem.rewards[best]];
        let advantages = advantage::against_greedy(&rewards, &[2], &greedy).unwrap();
        problem.surrogate(group, &advantages, COMPLETION, None)
    });
    assert_equal(&got, &problem.truth(1.0, 0.0));
    assert_eq!(
        advantage::against_greedy(&[1.0, f64::NAN], &[1, 1], &[f64::NAN, 0.0]).unwrap(),
        [0.0, 0.0]
    );
    assert!(advantage::against_greedy(&[1.0], &[1], &[]).is_err());
}

/// ∇ Σ_{k<G} pass@k / k = Σ_{k<G} (1 − p)^{k−1} ∇p, p the chance of success.
#[test]
fn maxrl_descends_the_truncated_likelihood() {
    let mut problem = Problem::two_tokens();
    problem.rewards = vec![0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0];
    let p: f64 = problem
        .probabilities()
        .iter()
        .zip(&problem.rewards)
        .map(|(p, r)| p * r)
        .sum();
    for size in [2u32, 3, 4] {
        let weight: f64 = (1..size).map(|k| (1.0 - p).powi(k as i32 - 1)).sum();
        assert_equal(
            &problem.by_group(size, AdvantageEstimator::MeanNormalized {}, COMPLETION),
            &problem.truth(weight, 0.0),
        );
    }
    let estimator = AdvantageEstimator::MeanNormalized {};
    assert_eq!(
        estimator
            .advantages(&[0.0, 0.0, 1.0, 1.0], &[2, 2])
            .unwrap(),
        [0.0; 4]
    );
    let e = estimator
        .advantages(&[1.0, -1.0], &[2])
        .unwrap_err()
        .to_string();
    assert!(e.contains("reward 1 is -1"), "{e}");
}

/// At ρ = 1 every surrogate is the policy gradient, however it treats other ratios.
#[test]
fn every_surrogate_is_the_truth_at_the_sampler() {
    let (token, sum) = (RatioLevel::Token, Reduction::SequenceSum {});
    let gate = Gate {
        positive: 1.0,
        negative: 1.05,
    };
    let named = |loss: PolicyLoss, problem: &Problem| {
        problem.expected(2, |group| {
            let rewards: Vec<f64> = group.iter().map(|&s| problem.rewards[s]).collect();
            let estimator = AdvantageEstimator::LeaveOneOut {};
            let advantages = estimator.advantages(&rewards, &[group.len()]).unwrap();
            let logprobs = problem.policy.select(&problem.policy.logprobs, group);
            let old = logprobs.with_values(logprobs.values().detach()).unwrap();
            let advantages = logprobs.broadcast(&from_slice(&advantages));
            let advantages = logprobs.with_values(advantages).unwrap();
            let inputs = PolicyInputs::new(&logprobs, &old, &advantages);
            loss.compute(&inputs).unwrap().loss
        })
    };
    let problem = Problem::two_tokens();
    for loss in [
        PolicyLoss::Clipped {
            clip: Clip::symmetric(0.2),
            ratio: token,
            reduction: sum,
        },
        PolicyLoss::Cispo {
            max_ratio: 5.0,
            min_ratio: 0.0,
            ratio: token,
            reduction: sum,
        },
        PolicyLoss::Sapo {
            temperature: gate,
            ratio: token,
            reduction: sum,
        },
        PolicyLoss::Vespo {
            weight: GammaWeight::default(),
            reduction: sum,
        },
        PolicyLoss::Reinforce { reduction: sum },
        // LUSPO: a completion's mean ratio, times its length.
        PolicyLoss::Clipped {
            clip: Clip::symmetric(0.2),
            ratio: RatioLevel::SequenceMean,
            reduction: sum,
        },
    ] {
        assert_equal(&named(loss, &problem), &problem.truth(1.0, 0.0));
    }
    // The geometric mean divides by the length: the truth where all are of one length, biased elsewhere.
    let gmpo = PolicyLoss::Gmpo {
        epsilon_low: 0.4,
        epsilon_high: 0.4,
    };
    let cosine = cosine(&named(gmpo, &problem), &problem.truth(1.0, 0.0));
    assert!(cosine > 0.5 && cosine < 1.0 - 1e-4, "{cosine}");
    let even = Problem::one_token();
    assert_equal(&named(gmpo, &even), &even.truth(1.0, 0.0));
}

#[test]
fn grpo_without_std_is_the_truth_times_the_share_of_others() {
    let problem = Problem::two_tokens();
    for size in [2u32, 3] {
        let share = f64::from(size - 1) / f64::from(size);
        assert_equal(
            &problem.by_group(size, AdvantageEstimator::GroupCentered {}, COMPLETION),
            &problem.truth(share, 0.0),
        );
    }
}

#[test]
fn grpo_with_std_points_elsewhere() {
    let problem = Problem::two_tokens();
    let estimator = AdvantageEstimator::GroupNormalized {
        std_epsilon: 1e-4,
        scope: StdScope::Group,
    };
    let cosine = cosine(
        &problem.by_group(3, estimator, COMPLETION),
        &problem.truth(1.0, 0.0),
    );
    assert!(cosine > 0.5 && cosine < 1.0 - 1e-3, "{cosine}");
}

#[test]
fn means_over_tokens_are_biased_where_lengths_differ() {
    let problem = Problem::two_tokens();
    for reduction in [Reduction::Sequence {}, Reduction::Token {}] {
        let cosine = cosine(
            &problem.by_group(2, AdvantageEstimator::LeaveOneOut {}, reduction),
            &problem.truth(1.0, 0.0),
        );
        assert!(
            cosine > 0.5 && cosine < 1.0 - 1e-4,
            "{reduction:?} {cosine}"
        );
    }
    // With completions of one length they are all the same.
    let problem = Problem::one_token();
    for reduction in [Reduction::Sequence {}, Reduction::Token {}] {
        assert_equal(
            &problem.by_group(2, AdvantageEstimator::LeaveOneOut {}, reduction),
            &problem.truth(1.0, 0.0),
        );
    }
}

#[test]
fn k1_in_the_reward_is_the_regularised_objective() {
    let problem = Problem::two_tokens();
    let kl = problem.log_ratios();
    let got = problem.expected(2, |group| {
        let rewards: Vec<f64> = group
            .iter()
            .map(|&s| problem.rewards[s] - BETA * kl[s])
            .collect();
        let advantages = AdvantageEstimator::LeaveOneOut {}
            .advantages(&rewards, &[2])
            .unwrap();
        problem.surrogate(group, &advantages, COMPLETION, None)
    });
    assert_equal(&got, &problem.truth(1.0, BETA));
}

/// PPO at ρ = 1: k1 in the token rewards, the score on the last token, generalised advantages.
fn ppo(problem: &Problem, lambda: f64, values: &dyn Fn(&[i64]) -> f64) -> Vec<f64> {
    problem.expected(1, |group| {
        let logprobs = problem.policy.select(&problem.policy.logprobs, group);
        let reference = problem.reference.select(&problem.reference.logprobs, group);
        let kl = KlEstimator::K1.estimate(&logprobs, &reference).unwrap();
        let score = from_slice(&[problem.rewards[group[0]]]);
        let rewards = ppo::token_rewards(&kl, &score, BETA, ScorePlace::LastToken {}).unwrap();
        let completion = &problem.policy.completions[group[0]];
        let v: Vec<f64> = (0..completion.len())
            .map(|t| values(&completion[..t]))
            .collect();
        let values = rewards.with_values(from_slice(&v)).unwrap();
        let out = advantage::generalized(&rewards, &values, 1.0, lambda, Whitening::None).unwrap();
        problem.token_surrogate(
            &logprobs,
            group,
            out.advantages.values().shallow_clone(),
            COMPLETION,
            None,
        )
    })
}

#[test]
fn ppo_is_unbiased_at_lambda_1_with_any_values() {
    let problem = Problem::two_tokens();
    let any = |prefix: &[i64]| {
        if prefix.is_empty() {
            0.3
        } else {
            -1.7 + prefix[0] as f64
        }
    };
    assert_equal(&ppo(&problem, 1.0, &any), &problem.truth(1.0, BETA));
    // With a smaller lambda wrong values do harm,
    assert!(largest_gap(&ppo(&problem, 0.5, &any), &problem.truth(1.0, BETA)) > 1e-2);
    // right ones do not.
    let (p, kl) = (problem.probabilities(), problem.log_ratios());
    let logprobs = Vec::<f64>::try_from(&problem.policy.logprobs.detach()).unwrap();
    let reference = Vec::<f64>::try_from(&problem.reference.logprobs.detach()).unwrap();
    let offsets = problem.policy.offsets();
    let exact = |prefix: &[i64]| {
        let (mut value, mut mass) = (0.0, 0.0);
        for (s, y) in problem
            .policy
            .completions
            .iter()
            .enumerate()
            .filter(|(_, y)| y.starts_with(prefix))
        {
            // What the prefix's own token paid is behind it.
            let start = offsets.host()[s] as usize;
            let paid: f64 = (start..start + prefix.len())
                .map(|t| logprobs[t] - reference[t])
                .sum();
            value += p[s] * (problem.rewards[s] - BETA * (kl[s] - paid));
            mass += p[s];
            assert!(y.len() > prefix.len());
        }
        value / mass
    };
    for lambda in [0.0, 0.5, 0.95] {
        assert_equal(&ppo(&problem, lambda, &exact), &problem.truth(1.0, BETA));
    }
}

/// With one token: a choice that warns does not descend KL(π‖π₀), a choice that does not warn does.
#[test]
fn the_warning_is_right_about_every_estimator_and_place() {
    let problem = Problem::one_token();
    let truth = problem.truth(0.0, BETA);
    let kl = problem.log_ratios();
    let mut silent = 0;
    for estimator in [
        KlEstimator::K1,
        KlEstimator::K2,
        KlEstimator::K3,
        KlEstimator::K3Straight,
    ] {
        for placement in [
            KlPlacement::InReward,
            KlPlacement::InLoss,
            KlPlacement::InLossWeighted,
        ] {
            let got = if placement == KlPlacement::InReward {
                problem.expected(1, |group| {
                    let one = |x: f64| {
                        Ragged::new(from_slice(&[x]), Offsets::new(vec![0, 1]).unwrap()).unwrap()
                    };
                    let penalty = estimator
                        .estimate(&one(kl[group[0]]), &one(0.0))
                        .unwrap()
                        .values()
                        .double_value(&[0]);
                    problem.surrogate(group, &[-BETA * penalty], COMPLETION, None)
                })
            } else {
                problem.kl_in_loss(estimator, placement)
            };
            let descends = largest_gap(&got, &truth) < 1e-12;
            let warning = KlPenalty {
                estimator,
                placement,
                coef: BETA,
            }
            .warning();
            assert_eq!(
                descends,
                warning.is_none(),
                "{estimator:?} {placement:?}: {got:?} {truth:?} {warning:?}"
            );
            silent += usize::from(descends);
        }
    }
    assert_eq!(silent, 6 - 1);
}

#[test]
fn in_the_loss_k1_does_nothing_and_k3_descends_the_other_kl() {
    for problem in [Problem::one_token(), Problem::two_tokens()] {
        let nothing = problem.kl_in_loss(KlEstimator::K1, KlPlacement::InLoss);
        assert!(nothing.iter().all(|g| g.abs() < 1e-14), "{nothing:?}");
    }
    let problem = Problem::two_tokens();
    let k3 = problem.kl_in_loss(KlEstimator::K3, KlPlacement::InLoss);
    assert_equal(&k3, &problem.kl_at_held_prefixes(true));
    assert!(largest_gap(&k3, &problem.kl_at_held_prefixes(false)) > 1e-2);
}

#[test]
fn in_the_loss_the_right_choices_descend_kl_at_held_prefixes() {
    let problem = Problem::two_tokens();
    let held = problem.kl_at_held_prefixes(false);
    for (estimator, placement) in [
        (KlEstimator::K2, KlPlacement::InLoss),
        (KlEstimator::K3Straight, KlPlacement::InLoss),
        (KlEstimator::K1, KlPlacement::InLossWeighted),
        (KlEstimator::K3, KlPlacement::InLossWeighted),
    ] {
        assert_equal(&problem.kl_in_loss(estimator, placement), &held);
    }
    // Which is not all of it: only the reward also weighs where a token leads.
    assert!(largest_gap(&held, &problem.truth(0.0, BETA)) > 1e-2);
}

/// The expected gradient over batches of `size` completions, whose tokens an estimator judges with the KL in the
/// reward and, on request, a step's reward at each first token.
fn of_tokens(problem: &Problem, size: u32, estimator: AdvantageEstimator, steps: bool) -> Vec<f64> {
    problem.expected(size, |group| {
        let scores: Vec<f64> = group.iter().map(|&s| problem.rewards[s]).collect();
        let logprobs = problem.policy.select(&problem.policy.logprobs, group);
        let reference = problem.reference.select(&problem.reference.logprobs, group);
        let k1 = (logprobs.values() - reference.values()).detach();
        let penalties = logprobs.with_values(k1 * BETA).unwrap();
        let judged: Vec<f64> = group
            .iter()
            .flat_map(|&s| (0..problem.policy.completions[s].len()).map(move |t| (s, t)))
            .map(|(s, t)| {
                if t == 0 {
                    first_step(problem, s)
                } else {
                    f64::NAN
                }
            })
            .collect();
        let judged = logprobs.with_values(from_slice(&judged)).unwrap();
        let advantages = estimator.of_tokens(&Earned {
            scores: &scores,
            group_sizes: &[group.len()],
            penalties: &penalties,
            steps: steps.then_some(&judged),
            greedy: Some(&[0.8]),
            running: -0.3,
        });
        let old = logprobs.with_values(logprobs.values().detach()).unwrap();

        let loss = PolicyLoss::Reinforce {
            reduction: Reduction::SequenceSum {},
        };
        // The estimator works on the host.
        let advantages = advantages.unwrap().values().to_device(device());
        let advantages = logprobs.with_values(advantages).unwrap();
        let inputs = PolicyInputs::new(&logprobs, &old, &advantages);
        loss.compute(&inputs).unwrap().loss
    })
}

/// A reward of the first token, whatever follows.
fn first_step(problem: &Problem, completion: usize) -> f64 {
    [0.9, -0.4, 1.3][problem.policy.completions[completion][0] as usize]
}

#[test]
fn every_baseline_leaves_the_regularised_gradient_as_it_is() {
    let problem = Problem::two_tokens();
    let mut with_steps = Problem::two_tokens();
    for s in 0..with_steps.rewards.len() {
        with_steps.rewards[s] += first_step(&problem, s);
    }
    for estimator in [
        AdvantageEstimator::Plain {},
        AdvantageEstimator::Running { decay: 0.9 },
        AdvantageEstimator::Greedy {},
        AdvantageEstimator::LeaveOneOut {},
    ] {
        let got = of_tokens(&problem, 2, estimator, false);
        assert_equal(&got, &problem.truth(1.0, BETA));
        let got = of_tokens(&problem, 2, estimator, true);
        assert_equal(&got, &with_steps.truth(1.0, BETA));
    }
    // A mean that includes the completion itself takes its share.
    let got = of_tokens(&problem, 2, AdvantageEstimator::BatchCentered {}, false);
    assert_equal(&got, &problem.truth(0.5, BETA * 0.5));
}

#[test]
fn reinforce_plus_plus_points_near_the_truth_and_not_along_it() {
    let problem = Problem::two_tokens();
    let plus = AdvantageEstimator::ReinforcePlusPlus {
        group_baseline: false,
    };
    let cosine = cosine(
        &of_tokens(&problem, 3, plus, false),
        &problem.truth(1.0, BETA),
    );
    assert!(cosine > 0.8 && cosine < 1.0 - 1e-4, "{cosine}");
}

/// A policy that follows the expected gradients alone comes to rest at π* ∝ π₀ exp(r/β), the optimum of
/// E[r] − β KL(π‖π₀): REINFORCE and RLOO with k1 in the reward, and, of one token, k2 in the loss (of more tokens it
/// knows nothing of what a token does to the later ones).
#[test]
fn the_regularised_optimum_is_reached() {
    const BETA: f64 = 1.0;
    let penalty = KlPenalty {
        estimator: KlEstimator::K2,
        placement: KlPlacement::InLoss,
        coef: BETA,
    };
    for (way, tokens) in [
        ("reinforce", 2),
        ("rloo", 2),
        ("reinforce", 1),
        ("k2 in the loss", 1),
    ] {
        let start = || match tokens {
            1 => Problem::one_token(),
            _ => Problem::two_tokens(),
        };
        let tilt = from_slice(&start().rewards) / BETA;
        let scores = start().reference.sequences().detach() + tilt;
        let optimum = scores.softmax(0, Kind::Double);
        let (mut first, mut second) = ([0.3, -0.5, 0.9], [0.0; 9]);
        let mut apart = 1.0;
        for _ in 0..1000 {
            let problem = Problem {
                policy: Table::new(first, (tokens == 2).then_some(second)),
                ..start()
            };
            let now = problem.policy.sequences().detach().exp();
            apart = (now - &optimum).abs().sum(Kind::Double).double_value(&[]) / 2.0;
            if apart < 1e-7 {
                break;
            }
            let log_ratios = problem.log_ratios();
            let tied = |s: usize| problem.rewards[s] - BETA * log_ratios[s];
            let gradient = match way {
                "reinforce" => {
                    problem.expected(1, |g| problem.surrogate(g, &[tied(g[0])], COMPLETION, None))
                }
                "rloo" => problem.expected(2, |g| {
                    let rewards: Vec<f64> = g.iter().map(|&s| tied(s)).collect();
                    let rloo = AdvantageEstimator::LeaveOneOut {};
                    let advantages = rloo.advantages(&rewards, &[2]).unwrap();
                    problem.surrogate(g, &advantages, COMPLETION, None)
                }),
                _ => problem.expected(1, |g| {
                    problem.surrogate(g, &[problem.rewards[g[0]]], COMPLETION, Some(penalty))
                }),
            };
            for (x, slope) in first.iter_mut().chain(&mut second).zip(gradient) {
                *x -= 3.0 * slope;
            }
        }
        assert!(
            apart < 1e-6,
            "{way}, {tokens}: {apart:.1e} from the optimum"
        );
    }
}

/// The exact divergence in the loss: with the prefixes held its expected gradient is that of KL(π‖π₀), as k2's is, and
/// without the noise of the token drawn.
#[test]
fn the_exact_divergence_holds_the_prefixes() {
    let problem = Problem::two_tokens();
    let tables = |t: &Table| {
        let rows: Vec<Tensor> = t.parameters.iter().map(|p| p.view([-1, 3])).collect();
        Tensor::cat(&rows, 0)
    };
    let (p, q) = (tables(&problem.policy), tables(&problem.reference).detach());
    let at = rlhf_policy::kl::exact(&p, &q).unwrap();
    // Row 0 is the root; row 1 + a follows token a.
    let rows: Vec<i64> = problem
        .policy
        .completions
        .iter()
        .flat_map(|c| [0, 1 + c[0]].into_iter().take(c.len()))
        .collect();
    let at_tokens = at.index_select(0, &from_slice(&rows));
    let penalty = KlPenalty {
        estimator: KlEstimator::Exact,
        placement: KlPlacement::InLoss,
        coef: BETA,
    };
    assert!(penalty.warning().is_none());
    let got = problem.expected(1, |group| {
        let logprobs = problem.policy.select(&problem.policy.logprobs, group);
        let old = logprobs.with_values(logprobs.values().detach()).unwrap();
        let none = logprobs
            .with_values(logprobs.values().zeros_like())
            .unwrap();
        let exact = problem.policy.select(&at_tokens, group);
        let reference = problem.reference.select(&problem.reference.logprobs, group);
        let inputs = PolicyInputs {
            kl: Some(KlTerm {
                exact: Some(&exact),
                ref_logprobs: &reference,
                penalty,
            }),
            ..PolicyInputs::new(&logprobs, &old, &none)
        };
        let clip = Clip::symmetric(0.2);
        let out = clipped::surrogate(&inputs, clip, RatioLevel::Token, COMPLETION);
        out.unwrap().loss
    });
    assert_equal(&got, &problem.kl_at_held_prefixes(false));
    assert_equal(
        &got,
        &problem.kl_in_loss(KlEstimator::K2, KlPlacement::InLoss),
    );
}
