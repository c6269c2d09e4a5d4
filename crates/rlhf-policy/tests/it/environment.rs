//! Talks with environments: what is trained, what is recorded, that noise and limits hold.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use rlhf_data::conversation::{Message, Role, Text};
use rlhf_data::group::{Completion, Finish, PromptGroup, SamplerRecord};
use rlhf_data::pack::PackedBatch;
use rlhf_data::tokenize::ChatTokenizer;
use rlhf_model::{
    Config, DecoderWeights, DeviceBatch, GenerateRequest, Sampler, SamplingConfig, Transformer,
    target_logprobs,
};
use rlhf_policy::environment::{
    Calculator, Environment, Reply, Scene, TalkLimits, Turn, continuation, play,
};
use rlhf_policy::rollout::{Prompt, RolloutConfig, draw, score};
use rlhf_reward::source::{Part, RewardMix, Rule};
use serde_json::Map;
use tch::{Device, Kind};

fn tokenizer() -> ChatTokenizer {
    let folder: PathBuf =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/tasks/tokenizer");
    ChatTokenizer::load(&folder).unwrap()
}

fn prompts(tokenizer: &ChatTokenizer, of: &[(&str, &str)]) -> Vec<Prompt> {
    of.iter()
        .enumerate()
        .map(|(i, (text, answer))| {
            let asked = Text::Messages(vec![Message::new(Role::User, *text)]);
            let mut fields = Map::new();
            fields.insert("answer".into(), (*answer).into());
            Prompt {
                row: 10 + i as u64,
                ids: tokenizer.prompt_ids(&asked).unwrap(),
                text: (*text).into(),
                fields,
            }
        })
        .collect()
}

fn config(group_size: usize, max_new_tokens: usize) -> RolloutConfig {
    RolloutConfig {
        seed: 3,
        prompts_per_step: 2,
        group_size,
        temperature: 0.8,
        top_k: None,
        top_p: None,
        min_p: None,
        max_new_tokens,
        max_sequences: 16,
        weights: DecoderWeights::AsLoaded,
    }
}

fn scene(environment: &dyn Environment, limits: TalkLimits) -> Scene<'_> {
    Scene {
        environment,
        limits,
    }
}

const LIMITS: TalkLimits = TalkLimits {
    max_turns: 3,
    max_tokens: 60,
};

/// A policy that says what is written in a play, whatever it hears; keeps what it was asked.
#[derive(Debug)]
struct Actor<'a> {
    tokenizer: &'a ChatTokenizer,
    /// Lines by sample, turn by turn.
    lines: Vec<Vec<&'static str>>,
    asked: RefCell<Vec<Vec<GenerateRequest>>>,
}

impl Sampler for Actor<'_> {
    fn sample(
        &self,
        requests: &[GenerateRequest],
        config: &SamplingConfig,
    ) -> rlhf_model::Result<Vec<PromptGroup>> {
        let turn = self.asked.borrow().len();
        self.asked.borrow_mut().push(requests.to_vec());
        // After the first turn those are asked that have a line left.
        let mut speakers = (0..self.lines.len()).filter(|&s| self.lines[s].len() > turn);
        Ok(requests
            .iter()
            .map(|r| {
                let completions = (0..r.samples)
                    .map(|_| {
                        let line = self.lines[speakers.next().unwrap()][turn];
                        let mut ids = self.tokenizer.encode(line).unwrap();
                        ids.push(self.tokenizer.eos_ids()[0]);
                        let logprobs = vec![-0.25 - turn as f32; ids.len()];
                        let mut c = Completion::whole(ids, Finish::Stop);
                        c.sampler = Some(SamplerRecord {
                            logprobs,
                            policy_version: config.policy_version,
                            top: Vec::new(),
                        });
                        c
                    })
                    .collect();
                PromptGroup {
                    row: r.prompt_key,
                    prompt: r.prompt.clone(),
                    completions,
                }
            })
            .collect())
    }
}

fn calculator() -> Calculator {
    Calculator {
        field: "answer".into(),
        // The template of the tasks knows no tools.
        role: Role::User,
    }
}

#[test]
fn a_calculator_answers_and_its_words_are_not_trained() {
    let t = tokenizer();
    let prompts = prompts(&t, &[("6*7", "42")]);
    let actor = Actor {
        tokenizer: &t,
        lines: vec![
            vec!["calc 6*7", "42"],
            vec!["41"],
            vec!["calc 6**7", "calc 6*7", "42"],
        ],
        asked: RefCell::new(Vec::new()),
    };
    let env = calculator();
    let out = play(
        &actor,
        &t,
        scene(&env, LIMITS),
        (&prompts, &[0]),
        &config(3, 12),
        5,
    )
    .unwrap();
    assert_eq!(out.len(), 1);
    let group = &out[0].group;
    group.validate().unwrap();
    assert_eq!((group.row, &group.prompt), (10, &prompts[0].ids));
    assert_eq!(out[0].earned, [1.0, 0.0, 1.0]);
    assert_eq!(out[0].texts[0], "calc 6*74242");
    assert!(out[0].texts[2].contains("error: `*`"));
    // What follows the prompt is the conversation as the template writes it.
    let told = |role, text: &str| Message::new(role, text);
    let whole = Text::Messages(vec![
        told(Role::User, "6*7"),
        told(Role::Assistant, "calc 6*7"),
        told(Role::User, "42"),
    ]);
    let whole = t.prompt_ids(&whole).unwrap();
    let first = &group.completions[0];
    let end = [t.encode("42").unwrap(), vec![t.eos_ids()[0]]].concat();
    assert_eq!(
        [&group.prompt[..], &first.ids].concat(),
        [whole, end].concat()
    );
    for (c, turns) in group.completions.iter().zip([2, 1, 3]) {
        assert_eq!(c.trained.len(), turns);
        assert_eq!(c.finish, Finish::Stop);
        let record = c.sampler.as_ref().unwrap();
        assert_eq!(record.policy_version, 5);
        // Each turn has the log-probabilities of its draw, the tool's tokens 0, and only what the policy said
        // is trained.
        let mut expected = vec![0.0; c.ids.len()];
        for (turn, r) in c.trained.iter().enumerate() {
            expected[r.clone()].fill(-0.25 - turn as f32);
            assert!(t.eos_ids().contains(&c.ids[r.end - 1]));
        }
        assert_eq!(record.logprobs, expected);
    }
    let said = |c: &Completion, i: usize| t.decode(&c.ids[c.trained[i].clone()], true).unwrap();
    assert_eq!(said(&group.completions[2], 1), "calc 6*7");
    // One request for the group at first, then one for each that goes on, with all that it heard.
    let asked = actor.asked.borrow();
    let shape: Vec<(usize, usize)> = asked.iter().map(|r| (r.len(), r[0].samples)).collect();
    assert_eq!(shape, [(1, 3), (2, 1), (1, 1)]);
    assert!(asked[1][0].prompt.starts_with(&prompts[0].ids));
    let keys: std::collections::BTreeSet<u64> =
        asked.iter().flatten().map(|r| r.prompt_key).collect();
    assert_eq!(keys.len(), 4);
}

#[test]
fn turns_and_room_end_a_talk() {
    let t = tokenizer();
    let prompts = prompts(&t, &[("6*7", "42")]);
    let actor = || Actor {
        tokenizer: &t,
        lines: vec![vec!["calc 1", "calc 2", "calc 3"]],
        asked: RefCell::new(Vec::new()),
    };
    let go = |max_turns, max_tokens| {
        let limits = TalkLimits {
            max_turns,
            max_tokens,
        };
        play(
            &actor(),
            &t,
            scene(&calculator(), limits),
            (&prompts, &[0]),
            &config(1, 12),
            0,
        )
    };
    let turns = |max_turns, max_tokens| {
        let out = go(max_turns, max_tokens).unwrap();
        let c = &out[0].group.completions[0];
        assert_eq!((c.finish, out[0].earned[0]), (Finish::Length, 0.0));
        // What nobody goes on from is left out: the last token is the policy's.
        assert_eq!(c.trained.last().unwrap().end, c.ids.len());
        assert!(c.ids.len() <= max_tokens);
        c.trained.len()
    };
    assert_eq!(turns(3, 60), 3);
    assert_eq!(turns(2, 60), 2);
    // "calc 1" and its end are 7 tokens, the tool's turn 4, and nothing is left.
    assert_eq!(turns(3, 11), 1);
    assert!(go(0, 60).is_err());
    assert!(go(3, 0).is_err());
}

/// Ends at once.
struct Silent;

impl Environment for Silent {
    fn name(&self) -> &str {
        "silent"
    }

    fn step(&self, turn: &Turn<'_>) -> rlhf_policy::Result<Reply> {
        Ok(Reply::End(turn.ids.len() as f64))
    }
}

/// Says a word after each turn but the third, whatever comes.
struct Echo;

impl Environment for Echo {
    fn name(&self) -> &str {
        "echo"
    }

    fn step(&self, turn: &Turn<'_>) -> rlhf_policy::Result<Reply> {
        Ok(match turn.texts.len() {
            3 => Reply::End(0.5),
            2 => Reply::Text(" and".into()),
            _ => Reply::Messages(vec![Message::new(Role::User, "go on")]),
        })
    }
}

fn model(t: &ChatTokenizer) -> Transformer {
    let mut shape = Config::new(t.vocab_size() as i64, 32, 2, 2, 128);
    shape.initializer_range = 0.2;
    Transformer::init(shape, 4, Device::Cpu, Kind::Float).unwrap()
}

#[test]
fn a_talk_of_one_turn_is_a_rollout() {
    let t = tokenizer();
    let prompts = prompts(&t, &[("1+1", "2"), ("3+4", "7")]);
    let (model, cfg) = (model(&t), config(3, 10));
    let sampler = cfg.local(&model).unwrap();
    let limits = TalkLimits {
        max_turns: 1,
        max_tokens: 10,
    };
    let played = play(
        &sampler,
        &t,
        scene(&Silent, limits),
        (&prompts, &[1, 0]),
        &cfg,
        2,
    )
    .unwrap();
    let drawn = draw(&sampler, &t, &prompts, &[1, 0], &cfg, 2).unwrap();
    for (p, d) in played.iter().zip(&drawn) {
        assert_eq!((p.prompt, &p.group), (d.prompt, &d.group));
        assert_eq!(p.texts, d.texts);
        let lengths = d.group.completions.iter().map(|c| c.ids.len() as f64);
        assert_eq!(p.earned, lengths.collect::<Vec<_>>());
    }
}

/// The learner, who sees a whole talk in one packed batch, has the log-probabilities of the sampler, who was
/// asked turn by turn.
#[test]
fn learner_and_sampler_agree_on_every_trained_token() {
    let t = tokenizer();
    let prompts = prompts(&t, &[("1+1", "2"), ("3+4", "7")]);
    let (model, cfg) = (model(&t), config(3, 8));
    let sampler = cfg.local(&model).unwrap();
    let all = |chosen: &[usize]| {
        play(
            &sampler,
            &t,
            scene(&Echo, LIMITS),
            (&prompts, chosen),
            &cfg,
            2,
        )
        .unwrap()
    };
    let played = all(&[0, 1]);
    let groups: Vec<PromptGroup> = played.iter().map(|p| p.group.clone()).collect();
    let batch = DeviceBatch::new(&PackedBatch::pack(&groups).unwrap(), Device::Cpu).unwrap();
    let learner = tch::no_grad(|| target_logprobs(&model, &batch, cfg.temperature, false).unwrap());
    let learner = Vec::<f32>::try_from(learner.logprobs.values()).unwrap();
    let drawn: Vec<f32> = groups
        .iter()
        .flat_map(|g| &g.completions)
        .flat_map(|c| {
            let trained = c.trained.iter().cloned().flatten();
            trained.map(|i| c.sampler.as_ref().unwrap().logprobs[i])
        })
        .collect();
    assert_eq!(learner.len(), drawn.len());
    assert!(drawn.len() < groups.iter().map(PromptGroup::num_tokens).sum());
    for (a, b) in learner.iter().zip(&drawn) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
    assert!(groups[0].completions.iter().all(|c| c.trained.len() == 3));
    // Samples differ, and a prompt has the same talks alone.
    assert_ne!(groups[0].completions[0].ids, groups[0].completions[1].ids);
    assert_eq!(
        all(&[1])[0]
            .group
            .completions
            .iter()
            .map(|c| &c.ids)
            .collect::<Vec<_>>(),
        groups[1]
            .completions
            .iter()
            .map(|c| &c.ids)
            .collect::<Vec<_>>()
    );
}

#[test]
fn rewards_of_other_sources_are_added() {
    let t = tokenizer();
    let prompts = prompts(&t, &[("6*7", "42")]);
    let actor = Actor {
        tokenizer: &t,
        lines: vec![vec!["42"], vec!["fun"]],
        asked: RefCell::new(Vec::new()),
    };
    let env = calculator();
    let played = play(
        &actor,
        &t,
        scene(&env, LIMITS),
        (&prompts, &[0]),
        &config(2, 12),
        0,
    )
    .unwrap();
    let mut mix = RewardMix::new(0.0);
    let rule = Rule::Words {
        positive: vec!["fun".into()],
        negative: vec![],
    };
    mix.push(Part::new(0.25, Box::new(rule))).unwrap();
    let (scored, parts) = score(played, &prompts, &mix).unwrap();
    assert_eq!(scored[0].rewards, [1.0, 0.25]);
    assert_eq!(
        parts,
        [
            ("environment".to_owned(), 0.5),
            ("words".to_owned(), 0.5),
            ("words_part".to_owned(), 0.125)
        ]
    );
}

#[test]
fn what_the_template_puts_between_turns() {
    let t = tokenizer();
    let ids = continuation(&t, &[Message::new(Role::User, "42")]).unwrap();
    assert_eq!(
        t.decode(&ids, false).unwrap(),
        "<|user|>42<|end|><|assistant|>"
    );
}
