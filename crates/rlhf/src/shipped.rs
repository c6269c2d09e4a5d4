//! The recipes shipped in the binary, as text.

/// A recipe shipped in the binary.
#[derive(Clone, Copy, Debug)]
pub struct Shipped {
    /// Its name on the command line.
    pub name: &'static str,
    /// Its TOML text.
    pub text: &'static str,
}

/// The shipped recipes.
pub const SHIPPED: &[Shipped] = &[
    Shipped {
        name: "quickstart",
        text: include_str!("../recipes/quickstart.toml"),
    },
    Shipped {
        name: "stories",
        text: include_str!("../recipes/stories.toml"),
    },
    Shipped {
        name: "cartpole",
        text: include_str!("../recipes/cartpole.toml"),
    },
    Shipped {
        name: "christiano2017",
        text: include_str!("../recipes/christiano2017.toml"),
    },
    Shipped {
        name: "overoptimisation",
        text: include_str!("../recipes/overoptimisation.toml"),
    },
    Shipped {
        name: "tasks",
        text: include_str!("../recipes/tasks.toml"),
    },
    Shipped {
        name: "thermostat",
        text: include_str!("../recipes/thermostat.toml"),
    },
    Shipped {
        name: "smollm2-persona",
        text: include_str!("../recipes/smollm2-persona.toml"),
    },
    Shipped {
        name: "reward-stories",
        text: include_str!("../recipes/reward-stories.toml"),
    },
    Shipped {
        name: "reward-smollm2",
        text: include_str!("../recipes/reward-smollm2.toml"),
    },
    Shipped {
        name: "smollm2-losses",
        text: include_str!("../recipes/smollm2-losses.toml"),
    },
    Shipped {
        name: "smollm2-gsm8k",
        text: include_str!("../recipes/smollm2-gsm8k.toml"),
    },
    Shipped {
        name: "smollm2-gsm8k-grpo",
        text: include_str!("../recipes/smollm2-gsm8k-grpo.toml"),
    },
    Shipped {
        name: "smollm2-harmless",
        text: include_str!("../recipes/smollm2-harmless.toml"),
    },
];

/// The algorithms that `preset = "…"` of a stage can name, as TOML: what each sets, and its source.
pub const PRESETS: &str = include_str!("../recipes/presets.toml");

/// Finds a shipped recipe.
#[must_use]
pub fn find(name: &str) -> Option<&'static Shipped> {
    SHIPPED.iter().find(|s| s.name == name)
}

/// The names of all shipped recipes, for messages.
#[must_use]
pub fn names() -> String {
    SHIPPED
        .iter()
        .map(|s| s.name)
        .collect::<Vec<_>>()
        .join(", ")
}
