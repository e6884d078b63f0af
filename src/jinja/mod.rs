//! Jinja as Python renders it: the language that chat templates are written in.
//!
//! A chat template is a program for Jinja 3.1 in Python, with transformers' functions. Other implementations of Jinja
//! differ where Python shows through: how a list prints, what `is sequence` holds for, what a generator is, how
//! `'%s' % x` formats. Here grammar, values and operators are Python's, checked byte by byte against recordings
//! (`golden/chat`). The sandbox is Jinja's immutable one: nothing changes a value, nothing beginning with `_` is seen.
//!
//! Everything that a template makes is counted before it is made, so every template ends, in bounded time and memory,
//! in the same way on every machine. See `budget`.

#![expect(clippy::format_push_string, reason = "writing to a text can not fail, and `write!` says that it can")]

mod ast;
mod budget;
mod clock;
mod collections;
mod evaluate;
mod expressions;
mod fault;
mod filters;
mod format;
mod globals;
mod json;
mod lexer;
mod machine;
mod methods;
mod operators;
mod parser;
mod tests;
mod text;
mod value;

pub use clock::Clock;
pub(crate) use fault::{Fault, Kind};

use value::Value;

/// Room for the deepest template. Only what is touched of it is taken.
const STACK: usize = 256 << 20;

/// Renders a template with variables.
pub(crate) fn render(
    source: &str,
    variables: &serde_json::Map<String, serde_json::Value>,
    clock: Clock,
) -> Result<String, Fault> {
    on_a_deep_stack(|| {
        let template = parser::parse(source)?;
        let variables: Vec<(String, Value)> = variables
            .iter()
            .map(|(name, value)| Ok((name.clone(), Value::from_json(value)?)))
            .collect::<Result<_, Fault>>()?;
        let mut out = String::new();
        machine::Machine::new(&variables, clock).run(&template.body, 1, &mut out)?;
        Ok(out)
    })
}

/// The names that a template reads without asking whether they are defined, and does not define itself.
pub(crate) fn needed_names(source: &str) -> Result<Vec<String>, Fault> {
    on_a_deep_stack(|| {
        let names = parser::parse(source)?.names;
        let needed = names.read.iter().filter(|name| !names.written.contains(*name) && !names.asked.contains(*name));
        Ok(needed.cloned().collect())
    })
}

/// Templates nest, and so do the functions that read them.
fn on_a_deep_stack<T: Send>(work: impl FnOnce() -> Result<T, Fault> + Send) -> Result<T, Fault> {
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("chat template".into()).stack_size(STACK);
        let thread = builder.spawn_scoped(scope, work);
        let thread = thread.map_err(|e| Fault::refused(format!("no thread to render in: {e}")))?;
        thread.join().unwrap_or_else(|_| Err(Fault::refused("a template that Jinja itself fails on")))
    })
}
