//! Messages with roles, and text that may be either plain or a list of messages.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The instructions before the talk.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// A tool's output.
    Tool,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 4] = [Self::System, Self::User, Self::Assistant, Self::Tool];

    /// The name in data and templates.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }

    /// The role of a name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.name() == name)
    }
}

/// A call of a tool by the assistant.
///
/// As JSON it is `{"id"?, "type": "function", "function": {"name", "arguments": {…}}}`. It is also read
/// without the outer layer, and with the arguments as JSON text, as OpenAI writes them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ToolCall {
    /// What the tool's answer refers to.
    pub id: Option<String>,
    /// The tool.
    pub name: String,
    /// Its arguments: a JSON object as text.
    arguments: String,
}

impl ToolCall {
    /// A call of the tool `name`.
    #[must_use]
    pub fn new(id: Option<String>, name: impl Into<String>, arguments: Map<String, Value>) -> Self {
        Self {
            id,
            name: name.into(),
            arguments: Value::Object(arguments).to_string(),
        }
    }

    /// Its arguments as a JSON object in text.
    #[must_use]
    pub fn arguments(&self) -> &str {
        &self.arguments
    }

    /// Reads a call.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_json(v: &Value) -> Result<Self, String> {
        let body = v.get("function").unwrap_or(v);
        let name = body
            .get("name")
            .and_then(Value::as_str)
            .filter(|n| !n.is_empty())
            .ok_or("a tool call has no name")?;
        let arguments = match body.get("arguments") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(o)) => o.clone(),
            Some(Value::String(s)) => serde_json::from_str(s).map_err(|e| {
                format!("the arguments of the tool call `{name}` are no JSON object: {e}")
            })?,
            Some(_) => {
                return Err(format!(
                    "the arguments of the tool call `{name}` are no JSON object"
                ));
            }
        };
        let id = match v.get("id") {
            None | Some(Value::Null) => None,
            Some(Value::String(s)) => Some(s.clone()),
            Some(_) => return Err(format!("the id of the tool call `{name}` is no text")),
        };
        Ok(Self::new(id, name, arguments))
    }

    /// The call as JSON.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let arguments: Value = serde_json::from_str(&self.arguments).unwrap_or_else(|_| json!({}));
        let mut call =
            json!({"type": "function", "function": {"name": self.name, "arguments": arguments}});
        if let Some(id) = &self.id {
            call["id"] = id.as_str().into();
        }
        call
    }
}

impl Serialize for ToolCall {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_json().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ToolCall {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_json(&Value::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said; may be empty beside tool calls.
    pub content: String,
    /// The tool that speaks, or which of several persons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The tools that the assistant calls.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

impl Message {
    /// A turn without tools.
    #[must_use]
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            name: None,
            tool_calls: Vec::new(),
        }
    }
}

/// A prompt or a completion as it stands in data.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Text {
    /// Plain text, no template.
    Plain(String),
    /// Messages, for the chat template.
    Messages(Vec<Message>),
}

impl Text {
    /// All the text, one message after the other.
    #[must_use]
    pub fn joined(&self) -> String {
        match self {
            Self::Plain(s) => s.clone(),
            Self::Messages(m) => m
                .iter()
                .map(|m| m.content.as_str())
                .collect::<Vec<_>>()
                .join("\n"),
        }
    }

    /// Whether there is nothing but white space and no tool call.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        match self {
            Self::Plain(s) => s.trim().is_empty(),
            Self::Messages(m) => m
                .iter()
                .all(|m| m.content.trim().is_empty() && m.tool_calls.is_empty()),
        }
    }
}
