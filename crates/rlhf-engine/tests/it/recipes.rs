use rlhf::shipped::SHIPPED;
use rlhf_dpo::loss::PreferenceLoss;
use rlhf_engine::recipe::{Source, StageKind};

fn parse(text: &str, sets: &[&str]) -> Result<rlhf_engine::recipe::Recipe, rlhf::Usage> {
    let source = Source {
        name: "t".into(),
        text: text.into(),
        origin: "t.toml".into(),
    };
    source.parse(
        false,
        &sets.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>(),
    )
}

#[test]
fn every_shipped_recipe_parses_with_and_without_its_overlay() {
    for s in SHIPPED {
        let source = Source::find(s.name).unwrap();
        let whole = source.parse(false, &[]).unwrap();
        let smoke = source.parse(true, &[]).unwrap();
        let steps = |r: &rlhf_engine::recipe::Recipe| {
            r.stages
                .iter()
                .map(|s| match &s.kind {
                    StageKind::Sft(s) => s.steps,
                    StageKind::Reward(s) => s.steps,
                    StageKind::Dpo(s) => s.steps,
                    StageKind::Unpaired(s) => s.steps,
                    StageKind::Ranked(s) => s.steps,
                    StageKind::OnlineDpo(s) => s.steps,
                    StageKind::Grpo(s) => s.steps,
                    StageKind::Ppo(s) => s.steps,
                    StageKind::Opd(s) => s.steps,
                    StageKind::Control(s) => s.steps,
                    _ => 0,
                })
                .sum::<u64>()
        };
        assert!(steps(&smoke) < steps(&whole), "{}", s.name);
    }
}

#[test]
fn keys_can_be_set_by_stage_name() {
    let text = Source::find("quickstart").unwrap().text;
    let r = parse(
        &text,
        &[
            "stages.dpo.loss.beta=0.25",
            "run.seed=99",
            "stages.sft.data.limit=7",
            "run.title=plain words",
        ],
    )
    .unwrap();
    assert_eq!((r.run.seed, r.run.title.as_str()), (99, "plain words"));
    for s in &r.stages {
        match &s.kind {
            StageKind::Dpo(d) => assert_eq!(
                d.loss,
                PreferenceLoss::Sigmoid {
                    beta: 0.25,
                    label_smoothing: 0.1
                }
            ),
            StageKind::Sft(s) => assert_eq!(s.data.limit, Some(7)),
            _ => {}
        }
    }
}

#[test]
fn a_wrong_key_is_named_with_the_valid_ones() {
    let text = Source::find("quickstart").unwrap().text;
    let e = parse(&text, &["stages.dpo.loss.betta=0.2"]).unwrap_err();
    assert!(
        e.cause.contains("betta") && e.cause.contains("`beta`"),
        "{e}"
    );
    assert_eq!(e.place, "t.toml, stage `dpo`");
    let e = parse(&text, &["stages.nope.beta=0.2"]).unwrap_err();
    assert!(
        e.cause.contains("nope") && e.mend.contains("sft, rm, grpo"),
        "{e}"
    );
    let e = parse(&text, &["run.sead=1"]).unwrap_err();
    assert!(e.cause.contains("sead") && e.cause.contains("seed"), "{e}");
}

#[test]
fn wrong_values_are_refused_before_anything_runs() {
    let text = Source::find("quickstart").unwrap().text;
    for (set, word) in [
        ("stages.dpo.loss.beta=-1", "beta"),
        ("stages.dpo.loss={ kind = \"magic\" }", "magic"),
        (
            "stages.dpo.plus=[{ weight = nan, loss = { kind = \"sft\" } }]",
            "weight",
        ),
        ("stages.dpo.patience=2", "test_every"),
        ("stages.sft.steps=0", "steps"),
        ("stages.sft.optim.lr=0.0", "lr"),
        ("stages.sft.neftune_alpha=0.0", "neftune_alpha"),
        ("stages.sft.test_every=5", "needs test"),
        ("stages.sft.loss={ kind = \"dfft\" }", "dfft"),
        ("stages.dpo.data.path=\"stage:later\"", "`later`"),
        ("stages.grpo.rollouts.group_size=1", "group_size"),
        (
            "stages.grpo.loss={ kind = \"cispo\", max_ratio = 0.2, ratio = \"token\", reduction = { kind = \"token\" } }",
            "bounds ρ itself",
        ),
        (
            "stages.grpo.rollouts.sampling.temperature=0.0",
            "temperature",
        ),
        ("stages.ppo.gamma=1.5", "gamma"),
        ("stages.grpo.model=\"later\"", "`later`"),
        ("stages.rm.kind=\"magic\"", "magic"),
        ("init.from=\"x\"", "scratch"),
        ("run.checkpoint_every=0", "checkpoint_every"),
    ] {
        let e = parse(&text, &[set]).unwrap_err();
        assert!(e.to_string().contains(word), "{set}: {e}");
    }
    for (part, word) in [
        ("verifier = { kind = \"mth\" }", "mth"),
        ("verifier = { kind = \"math\", anser = \"a\" }", "anser"),
        (
            "verifier = { kind = \"regex\", pattern = \"(\" }",
            "`pattern`",
        ),
        (
            "verifier = { kind = \"code\", command = [] }",
            "`command` is empty",
        ),
        (
            "verifier = { kind = \"math\" }, pool = { deadline_s = 0.0 }",
            "deadline_s",
        ),
        ("verifier = { kind = \"math\" }, model = \"rm\"", "one of"),
        ("pool = { workers = 1 }, model = \"rm\"", "`pool`"),
        ("judge = { model = \"sft\" }", "pairwise"),
        (
            "judge = { model = \"later\", style = \"pairwise\" }",
            "`later`",
        ),
        (
            "judge = { url = \"http://h/v1\", model = \"m\", settings = { prompts = { rating = \"x\" } } }",
            "{prompt}",
        ),
    ] {
        let set = format!("stages.grpo.rollouts.reward=[{{ {part}, weight = 1.0 }}]");
        let e = parse(&text, &[&set]).unwrap_err();
        assert!(e.to_string().contains(word), "{set}: {e}");
    }
    assert!(parse("not toml [", &[]).is_err());
    assert!(
        parse("[run]\ntitle='x'", &[])
            .unwrap_err()
            .cause
            .contains("no stages")
    );
}

#[test]
fn a_stage_reads_what_an_earlier_one_kept() {
    let text = |select: &str, path: &str| {
        format!(
            r#"
[run]
title = "t"
seed = 1
checkpoint_every = 5
[init]
from = "x"
[[stages]]
name = "bon"
kind = "rejection"
model = "init"
data = {{ path = "p.jsonl", max_prompt = 8, max_completion = 8 }}
samples = 4
sampling = {{ temperature = 1.0, max_new_tokens = 8, max_sequences = 8 }}
reward = [{{ rule = {{ kind = "exact", field = "answer" }}, weight = 1.0 }}]
missing_eos_penalty = 0.0
select = {select}
micro_tokens = 64
[[stages]]
name = "again"
kind = "sft"
model = "init"
data = {{ path = "{path}", max_prompt = 8, max_completion = 8 }}
steps = 1
batch_size = 1
micro_tokens = 64
optim = {{ lr = 1e-3, schedule = {{ kind = "constant" }}, warmup_steps = 0, weight_decay = 0.0, max_grad_norm = 1.0 }}
"#
        )
    };
    let best = r#"{ kind = "top_per_prompt", keep = 1 }"#;
    let recipe = parse(&text(best, "stage:bon"), &[]).unwrap();
    assert!(matches!(&recipe.stages[1].kind, StageKind::Sft(s) if s.data.stage() == Some("bon")));
    assert!(parse(&text(best, "stage:bon/control"), &[]).is_ok());
    let e = parse(&text(best, "stage:worse"), &[]).unwrap_err();
    assert!(e.cause.contains("`worse`"), "{e}");
    for (select, word) in [
        (r#"{ kind = "top_per_prompt", keep = 5 }"#, "keep"),
        (r#"{ kind = "top_overall", keep = 0 }"#, "keep"),
        (r#"{ kind = "top_of_all", keep = 1 }"#, "top_of_all"),
    ] {
        let e = parse(&text(select, "stage:bon"), &[]).unwrap_err();
        assert!(e.to_string().contains(word), "{select}: {e}");
    }
}
