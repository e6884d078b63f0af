//! A repository's chat template: Jinja as transformers renders it.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind};
use serde::Serialize as _;
use serde_json::Value as Json;
use serde_json::ser::Formatter;

use super::bounds;
use crate::error::{Code, Error, Result};

/// A chat template with the special tokens that it may name.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    tokens: serde_json::Map<String, Json>,
    /// Where it was found.
    origin: String,
}

impl ChatTemplate {
    /// Finds the template of a directory: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.
    pub fn open(directory: &Path) -> Result<Self> {
        let config_path = directory.join("tokenizer_config.json");
        let invalid = |path: &Path| Error::new(Code::TokenizerInvalid, path.display());
        let config: Json = match text(&config_path)? {
            Some(text) => serde_json::from_str(&text).map_err(|e| {
                invalid(&config_path).found(e).expected("JSON").help("copy the repository's file again")
            })?,
            None => Json::Null,
        };
        let file = directory.join("chat_template.jinja");
        if let Some(source) = text(&file)? {
            return Ok(Self::new(source, &config, &file.display().to_string()));
        }
        let Some(value) = config.get("chat_template").filter(|value| !value.is_null()) else {
            return Err(invalid(directory)
                .found("no chat template")
                .expected("chat_template.jinja, or chat_template in tokenizer_config.json")
                .help("leave --chat out: the model may not be one for conversations"));
        };
        let source = default_template(value).ok_or_else(|| {
            invalid(&config_path)
                .found("a chat_template that is neither a text nor a list of them")
                .expected("a text, or a list of objects with name and template")
                .help("mend it, or leave --chat out")
        })?;
        Ok(Self::new(source, &config, &config_path.display().to_string()))
    }

    /// A template with the special tokens of a `tokenizer_config.json`.
    pub fn new(source: String, config: &Json, origin: &str) -> Self {
        let entries = config.as_object().into_iter().flatten().filter(|(key, _)| key.ends_with("_token"));
        let text = |value: &Json| value.as_str().or_else(|| value.get("content")?.as_str()).map(Json::from);
        let tokens = entries.filter_map(|(key, value)| Some((key.clone(), text(value)?))).collect();
        Self { source, tokens, origin: origin.to_owned() }
    }

    /// Renders a conversation, with the opening of the model's answer at its end.
    pub fn render(&self, messages: &Json) -> Result<String> {
        let invalid = |e: &minijinja::Error| {
            let help = if e.kind() == ErrorKind::InvalidOperation {
                "the template refuses this conversation"
            } else {
                "mend the template, or leave --chat out"
            };
            Error::new(Code::TokenizerInvalid, &self.origin).found(e).expected("a template that renders").help(help)
        };
        if self.source.len() > bounds::LONGEST {
            let found = format!("a template of {} bytes, over {}", self.source.len(), bounds::LONGEST);
            return Err(invalid(&bounds::refused(found)));
        }
        let source = without_generation_marks(&self.source);
        let mut context = self.tokens.clone();
        context.insert("messages".into(), messages.clone());
        context.insert("add_generation_prompt".into(), true.into());
        let rendered = bounds::patiently(move || {
            let mut environment = environment();
            environment.add_template_owned("chat", source)?;
            environment.get_template("chat")?.render(Json::Object(context))
        });
        rendered.map_err(|e| invalid(&e))
    }
}

/// The text of a file, or `None` where there is no such file.
fn text(path: &Path) -> Result<Option<String>> {
    match crate::regular::read(path, crate::regular::CONFIGURATION) {
        Ok(bytes) => String::from_utf8(bytes).map(Some).map_err(|e| {
            Error::new(Code::TokenizerInvalid, path.display())
                .found(e)
                .expected("a text in UTF-8")
                .help("copy the repository's file again")
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, &e)),
    }
}

/// The template itself, or the one called `default` of a list.
fn default_template(value: &Json) -> Option<String> {
    if let Some(text) = value.as_str() {
        return Some(text.to_owned());
    }
    let list = value.as_array()?;
    let default = list.iter().find(|t| t.get("name").and_then(Json::as_str) == Some("default"));
    default.or(list.first())?.get("template")?.as_str().map(str::to_owned)
}

/// Jinja with the settings and functions that transformers gives to chat templates.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    bounds::bound(&mut environment);
    // Chat is plain text: nothing is escaped, whatever a template's name ends with.
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        strftime(&format, now)
    });
    environment.add_filter("tojson", to_json);
    environment
}

/// `{% generation %}` marks what a model is trained on. It renders nothing; as an `if` it keeps its whitespace control.
fn without_generation_marks(source: &str) -> String {
    let mut result = String::new();
    let mut rest = source;
    while let Some((before, after)) = rest.split_once("{%") {
        result += before;
        let Some((block, next)) = after.split_once("%}") else {
            rest = after;
            result += "{%";
            continue;
        };
        let word = block.trim_matches(['-', '+']).trim();
        let block = match word {
            "generation" => block.replacen("generation", "if true", 1),
            "endgeneration" => block.replacen("endgeneration", "endif", 1),
            _ => block.to_owned(),
        };
        result += "{%";
        result += &block;
        result += "%}";
        rest = next;
    }
    result + rest
}

/// Widest indent, and longest list that becomes JSON.
const DEEPEST: usize = 64;
const MOST_ITEMS: usize = 100_000;

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
#[expect(clippy::needless_pass_by_value, reason = "the form that a filter has")]
fn to_json(value: &Value, arguments: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    if indent.is_some_and(|indent| indent > DEEPEST) || value.len().is_some_and(|length| length > MOST_ITEMS) {
        return Err(bounds::refused(format!("an indent over {DEEPEST}, or more than {MOST_ITEMS} items")));
    }
    // Accepted by transformers' filter and of no effect on what is rendered here.
    for ignored in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = arguments.get(ignored)?;
    }
    arguments.assert_all_used()?;
    let failed = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut bytes = Vec::new();
    if let Some(indent) = indent {
        let spaces = " ".repeat(indent);
        let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter)).map_err(failed)?;
    } else {
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, PythonFormatter)).map_err(failed)?;
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// JSON on one line with a space after each comma and colon.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The part of C's strftime that templates use, in UTC.
fn strftime(format: &str, seconds: u64) -> String {
    let mut text = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        match (letter, letters.as_str().chars().next()) {
            ('%', Some(field)) => {
                letters.next();
                text.push_str(&date_field(field, seconds));
            }
            _ => text.push(letter),
        }
    }
    text
}

/// One field of a date; an unknown one stays as it was written.
fn date_field(field: char, seconds: u64) -> String {
    let (days, clock) = (seconds / 86400, seconds % 86400);
    let (year, month, day) = civil(days);
    let name = |list: &[&str], index: u64| {
        usize::try_from(index).ok().and_then(|i| list.get(i)).copied().unwrap_or_default().to_owned()
    };
    let short = |name: String| name.chars().take(3).collect();
    match field {
        'Y' => format!("{year:04}"),
        'y' => format!("{:02}", year % 100),
        'm' => format!("{month:02}"),
        'd' => format!("{day:02}"),
        'B' => name(&MONTHS, month - 1),
        'b' => short(name(&MONTHS, month - 1)),
        'A' => name(&DAYS, (days + 4) % 7),
        'a' => short(name(&DAYS, (days + 4) % 7)),
        'H' => format!("{:02}", clock / 3600),
        'M' => format!("{:02}", clock / 60 % 60),
        'S' => format!("{:02}", clock % 60),
        '%' => "%".to_owned(),
        other => format!("%{other}"),
    }
}

/// Year, month and day of a number of days since 1970-01-01, by 400-year cycles that start in March.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: &Json) -> Result<String> {
        let config = json!({"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "special": true}, "n": 3});
        ChatTemplate::new(source.to_owned(), &config, "test").render(messages)
    }

    #[test]
    fn a_template_in_llama_3_style_renders() {
        let source = "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = \"26 Jul 2024\" %}\n{%- endif %}\n\
            {%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n\
            {%- else %}\n    {%- set system_message = \"\" %}\n{%- endif %}\n{{- \"<|start_header_id|>system<|end_header_id|>\\n\\n\" }}\n\
            {{- \"Today Date: \" + date_string + \"\\n\\n\" }}\n{{- system_message }}\n{{- \"<|eot_id|>\" }}\n{%- for message in messages %}\n\
            {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n\
            {%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n";
        let text =
            render(source, &json!([{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hi\n"}]));
        assert_eq!(
            text.unwrap(),
            "<|begin|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nBe kind.<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        );
    }

    #[test]
    fn a_template_in_qwen_style_renders_with_python_methods_and_tools() {
        let source = "{%- set ns = namespace(last=-1) %}\n{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n\
            {%- if ns.last < 0 and message.role == 'user' and message.content is string and not message.content.startswith('<tool>') %}\n{%- set ns.last = index %}\n{%- endif %}\n{%- endfor %}\n\
            {%- for message in messages %}\n    {%- set content = message.content %}\n    {%- if '</think>' in content %}\n        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n    {%- endif %}\n\
            {%- if message.tool_calls is defined %}{{ message.tool_calls[0] | tojson }}{% break %}{% endif %}\n\
            {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n{{- ns.last }}";
        let messages = json!([{"role": "user", "content": "Why <b>?"}, {"role": "assistant", "content": "<think>x</think>\n\nSo."}]);
        assert_eq!(
            render(source, &messages).unwrap(),
            "<|im_start|>user\nWhy <b>?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>assistant\n0"
        );
        let call = json!([{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": [1, 2], "b": "<é>"}}]}]);
        assert!(render(source, &call).unwrap().starts_with(r#"{"name": "f", "arguments": {"a": [1, 2], "b": "<é>"}}"#));
    }

    #[test]
    fn whitespace_and_generation_marks_are_treated_as_jinja_treats_them() {
        let source = "{% for m in messages %}\n  {% generation %}\nA{{ m.content }}{{ eos_token }}\n  {%- endgeneration -%}\n\n{% endfor %}\n";
        assert_eq!(render(source, &json!([{"content": "x"}, {"content": "y"}])).unwrap(), "Ax<|end|>Ay<|end|>");
    }

    #[test]
    fn a_template_that_raises_is_an_error_with_its_words() {
        let source = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}";
        let error = render(source, &json!([{"role": "system", "content": ""}])).unwrap_err();
        assert!(error.found.contains("roles must alternate"), "{error}");
        assert!(render("{% if %}", &json!([])).is_err());
    }

    #[test]
    fn a_template_that_would_not_end_or_fill_the_memory_is_an_error() {
        let started = std::time::Instant::now();
        let sum = format!("{{{{ 1{} }}}}", "+1".repeat(bounds::LONGEST / 2 - 10));
        let long = "x".repeat(bounds::LONGEST + 1);
        for (source, words) in [
            ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "fuel"),
            ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
            ("{% include 'chat' %}", "could not render include"),
            ("{% extends 'chat' %}", ""),
            ("{{ range(10**9) }}", "too many elements"),
            ("{{ [0] * 10**12 }}", "more than"),
            ("{{ ([0] * 10**12)|list }}", "list of operands"),
            ("{{ ([0, 0] * (2**63))|list }}", ""),
            ("{{ 'x' * 10**9 }}", "too large"),
            ("{% for a in range(999) %}{{ 'x' * 10**6 }}{% endfor %}", "bytes of text"),
            ("{{ 'x'|indent(10**9) }}", "indent of operands"),
            ("{{ '%1000000000d'|format(1) }}", "format of operands"),
            ("{{ '{:>1000000000}'.format(1) }}", "format of operands"),
            ("{{ [1]|batch(10**9, 0)|list }}", "batch of operands"),
            ("{{ ('x' * 10**5).replace('x', 'y' * 10**5) }}", "replace of operands"),
            ("{{ messages|tojson(indent=10**12) }}", "indent"),
            (long.as_str(), "a template of"),
        ] {
            let error = render(source, &json!([])).unwrap_err();
            assert!(error.code == Code::TokenizerInvalid && error.found.contains(words), "{words}: {error}");
        }
        // As deep as a template can be: it has stack enough.
        assert_eq!(render(&sum, &json!([])).unwrap(), (bounds::LONGEST / 2 - 9).to_string());
        assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(strftime("%d %b %Y", 1_721_952_000), "26 Jul 2024");
        assert_eq!(strftime("%A %Y-%m-%d %H:%M:%S %% %q", 951_827_696), "Tuesday 2000-02-29 12:34:56 % %q");
        assert_eq!(strftime("%a, %B %y", 0), "Thu, January 70");
    }

    #[test]
    fn the_default_of_several_templates_is_taken() {
        let list = json!([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]);
        assert_eq!(default_template(&list).as_deref(), Some("D"));
        let folder = tempfile::tempdir().unwrap();
        assert!(ChatTemplate::open(folder.path()).unwrap_err().found.contains("no chat template"));
        std::fs::write(folder.path().join("tokenizer_config.json"), json!({"chat_template": list}).to_string())
            .unwrap();
        assert_eq!(ChatTemplate::open(folder.path()).unwrap().source, "D");
        std::fs::write(folder.path().join("chat_template.jinja"), "F").unwrap();
        assert_eq!(ChatTemplate::open(folder.path()).unwrap().source, "F");
    }
}
