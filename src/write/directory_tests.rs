#![allow(clippy::unwrap_used)]

use super::*;
use tempfile::TempDir;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn build(output: &Path, force: Force, text: &str) -> Result<()> {
    let staging = Staging::new(output, force)?;
    fs::create_dir(staging.path().join("onnx")).unwrap();
    fs::write(staging.path().join("onnx/model.onnx"), text).unwrap();
    fs::write(staging.path().join("hf2onnx.json"), "{}").unwrap();
    staging.commit()
}

#[test]
fn a_commit_leaves_the_output_alone() {
    let root = TempDir::new().unwrap();
    let output = root.path().join("a/b/out");
    build(&output, Force::No, "x").unwrap();
    assert_eq!(names(output.parent().unwrap()), ["out"]);
    assert_eq!(names(&output), ["hf2onnx.json", "onnx"]);
}

#[cfg(unix)]
#[test]
fn modes() {
    use std::os::unix::fs::PermissionsExt;
    let root = TempDir::new().unwrap();
    let source = root.path().join("source");
    fs::write(&source, "weights").unwrap();
    fs::set_permissions(&source, fs::Permissions::from_mode(0o400)).unwrap();
    let staging = Staging::new(&root.path().join("out"), Force::No).unwrap();
    fs::create_dir(staging.path().join("d")).unwrap();
    fs::write(staging.path().join("d/own"), "x").unwrap();
    fs::set_permissions(staging.path().join("d/own"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::hard_link(&source, staging.path().join("linked")).unwrap();
    staging.commit().unwrap();
    let mode = |path: &str| fs::metadata(root.path().join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("out"), mode("out/d"), mode("out/d/own")), (0o755, 0o755, 0o644));
    assert_eq!(mode("source"), 0o400, "a linked file keeps its owner's mode");
}

#[test]
fn a_drop_leaves_nothing() {
    let root = TempDir::new().unwrap();
    let staging = Staging::new(&root.path().join("a/b/out"), Force::No).unwrap();
    fs::write(staging.path().join("file"), "x").unwrap();
    drop(staging);
    assert_eq!(names(root.path()), [""; 0]);
}

#[test]
fn what_force_replaces() {
    let root = TempDir::new().unwrap();
    let output = root.path().join("out");
    build(&output, Force::No, "first").unwrap();
    let error = build(&output, Force::No, "second").unwrap_err();
    assert_eq!(error.code, Code::OutputExists);
    assert!(error.help.contains("--force"), "{error}");
    build(&output, Force::Yes, "second").unwrap();
    assert_eq!(fs::read_to_string(output.join("onnx/model.onnx")).unwrap(), "second");

    let empty = root.path().join("empty");
    fs::create_dir(&empty).unwrap();
    assert_eq!(build(&empty, Force::No, "x").unwrap_err().code, Code::OutputExists);
    build(&empty, Force::Yes, "x").unwrap();

    let other = root.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.tex"), "x").unwrap();
    assert_eq!(build(&other, Force::Yes, "x").unwrap_err().code, Code::OutputExists);
    assert_eq!(build(&other.join("thesis.tex"), Force::Yes, "x").unwrap_err().code, Code::OutputExists);
    assert_eq!(names(&other), ["thesis.tex"]);
    assert_eq!(names(root.path()), ["empty", "other", "out"]);
}

#[test]
fn an_output_that_appears_meanwhile_is_not_replaced() {
    let root = TempDir::new().unwrap();
    let output = root.path().join("out");
    let staging = Staging::new(&output, Force::No).unwrap();
    fs::create_dir(&output).unwrap();
    assert_eq!(staging.commit().unwrap_err().code, Code::OutputExists);
    assert_eq!(names(root.path()), ["out"]);
}

#[test]
fn a_path_without_a_name() {
    assert_eq!(Staging::new(Path::new("/"), Force::Yes).unwrap_err().code, Code::UsageInvalid);
}

#[cfg(unix)]
#[test]
fn an_output_that_is_a_link() {
    let root = TempDir::new().unwrap();
    fs::create_dir(root.path().join("disk")).unwrap();
    fs::create_dir(root.path().join("disk/out")).unwrap();
    std::os::unix::fs::symlink("disk/out", root.path().join("link")).unwrap();
    build(&root.path().join("link"), Force::Yes, "x").unwrap();
    assert_eq!(names(&root.path().join("disk/out")), ["hf2onnx.json", "onnx"]);
    assert!(root.path().join("link").is_symlink());
}

#[test]
fn left_over_builds_are_removed_and_living_ones_are_not() {
    let root = TempDir::new().unwrap();
    let output = root.path().join("out");
    let living = Staging::new(&output, Force::No).unwrap();
    for dead in [".out.hf2onnx-partial-dead", ".out.hf2onnx-partial-nolock", ".other.hf2onnx-partial-x"] {
        fs::create_dir(root.path().join(dead)).unwrap();
        fs::write(root.path().join(dead).join("file"), "x").unwrap();
    }
    fs::write(root.path().join(".out.hf2onnx-partial-dead.lock"), "1").unwrap();
    build(&output, Force::No, "x").unwrap();
    let kept = living.path().file_name().unwrap().to_str().unwrap().to_owned();
    let lock = format!("{kept}.lock");
    let mut expected = [".other.hf2onnx-partial-x", "out", &kept, &lock];
    expected.sort_unstable();
    assert_eq!(names(root.path()), expected);
    drop(living);
    assert_eq!(names(root.path()), [".other.hf2onnx-partial-x", "out"]);
}

#[test]
fn an_interrupted_replacement_gives_the_old_output_back() {
    let root = TempDir::new().unwrap();
    let output = root.path().join("out");
    build(&root.path().join(".out.hf2onnx-partial-x.old"), Force::No, "old").unwrap();
    fs::create_dir(root.path().join(".out.hf2onnx-partial-x")).unwrap();
    let error = Staging::new(&output, Force::No).unwrap_err();
    assert_eq!(error.code, Code::OutputExists);
    assert_eq!(names(root.path()), ["out"]);
    assert_eq!(fs::read_to_string(output.join("onnx/model.onnx")).unwrap(), "old");
}
