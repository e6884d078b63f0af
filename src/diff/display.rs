//! A comparison in words.

use super::{Change, Difference, Side, ValueChange, WeightChange};
use crate::inspect::bytes;

/// Lines of a list that are shown when not all are wanted.
const SHOWN: usize = 8;
/// Characters of a line that are shown then.
const WIDTH: usize = 160;

/// Text under construction.
struct Words {
    text: String,
    all: bool,
}

impl Words {
    fn line(&mut self, line: &str) {
        self.text += line;
        self.text.push('\n');
    }

    /// A title, and lines as far as they are wanted; nothing without lines.
    fn list(&mut self, title: &str, lines: &[String]) {
        if lines.is_empty() {
            return;
        }
        self.line(title);
        let shown = if self.all || lines.len() == SHOWN + 1 { lines.len() } else { SHOWN };
        for line in lines.iter().take(shown) {
            match line.char_indices().nth(WIDTH) {
                Some((end, _)) if !self.all => self.line(&format!("  {}...", line.get(..end).unwrap_or_default())),
                _ => self.line(&format!("  {line}")),
            }
        }
        if lines.len() > shown {
            self.line(&format!("  and {} more; --all lists them", lines.len() - shown));
        }
    }
}

impl Difference {
    /// A summary for people; long lists are cut unless `all` is set.
    pub fn words(&self, all: bool) -> String {
        let mut words = Words { text: String::new(), all };
        if self.equal {
            let side = &self.a;
            let (nodes, count, size) = (side.nodes, side.initializers, bytes(side.bytes));
            words.line(&format!("equal: {}; {nodes} nodes, {count} initializers of {size}", side.summary));
        } else {
            words.line(&format!("A {}", side(&self.a)));
            words.line(&format!("B {}", side(&self.b)));
        }
        let graph = &self.graph;
        words.list(&format!("graph: {} lines only in A, {} only in B", graph.only_a, graph.only_b), &graph.lines);
        self.initializers(&mut words);
        for file in &self.files {
            let name = &file.name;
            match &file.change {
                Change::OnlyA => words.line(&format!("{name}: only in A")),
                Change::OnlyB => words.line(&format!("{name}: only in B")),
                Change::Bytes(a, b) => words.line(&format!("{name}: other bytes ({} and {})", bytes(*a), bytes(*b))),
                Change::Json(changes) if changes.is_empty() => {
                    words.line(&format!("{name}: other bytes, but the same JSON"));
                }
                Change::Json(changes) => words.list(&format!("{name}:"), &values(changes)),
            }
        }
        words.list("hf2onnx.json:", &values(&self.record));
        for note in &self.notes {
            words.line(&format!("note: {note}"));
        }
        words.text
    }

    fn initializers(&self, words: &mut Words) {
        let changes = &self.initializers;
        let renamed: Vec<String> = changes.renamed.iter().map(|(a, b)| format!("{a} -> {b}")).collect();
        let is_new = |name: &&String| !changes.renamed.iter().any(|(a, b)| a == *name || b == *name);
        let alone = |names: &[String]| names.iter().filter(is_new).cloned().collect::<Vec<String>>();
        let retyped: Vec<String> = changes.retyped.iter().map(|r| format!("{}: {} -> {}", r.name, r.a, r.b)).collect();
        let changed: Vec<String> = changes.changed.iter().map(weight).collect();
        let (only_a, only_b) = (alone(&changes.only_a), alone(&changes.only_b));
        words.list(&format!("initializers of the same content under another name: {}", renamed.len()), &renamed);
        words.list(&format!("initializers only in A: {}", only_a.len()), &only_a);
        words.list(&format!("initializers only in B: {}", only_b.len()), &only_b);
        words.list(&format!("initializers of another type or shape: {}", retyped.len()), &retyped);
        let title = format!("initializers with other values: {} of {} in both", changed.len(), changes.in_both);
        words.list(&title, &changed);
    }
}

fn side(side: &Side) -> String {
    let size = bytes(side.bytes);
    format!(
        "{}: {}; {} nodes, {} initializers of {size}",
        side.dir.display(),
        side.summary,
        side.nodes,
        side.initializers
    )
}

fn values(changes: &[ValueChange]) -> Vec<String> {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".into());
    changes.iter().map(|change| format!("{}: {} -> {}", change.path, text(&change.a), text(&change.b))).collect()
}

fn weight(change: &WeightChange) -> String {
    let largest = change.largest.map_or_else(String::new, |largest| format!(", values by up to {largest:.1e}"));
    format!(
        "{} {}: {} of {} bytes, the first at {}{largest}",
        change.name, change.r#type, change.bytes, change.of, change.first
    )
}
