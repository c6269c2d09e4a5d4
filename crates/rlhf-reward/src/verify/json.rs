//! JSON: whether a completion is some, and keeps a schema.

use std::sync::Mutex;

use boon::{Compiler, SchemaIndex, Schemas};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::part::Part;
use super::{Sample, Verdict, Verifier, bad, short};
use crate::error::Result;

const NAME: &str = "json";

/// Whether a completion is JSON that keeps a schema.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Json {
    /// A JSON Schema (drafts 4 to 2020-12; without `$schema` the last).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
    /// The field that holds a row's own schema, as JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema_field: Option<String>,
    /// What of the completion must be JSON.
    #[serde(default)]
    pub part: Part,
}

struct Schema {
    schemas: Schemas,
    index: SchemaIndex,
}

impl Schema {
    fn new(schema: Value) -> std::result::Result<Self, String> {
        // Nothing is read from elsewhere: a reference leads into the schema itself.
        const HERE: &str = "urn:rlhf:schema";
        let mut schemas = Schemas::new();
        let mut compiler = Compiler::new();
        compiler.use_loader(Box::new(Nowhere));
        compiler
            .add_resource(HERE, schema)
            .map_err(|e| format!("{e:#}"))?;
        let index = compiler
            .compile(HERE, &mut schemas)
            .map_err(|e| format!("{e:#}"))?;
        Ok(Self { schemas, index })
    }

    fn wrong(&self, value: &Value) -> Option<String> {
        let e = self.schemas.validate(value, self.index).err()?;
        // The deepest cause says most.
        let mut cause = &e;
        while let Some(deeper) = cause.causes.first() {
            cause = deeper;
        }
        Some(format!("at `{}`: {}", cause.instance_location, cause.kind))
    }
}

struct Nowhere;

impl boon::UrlLoader for Nowhere {
    fn load(&self, url: &str) -> std::result::Result<Value, Box<dyn std::error::Error>> {
        Err(format!("a schema lies elsewhere ({url}); put it in").into())
    }
}

struct Compiled {
    /// One at a time: it is fast.
    schema: Option<Mutex<Schema>>,
    field: Option<String>,
    part: Part,
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Json")
            .field("schema", &self.schema.is_some())
            .field("field", &self.field)
            .field("part", &self.part)
            .finish()
    }
}

impl Json {
    pub(crate) fn build(&self) -> Result<impl Verifier + use<>> {
        if self.schema.is_some() && self.schema_field.is_some() {
            return Err(bad(NAME, "give `schema` or `schema_field`, not both"));
        }
        let schema = self.schema.clone().map(Schema::new).transpose();
        Ok(Compiled {
            schema: schema
                .map_err(|e| bad(NAME, format!("`schema`: {e}")))?
                .map(Mutex::new),
            field: self.schema_field.clone(),
            part: self.part,
        })
    }
}

impl Verifier for Compiled {
    fn name(&self) -> &str {
        NAME
    }

    fn verify(&self, sample: &Sample<'_>) -> Result<Verdict> {
        let text = self.part.of(sample.completion);
        // The parser goes 128 levels deep and no deeper.
        let value: std::result::Result<Value, _> = serde_json::from_str(text);
        let own = match &self.field {
            Some(field) => {
                let wrong = |e: String| bad(NAME, format!("the field `{field}` is no schema: {e}"));
                let schema = match sample.fields.get(field) {
                    Some(Value::Object(o)) => Value::Object(o.clone()),
                    _ => serde_json::from_str(&sample.text(NAME, field)?)
                        .map_err(|e| wrong(e.to_string()))?,
                };
                Some(Schema::new(schema).map_err(wrong)?)
            }
            None => None,
        };
        let value = match value {
            Ok(v) => v,
            Err(e) => return Ok(Verdict::of(false, format!("no JSON: {e}"))),
        };
        let wrong = match (&own, &self.schema) {
            (Some(s), _) => s.wrong(&value),
            (None, Some(s)) => s
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .wrong(&value),
            (None, None) => None,
        };
        Ok(match wrong {
            Some(what) => Verdict::of(false, short(&what)),
            None => Verdict::of(true, "as it should be"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, json};

    fn score(v: &dyn Verifier, text: &str, fields: &Value) -> Result<f64> {
        let fields = fields.as_object().cloned().unwrap_or(Map::new());
        Ok(v.verify(&Sample::new("", text, &fields))?.score)
    }

    fn person() -> Value {
        json!({"type": "object", "required": ["name"], "additionalProperties": false,
            "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}, "age": {"$ref": "#/$defs/age"}},
            "$defs": {"age": {"type": "integer", "minimum": 0}}})
    }

    #[test]
    fn json_and_schemas() {
        let any = Json::default().build().unwrap();
        let schema = Json {
            schema: Some(person()),
            part: Part::Fenced,
            ..Json::default()
        };
        let schema = schema.build().unwrap();
        for (text, is_json, fits) in [
            ("", 0.0, 0.0),
            ("{}", 1.0, 0.0),
            ("{\"name\": \"Ada\"}", 1.0, 1.0),
            ("{\"name\": \"ada\"}", 1.0, 0.0),
            ("{\"name\": \"Ada\", \"age\": 36}", 1.0, 1.0),
            ("{\"name\": \"Ada\", \"age\": -1}", 1.0, 0.0),
            ("{\"name\": \"Ada\", \"x\": 1}", 1.0, 0.0),
            ("{\"name\": \"Ada\"} so", 0.0, 0.0),
            ("Here:\n```json\n{\"name\": \"Ada\"}\n```", 0.0, 1.0),
        ] {
            assert_eq!(score(&any, text, &Value::Null).unwrap(), is_json, "{text}");
            assert_eq!(score(&schema, text, &Value::Null).unwrap(), fits, "{text}");
        }
        // Deeper than any schema: no JSON that is read, and no overflow of the stack.
        assert_eq!(
            score(&any, &"[".repeat(1_000_000), &Value::Null).unwrap(),
            0.0
        );
    }

    #[test]
    fn a_row_brings_its_own_schema() {
        let json = Json {
            schema_field: Some("schema".into()),
            ..Json::default()
        };
        let v = json.build().unwrap();
        let as_text = json!({"schema": "{\"type\": \"array\"}"});
        assert_eq!(score(&v, "[1]", &as_text).unwrap(), 1.0);
        assert_eq!(
            score(&v, "1", &json!({"schema": {"type": "array"}})).unwrap(),
            0.0
        );
        let e = score(&v, "1", &json!({"schema": "{\"type\": 5}"})).unwrap_err();
        assert!(e.to_string().contains("`schema` is no schema"), "{e}");
        assert!(score(&v, "1", &json!({})).is_err());
    }

    #[test]
    fn schemas_that_cannot_be_used() {
        for schema in [
            json!({"type": 5}),
            json!({"$ref": "file:///etc/passwd"}),
            json!({"$ref": "https://example.com/schema.json"}),
            json!({"pattern": "("}),
        ] {
            let json = Json {
                schema: Some(schema.clone()),
                ..Json::default()
            };
            let e = json.build().err().map(|e| e.to_string());
            assert!(
                e.as_ref().is_some_and(|e| e.contains("`schema`")),
                "{schema}: {e:?}"
            );
        }
    }
}
