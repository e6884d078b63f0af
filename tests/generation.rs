//! `generate` follows a `generation_config.json` as transformers does: what golden/generation recorded of it.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use hf2onnx::generate::config::{GenerationConfig, Overrides};
use hf2onnx::generate::generate;
use hf2onnx::runtime::{Search, ensure};
use hf2onnx::session::{Decoder, Options};
use hf2onnx::tokenizer::Tokenizer;
use serde_json::{Value, json};

type TestResult<T = ()> = Result<T, Box<dyn Error>>;

fn golden(parts: &[&str]) -> std::path::PathBuf {
    parts.iter().fold(Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"), |path, part| path.join(part))
}

fn program(arguments: &[&str]) -> TestResult<Output> {
    Ok(Command::new(env!("CARGO_BIN_EXE_hf2onnx")).args(arguments).output()?)
}

/// Builds kjv-llama, with this `generation_config.json` in place of its own.
fn build(folder: &Path, generation: &Value) -> TestResult<(std::path::PathBuf, Output)> {
    let (repository, output) = (folder.join("repository"), folder.join("output"));
    fs::create_dir_all(&repository)?;
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(golden(&["kjv-llama", name]), repository.join(name))?;
    }
    fs::write(repository.join("generation_config.json"), generation.to_string())?;
    let text = |path: &Path| path.to_str().map(str::to_owned).ok_or("a path that is no text");
    let built = program(&["build", &text(&repository)?, "--output", &text(&output)?])?;
    Ok((output, built))
}

#[test]
fn texts_are_continued_as_transformers_continues_them() -> TestResult {
    ensure(&Search::default(), &mut |_| {})?;
    let folder = tempfile::tempdir()?;
    let (model, built) = build(folder.path(), &json!({}))?;
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let mut decoder = Decoder::open(&model, &Options { threads: 1, ..Options::default() })?;
    let tokenizer = Tokenizer::open(&model)?;
    let recorded: Value = serde_json::from_slice(&fs::read(golden(&["generation", "texts.json"]))?)?;
    let cases = recorded["cases"].as_array().ok_or("no cases")?;
    assert!(cases.len() > 100, "{} cases", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        fs::write(model.join("generation_config.json"), case["settings"].to_string())?;
        let prompt = tokenizer.encode(case["prompt"].as_str().ok_or("no prompt")?, true)?;
        let settings = GenerationConfig::read(&model)?.settings(&prompt, &Overrides::default())?;
        let got = generate(&mut decoder, &tokenizer, &prompt, &settings, &mut |_| true)?;
        if (json!(got.ids), json!(got.text)) != (case["ids"].clone(), case["text"].clone()) {
            wrong.push(format!("{case}\n{:?} {:?}", got.ids, got.text));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    Ok(())
}

/// From the file to the program: followed, named where it is not, refused where it is wrong, and no build stopped by it.
#[test]
fn the_program_follows_names_and_refuses() -> TestResult {
    let folder = tempfile::tempdir()?;
    let hints = json!({"eos_token_id": 1, "top_k": -1, "temperature": "warm", "do_sample": true});
    let (model, built) = build(folder.path(), &hints)?;
    let said = String::from_utf8(built.stderr)?;
    assert!(built.status.success(), "{said}");
    assert!(said.contains("key `top_k` is -1") && said.contains("key `temperature` is \"warm\""), "{said}");
    let genai: Value = serde_json::from_slice(&fs::read(model.join("genai_config.json"))?)?;
    assert_eq!((&genai["search"]["top_k"], &genai["search"]["temperature"]), (&json!(0), &json!(1.0)));

    let dir = model.to_str().ok_or("a path that is no text")?;
    let prompt = "Blessed are they that";
    let refused = program(&["generate", dir, "--prompt", prompt])?;
    let said = String::from_utf8(refused.stderr)?;
    assert!(!refused.status.success() && said.contains("generation_config.json: key `temperature`"), "{said}");
    let mended = program(&[
        "generate",
        dir,
        "--prompt",
        prompt,
        "--json",
        "--temperature",
        "1",
        "--top-k",
        "1",
        "--max-new-tokens",
        "4",
    ])?;
    assert!(mended.status.success(), "{}", String::from_utf8_lossy(&mended.stderr));

    let followed = json!({"eos_token_id": 1, "num_beams": 4, "my_own": 7, "stop_strings": [" be"], "max_length": 40});
    fs::write(model.join("generation_config.json"), followed.to_string())?;
    let ran = program(&["generate", dir, "--prompt", prompt, "--json"])?;
    let (said, result) = (String::from_utf8(ran.stderr)?, serde_json::from_slice::<Value>(&ran.stdout)?);
    let named = |key: &str| said.lines().filter(|line| line.contains(&format!("`{key}`"))).count();
    assert_eq!((named("num_beams"), named("my_own"), named("stop_strings")), (1, 1, 0), "{said}");
    let (text, finish) = (result["generated"]["text"].as_str().ok_or("no text")?, &result["generated"]["finish"]);
    let count = result["generated"]["ids"].as_array().ok_or("no ids")?.len();
    let ends = text.find(" be").is_some_and(|at| at + 6 >= text.len());
    assert!(*finish == "stop" && ends || *finish == "length" && count < 40, "{result}");
    Ok(())
}
