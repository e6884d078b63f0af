//! A conversation, prepared as transformers prepares one for a template.

use serde_json::{Map, Value, json};

use crate::error::{Code, Error, Result};

/// Names under which a message's reasoning is passed, the usual one first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// What every template is given beside special tokens.
const GIVEN: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// What a chat template renders.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// Objects with `role`, `content` and what else a template knows.
    pub messages: Vec<Value>,
    /// Functions that the model may call, as JSON schemas.
    pub tools: Option<Vec<Value>>,
    /// Texts that the model may read.
    pub documents: Option<Vec<Value>>,
    /// Ends with the opening of the model's answer.
    pub add_generation_prompt: bool,
    /// Further variables of the template, such as `enable_thinking`.
    pub variables: Map<String, Value>,
}

impl Conversation {
    /// One message of a user.
    pub fn of_user(prompt: &str) -> Self {
        Self {
            messages: vec![json!({ "role": "user", "content": prompt })],
            tools: None,
            documents: None,
            add_generation_prompt: true,
            variables: Map::new(),
        }
    }

    /// From JSON: a list of messages, or an object with `messages` and perhaps `tools`, `documents`,
    /// `add_generation_prompt` (true if left out), and further variables of the template.
    pub fn from_json(json: Value) -> Result<Self> {
        let wrong = |found: String, expected: &str| {
            Error::new(Code::UsageInvalid, "the conversation").found(found).expected(expected)
        };
        let mut object = match json {
            Value::Array(messages) => Map::from_iter([("messages".to_owned(), Value::Array(messages))]),
            Value::Object(object) => object,
            other => return Err(wrong(other.to_string(), "a list of messages, or an object with `messages`")),
        };
        let mut list = |key: &str| match object.shift_remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(items)) if items.iter().all(Value::is_object) => Ok(Some(items)),
            Some(other) => Err(wrong(format!("`{key}`: {other}"), "a list of objects")),
        };
        let messages = list("messages")?.unwrap_or_default();
        let (tools, documents) = (list("tools")?, list("documents")?);
        if messages.is_empty() {
            return Err(wrong("no message".into(), "one message at least"));
        }
        let add_generation_prompt = match object.shift_remove("add_generation_prompt") {
            None => true,
            Some(Value::Bool(wanted)) => wanted,
            Some(other) => return Err(wrong(format!("`add_generation_prompt`: {other}"), "true or false")),
        };
        Ok(Self { messages, tools, documents, add_generation_prompt, variables: object })
    }

    /// The variables of a template, with the special tokens.
    pub(super) fn context(&self, tokens: &Map<String, Value>) -> Map<String, Value> {
        let mut context = tokens.clone();
        context.extend(self.variables.clone());
        let list = |items: &Option<Vec<Value>>| items.clone().map_or(Value::Null, Value::Array);
        let messages = self.messages.iter().map(prepared).collect();
        let values = [messages, list(&self.tools), list(&self.documents), self.add_generation_prompt.into()];
        context.extend(GIVEN.map(str::to_owned).into_iter().zip(values));
        context
    }
}

/// A message without what is null, and with its reasoning under all its names.
fn prepared(message: &Value) -> Value {
    let Value::Object(fields) = message else { return message.clone() };
    let mut fields: Map<String, Value> =
        fields.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone())).collect();
    if let Some(reasoning) = REASONING.iter().find_map(|key| fields.get(*key)).cloned() {
        if !fields.contains_key("thinking") {
            fields.shift_insert(0, "thinking".into(), reasoning.clone());
        } else if let Some(thinking) = fields.shift_remove("thinking") {
            // transformers puts it first.
            fields.shift_insert(0, "thinking".into(), thinking);
        }
        fields.insert("reasoning_content".into(), reasoning);
    }
    Value::Object(fields)
}
