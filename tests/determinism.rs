//! Same input, same bytes: with one thread and with many, from relative and from absolute paths.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use common::models::{TARGETS, build_with};
use common::{Case, TestResult, cases, kjv_llama, scratch};
use hf2onnx::compile::{Options, Weights};

/// A plain model, one whose experts are stacked and interleaved, and one with a template of its own.
const CASES: [&str; 3] = ["llama-sharded", "mixtral", "my_model"];

#[test]
fn builds_are_the_same_byte_for_byte() -> TestResult {
    let mut repositories = vec![("kjv-llama".to_owned(), kjv_llama(), None)];
    for name in CASES {
        let case = Case::named(name)?;
        repositories.push((case.name.clone(), case.repo()?, case.template()));
    }
    let mut wrong = Vec::new();
    for (name, repository, template) in &repositories {
        for target in TARGETS {
            let one = build(repository, template.as_deref(), target, "1", false)?;
            let many = build(repository, template.as_deref(), target, "7", false)?;
            let relative = build(repository, template.as_deref(), target, "7", true)?;
            wrong.extend(differences(&one, &many).map(|file| format!("{name} on {target}: {file}, by threads")));
            wrong.extend(differences(&one, &relative).map(|file| format!("{name} on {target}: {file}, by path")));
            assert!(one.contains_key("onnx/model.onnx_data") && one.contains_key("hf2onnx.json"), "{:?}", one.keys());
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    Ok(())
}

/// Every case, and a few with linked weights, with one thread and with three.
#[test]
fn every_case_is_the_same_on_any_threads() -> TestResult {
    let mut jobs = Vec::new();
    for case in cases()? {
        jobs.push((case.name.clone(), case.options("ort-cpu")?));
    }
    for name in CASES {
        let options = Case::named(name)?.options("ort-cpu")?;
        jobs.push((format!("{name}, linked"), Options { weights: Weights::Link { hash: false }, ..options }));
    }
    let threads = |count: usize| rayon::ThreadPoolBuilder::new().num_threads(count).build();
    let (one, three) = (threads(1)?, threads(3)?);
    let mut wrong = Vec::new();
    for (name, options) in &jobs {
        let built = |pool: &rayon::ThreadPool| -> TestResult<BTreeMap<String, Vec<u8>>> {
            let place = tempfile::tempdir_in(scratch())?;
            let output = place.path().join("out");
            pool.install(|| build_with(options, &output))?;
            let mut files = BTreeMap::new();
            read_all(&output, "", &mut files)?;
            Ok(files)
        };
        let (first, second) = (built(&one)?, built(&three)?);
        wrong.extend(differences(&first, &second).map(|file| format!("{name}: {file}")));
    }
    assert!(wrong.is_empty() && jobs.len() > 100, "\n{}", wrong.join("\n"));
    Ok(())
}

/// Every file of a fresh build. Relative paths start from the repository's parent, in another place than the absolute ones.
fn build(
    repository: &Path,
    template: Option<&Path>,
    target: &str,
    threads: &str,
    relative: bool,
) -> TestResult<BTreeMap<String, Vec<u8>>> {
    let place = tempfile::tempdir_in(scratch())?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_hf2onnx"));
    command.env("RAYON_NUM_THREADS", threads).args(["build", "--target", target]);
    if relative {
        let copy = place.path().join("some").join("where");
        copy_files(repository, &copy)?;
        command.current_dir(place.path()).args(["some/where/../where", "--output", "./out"]);
        if let Some(template) = template {
            fs::copy(template, place.path().join("template.toml"))?;
            command.args(["--template", "template.toml"]);
        }
    } else {
        command.arg(repository).arg("--output").arg(place.path().join("out"));
        command.args(template.iter().flat_map(|template| ["--template".as_ref(), template.as_os_str()]));
    }
    let ran = command.output()?;
    if !ran.status.success() {
        return Err(String::from_utf8_lossy(&ran.stderr).into());
    }
    let mut files = BTreeMap::new();
    read_all(&place.path().join("out"), "", &mut files)?;
    Ok(files)
}

fn copy_files(from: &Path, to: &Path) -> TestResult {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

fn read_all(dir: &Path, prefix: &str, files: &mut BTreeMap<String, Vec<u8>>) -> TestResult {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            read_all(&entry.path(), &format!("{name}/"), files)?;
        } else {
            files.insert(name, fs::read(entry.path())?);
        }
    }
    Ok(())
}

fn differences<'f>(
    a: &'f BTreeMap<String, Vec<u8>>,
    b: &'f BTreeMap<String, Vec<u8>>,
) -> impl Iterator<Item = &'f String> {
    let names: std::collections::BTreeSet<_> = a.keys().chain(b.keys()).collect();
    names.into_iter().filter(|name| a.get(*name) != b.get(*name))
}
