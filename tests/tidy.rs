//! What the design asks of the source as text: small files and functions, arrows that point down the pipeline,
//! nothing left to do, and error codes that scripts can rely on.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

type TestResult<T = ()> = Result<T, Box<dyn Error>>;

/// The modules in the order of the pipeline: each may use those before it.
const PIPELINE: [&str; 40] = [
    "error",
    "guard",
    "jinja",
    "stage",
    "interrupt",
    "patterns",
    "regular",
    "element",
    "encoding",
    "onnx",
    "opset",
    "weight",
    "hub",
    "quantize",
    "read",
    "chat",
    "spec",
    "describe",
    "graph",
    "build",
    "lower",
    "bind",
    "recipe",
    "write",
    "scaffold",
    "synth",
    "compile",
    "runtime",
    "session",
    "golden",
    "tokenizer",
    "calibrate",
    "toy",
    "verify",
    "generate",
    "bench",
    "quant_report",
    "inspect",
    "diff",
    "cli",
];
const FILE_LINES: usize = 600;
const FUNCTION_LINES: usize = 60;

#[test]
fn files_are_short() -> TestResult {
    let mut wrong = String::new();
    for (path, text) in sources(&["src", "tests", "benches", "golden", "opsets"], &["rs", "py"])? {
        let lines = text.lines().count();
        if lines > FILE_LINES {
            writeln!(wrong, "{path}: {lines} lines")?;
        }
    }
    assert!(wrong.is_empty(), "a file over {FILE_LINES} lines wants to be two:\n{wrong}");
    Ok(())
}

#[test]
fn functions_are_short() -> TestResult {
    let mut wrong = String::new();
    for (path, text) in rust()? {
        for (name, at, lines) in functions(&text).into_iter().filter(|(_, _, lines)| *lines > FUNCTION_LINES) {
            writeln!(wrong, "{path}:{at}: {name} has {lines} lines")?;
        }
    }
    assert!(wrong.is_empty(), "a function over {FUNCTION_LINES} lines wants to be two:\n{wrong}");
    Ok(())
}

#[test]
fn arrows_point_down_the_pipeline() -> TestResult {
    let order = |name: &str| PIPELINE.iter().position(|module| *module == name);
    let mut wrong = BTreeSet::new();
    for (path, text) in sources(&["src"], &["rs"])? {
        let Some(module) = module_of(&path) else { continue };
        let Some(own) = order(&module) else {
            wrong.insert(format!("{path}: the module {module} has no place in the pipeline's order"));
            continue;
        };
        for used in uses(&text).into_iter().filter(|used| *used != module) {
            if order(&used).is_none_or(|place| place > own) {
                wrong.insert(format!("{path}: {module} uses {used}, which comes after it"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.into_iter().collect::<Vec<_>>().join("\n"));
    Ok(())
}

#[test]
fn nothing_is_left_to_do() -> TestResult {
    let markers = ["todo!", "unimplemented!"].map(|name| format!("{name}("));
    let mut wrong = String::new();
    for (path, text) in rust()? {
        for (at, line) in text.lines().enumerate().filter(|(_, line)| markers.iter().any(|mark| line.contains(mark))) {
            writeln!(wrong, "{path}:{}: {}", at + 1, line.trim())?;
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    Ok(())
}

/// Each code has a line of documentation, and is spelled as its variant is, in lower case with hyphens.
#[test]
fn error_codes_are_documented() -> TestResult {
    let text = fs::read_to_string(root().join("src").join("error.rs"))?;
    let body = text.split_once("pub enum Code {").and_then(|(_, rest)| rest.split_once("\n}")).ok_or("no enum Code")?.0;
    let (mut documented, mut variants) = (false, 0);
    for line in body.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some(variant) = line.strip_suffix(',').filter(|name| name.chars().all(char::is_alphanumeric)) {
            assert!(documented, "{variant} has no documentation");
            let arm = format!("Self::{variant} => \"{}\"", kebab(variant));
            assert!(text.contains(&arm), "as_str does not say {arm}");
            variants += 1;
        }
        documented = line.starts_with("///");
    }
    assert!(variants > 20, "{variants} error codes");
    Ok(())
}

fn kebab(name: &str) -> String {
    let mut text = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !text.is_empty() {
            text.push('-');
        }
        text.extend(letter.to_lowercase());
    }
    text
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust() -> TestResult<Vec<(String, String)>> {
    sources(&["src", "tests", "benches"], &["rs"])
}

/// Path (with forward slashes, from the root) and text of every file of these kinds in these folders.
fn sources(folders: &[&str], kinds: &[&str]) -> TestResult<Vec<(String, String)>> {
    let mut found = Vec::new();
    let mut open: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).filter(|dir| dir.is_dir()).collect();
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().and_then(|kind| kind.to_str()).is_some_and(|kind| kinds.contains(&kind)) {
                let name = path.strip_prefix(root())?.to_string_lossy().replace('\\', "/");
                found.push((name, fs::read_to_string(&path)?));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The top-level module that a file of `src` belongs to; the crate's roots belong to none.
fn module_of(path: &str) -> Option<String> {
    let first = path.strip_prefix("src/")?.split('/').next()?;
    let name = first.strip_suffix(".rs").unwrap_or(first);
    let name = name.strip_suffix("_tests").unwrap_or(name);
    (!["lib", "main"].contains(&name)).then(|| name.to_owned())
}

/// The top-level modules that a file names after `crate::`, in code and above its tests.
fn uses(text: &str) -> BTreeSet<String> {
    let above = text.split("#[cfg(test)]").next().unwrap_or(text);
    let code = above.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut names = BTreeSet::new();
    for rest in code.flat_map(|line| line.split("crate::").skip(1)) {
        let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if !name.is_empty() && name.chars().all(|c| c.is_lowercase() || c == '_') {
            names.insert(name);
        }
    }
    names
}

/// Name, first line and length of every function, in text that rustfmt has laid out: a function ends at the first
/// closing brace that stands as far in as it does.
fn functions(text: &str) -> Vec<(String, usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else { continue };
        let indent = line.len() - line.trim_start().len();
        let own = |line: &&&str| line.len() - line.trim_start().len() == indent && !line.trim().is_empty();
        let closes = |line: &&str| own(&line) && (line.trim() == "}" || line.ends_with(';'));
        let one_line = line.ends_with('}') || line.ends_with(';');
        let after = lines.iter().skip(at + 1).position(closes).filter(|_| !one_line);
        found.push((name, at + 1, after.map_or(1, |after| after + 2)));
    }
    found
}

/// The name of the function that a line begins.
fn function_name(line: &str) -> Option<String> {
    let mut words = line.split_whitespace();
    let before = words.by_ref().take_while(|word| *word != "fn").collect::<Vec<_>>();
    let modifier =
        |word: &str| ["const", "async", "unsafe", "extern", "\"C\""].contains(&word) || word.starts_with("pub");
    let name = words.next().filter(|_| before.iter().all(|word| modifier(word)))?;
    Some(name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
}

#[test]
fn the_scanner_counts_as_it_should() {
    let text = "impl X {\n    pub(super) const fn a(\n        x: u8,\n    ) -> u8 {\n        x\n    }\n    fn b() {}\n}\nfn c();\n";
    let found = functions(text);
    let want = [("a", 2, 5), ("b", 7, 1), ("c", 9, 1)].map(|(name, at, lines)| (name.to_owned(), at, lines));
    assert_eq!(found, want);
    let used =
        uses("use crate::read::Config;\n// crate::cli\nlet x = crate::spec::a(crate::Y);\n#[cfg(test)]\ncrate::cli::x");
    assert_eq!(used.into_iter().collect::<Vec<_>>(), ["read", "spec"]);
}
