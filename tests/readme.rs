//! What README and golden/support.toml say is supported is what the templates and the cases say.
//! `UPDATE_README=1 cargo test --test readme` writes both again.

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use common::{TestResult, cases, repository};
use hf2onnx::describe::Catalogue;
use hf2onnx::describe::support::{self, Case};
use hf2onnx::opset::Target;

const BEGIN: &str = "<!-- supported: written by `UPDATE_README=1 cargo test --test readme` -->\n";
const END: &str = "<!-- /supported -->";

fn updating() -> bool {
    std::env::var_os("UPDATE_README").is_some()
}

#[test]
fn support_lists_every_case() -> TestResult {
    let catalogue = Catalogue::built_in()?;
    let targets: Vec<String> = Target::all()?.iter().map(|target| target.name.clone()).collect();
    let mut found = BTreeMap::new();
    for case in cases()? {
        let config: serde_json::Value = serde_json::from_slice(&fs::read(case.dir.join("config.json"))?)?;
        let model_type = config.get("model_type").and_then(serde_json::Value::as_str).ok_or("no model_type")?;
        let template = catalogue.for_model_type(model_type).map_or("own", |template| &template.name);
        let targets = targets.clone();
        let entry = Case { model_type: model_type.to_owned(), template: template.to_owned(), targets };
        found.insert(case.name, entry);
    }
    if updating() {
        let path = repository().join("golden").join("support.toml");
        let old = fs::read_to_string(&path)?;
        let mut text: String =
            old.lines().take_while(|line| line.starts_with('#')).fold(String::new(), |t, l| t + l + "\n");
        for (name, case) in &found {
            write!(text, "\n[{name}]\nmodel_type = {:?}\ntemplate = {:?}\n", case.model_type, case.template)?;
            writeln!(text, "targets = {:?}", case.targets)?;
        }
        fs::write(path, text)?;
        return Ok(());
    }
    assert_eq!(support::cases()?, found, "run UPDATE_README=1 cargo test --test readme");
    Ok(())
}

#[test]
fn readme_holds_the_table() -> TestResult {
    let path = repository().join("README.md");
    let text = fs::read_to_string(&path)?;
    let (before, rest) = text.split_once(BEGIN).ok_or("README.md has no mark where the table begins")?;
    let (table, after) = rest.split_once(END).ok_or("README.md has no mark where the table ends")?;
    let wanted = support::markdown(&support::rows(&Catalogue::built_in()?)?);
    if updating() {
        return Ok(fs::write(path, format!("{before}{BEGIN}{wanted}{END}{after}"))?);
    }
    assert_eq!(table, wanted, "run UPDATE_README=1 cargo test --test readme");
    Ok(())
}

/// Every template is shown by a case, its printed form is a template, and nothing in the list is empty.
#[test]
fn templates_are_listed() -> TestResult {
    let catalogue = Catalogue::built_in()?;
    for (row, template) in support::rows(&catalogue)?.iter().zip(catalogue.templates()) {
        assert!(!row.summary.is_empty(), "{}: no summary at its head", row.template);
        assert!(!row.cases.is_empty(), "{}: no golden case", row.template);
        let again = hf2onnx::describe::Template::parse(&row.template, &template.annotated())?;
        assert_eq!(again.merged(), template.merged(), "{}", row.template);
    }
    let listed = common::hf2onnx(["templates"])?;
    let text = String::from_utf8(listed.stdout)?;
    assert!(text.contains("deepseek_v3") && text.contains("(extends llama)"), "{text}");
    let odd = common::hf2onnx(["templates", "lama"])?;
    assert_eq!(odd.status.code(), Some(1));
    Ok(())
}
