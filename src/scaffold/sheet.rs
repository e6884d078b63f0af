//! The text of a draft: tables in the order of templates, each line with its mark.

use std::fmt::Write as _;

use crate::describe::{TABLES, quoted_key};

/// Lines by table. Everything that is not certain carries `# guess: why` or `# TODO: what to look up`.
#[derive(Debug, Clone, Default)]
pub(super) struct Sheet {
    lines: Vec<(&'static str, String)>,
    pub(super) guesses: Vec<String>,
    pub(super) todos: Vec<String>,
}

/// A line break would end a comment, and TOML allows no other control character in one.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

impl Sheet {
    fn entry(&mut self, table: &'static str, key: &str, value: &str, comment: &str) {
        let comment = printable(comment);
        self.lines.push((table, format!("{} = {value}  # {comment}", quoted_key(key))));
    }

    /// A value that is probably right.
    pub(super) fn guess(&mut self, table: &'static str, key: &str, value: &str, why: &str) {
        if why.starts_with("TODO: ") {
            return self.todo(table, key, value, why.trim_start_matches("TODO: "));
        }
        self.entry(table, key, value, &format!("guess: {why}"));
        self.guesses.push(format!("[{table}] {key} = {value}: {why}"));
    }

    /// A value that stands in for one that must be looked up.
    pub(super) fn todo(&mut self, table: &'static str, key: &str, value: &str, what: &str) {
        self.entry(table, key, value, &format!("TODO: {what}"));
        self.todos.push(format!("[{table}] {key} = {value}: {what}"));
    }

    /// Something to look up that has no line of its own.
    pub(super) fn ask(&mut self, table: &'static str, what: &str) {
        let what = printable(what);
        self.lines.push((table, format!("# TODO: {what}")));
        self.todos.push(format!("[{table}] {what}"));
    }

    /// The tables as TOML.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        for table in TABLES {
            let mut lines = self.lines.iter().filter(|(of, _)| *of == table).peekable();
            if lines.peek().is_some() {
                let _ = writeln!(text, "\n[{table}]");
            }
            for (_, line) in lines {
                let _ = writeln!(text, "{line}");
            }
        }
        text
    }
}
