//! Random checkpoints: the compiler takes them, their names and shapes are those that transformers saves, and the
//! same configuration gives the same bytes.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use common::models::{build_with, options};
use common::{Case, TestResult, cases, hf2onnx, repository, scratch};
use hf2onnx::compile::{Options, compile};
use hf2onnx::element::ElementType;
use hf2onnx::read::{Checkpoint, Repository};
use hf2onnx::synth::{self, Layout};

const LAYOUT: Layout = Layout { element: ElementType::BF16, seed: 7, shard_size: 60_000, sparse: false };

/// Makes a checkpoint for a case; the options compile it.
fn make(case: &Case, layout: &Layout, output: &Path) -> TestResult<Options> {
    let template = case.template();
    let checkpoint = synth::plan(&case.dir.join("config.json"), template.as_deref(), &[])?;
    synth::write(&checkpoint, layout, output, |_| {})?;
    Ok(Options { template, ..options(output, "ort-cpu")? })
}

#[test]
fn every_case_compiles_from_its_config_alone() -> TestResult {
    let mut wrong = Vec::new();
    for case in cases()? {
        let place = tempfile::tempdir_in(scratch())?;
        let compiled = make(&case, &LAYOUT, &place.path().join("repo")).and_then(|options| Ok(compile(&options)?));
        match compiled {
            // Nothing is left over either.
            Ok(compiled) if compiled.plan.dropped.is_empty() => {}
            Ok(compiled) => wrong.push(format!("{}: {:?} are in nobody's way", case.name, compiled.plan.dropped)),
            Err(error) => wrong.push(format!("{}: {error}", case.name)),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// The recipes of the cases list what transformers saved.
#[test]
fn names_and_shapes_are_those_of_transformers() -> TestResult {
    let mut wrong = Vec::new();
    for case in cases()? {
        let recipe: Vec<serde_json::Value> = serde_json::from_slice(&fs::read(case.dir.join("weights.json"))?)?;
        let saved = recipe.iter().map(|entry| {
            let shape = serde_json::from_value::<Vec<usize>>(entry["shape"].clone())?;
            Ok((entry["name"].as_str().ok_or("no name")?, shape))
        });
        let saved: BTreeMap<&str, Vec<usize>> = saved.collect::<TestResult<_>>()?;
        for tensor in synth::plan(&case.dir.join("config.json"), case.template().as_deref(), &[])?.tensors {
            if saved.get(tensor.name.as_str()) != Some(&tensor.shape) {
                let found = saved.get(tensor.name.as_str());
                wrong.push(format!("{}: {} {:?}, not {found:?}", case.name, tensor.name, tensor.shape));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn some_are_built() -> TestResult {
    for name in ["llama-tied", "mixtral", "dbrx", "gpt2", "gpt_oss"] {
        let place = tempfile::tempdir_in(scratch())?;
        for (folder, element) in [("f16", ElementType::F16), ("f32", ElementType::F32)] {
            let layout = Layout { element, ..LAYOUT };
            let options = make(&Case::named(name)?, &layout, &place.path().join(folder))?;
            let output = place.path().join(format!("{folder}-onnx"));
            let compiled = build_with(&options, &output)?;
            let size: u64 = compiled.plan.initializers.iter().map(hf2onnx::bind::Initializer::bytes).sum();
            assert!(fs::metadata(output.join("onnx/model.onnx_data"))?.len() >= size, "{name} in {element}");
        }
    }
    Ok(())
}

/// Every file of a checkpoint that the program makes.
fn files(threads: &str, seed: &str, more: &[&str]) -> TestResult<BTreeMap<String, Vec<u8>>> {
    let place = tempfile::tempdir_in(scratch())?;
    let output = place.path().join("out");
    let config = Case::named("mixtral")?.dir.join("config.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hf2onnx"));
    command.env("RAYON_NUM_THREADS", threads).args(["dev", "synth", "--seed", seed, "--shard-size", "60KB"]);
    let ran = command.args(more).arg(config).arg("--output").arg(&output).output()?;
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(&output)? {
        let path = entry?.path();
        files.insert(path.file_name().unwrap_or_default().to_string_lossy().into_owned(), fs::read(&path)?);
    }
    Ok(files)
}

#[test]
fn the_same_bytes_with_any_number_of_threads() -> TestResult {
    for dtype in ["bf16", "f32"] {
        let one = files("1", "3", &["--dtype", dtype])?;
        assert!(one == files("7", "3", &["--dtype", dtype])?, "{dtype}: threads change the bytes");
        let other = files("1", "4", &["--dtype", dtype])?;
        assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
        assert!(one != other, "{dtype}: the seed changes nothing");
        assert!(one.len() > 4, "{:?}", one.keys());
        let config = fs::read(Case::named("mixtral")?.dir.join("config.json"))?;
        assert!(one.get("config.json") == Some(&config));
    }
    Ok(())
}

/// A checkpoint of holes is the same, with zeros for data.
#[test]
fn holes_read_as_zeros() -> TestResult {
    let (data, holes) = (files("2", "0", &[])?, files("2", "0", &["--sparse"])?);
    assert_eq!(data.keys().collect::<Vec<_>>(), holes.keys().collect::<Vec<_>>());
    for (name, bytes) in data.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
        let sparse = holes.get(name).ok_or("a file is missing")?;
        assert_eq!(bytes.len(), sparse.len(), "{name}");
        let start = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into()?))?;
        assert_eq!(bytes[..start], sparse[..start], "{name}: another header");
        assert!(sparse[start..].iter().all(|byte| *byte == 0), "{name}: not only holes");
        assert!(bytes[start..].iter().any(|byte| *byte != 0), "{name}: no data");
    }
    Ok(())
}

/// The largest model of the benches: more than a terabyte, described in full and written nowhere.
#[test]
fn a_sparse_checkpoint_takes_no_disk() -> TestResult {
    let config = repository().join("benches").join("configs").join("deepseek-v3.json");
    let checkpoint = synth::plan(&config, None, &[])?;
    let layout = Layout { shard_size: 5_000_000_000, sparse: true, ..LAYOUT };
    // Without the 11 billion of the layer that predicts a token further ahead: 671 billion.
    assert_eq!(checkpoint.bytes(&layout)?, 2 * 671_026_419_200);
    let place = tempfile::tempdir_in(scratch())?;
    let config = repository().join("benches").join("configs").join("llama-3.2-1b.json");
    let checkpoint = synth::plan(&config, None, &[])?;
    // A system without holes would need the room.
    if cfg!(target_os = "linux") {
        synth::write(&checkpoint, &Layout { shard_size: 1_000_000_000, ..layout }, &place.path().join("1b"), |_| {})?;
        let opened = Repository::open(&place.path().join("1b"))?.checkpoint;
        assert_eq!(opened.tensors().map(|tensor| tensor.length).sum::<u64>(), checkpoint.bytes(&layout)?);
        assert!(blocks(&opened)? < 10_000, "{} blocks on disk", blocks(&opened)?);
    }
    Ok(())
}

/// Blocks of 512 bytes that the files take.
#[cfg(unix)]
fn blocks(checkpoint: &Checkpoint) -> TestResult<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let of = |file: &hf2onnx::read::ShardFile| Ok(fs::metadata(&file.path)?.blocks());
    checkpoint.files().iter().map(of).sum()
}

#[cfg(not(unix))]
#[expect(clippy::unnecessary_wraps, reason = "as where it can fail")]
fn blocks(_: &Checkpoint) -> TestResult<u64> {
    Ok(0)
}

#[test]
fn what_exists_is_kept_and_what_fails_leaves_nothing() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let output = place.path().join("out");
    fs::create_dir(&output)?;
    fs::write(output.join("mine"), "mine")?;
    let config = Case::named("llama")?.dir.join("config.json");
    let run = |config: &Path, output: &Path| {
        hf2onnx(["dev".as_ref(), "synth".as_ref(), config.as_os_str(), "--output".as_ref(), output.as_os_str()])
    };
    let ran = run(&config, &output)?;
    assert!(String::from_utf8_lossy(&ran.stderr).contains("error[output-exists]"));
    assert_eq!(fs::read_to_string(output.join("mine"))?, "mine");
    let odd = place.path().join("odd.json");
    fs::write(&odd, fs::read_to_string(&config)?.replace("\"model_type\": \"llama\"", "\"model_type\": \"odd\""))?;
    let ran = run(&odd, &place.path().join("never"))?;
    assert!(String::from_utf8_lossy(&ran.stderr).contains("error[model-type-unknown]"));
    assert_eq!(fs::read_dir(place.path())?.count(), 2, "only what was there before");
    Ok(())
}
