//! A build that is killed leaves no output, and the next one cleans up behind it.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hf2onnx::write::{Force, Staging};

const VARIABLE: &str = "HF2ONNX_TEST_STAGE";

/// Not a test of its own: what the killed process does.
#[test]
fn a_build_that_never_ends() {
    let Some(output) = std::env::var_os(VARIABLE) else {
        return;
    };
    let staging = Staging::new(&PathBuf::from(output), Force::No).unwrap();
    fs::write(staging.path().join("model.onnx"), "half").unwrap();
    println!("\nstaged");
    std::thread::sleep(std::time::Duration::from_secs(60));
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_killed_build() {
    let root = tempfile::tempdir().unwrap();
    let output = root.path().join("out");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_build_that_never_ends", "--nocapture"])
        .env(VARIABLE, &output)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "staged"));

    // While it lives, another build leaves it alone.
    drop(Staging::new(&output, Force::No).unwrap());
    assert_eq!(names(root.path()).len(), 2, "a directory and its lock");

    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(names(root.path()).len(), 2, "no output, only what was left");

    let staging = Staging::new(&output, Force::No).unwrap();
    fs::write(staging.path().join("model.onnx"), "whole").unwrap();
    staging.commit().unwrap();
    assert_eq!(names(root.path()), ["out"]);
    assert_eq!(fs::read_to_string(output.join("model.onnx")).unwrap(), "whole");
}
