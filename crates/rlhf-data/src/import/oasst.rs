//! Message trees: OASST1, message by message or a tree a row.
//!
//! Invariant: one tree is held at a time. The messages of a tree stand together; one whose tree was
//! closed before is refused, since its siblings are gone.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value;

use super::cell::{Cell, Columns, assistant, cell, message, optional, provenance, row};
use crate::record::Fault;

/// Messages from the root to a reply.
const MAX_DEPTH: usize = 128;
/// Bytes of text that a tree may hold, and that its rows may hold together.
const MAX_BYTES: usize = 64 << 20;

/// A message of a tree.
#[derive(Debug)]
struct Node {
    id: String,
    parent: Option<String>,
    assistant: bool,
    text: String,
    rank: Option<f64>,
    /// Neither deleted nor found bad by the reviewers.
    kept: bool,
    place: String,
}

/// A tree as far as it was read.
#[derive(Debug)]
pub(super) struct Tree {
    id: String,
    lang: Value,
    nodes: Vec<Node>,
    ids: HashSet<String>,
    bytes: usize,
}

/// The messages of a file, tree by tree.
#[derive(Debug, Default)]
pub(super) struct Trees {
    open: Option<Tree>,
    closed: HashSet<String>,
}

impl Trees {
    /// The tree that ends where this message begins another.
    pub(super) fn ended_by(&mut self, from: &Columns) -> Option<Tree> {
        let id = from.get("message_tree_id").and_then(Value::as_str)?;
        if self.open.as_ref().is_none_or(|tree| tree.id == id) {
            return None;
        }
        self.end()
    }

    /// The last tree.
    pub(super) fn end(&mut self) -> Option<Tree> {
        let tree = self.open.take()?;
        self.closed.insert(tree.id.clone());
        Some(tree)
    }

    /// Adds a message.
    pub(super) fn add(&mut self, place: &str, from: &Columns) -> Result<(), Fault> {
        let id = cell(from, "message_tree_id")?;
        let name = id.filled()?;
        if self.closed.contains(name) {
            return Err(Fault {
                mend: "sort the file by `message_tree_id`".into(),
                ..id.fault(
                    "scattered",
                    "other trees stand between the messages of its tree",
                )
            });
        }
        let tree = self.open.get_or_insert_with(|| Tree::new(name, from));
        let get = |name: &str| cell(from, name);
        let node = node(place, &get, &|name| optional(from, name))?;
        tree.add(node, &|| id.clone())
    }
}

/// A message of its fields.
fn node<'a>(
    place: &str,
    must: &dyn Fn(&str) -> Result<Cell<'a>, Fault>,
    maybe: &dyn Fn(&str) -> Option<Cell<'a>>,
) -> Result<Node, Fault> {
    // CSV has no null.
    let given = |name: &str| maybe(name).filter(|c| c.value() != "");
    let role = must("role")?;
    // Nor has it truth values.
    let is = |name: &str, wanted: bool| {
        given(name).is_some_and(|c| match c.value() {
            Value::String(s) => s.eq_ignore_ascii_case(&wanted.to_string()),
            v => *v == wanted,
        })
    };
    Ok(Node {
        id: must("message_id")?.filled()?.to_owned(),
        parent: match given("parent_id") {
            Some(c) => Some(c.filled()?.to_owned()),
            None => None,
        },
        assistant: match role.text()? {
            "prompter" => false,
            "assistant" => true,
            other => return Err(role.fault("unknown_role", format!("the unknown role `{other}`"))),
        },
        text: must("text")?.text()?.to_owned(),
        rank: match given("rank") {
            Some(c) => Some(c.number()?),
            None => None,
        },
        kept: !is("deleted", true) && !is("review_result", false),
        place: place.to_owned(),
    })
}

/// The rows of a whole tree: `prompt` with its `replies`, which have theirs.
pub(super) fn nested(from: &Columns) -> Result<Vec<Columns>, Fault> {
    let Some(root) = optional(from, "prompt") else {
        let alone = cell(from, "message_tree_id")?;
        return Err(Fault {
            mend: "read the file as a whole".into(),
            ..alone.fault(
                "malformed",
                "one message of a tree, which says nothing alone",
            )
        });
    };
    let name = cell(from, "message_tree_id")?;
    let mut tree = Tree::new(name.filled()?, from);
    let mut left = vec![(root, None::<String>)];
    while let Some((message, parent)) = left.pop() {
        let get = |name: &str| message.field(name);
        let mut node = node("", &get, &|name| message.maybe(name))?;
        node.parent = parent;
        if let Some(replies) = message.maybe("replies") {
            // The last one first, so that they leave the stack in their order.
            let replies = replies.items()?.into_iter().rev();
            left.extend(replies.map(|reply| (reply, Some(node.id.clone()))));
        }
        tree.add(node, &|| message.clone())?;
    }
    tree.rows().map_err(|(_, fault)| fault)
}

impl Tree {
    fn new(id: &str, from: &Columns) -> Self {
        Self {
            id: id.to_owned(),
            lang: from.get("lang").cloned().unwrap_or(Value::Null),
            nodes: Vec::new(),
            ids: HashSet::new(),
            bytes: 0,
        }
    }

    fn add<'a>(&mut self, node: Node, whole: &dyn Fn() -> Cell<'a>) -> Result<(), Fault> {
        if !self.ids.insert(node.id.clone()) {
            let what = format!("the message `{}` stands twice in its tree", node.id);
            return Err(whole().fault("malformed", what));
        }
        // The ids weigh more than nothing, however short the texts are.
        self.bytes += node.text.len() + 2 * node.id.len() + size_of::<Node>();
        if self.bytes > MAX_BYTES {
            return Err(whole().fault("over_long", too_large()));
        }
        self.nodes.push(node);
        Ok(())
    }

    /// Where its first message stands.
    pub(super) fn place(&self) -> &str {
        self.nodes.first().map_or("", |n| n.place.as_str())
    }

    /// One ranking for each message of the prompter with at least two ranked replies; what is wrong
    /// comes with the message's place.
    pub(super) fn rows(&self) -> Result<Vec<Columns>, (String, Fault)> {
        let at: HashMap<&str, usize> = (0..)
            .zip(&self.nodes)
            .map(|(i, n)| (n.id.as_str(), i))
            .collect();
        let wrong = |n: &Node, column: &str, what: String| {
            let mend = "correct or drop the tree";
            (
                n.place.clone(),
                super::cell::fault("malformed", column, what, mend),
            )
        };
        let mut replies: BTreeMap<usize, Vec<&Node>> = BTreeMap::new();
        for n in &self.nodes {
            let Some(parent) = &n.parent else {
                if n.assistant {
                    return Err(wrong(n, "role", "a tree that begins with an answer".into()));
                }
                continue;
            };
            let Some(&parent) = at.get(parent.as_str()) else {
                let what = format!("the message `{parent}` is not in its tree");
                return Err(wrong(n, "parent_id", what));
            };
            if self.nodes[parent].assistant == n.assistant {
                let what = "the same role as the message before it".to_owned();
                return Err(wrong(n, "role", what));
            }
            if n.assistant && n.kept && n.rank.is_some() && !n.text.trim().is_empty() {
                replies.entry(parent).or_default().push(n);
            }
        }
        let (mut rows, mut bytes) = (Vec::new(), 0_usize);
        for (prompt, replies) in replies.into_iter().filter(|(_, r)| r.len() > 1) {
            let asked = &self.nodes[prompt];
            let mut path = vec![asked];
            while let Some(parent) = path.last().and_then(|n| n.parent.as_deref()) {
                if path.len() > MAX_DEPTH {
                    let what = format!("more than {MAX_DEPTH} messages from the tree's root");
                    return Err(wrong(asked, "parent_id", what));
                }
                path.extend(at.get(parent).map(|i| &self.nodes[*i]));
            }
            if path.iter().any(|n| !n.kept) {
                continue;
            }
            bytes += path
                .iter()
                .chain(&replies)
                .map(|n| n.text.len())
                .sum::<usize>();
            if bytes > MAX_BYTES {
                return Err(wrong(asked, "text", too_large()));
            }
            rows.push(self.ranking(&path, &replies));
        }
        Ok(rows)
    }

    /// The row of replies to a path, which is given from its end.
    fn ranking(&self, path: &[&Node], replies: &[&Node]) -> Columns {
        let role = |n: &Node| if n.assistant { "assistant" } else { "user" };
        let ranks = || replies.iter().filter_map(|n| n.rank);
        let prompt = path.iter().rev().map(|n| message(role(n), &n.text));
        let mut to = row([
            ("prompt", prompt.collect()),
            (
                "completions",
                replies.iter().map(|n| assistant(&n.text)).collect(),
            ),
            (
                "scores",
                ranks().map(|rank| Value::from(0.0 - rank)).collect(),
            ),
            ("ranks", ranks().map(super::cell::tidy).collect()),
        ]);
        let origin = row([
            ("tree", self.id.as_str().into()),
            ("id", path.first().map(|n| n.id.as_str()).into()),
            ("lang", self.lang.clone()),
        ]);
        provenance(
            &mut to,
            &origin,
            &[("id", "id"), ("tree", "tree"), ("lang", "lang")],
        );
        to
    }
}

fn too_large() -> String {
    format!("a tree of more than {} MiB", MAX_BYTES >> 20)
}
