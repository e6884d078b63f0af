//! A build that is ended at any moment, by whatever: its output is whole or absent, and the next build succeeds.
#![allow(clippy::indexing_slicing)]

mod common;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::models::runtime;
use common::{TestResult, scratch};
use hf2onnx::read::{hash_files, json_file};
use hf2onnx::session::{Decoder, Options};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

const HIDDEN: usize = 512;
const MLP: usize = 1024;
const LAYERS: usize = 4;
const VOCABULARY: usize = 8192;
const KILLS: usize = 50;
const KILLS_OF_REPLACEMENTS: usize = 20;

/// A folder with a repository whose build takes a while, and the output beside it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> TestResult<Self> {
        let place = Self { dir: tempfile::tempdir_in(scratch())? };
        let repo = place.repo();
        fs::create_dir_all(&repo)?;
        fs::create_dir_all(place.output().parent().ok_or("no parent")?)?;
        let config = json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN,
            "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
            "num_key_value_heads": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true, "attention_bias": false,
            "mlp_bias": false, "bos_token_id": 0, "eos_token_id": 1
        });
        fs::write(repo.join("config.json"), config.to_string())?;
        write_weights(&repo.join("model.safetensors"))?;
        Ok(place)
    }

    fn repo(&self) -> PathBuf {
        self.dir.path().join("repo")
    }

    fn output(&self) -> PathBuf {
        self.dir.path().join("outputs").join("model")
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hf2onnx"));
        command.arg("build").arg(self.repo()).arg("--output").arg(self.output()).args(more);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    fn start(&self, more: &[&str]) -> TestResult<Child> {
        Ok(self.command(more).spawn()?)
    }

    /// An undisturbed build, and how long it takes.
    fn build(&self, more: &[&str]) -> TestResult<Duration> {
        let start = Instant::now();
        let ran = self.command(more).output()?;
        let time = start.elapsed();
        assert!(ran.status.success(), "{}", words(&ran));
        self.whole()?.ok_or("no output")?;
        Ok(time)
    }

    /// The record of the output, if there is an output; what is there has to be whole.
    fn whole(&self) -> TestResult<Option<Value>> {
        let output = self.output();
        if !output.try_exists()? {
            return Ok(None);
        }
        let record = Value::Object(json_file(&output.join("hf2onnx.json"))?);
        let outputs = record["outputs"].as_array().filter(|list| !list.is_empty()).ok_or("no outputs")?;
        for entry in outputs {
            let name = entry["name"].as_str().ok_or("no name")?;
            let path = output.join("onnx").join(name);
            let hash = &hash_files(&[&path])?[0];
            assert_eq!(hash.sha256.as_deref(), entry["sha256"].as_str(), "{}", path.display());
        }
        for name in ["config.json", "genai_config.json", "generation_config.json"] {
            json_file(&output.join(name))?;
        }
        Ok(Some(record))
    }

    /// Names beside the output, itself included.
    fn names(&self) -> TestResult<Vec<String>> {
        let entries = fs::read_dir(self.output().parent().ok_or("no parent")?)?;
        let mut names = Vec::new();
        for entry in entries {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn loads(&self) -> TestResult {
        runtime()?;
        Decoder::open(&self.output(), &Options { threads: 1, ..Options::default() })?;
        Ok(())
    }
}

fn words(ran: &Output) -> String {
    format!("{}: {}", ran.status, String::from_utf8_lossy(&ran.stderr))
}

/// Random bfloat16 numbers between -1 and 1, written as they are made.
fn write_weights(path: &Path) -> TestResult {
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN])];
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        };
        for name in ["input_layernorm", "post_attention_layernorm"] {
            add(name, &[HIDDEN]);
        }
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            add(&format!("self_attn.{name}"), &[HIDDEN, HIDDEN]);
        }
        add("mlp.gate_proj", &[MLP, HIDDEN]);
        add("mlp.up_proj", &[MLP, HIDDEN]);
        add("mlp.down_proj", &[HIDDEN, MLP]);
    }
    tensors.push(("model.norm.weight".into(), vec![HIDDEN]));
    let (mut header, mut end) = (String::from("{"), 0);
    for (name, shape) in &tensors {
        let begin = end;
        end += 2 * shape.iter().product::<usize>();
        let comma = if begin == 0 { "" } else { "," };
        write!(header, r#"{comma}"{name}":{{"dtype":"BF16","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#)?;
    }
    header += "}";
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(&u64::try_from(header.len())?.to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut random = ChaCha8Rng::seed_from_u64(7);
    for _ in 0..end / 2 {
        file.write_all(&half::bf16::from_f32(random.random_range(-1.0..1.0)).to_le_bytes())?;
    }
    Ok(file.flush()?)
}

/// A random part of a time, in whole microseconds.
fn moment(random: &mut ChaCha8Rng, time: Duration) -> TestResult<Duration> {
    Ok(Duration::from_micros(random.random_range(0..=u64::try_from(time.as_micros())?)))
}

/// Starts a build and kills it after a time. True if it had not ended by itself.
fn kill_after(place: &Place, more: &[&str], after: Duration) -> TestResult<bool> {
    let mut child = place.start(more)?;
    std::thread::sleep(after);
    child.kill()?;
    let status = child.wait()?;
    Ok(!status.success())
}

#[test]
fn killed_at_any_moment() -> TestResult {
    let place = Place::new()?;
    let time = place.build(&[])?;
    let mut random = ChaCha8Rng::seed_from_u64(50);
    let (mut killed, mut left_behind) = (0, 0);
    for round in 0..KILLS {
        fs::remove_dir_all(place.output())?;
        let after = moment(&mut random, time)?;
        killed += usize::from(kill_after(&place, &[], after)?);
        let there = place.whole().map_err(|error| format!("round {round}, killed after {after:?}: {error}"))?;
        left_behind += usize::from(place.names()?.len() > usize::from(there.is_some()));
        // Without --force where nothing appeared: what was left must not look like an output.
        place.build(if there.is_some() { &["--force"] } else { &[] })?;
        assert_eq!(place.names()?, ["model"], "round {round}");
    }
    // Otherwise nothing was tried.
    assert!(killed >= KILLS / 3 && left_behind >= KILLS / 5, "{killed} killed, {left_behind} left something behind");
    place.loads()
}

#[test]
fn killed_while_replacing() -> TestResult {
    let place = Place::new()?;
    let logits = |record: &Value| record["logits"].as_str().map(str::to_owned);
    let time = place.build(&["--logits", "last"])?;
    let mut random = ChaCha8Rng::seed_from_u64(20);
    let mut old = 0;
    for round in 0..KILLS_OF_REPLACEMENTS {
        // The last third of a build, where the old output goes and the new one comes.
        let after = time.mul_f64(0.66) + moment(&mut random, time.mul_f64(0.5))?;
        kill_after(&place, &["--force", "--logits", "all"], after)?;
        let there = place.whole().map_err(|error| format!("round {round}, killed after {after:?}: {error}"))?;
        match there.as_ref().and_then(logits).as_deref() {
            Some("last") => old += 1,
            Some("all") => {}
            // Two renames where the system can not exchange directories: the next build puts the old one back.
            None if cfg!(windows) => {}
            other => return Err(format!("round {round}: an output with {other:?}").into()),
        }
        place.build(&["--force", "--logits", "last"])?;
        assert_eq!(place.names()?, ["model"], "round {round}");
    }
    assert!(old > 0, "every build was ready before it was killed");
    Ok(())
}

#[test]
fn the_source_disappears() -> TestResult {
    let place = Place::new()?;
    let time = place.build(&[])?;
    fs::remove_dir_all(place.output())?;
    let child = place.start(&[])?;
    std::thread::sleep(time.mul_f64(0.3));
    // Windows does not remove files that are open.
    let _ = fs::remove_dir_all(place.repo());
    let ran = child.wait_with_output()?;
    if place.whole()?.is_some() {
        assert!(ran.status.success() && place.names()? == ["model"], "{}", words(&ran));
    } else {
        assert_eq!(ran.status.code(), Some(1), "{}", words(&ran));
        assert!(words(&ran).contains("error[") && words(&ran).contains("repo"), "{}", words(&ran));
        assert!(place.names()?.is_empty(), "{:?}", place.names());
    }
    Ok(())
}

/// A file may not grow past a limit, as on a full disk: once with the signal that kills, once with the error.
#[cfg(unix)]
#[test]
fn a_limit_on_files() -> TestResult {
    let place = Place::new()?;
    let limited = |signal: &str| -> TestResult<Output> {
        let script = format!("{signal} ulimit -f 4000; exec \"$@\"");
        let build = place.command(&[]);
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(script).arg("sh").arg(build.get_program()).args(build.get_args());
        Ok(shell.output()?)
    };
    let ran = limited("trap '' XFSZ;")?;
    assert_eq!(ran.status.code(), Some(1), "{}", words(&ran));
    assert!(words(&ran).contains("error[io]") && words(&ran).contains("model.onnx_data"), "{}", words(&ran));
    assert!(words(&ran).contains("disk space, or lift its limits"), "{}", words(&ran));
    assert!(place.names()?.is_empty(), "{:?}", place.names());
    let ran = limited("")?;
    assert!(!ran.status.success() && place.whole()?.is_none(), "{}", words(&ran));
    place.build(&[])?;
    assert_eq!(place.names()?, ["model"]);
    Ok(())
}

/// Sends a signal as a shell would.
#[cfg(unix)]
fn signal(child: &Child, name: &str) -> TestResult {
    assert!(Command::new("kill").args(["-s", name, &child.id().to_string()]).status()?.success());
    Ok(())
}

/// Waits until a build has something beside its output.
#[cfg(unix)]
fn staged(place: &Place) -> TestResult {
    let start = Instant::now();
    while !place.names()?.iter().any(|name| name.contains("hf2onnx-partial") && !name.contains(".lock")) {
        assert!(start.elapsed() < Duration::from_secs(30), "nothing was staged");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

#[cfg(unix)]
#[test]
fn one_ctrl_c_cleans_up() -> TestResult {
    let place = Place::new()?;
    for name in ["INT", "TERM"] {
        let child = place.start(&["--json"])?;
        staged(&place)?;
        signal(&child, name)?;
        let ran = child.wait_with_output()?;
        assert_eq!(ran.status.code(), Some(130), "{name}: {}", words(&ran));
        let error: Value = serde_json::from_slice(&ran.stderr)?;
        assert_eq!(error["error"]["code"], json!("interrupted"), "{error}");
        assert!(place.names()?.is_empty(), "{name}: {:?}", place.names());
    }
    Ok(())
}

#[cfg(unix)]
#[test]
fn two_ctrl_c_end_at_once() -> TestResult {
    let place = Place::new()?;
    let child = place.start(&[])?;
    staged(&place)?;
    signal(&child, "INT")?;
    // The first one may have done its work by now.
    let _ = Command::new("kill").args(["-s", "INT", &child.id().to_string()]).stderr(Stdio::null()).status()?;
    let ran = child.wait_with_output()?;
    assert_eq!(ran.status.code(), Some(130), "{}", words(&ran));
    assert!(place.whole()?.is_none());
    place.build(&[])?;
    assert_eq!(place.names()?, ["model"]);
    Ok(())
}
