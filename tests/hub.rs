//! Models of the hub, against a server of our own: what is fetched, what is resumed, what is checked, and who gets
//! the token.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use common::hub::{COMMIT, Hub};
use common::models::{build_with, options};
use common::{Case, TestResult, kjv_llama};
use hf2onnx::error::{Code, Error};
use hf2onnx::hub::{Clock, Id, Settings, Watch, directory, snapshot};

const MODEL: &str = "model.safetensors";

/// A hub with the trained model, and an empty cache.
fn kjv() -> TestResult<(Hub, tempfile::TempDir, Settings)> {
    let hub = Hub::of_folder("org/kjv", &kjv_llama())?;
    let cache = tempfile::tempdir()?;
    let settings = settings(&hub, cache.path());
    Ok((hub, cache, settings))
}

fn settings(hub: &Hub, cache: &Path) -> Settings {
    let plain = Settings::new(cache.to_owned());
    Settings { endpoint: hub.endpoint.clone(), pause: Duration::ZERO, silence: Duration::from_secs(5), ..plain }
}

fn fetch(id: &str, settings: &Settings) -> Result<PathBuf, Error> {
    let id = Id::parse(id).ok_or_else(|| Error::new(Code::UsageInvalid, id))?;
    snapshot(&id, settings, &())
}

fn names(dir: &Path) -> TestResult<BTreeSet<String>> {
    Ok(fs::read_dir(dir)?.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

#[test]
fn a_model_is_downloaded_once_into_the_shared_layout_and_compiles() -> TestResult {
    let hub = Hub::of_folder("org/sharded", &Case::named("llama-sharded")?.repo()?)?;
    for unread in ["modeling.py", "pytorch_model.bin", "consolidated.safetensors", "extra.safetensors"] {
        hub.model().files.insert(unread.to_owned(), b"no".to_vec());
    }
    let cache = tempfile::tempdir()?;
    let settings = settings(&hub, cache.path());
    let dir = fetch("org/sharded", &settings)?;
    let place = cache.path().join("models--org--sharded");
    assert_eq!(dir, place.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(place.join("refs").join("main"))?, COMMIT);
    let there = names(&dir)?;
    let shards = there.iter().filter(|name| name.starts_with("model-000")).count();
    assert_eq!((shards, there.len()), (5, 9), "{there:?}");
    for name in &there {
        let path = dir.join(name);
        assert_eq!(fs::read(&path)?, hub.model().files[name], "{name}");
        #[cfg(unix)]
        assert!(fs::read_link(&path)?.starts_with("../../blobs"), "{name}");
    }
    let output = tempfile::tempdir()?;
    build_with(&options(&dir, "ort-cpu")?, &output.path().join("built"))?;
    let record: serde_json::Value = serde_json::from_slice(&fs::read(output.path().join("built/hf2onnx.json"))?)?;
    assert_eq!(record["hub"], serde_json::json!({ "repository": "org/sharded", "commit": COMMIT }));

    // There is no tokenizer in this model, so the hub is asked for one; the files are not fetched again.
    let before = hub.log().len();
    assert_eq!(fetch("org/sharded", &settings)?, dir);
    assert_eq!(hub.log().len(), before + 1, "only the list");
    Ok(())
}

#[test]
fn a_complete_snapshot_is_used_without_a_request() -> TestResult {
    let (hub, _cache, settings) = kjv()?;
    let dir = fetch("org/kjv", &settings)?;
    let before = hub.log().len();
    let offline = Settings { offline: true, ..settings.clone() };
    for settings in [&settings, &offline] {
        for id in ["org/kjv", "org/kjv@main", &format!("org/kjv@{COMMIT}")] {
            assert_eq!(fetch(id, settings)?, dir);
        }
    }
    assert_eq!(hub.log().len(), before);
    Ok(())
}

#[test]
fn revisions_are_branches_tags_pull_requests_and_commits() -> TestResult {
    let (_hub, cache, settings) = kjv()?;
    for revision in ["v1", "refs/pr/1", COMMIT] {
        let dir = fetch(&format!("org/kjv@{revision}"), &settings)?;
        assert!(dir.ends_with(COMMIT));
        let reference = cache.path().join("models--org--kjv").join("refs").join(revision);
        assert_eq!(reference.is_file(), revision != COMMIT, "{revision}");
    }
    let error = fetch("org/kjv@v9", &settings).expect_err("no such revision");
    assert_eq!(error.code, Code::HubNotFound);
    assert!(error.found.contains("no such revision"), "{error}");
    Ok(())
}

#[test]
fn a_dropped_connection_is_resumed_within_a_run() -> TestResult {
    let (hub, _cache, settings) = kjv()?;
    hub.model().cut.insert(MODEL.to_owned(), vec![1000, 0, 500, 1, 1, 1]);
    let dir = fetch("org/kjv", &settings)?;
    assert_eq!(fs::read(dir.join(MODEL))?, hub.model().files[MODEL]);
    let ranges: Vec<_> = from_store(&hub).into_iter().map(|request| request.range).collect();
    let rest = |from: &str| Some(format!("bytes={from}-"));
    // More failures than attempts, but never as many in a row without a byte.
    let expected = [None, rest("1000"), rest("1000"), rest("1500"), rest("1501"), rest("1502"), rest("1503")];
    assert_eq!(ranges, expected);
    Ok(())
}

fn from_store(hub: &Hub) -> Vec<common::hub::Request> {
    hub.gets(MODEL).into_iter().filter(|request| request.host == "store").collect()
}

#[test]
fn a_download_that_gave_up_is_resumed_by_the_next_run() -> TestResult {
    let (hub, cache, settings) = kjv()?;
    hub.model().cut.insert(MODEL.to_owned(), vec![7000, 0, 0, 0, 0, 0]);
    let error = fetch("org/kjv", &settings).expect_err("five attempts without a byte");
    assert_eq!(error.code, Code::HubUnreachable, "{error}");
    assert!(error.found.contains(MODEL) && error.found.contains("after 7000 of 4727864 bytes"), "{error}");
    let offline = fetch("org/kjv", &Settings { offline: true, ..settings.clone() }).expect_err("not complete");
    assert_eq!(offline.code, Code::HubOffline);
    let reference = cache.path().join("models--org--kjv").join("refs").join("main");
    assert!(!reference.exists(), "a branch points at complete snapshots only");

    hub.model().cut.clear();
    let before = from_store(&hub).len();
    let dir = fetch("org/kjv", &settings)?;
    let ranges: Vec<_> = from_store(&hub).into_iter().skip(before).map(|request| request.range).collect();
    assert_eq!(ranges, [Some("bytes=7000-".to_owned())]);
    assert_eq!(fs::read(dir.join(MODEL))?, hub.model().files[MODEL]);
    Ok(())
}

/// A clock that goes on by two seconds whenever it is looked at.
fn hasty() -> Clock {
    let now = std::sync::atomic::AtomicU64::new(0);
    Clock::new(move || Duration::from_secs(now.fetch_add(2, std::sync::atomic::Ordering::Relaxed)))
}

#[test]
fn a_server_that_trickles_is_given_up() -> TestResult {
    for file in [MODEL, "config.json", "/revision/main"] {
        let (hub, _cache, settings) = kjv()?;
        hub.model().trickle = Some(file.to_owned());
        // Two seconds for each byte, were it not for the clock.
        let error = fetch("org/kjv", &Settings { clock: hasty(), at_once: 1, ..settings }).expect_err("too slow");
        assert_eq!(error.code, Code::HubUnreachable, "{file}: {error}");
        assert!(error.found.contains("less than 1000 a second"), "{file}: {error}");
        let asked = hub.log().iter().filter(|request| request.path.contains(file)).count();
        // The store is asked once for each time that the hub is.
        assert!((5..=10).contains(&asked), "{file}: {asked} requests");
    }
    Ok(())
}

#[test]
fn a_server_that_hangs_up_after_each_byte_is_given_up() -> TestResult {
    let (hub, _cache, settings) = kjv()?;
    hub.model().cut.insert(MODEL.to_owned(), vec![1; 1000]);
    let error = fetch("org/kjv", &Settings { clock: hasty(), ..settings }).expect_err("a byte for each connection");
    assert_eq!(error.code, Code::HubUnreachable, "{error}");
    assert_eq!(from_store(&hub).len(), 5);
    Ok(())
}

#[test]
fn a_server_without_ranges_sends_the_file_again() -> TestResult {
    let (hub, _cache, settings) = kjv()?;
    hub.model().no_ranges = true;
    hub.model().cut.insert(MODEL.to_owned(), vec![1000]);
    let dir = fetch("org/kjv", &settings)?;
    assert_eq!(fs::read(dir.join(MODEL))?, hub.model().files[MODEL]);
    Ok(())
}

#[test]
fn a_busy_server_is_asked_again() -> TestResult {
    let (hub, _cache, settings) = kjv()?;
    hub.model().busy = 3;
    fetch("org/kjv", &settings)?;
    hub.model().busy = usize::MAX;
    let error = fetch("org/kjv@v1", &settings).expect_err("always busy");
    assert_eq!(error.code, Code::HubUnreachable);
    assert!(error.found.contains("503"), "{error}");
    Ok(())
}

#[test]
fn a_corrupted_file_is_fetched_once_more_and_then_named_and_removed() -> TestResult {
    // A large file has a SHA-256, a small one git's hash.
    for file in [MODEL, "config.json"] {
        let (hub, cache, settings) = kjv()?;
        // One at a time: what the others leave when one fails is not corrupted, and stays.
        let settings = Settings { at_once: 1, ..settings };
        hub.model().corrupt.insert(file.to_owned(), 2);
        let error = fetch("org/kjv", &settings).expect_err("corrupted twice");
        assert_eq!(error.code, Code::DownloadCorrupt, "{error}");
        assert!(error.subject.contains(file), "{error}");
        let place = cache.path().join("models--org--kjv");
        let blobs = names(&place.join("blobs"))?;
        assert!(!blobs.iter().any(|name| name.ends_with(".incomplete")), "{blobs:?}");
        assert!(!place.join("snapshots").join(COMMIT).join(file).exists());

        hub.model().corrupt.insert(file.to_owned(), 1);
        let dir = fetch("org/kjv", &settings)?;
        assert_eq!(fs::read(dir.join(file))?, hub.model().files[file]);
    }
    Ok(())
}

#[test]
fn a_mirror_without_hashes_in_its_list_is_asked_for_each_file() -> TestResult {
    let (hub, _cache, settings) = kjv()?;
    hub.model().bare = true;
    hub.model().corrupt.insert(MODEL.to_owned(), 1);
    let dir = fetch("org/kjv", &settings)?;
    assert_eq!(fs::read(dir.join(MODEL))?, hub.model().files[MODEL]);
    let heads: Vec<_> = hub.log().into_iter().filter(|request| request.method == "HEAD").collect();
    assert_eq!(heads.len(), names(&dir)?.len());
    assert!(heads.iter().all(|request| request.host == "hub"), "the store does not know the hash");
    Ok(())
}

#[test]
fn missing_files_and_unusable_models_are_named() -> TestResult {
    let (hub, _cache, settings) = kjv()?;
    hub.model().gone.insert(MODEL.to_owned());
    let error = fetch("org/kjv", &settings).expect_err("the file is gone");
    assert_eq!(error.code, Code::HubNotFound);
    assert!(error.subject.contains(MODEL), "{error}");

    hub.model().files.remove(MODEL);
    hub.model().files.insert("pytorch_model.bin".to_owned(), Vec::new());
    let error = fetch("org/kjv", &settings).expect_err("only a pickle");
    assert_eq!(error.code, Code::WeightsMissing);

    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#;
    hub.model().files.insert("model.safetensors.index.json".to_owned(), index.into());
    let error = fetch("org/kjv", &settings).expect_err("a shard that is not there");
    assert_eq!(error.code, Code::ShardMissing);
    assert!(error.subject.contains("model-00001-of-00002.safetensors"), "{error}");
    Ok(())
}

#[test]
fn refusals_say_what_to_do() -> TestResult {
    let (hub, _cache, settings) = kjv()?;
    let error = fetch("org/nothing", &settings).expect_err("no such model");
    assert_eq!(error.code, Code::HubNotFound);
    assert!(error.help.contains("spelling") && error.help.contains("HF_TOKEN"), "{error}");

    hub.model().token = Some("right".to_owned());
    let error = fetch("org/kjv", &settings).expect_err("a private model");
    assert_eq!(error.code, Code::HubNotFound);
    assert!(error.found.contains("without a token"), "{error}");
    let wrong = Settings { token: Some("wrong".to_owned()), ..settings.clone() };
    let error = fetch("org/kjv", &wrong).expect_err("a wrong token");
    assert!(error.found.contains("with this token") && !error.to_string().contains("wrong"), "{error}");

    hub.model().gated = true;
    let right = Settings { token: Some("right".to_owned()), ..settings };
    let error = fetch("org/kjv", &right).expect_err("a gated model");
    assert_eq!(error.code, Code::HubDenied);
    assert!(error.help.contains(&format!("{}/org/kjv", hub.endpoint)), "{error}");
    Ok(())
}

#[test]
fn the_token_goes_to_the_hub_only_also_after_a_redirect_on_it() -> TestResult {
    let (hub, _cache, settings) = kjv()?;
    hub.model().token = Some("secret".to_owned());
    hub.model().former = Some("old/kjv".to_owned());
    hub.model().cut.insert(MODEL.to_owned(), vec![1000]);
    fetch("old/kjv", &Settings { token: Some("secret".to_owned()), ..settings })?;
    let log = hub.log();
    assert!(log.iter().any(|request| request.host == "store"));
    for request in log {
        let expected = (request.host == "hub").then(|| "Bearer secret".to_owned());
        assert_eq!(request.token, expected, "{} {}", request.host, request.path);
    }
    Ok(())
}

#[test]
fn offline_names_what_is_missing_and_asks_nobody() -> TestResult {
    let (hub, _cache, settings) = kjv()?;
    let offline = Settings { offline: true, ..settings.clone() };
    let error = fetch("org/kjv", &offline).expect_err("an empty cache");
    assert_eq!((error.code, hub.log().len()), (Code::HubOffline, 0));
    assert!(error.help.contains("hf download org/kjv"), "{error}");

    let dir = fetch("org/kjv", &settings)?;
    let blob = dir.join(MODEL).canonicalize()?;
    fs::remove_file(blob)?;
    let before = hub.log().len();
    let error = fetch("org/kjv", &offline).expect_err("a link to nothing");
    assert_eq!((error.code, hub.log().len()), (Code::HubOffline, before));
    assert!(error.found.contains(MODEL), "{error}");

    fetch("org/kjv", &settings)?;
    assert_eq!(fs::read(dir.join(MODEL))?, hub.model().files[MODEL]);
    assert_eq!(hub.gets("config.json").len(), 1, "what was there is not fetched again");
    Ok(())
}

#[test]
fn a_directory_wins_and_a_path_is_never_asked_for() -> TestResult {
    let (hub, cache, settings) = kjv()?;
    for path in [cache.path(), Path::new("src/hub"), Path::new("./none"), Path::new("/none/at/all"), Path::new("a/b/c")]
    {
        assert_eq!(directory(path, &settings, &())?, path);
    }
    assert_eq!(hub.log().len(), 0);
    assert!(directory(Path::new("org/kjv"), &settings, &())?.ends_with(COMMIT));
    Ok(())
}

#[test]
fn progress_ends_at_its_length_whatever_happens_between() -> TestResult {
    #[derive(Default)]
    struct Sum(std::sync::Mutex<(u64, u64)>);
    impl Watch for Sum {
        fn grow(&self, bytes: u64) {
            self.0.lock().expect("unpoisoned").0 += bytes;
        }
        fn advance(&self, bytes: u64) {
            self.0.lock().expect("unpoisoned").1 += bytes;
        }
        fn retreat(&self, bytes: u64) {
            self.0.lock().expect("unpoisoned").1 -= bytes;
        }
        fn say(&self, _: &str) {}
    }
    let (hub, _cache, settings) = kjv()?;
    hub.model().no_ranges = true;
    hub.model().cut.insert(MODEL.to_owned(), vec![1000]);
    hub.model().corrupt.insert(MODEL.to_owned(), 1);
    let sum = Sum::default();
    let dir = snapshot(&Id::parse("org/kjv").ok_or("an id")?, &settings, &sum)?;
    let mut bytes = 0;
    for name in names(&dir)? {
        bytes += fs::metadata(dir.join(name))?.len();
    }
    assert_eq!(*sum.0.lock().map_err(|_| "poisoned")?, (bytes, bytes));
    Ok(())
}

fn run(arguments: &[&str], hub: &Hub, home: &Path, more: &[(&str, &str)]) -> TestResult<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hf2onnx"));
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"] {
        command.env_remove(name);
    }
    command.env("HF_HOME", home).env("HF_ENDPOINT", &hub.endpoint).env("NO_PROXY", "127.0.0.1");
    Ok(command.args(arguments).envs(more.iter().copied()).output()?)
}

#[test]
fn the_program_builds_inspects_and_scaffolds_a_model_of_the_hub() -> TestResult {
    let (hub, cache, _) = kjv()?;
    hub.model().token = Some("secret".to_owned());
    fs::write(cache.path().join("token"), "secret\n")?;
    let output = cache.path().join("built");
    let offline = [("HF_HUB_OFFLINE", "1")];
    let refused = run(&["inspect", "org/kjv"], &hub, cache.path(), &offline)?;
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("error[hub-offline]: org/kjv"));

    let built = run(&["build", "org/kjv@v1", "--output", &output.to_string_lossy()], &hub, cache.path(), &[])?;
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    assert!(output.join("onnx/model.onnx").is_file() && output.join("tokenizer.json").is_file());
    let record: serde_json::Value = serde_json::from_slice(&fs::read(output.join("hf2onnx.json"))?)?;
    assert_eq!(record["hub"]["commit"], COMMIT);

    for command in ["inspect", "scaffold"] {
        let ran = run(&[command, "org/kjv@v1"], &hub, cache.path(), &offline)?;
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    }
    Ok(())
}

#[test]
fn no_filter_shows_the_token() -> TestResult {
    // Long enough to fill a row of a dump of bytes, wherever it starts in one.
    let token = "q".repeat(48);
    for filter in [
        "trace",
        "ureq_proto=trace",
        "ureq_proto::util=trace,ureq=trace,debug",
        "log=trace,[]=trace",
        "[{x}]=trace,trace",
    ] {
        let (hub, cache, _) = kjv()?;
        hub.model().token = Some(token.clone());
        hub.model().busy = 1;
        let more = [("RUST_LOG", filter), ("HF_TOKEN", token.as_str())];
        let ran = run(&["inspect", "org/kjv"], &hub, cache.path(), &more)?;
        let words = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "{filter}: {words}");
        if filter.ends_with("trace") && filter.contains(",trace") || filter == "trace" {
            assert!(words.contains("hf2onnx::hub::fetch"), "{filter}: nothing is traced");
        }
        for shown in ["qqqq", "7171"] {
            assert!(!words.contains(shown), "{filter}: `{shown}` in\n{words}");
        }
    }
    Ok(())
}

#[test]
fn a_token_that_is_none_is_refused_without_being_shown() -> TestResult {
    let (hub, _cache, settings) = kjv()?;
    let error = fetch("org/kjv", &Settings { token: Some("secret\nx: y".to_owned()), ..settings }).expect_err("a line");
    assert_eq!((error.code, hub.log().len()), (Code::UsageInvalid, 0));
    assert!(error.subject.contains("HF_TOKEN") && !error.to_string().contains("secret"), "{error}");
    Ok(())
}

#[test]
fn an_adapter_beside_a_model_of_the_hub_is_seen() -> TestResult {
    let (hub, cache, _) = kjv()?;
    for (name, text) in [("adapter_config.json", "{}"), ("adapter_model.safetensors", "not fetched")] {
        hub.model().files.insert(name.to_owned(), text.into());
    }
    let ran = run(&["inspect", "org/kjv"], &hub, cache.path(), &[])?;
    let words = String::from_utf8_lossy(&ran.stderr);
    assert!(!ran.status.success() && words.contains("error[weights-ambiguous]"), "{words}");
    assert!(words.contains("adapter_config.json") && words.contains("--ignore-adapter"), "{words}");
    let ran = run(&["inspect", "org/kjv", "--ignore-adapter"], &hub, cache.path(), &[])?;
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    assert!(hub.gets("adapter_model.safetensors").is_empty());
    Ok(())
}
