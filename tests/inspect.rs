//! `hf2onnx inspect`: the words for three kinds of architecture, one tensor's way, and the record of a built directory.

mod common;

use std::path::Path;

use common::{Case, TestResult, build, hf2onnx};

fn inspect(case: &str, more: &[&str]) -> TestResult<String> {
    let repo = Case::named(case)?.repo()?;
    let own = repo.join("template.toml");
    let mut arguments = vec!["inspect".as_ref(), repo.as_os_str()];
    if own.is_file() {
        arguments.extend(["--template".as_ref(), own.as_os_str()]);
    }
    arguments.extend(more.iter().map(AsRef::<std::ffi::OsStr>::as_ref));
    let ran = hf2onnx(arguments)?;
    if !ran.status.success() {
        return Err(String::from_utf8_lossy(&ran.stderr).into_owned().into());
    }
    Ok(String::from_utf8(ran.stdout)?)
}

/// Without the part that differs by where the template lies, or by how well a target is lowered today.
fn stable(text: &str) -> String {
    let kept = text.lines().filter(|line| !line.contains("by the template") && !line.starts_with("  graph "));
    let kept = kept.take_while(|line| *line != "not in the target's best form");
    kept.fold(String::new(), |text, line| text + line + "\n")
}

#[test]
fn words() -> TestResult {
    for case in ["llama", "deepseek_v3", "my_model"] {
        insta::assert_snapshot!(case, stable(&inspect(case, &[])?));
    }
    Ok(())
}

#[test]
fn what_is_not_in_its_best_form_says_why() -> TestResult {
    let text = inspect("deepseek_v3", &[])?;
    let (_, notes) = text.split_once("not in the target's best form").ok_or(text.clone())?;
    assert!(notes.contains("attention: GroupQueryAttention is not used, because"), "{notes}");
    Ok(())
}

#[test]
fn a_tensors_way() -> TestResult {
    let of_tensor = inspect("my_model", &["--tensor", "blocks.0.attn.qkv.weight"])?;
    for part in ["in model.safetensors", "self_attn.k_proj.weight", "split(blocks.0.attn.qkv.weight", "MatMul"] {
        assert!(of_tensor.contains(part), "{part} in\n{of_tensor}");
    }
    let of_parameter = inspect("my_model", &["--tensor", "model.layers.0.self_attn.k_proj.weight"])?;
    assert!(of_parameter.contains("blocks.0.attn.qkv.weight"), "{of_parameter}");
    let dropped = inspect("llama", &["--json", "--tensor", "model.norm.weight"])?;
    let way: serde_json::Value = serde_json::from_str(&dropped)?;
    let nodes = way.pointer("/initializers/0/nodes").and_then(serde_json::Value::as_array).map(Vec::len);
    assert_eq!(nodes, Some(1), "{way:#}");
    let error = inspect("llama", &["--tensor", "model.nrm.weight"]).expect_err("no such name").to_string();
    assert!(error.contains("model.norm.weight"), "{error}");
    Ok(())
}

#[test]
fn graphs() -> TestResult {
    let text = inspect("llama", &["--graph", "--target", "standard"])?;
    assert!(text.contains("# composite operations") && text.contains("# standard"), "{text}");
    Ok(())
}

#[test]
fn a_built_directory_by_its_record() -> TestResult {
    let scratch = tempfile::tempdir()?;
    let output = scratch.path().join("out");
    build(&Case::named("llama")?.repo()?, &output, "standard", None)?;
    let ran = hf2onnx([Path::new("inspect"), &output])?;
    let text = String::from_utf8(ran.stdout)?;
    for part in ["with the template llama", "standard", "checked       no", "pairs (i, i + half)", "sha256"] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    let json = hf2onnx([Path::new("inspect"), &output, Path::new("--json")])?;
    let record: serde_json::Value = serde_json::from_slice(&json.stdout)?;
    assert_eq!(record.pointer("/record/target").and_then(serde_json::Value::as_str), Some("standard"));
    Ok(())
}
