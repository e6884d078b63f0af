//! Repositories and built directories whose files are no files, or larger than anything of their kind; outputs where
//! none can be. Each is an error in bounded time, with little memory.
#![cfg(unix)]

mod common;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::models::{build_with, options, runtime};
use common::{TestResult, copy_kjv_llama, kjv_llama, scratch};
use hf2onnx::error::Code;
use hf2onnx::read::Checkpoint;
use hf2onnx::write::{Force, Staging, free_space, link};

/// No run here takes a second; whoever waits for somebody who never comes is ended.
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with a copy of the trained model, and room for outputs.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> TestResult<Self> {
        let place = Self { dir: tempfile::tempdir_in(scratch())? };
        fs::create_dir(place.repo())?;
        copy_kjv_llama(&place.repo())?;
        Ok(place)
    }

    fn repo(&self) -> PathBuf {
        self.dir.path().join("repo")
    }

    fn output(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    /// `hf2onnx build` with more words.
    fn build(&self, more: &[&str]) -> TestResult<Output> {
        let (repo, output) = (self.repo(), self.output());
        run(&[&["build", text(&repo)?, "--output", text(&output)?], more].concat())
    }
}

fn text(path: &Path) -> TestResult<&str> {
    Ok(path.to_str().ok_or("no UTF-8")?)
}

/// Runs the program with at most 3 GB of addresses, and ends it when it does not end.
fn run(words: &[&str]) -> TestResult<Output> {
    let limit = if cfg!(target_os = "linux") { "ulimit -v 3000000; exec \"$@\"" } else { "exec \"$@\"" };
    let mut command = Command::new("sh");
    command.args(["-c", limit, "sh", env!("CARGO_BIN_EXE_hf2onnx")]).args(words);
    command.env("RAYON_NUM_THREADS", "2").env("HF_HUB_OFFLINE", "1");
    wait(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?, words)
}

fn wait(child: std::process::Child, words: &[&str]) -> TestResult<Output> {
    let id = child.id().to_string();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    if let Ok(ran) = receiver.recv_timeout(PATIENCE) {
        return Ok(ran?);
    }
    Command::new("kill").args(["-s", "KILL", &id]).status()?;
    Err(format!("{words:?} did not end").into())
}

fn refused(ran: &Output, words: &[&str], what: &str) {
    let said = String::from_utf8_lossy(&ran.stderr);
    let code = ran.status.code();
    assert!(code == Some(1) || code == Some(2), "{what}: {:?}: {said}", ran.status);
    assert!(said.contains("error["), "{what}: {said}");
    for word in words {
        assert!(said.contains(word), "{what}: no `{word}` in {said}");
    }
}

/// Puts something at a path.
type Make = fn(&Path) -> TestResult;

/// Things that are no file.
const KINDS: [(&str, Make); 3] = [
    ("a named pipe", |path| {
        assert!(Command::new("mkfifo").arg(path).status()?.success());
        Ok(())
    }),
    ("a socket", |path| {
        // The path may be longer than a socket's may be.
        let short = tempfile::tempdir()?;
        let bound = short.path().join("s");
        drop(UnixListener::bind(&bound)?);
        if fs::rename(&bound, path).is_err() {
            // Another file system.
            fs::create_dir(path)?;
        }
        Ok(())
    }),
    ("a directory", |path| Ok(fs::create_dir(path)?)),
];

fn replace(path: &Path, make: Make) -> TestResult {
    if path.is_dir() {
        fs::remove_dir_all(path)?;
    } else if path.symlink_metadata().is_ok() {
        fs::remove_file(path)?;
    }
    fs::create_dir_all(path.parent().ok_or("no parent")?)?;
    make(path)
}

#[test]
fn a_file_of_a_repository_that_is_no_file() -> TestResult {
    let names = [
        "config.json",
        "generation_config.json",
        "quantize_config.json",
        "hf_quant_config.json",
        "quanto_qmap.json",
        "model.safetensors",
        "golden.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "vocab.json",
        "tokenizer.model",
        "chat_templates/tool.jinja",
    ];
    for name in names {
        for (kind, make) in KINDS {
            let place = Place::new()?;
            replace(&place.repo().join(name), make)?;
            let ran = place.build(&["--verify"])?;
            refused(&ran, &[name.rsplit('/').next().unwrap_or(name)], &format!("{name} as {kind}"));
            assert!(!place.output().exists(), "{name} as {kind}");
        }
    }
    Ok(())
}

#[test]
fn shards_and_their_index_that_are_no_files() -> TestResult {
    for (kind, make) in KINDS {
        for name in ["model.safetensors.index.json", "shard.safetensors"] {
            let place = Place::new()?;
            fs::remove_file(place.repo().join("model.safetensors"))?;
            let index = place.repo().join("model.safetensors.index.json");
            fs::write(&index, r#"{"weight_map": {"w": "shard.safetensors"}}"#)?;
            replace(&place.repo().join(name), make)?;
            refused(&place.build(&[])?, &[name], &format!("{name} as {kind}"));
        }
    }
    Ok(())
}

#[test]
fn what_the_command_line_names_that_is_no_file() -> TestResult {
    let place = Place::new()?;
    for (kind, make) in KINDS {
        let path = place.dir.path().join("named");
        replace(&path, make)?;
        let name = text(&path)?;
        refused(&place.build(&["--template", name])?, &["named"], kind);
        if kind != "a directory" {
            refused(&place.build(&[&format!("--verify={name}")])?, &["named"], kind);
        }
    }
    for device in ["/dev/zero", "/dev/urandom"] {
        refused(&place.build(&["--template", device])?, &["a device"], device);
        refused(&place.build(&[&format!("--verify={device}")])?, &["a device"], device);
    }
    Ok(())
}

#[test]
fn a_file_of_a_built_directory_that_is_no_file() -> TestResult {
    runtime()?;
    let place = Place::new()?;
    let built = place.dir.path().join("built");
    build_with(&options(&place.repo(), "ort-cpu")?, &built)?;
    let fifo = KINDS[0].1;
    for name in [
        "genai_config.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "onnx/model.onnx",
        "onnx/model.onnx_data",
    ] {
        let aside = place.dir.path().join("aside");
        fs::rename(built.join(name), &aside)?;
        replace(&built.join(name), fifo)?;
        // With onnxruntime, whose threads take addresses: no limit on those.
        let mut command = Command::new(env!("CARGO_BIN_EXE_hf2onnx"));
        command.args(["generate", text(&built)?, "--prompt", "In the", "--max-new-tokens", "1"]);
        if name == "tokenizer_config.json" {
            command.arg("--chat");
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        refused(&wait(child, &["generate", name])?, &[name.rsplit('/').next().unwrap_or(name)], name);
        replace(&built.join(name), |_| Ok(()))?;
        fs::rename(&aside, built.join(name))?;
    }
    Ok(())
}

/// A file of this size that takes no room; it starts with `start`.
fn sparse(path: &Path, start: &str, size: u64) -> TestResult {
    let mut file = File::create(path)?;
    file.write_all(start.as_bytes())?;
    Ok(file.set_len(size)?)
}

#[test]
fn files_larger_than_any_of_their_kind_are_not_read() -> TestResult {
    for (name, size) in [
        ("config.json", 50_000_000_u64),
        ("config.json", 1 << 40),
        ("generation_config.json", 1 << 40),
        ("hf_quant_config.json", 1 << 36),
        ("tokenizer_config.json", 1 << 36),
        ("chat_template.jinja", 1 << 36),
        ("tokenizer.json", 1 << 36),
        ("vocab.json", 1 << 36),
        ("golden.safetensors", 1 << 40),
    ] {
        let place = Place::new()?;
        sparse(&place.repo().join(name), "{", size)?;
        let ran = place.build(&["--verify"])?;
        refused(&ran, &[name, &size.to_string()], name);
    }
    let place = Place::new()?;
    fs::remove_file(place.repo().join("model.safetensors"))?;
    sparse(&place.repo().join("model.safetensors.index.json"), "{", 1 << 36)?;
    refused(&place.build(&[])?, &["model.safetensors.index.json", "68719476736"], "the index");
    let place = Place::new()?;
    sparse(&place.dir.path().join("template.toml"), "", 1 << 36)?;
    let template = place.dir.path().join("template.toml");
    refused(&place.build(&["--template", text(&template)?])?, &["template.toml", "68719476736"], "a template");
    Ok(())
}

/// As large as may be, and as costly as JSON of that size gets.
#[test]
fn configurations_of_the_largest_size_are_refused_with_little_memory() -> TestResult {
    let mut keys = String::new();
    for key in 0..1_000_000 {
        write!(keys, ",\"k{key}\":0")?;
    }
    let config = fs::read_to_string(kjv_llama().join("config.json"))?;
    let body = config.trim_end().strip_suffix('}').ok_or("no object")?;
    for (what, text, word) in [
        ("a million keys", format!("{body}{keys}}}"), "config-unused-key"),
        ("a long list", format!("{body},\"list\":[{}0]}}", "0,".repeat(7_000_000)), "config-unused-key"),
        ("a deep list", format!("{body},\"deep\":{}", "[".repeat(10_000_000)), "config-invalid"),
        ("a long number", format!("{body},\"number\":{}}}", "9".repeat(10_000_000)), "config-"),
        ("a long text", format!("{body},\"hidden_act\":\"{}\"}}", "x".repeat(10_000_000)), "config-"),
    ] {
        let place = Place::new()?;
        fs::write(place.repo().join("config.json"), text)?;
        refused(&place.build(&[])?, &["config.json", word], what);
    }
    Ok(())
}

#[test]
fn outputs_where_none_can_be() -> TestResult {
    let place = Place::new()?;
    let repo = place.repo();
    fs::write(place.dir.path().join("file"), "x")?;
    symlink(place.dir.path().join("file"), place.dir.path().join("link"))?;
    let below = |name: &str| place.dir.path().join(name).to_string_lossy().into_owned();
    let mut outputs = vec![
        (below("file"), "output-exists"),
        (below("link"), "output-exists"),
        (below("file/out"), "io"),
        (below("file/a/b"), "io"),
        (below(&"n".repeat(256)), "usage-invalid"),
        (below(&"é".repeat(200)), "usage-invalid"),
        ("/".to_owned(), "usage-invalid"),
        ("/dev/null/out".to_owned(), "io"),
    ];
    if cfg!(target_os = "linux") {
        for path in ["/proc/out", "/proc/self/out", "/proc/a/b/c", "/sys/out", "/sys/kernel/out", "/dev/full/out"] {
            outputs.push((path.to_owned(), "io"));
        }
    }
    for (output, code) in outputs {
        for force in [&[][..], &["--force"]] {
            let ran = run(&[&["build", text(&repo)?, "--output", &output], force].concat())?;
            // A link stands for what it leads to.
            let name = if output.ends_with("link") { "file" } else { &output };
            refused(&ran, &[&format!("error[{code}]: "), name, "help: "], &output);
        }
    }
    let left: Vec<_> = fs::read_dir(place.dir.path())?.flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
    Ok(())
}

#[test]
fn outputs_of_the_longest_names() -> TestResult {
    runtime()?;
    for name in ["n".repeat(230), "n".repeat(255), "é".repeat(127), "語".repeat(85)] {
        let place = Place::new()?;
        let output = place.dir.path().join(&name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_hf2onnx"));
        fs::remove_file(place.repo().join("golden.safetensors"))?;
        // Without a golden a second output is made beside the first.
        command.arg("build").arg(place.repo()).arg("--output").arg(&output).arg("--verify");
        let ran = command.output()?;
        assert!(ran.status.success(), "{name}: {}", String::from_utf8_lossy(&ran.stderr));
        assert!(output.join("onnx/model.onnx").is_file());
        assert_eq!(fs::read_dir(place.dir.path())?.count(), 2, "nothing is left beside it");
    }
    Ok(())
}

/// Names of which only the end differs have stagings of their own: one build does not clean up behind the other.
#[test]
fn long_names_do_not_share_a_staging() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let [first, second] = ["a", "b"].map(|end| place.path().join(format!("{}{end}", "n".repeat(250))));
    let staged = Staging::new(&first, Force::No)?;
    let prefix = |path: &Path| {
        path.file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| Some(name.split_once(".hf2onnx-partial-")?.0.to_owned()))
    };
    let other = Staging::new(&second, Force::No)?;
    assert!(prefix(staged.path()).is_some() && prefix(staged.path()) != prefix(other.path()));
    Ok(())
}

/// As many shards as a very large model has, with fewer files open at once than there are shards.
#[test]
fn two_thousand_shards_with_few_open_files() -> TestResult {
    const LAYERS: usize = 223;
    let place = tempfile::tempdir_in(scratch())?;
    let repo = place.path().join("repo");
    fs::create_dir(&repo)?;
    let (hidden, vocabulary) = (8, 16);
    fs::write(
        repo.join("config.json"),
        serde_json::json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": 8,
            "num_hidden_layers": LAYERS, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": vocabulary,
            "max_position_embeddings": 64, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false, "bos_token_id": 0,
            "eos_token_id": 1
        })
        .to_string(),
    )?;
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden])];
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    for layer in 0..LAYERS {
        for name in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), vec![hidden]));
        }
        for name in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), vec![hidden, hidden]));
        }
        for name in ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), vec![hidden, hidden]));
        }
    }
    let mut map = serde_json::Map::new();
    for (index, (name, shape)) in tensors.iter().enumerate() {
        let file = format!("shard-{index}.safetensors");
        let bytes = vec![0x3c; 4 * shape.iter().product::<usize>()];
        let header = format!(r#"{{"{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[0,{}]}}}}"#, bytes.len());
        let length = u64::try_from(header.len())?.to_le_bytes();
        fs::write(repo.join(&file), [&length[..], header.as_bytes(), &bytes].concat())?;
        map.insert(name.clone(), file.into());
    }
    assert!(tensors.len() > 2000);
    fs::write(repo.join("model.safetensors.index.json"), serde_json::json!({ "weight_map": map }).to_string())?;
    for weights in ["pack", "link"] {
        let output = place.path().join(weights);
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -n 256; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_hf2onnx"), "build"]);
        command.arg(&repo).arg("--output").arg(&output).args(["--weights", weights]);
        let ran = command.output()?;
        assert!(ran.status.success(), "{weights}: {}", String::from_utf8_lossy(&ran.stderr));
    }
    Ok(())
}

/// Where links can not be made the files are copied: room for all of them is asked for before the first byte.
#[cfg(target_os = "linux")]
#[test]
fn linking_to_another_file_system_asks_for_room_first() -> TestResult {
    use std::os::unix::fs::MetadataExt as _;
    let (place, memory) = (tempfile::tempdir_in(scratch())?, Path::new("/dev/shm"));
    let elsewhere =
        memory.metadata().is_ok_and(|data| place.path().metadata().is_ok_and(|own| own.dev() != data.dev()));
    // Nothing to try without a second file system.
    if !elsewhere {
        return Ok(());
    }
    let folder = tempfile::tempdir_in(memory)?;
    let free = free_space(folder.path()).ok_or("no free space known")?;
    // Each of them would fit; both do not.
    let size = free / 3 * 2;
    for name in ["a", "b"] {
        let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}"#);
        let path = place.path().join(format!("{name}.safetensors"));
        let length = u64::try_from(header.len())?.to_le_bytes();
        fs::write(&path, [&length[..], header.as_bytes()].concat())?;
        File::options().write(true).open(&path)?.set_len(8 + u64::try_from(header.len())? + size)?;
    }
    let checkpoint = Checkpoint::open(place.path())?;
    let error = link(&checkpoint, &[0, 1], folder.path()).expect_err("no room");
    assert_eq!(error.code, Code::DiskFull, "{error}");
    assert_eq!(fs::read_dir(folder.path())?.count(), 0, "not a byte was copied");
    Ok(())
}
