//! Broken and hostile repositories: each has its error, which names the file and the tensor.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::cast_possible_truncation)]

use std::fs;
use std::path::Path;

use hf2onnx::error::{Code, Error};
use hf2onnx::read::{Checkpoint, Repository, StoredType, hash_files, json_file};
use proptest::prelude::*;
use tempfile::TempDir;

/// A safetensors file of this header and this many bytes of data: 0, 1, 2, ...
fn file(header: &str, data: usize) -> Vec<u8> {
    raw_file(header.as_bytes(), header.len() as u64, data)
}

fn raw_file(header: &[u8], length: u64, data: usize) -> Vec<u8> {
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend((0..data).map(|byte| byte as u8));
    bytes
}

fn tensor(name: &str, dtype: &str, shape: &str, begin: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

fn header(tensors: &[String]) -> String {
    format!("{{{}}}", tensors.join(","))
}

fn good() -> Vec<u8> {
    let tensors = [tensor("b", "F32", "[2]", 0, 8), tensor("a.weight", "BF16", "[1,3]", 8, 14)];
    file(&header(&tensors), 14)
}

fn dir(files: &[(&str, &[u8])]) -> TempDir {
    let dir = TempDir::new().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// The error of opening; its text has to hold every one of `words`.
fn refused(dir: &Path, code: Code, words: &[&str]) -> Error {
    check(Checkpoint::open(dir).map(|_| ()).unwrap_err(), code, words)
}

fn check(error: Error, code: Code, words: &[&str]) -> Error {
    let text = error.to_string();
    assert_eq!(error.code, code, "{text}");
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
    error
}

fn refused_file(bytes: &[u8], words: &[&str]) {
    let dir = dir(&[("model.safetensors", bytes)]);
    let error = refused(dir.path(), Code::WeightsCorrupt, words);
    assert!(error.subject.contains("model.safetensors"), "{error}");
}

#[test]
fn a_good_file() {
    let dir = dir(&[("model.safetensors", &good())]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let names: Vec<_> = checkpoint.tensors().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["a.weight", "b"]);
    let tensor = checkpoint.get("a.weight").unwrap();
    assert_eq!((tensor.dtype, tensor.shape.as_slice()), (StoredType::BF16, &[1, 3][..]));
    assert_eq!(checkpoint.bytes(tensor).unwrap(), [8, 9, 10, 11, 12, 13]);
    let mut part = [0; 3];
    checkpoint.read(tensor, 2, &mut part).unwrap();
    assert_eq!(part, [10, 11, 12]);
    check(checkpoint.read(tensor, 4, &mut part).unwrap_err(), Code::TensorMissing, &["a.weight", "4..7 of 6"]);
    assert!(checkpoint.get("c").is_none());
    assert_eq!(checkpoint.files()[0].size, good().len() as u64);
}

#[test]
fn an_empty_tensor_and_metadata() {
    let tensors = [
        r#""__metadata__":{"format":"pt"}"#.to_owned(),
        tensor("z", "F32", "[0,4]", 4, 4),
        tensor("s", "F32", "[]", 0, 4),
    ];
    let dir = dir(&[("model.safetensors", &file(&(header(&tensors) + "   "), 4))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.bytes(checkpoint.get("z").unwrap()).unwrap(), [0_u8; 0]);
    assert_eq!(checkpoint.bytes(checkpoint.get("s").unwrap()).unwrap().len(), 4);
}

#[test]
fn headers_that_lie() {
    let one = |dtype, shape, begin, end| header(&[tensor("w", dtype, shape, begin, end)]);
    let two = |a: (u64, u64), b: (u64, u64)| {
        header(&[
            tensor("v", "U8", &format!("[{}]", a.1 - a.0), a.0, a.1),
            tensor("w", "U8", &format!("[{}]", b.1 - b.0), b.0, b.1),
        ])
    };
    for (bytes, words) in [
        (vec![], vec!["0 bytes", "cut short"]),
        (vec![1, 2, 3], vec!["3 bytes"]),
        (raw_file(b"{}", 3, 0), vec!["header of 3 bytes", "cut short"]),
        (raw_file(b"{}", u64::MAX, 0), vec!["18446744073709551615", "100000000"]),
        (raw_file(b"{}", 100_000_001, 0), vec!["100000001"]),
        (raw_file(b"{\xff}", 3, 0), vec!["UTF-8"]),
        (file("[]", 0), vec!["does not start with `{`"]),
        (file("{\"w\":", 0), vec!["line 1 column 5"]),
        (file("{} x", 0), vec!["trailing"]),
        (file(&("{\"w\":".to_owned() + &"[".repeat(100_000)), 0), vec!["`w`"]),
        (file(r#"{"w":{"dtype":"F32","shape":[1]}}"#, 4), vec!["`w`", "data_offsets"]),
        (file(r#"{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4), vec!["`w`", "-1"]),
        (file(r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}"#, 4), vec!["`w`", "-4"]),
        (file(r#"{"w":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#, 4), vec!["`w`", "1.5"]),
        (file(r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}"#, 4), vec!["`w`", "`x`"]),
        (file(&one("F31", "[1]", 0, 4), 4), vec!["`w`", "dtype `F31`", "BF16"]),
        (file(&one("F32", "[2]", 0, 4), 4), vec!["`w`", "4 bytes", "8 bytes", "[2]"]),
        (file(&one("F4", "[3]", 0, 1), 1), vec!["`w`", "[3]", "whole bytes"]),
        (file(&one("F32", "[1]", 8, 4), 8), vec!["`w`", "[8, 4]"]),
        (file(&one("F32", "[2]", 0, 8), 4), vec!["`w`", "4 bytes of data", "cut short"]),
        (file(&one("F32", "[1]", 0, 4), 5), vec!["1 bytes behind the last"]),
        (file(&one("F32", "[1]", 1, 5), 5), vec!["`w`", "gap", "the header"]),
        (file(&one("F32", "[4294967296,4294967296]", 0, 4), 4), vec!["`w`", "4294967296"]),
        (file(&one("F32", "[0,18446744073709551615,2]", 0, 0), 0), vec!["`w`", "18446744073709551615"]),
        (file(&one("U8", &format!("[{}1]", "1,".repeat(80)), 0, 1), 1), vec!["`w`", "64 dimensions"]),
        (file(&one("U8", "[18446744073709551615]", 0, u64::MAX), 8), vec!["`w`"]),
        (file(&two((0, 4), (3, 6)), 6), vec!["`w`", "overlaps", "`v`"]),
        (file(&two((0, 4), (5, 6)), 6), vec!["`w`", "gap", "`v`"]),
        (file(&header(&[tensor("w", "U8", "[1]", 0, 1), tensor("w", "U8", "[1]", 1, 2)]), 2), vec!["`w`", "twice"]),
        (file(&format!("{{\"{}\":0}}", "n".repeat(5000)), 0), vec!["4096"]),
        (b"version https://git-lfs.github.com/spec/v1\noid".to_vec(), vec!["Git LFS", "git lfs pull"]),
        (b"PK\x03\x04 and so on".to_vec(), vec!["zip"]),
        (b"<!DOCTYPE html><html>".to_vec(), vec!["HTML"]),
    ] {
        refused_file(&bytes, &words);
    }
}

#[test]
fn control_characters_of_names_are_not_printed() {
    refused_file(&file(&header(&[tensor("\\u001b[31m", "F31", "[]", 0, 0)]), 0), &["\\u{1b}[31m"]);
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = good();
    for length in 0..bytes.len() {
        refused_file(&bytes[..length], &[]);
    }
}

/// A file as large as those of small models, cut at a hundred places of header and data.
#[test]
fn a_large_file_cut_at_a_hundred_places() {
    let tensors: Vec<String> = (0..50).map(|i| tensor(&format!("w{i}"), "F32", "[4]", i * 16, i * 16 + 16)).collect();
    let bytes = file(&header(&tensors), 800);
    let dir = dir(&[]);
    let path = dir.path().join("model.safetensors");
    for place in 0..100 {
        fs::write(&path, &bytes[..bytes.len() * place / 100]).unwrap();
        refused(dir.path(), Code::WeightsCorrupt, &["model.safetensors"]);
    }
    fs::write(&path, &bytes).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().tensors().len(), 50);
}

/// What a header claims is compared with the file before anything is allocated for it.
#[test]
fn headers_that_claim_much_cost_nothing() {
    let started = std::time::Instant::now();
    for length in [100_000_000, 99_999_999, u64::from(u32::MAX), i64::MAX as u64] {
        refused_file(&raw_file(b"{}", length, 0), &["header of"]);
    }
    let wide = format!("[{}]", "1,".repeat(1_000_000) + "1");
    refused_file(&file(&header(&[tensor("w", "U8", &wide, 0, 1)]), 1), &["64 dimensions"]);
    let huge = tensor("w", "F32", "[1000000,1000000,1000]", 0, 4_000_000_000_000_000);
    refused_file(&file(&header(&[huge]), 4), &["`w`", "cut short"]);
    assert!(started.elapsed().as_secs() < 10, "{:?}", started.elapsed());
}

#[test]
fn a_file_that_changes_after_opening() {
    let dir = dir(&[("model.safetensors", &good())]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let tensor = checkpoint.get("b").unwrap();
    checkpoint.bytes(tensor).unwrap();
    fs::write(dir.path().join("model.safetensors"), &good()[..20]).unwrap();
    check(checkpoint.bytes(tensor).unwrap_err(), Code::WeightsCorrupt, &["model.safetensors", "changed"]);
    check(checkpoint.check_unchanged().unwrap_err(), Code::WeightsCorrupt, &["model.safetensors", "20 bytes"]);
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    check(checkpoint.check_unchanged().unwrap_err(), Code::Io, &["model.safetensors"]);
}

fn shard(name: &str) -> Vec<u8> {
    file(&header(&[tensor(name, "U8", "[2]", 0, 2)]), 2)
}

fn sharded(map: &str) -> TempDir {
    let index = format!(r#"{{"metadata":{{"total_size":4}},"weight_map":{map}}}"#);
    dir(&[
        ("model.safetensors.index.json", index.as_bytes()),
        ("s1.safetensors", &shard("a")),
        ("s2.safetensors", &shard("b")),
        ("consolidated.safetensors", &shard("other")),
    ])
}

#[test]
fn shards_of_an_index() {
    let dir = sharded(r#"{"b":"s2.safetensors","a":"s1.safetensors"}"#);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensors().map(|tensor| tensor.file).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(checkpoint.files()[1].name, "s2.safetensors");
}

#[test]
fn an_index_that_disagrees() {
    let (a, b) = (r#""a":"s1.safetensors""#, r#""b":"s2.safetensors""#);
    for (map, code, words) in [
        (format!("{{{a},{b},\"c\":\"s3.safetensors\"}}"), Code::ShardMissing, vec!["s3.safetensors", "`c`"]),
        (format!("{{{a},{a},{b}}}"), Code::WeightsCorrupt, vec!["`a`", "twice"]),
        ("{}".into(), Code::WeightsCorrupt, vec!["empty `weight_map`"]),
        ("[]".into(), Code::WeightsCorrupt, vec!["weight_map"]),
        (r#"{"a":1}"#.into(), Code::WeightsCorrupt, vec!["line 1"]),
    ] {
        refused(sharded(&map).path(), code, &[&words[..], &["model.safetensors.index.json"][..]].concat());
    }
    let deep = "[".repeat(100_000);
    for (text, words) in [
        (&b"{"[..], ["index.json", "line 1"]),
        (b"{}", ["index.json", "weight_map"]),
        (b"{\"weight_map\": null}", ["index.json", "weight_map"]),
        (format!("{{\"metadata\":{deep}").as_bytes(), ["index.json", "line 1"]),
        (b"\xff", ["index.json", "UTF-8"]),
    ] {
        let dir = dir(&[("model.safetensors.index.json", text)]);
        let error = Checkpoint::open(dir.path()).map(|_| ()).unwrap_err();
        check(error, if text == b"\xff" { Code::ConfigInvalid } else { Code::WeightsCorrupt }, &words);
    }
}

/// The headers have the last word, and a note says so.
#[test]
fn an_index_that_its_shards_contradict() {
    let (a, b) = (r#""a":"s1.safetensors""#, r#""b":"s2.safetensors""#);
    for (map, words) in [
        (format!("{{{a},{b},\"c\":\"s1.safetensors\"}}"), vec!["`c` is not in s1.safetensors"]),
        (format!("{{{a},\"x\":\"s2.safetensors\"}}"), vec!["`b` is in s2.safetensors, and not in the index", "1 more"]),
        (
            r#"{"a":"s2.safetensors","b":"s1.safetensors"}"#.into(),
            vec!["`a` is in s1.safetensors, not in s2.safetensors"],
        ),
    ] {
        let dir = sharded(&map);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let names: Vec<_> = checkpoint.tensors().map(|t| (t.name.as_str(), t.file)).collect();
        assert_eq!(names, [("a", 0), ("b", 1)], "{map}");
        let [note] = checkpoint.notes() else { panic!("{map}: {:?}", checkpoint.notes()) };
        assert!(words.iter().all(|word| note.contains(word)), "{map}: {note}");
    }
    // Of a numbered series only what the index names is read.
    let part = |n: u8| format!("model-0000{n}-of-00002.safetensors");
    let index = format!(r#"{{"weight_map":{{"a":"{}"}}}}"#, part(1));
    let dir =
        dir(&[("model.safetensors.index.json", index.as_bytes()), (&part(1), &shard("a")), (&part(2), b"not read")]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.files().len(), 1);
    assert!(checkpoint.notes().iter().any(|note| note.contains(&part(2))), "{:?}", checkpoint.notes());
    // One tensor in two of the shards that are named is no model's.
    let twice = sharded(r#"{"a":"s1.safetensors","b":"s2.safetensors"}"#);
    fs::write(twice.path().join("s2.safetensors"), shard("a")).unwrap();
    refused(twice.path(), Code::WeightsCorrupt, &["`a`", "s1.safetensors", "s2.safetensors"]);
}

#[test]
fn an_index_that_leads_out() {
    for name in ["../s1.safetensors", "/etc/passwd", "a/../../b", "..", "C:\\\\x", "", ".."] {
        let dir = sharded(&format!(r#"{{"a":"{name}"}}"#));
        refused(dir.path(), Code::PathUnsafe, &["model.safetensors.index.json", "`a`"]);
    }
}

#[cfg(unix)]
#[test]
fn links() {
    use std::os::unix::fs::symlink;
    let cache = TempDir::new().unwrap();
    let snapshot = cache.path().join("models--o--n/snapshots/0123");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(cache.path().join("models--o--n/blobs")).unwrap();
    fs::write(cache.path().join("models--o--n/blobs/hash"), good()).unwrap();
    symlink("../../blobs/hash", snapshot.join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(&snapshot).unwrap();
    assert_eq!(checkpoint.bytes(checkpoint.get("b").unwrap()).unwrap().len(), 8);
    assert!(checkpoint.files()[0].path.ends_with("blobs/hash"));

    let elsewhere = dir(&[("x.safetensors", &good())]);
    let repository = dir(&[]);
    let link = repository.path().join("model.safetensors");
    symlink(elsewhere.path().join("x.safetensors"), &link).unwrap();
    refused(repository.path(), Code::PathUnsafe, &["model.safetensors", "x.safetensors"]);
    fs::remove_file(&link).unwrap();
    symlink("nowhere", &link).unwrap();
    refused(repository.path(), Code::Io, &["model.safetensors"]);
    fs::remove_file(&link).unwrap();
    symlink(elsewhere.path(), repository.path().join("sub")).unwrap();
    let index = r#"{"weight_map":{"b":"sub/x.safetensors"}}"#;
    fs::write(repository.path().join("model.safetensors.index.json"), index).unwrap();
    refused(repository.path(), Code::PathUnsafe, &["index.json", "`b`"]);
}

#[test]
fn files_without_an_index() {
    let shards = dir(&[
        ("model-00001-of-00002.safetensors", &shard("a")),
        ("model-00002-of-00002.safetensors", &shard("b")),
        ("golden.safetensors", b"not read"),
    ]);
    assert_eq!(Checkpoint::open(shards.path()).unwrap().tensors().len(), 2);
    fs::remove_file(shards.path().join("model-00001-of-00002.safetensors")).unwrap();
    refused(shards.path(), Code::ShardMissing, &["model-00001-of-00002.safetensors"]);
    let other = dir(&[("my-weights.safetensors", &shard("a"))]);
    assert_eq!(Checkpoint::open(other.path()).unwrap().files()[0].name, "my-weights.safetensors");
    let twice = dir(&[("x.safetensors", &shard("a")), ("y.safetensors", &shard("a"))]);
    refused(twice.path(), Code::WeightsCorrupt, &["`a`", "x.safetensors", "y.safetensors"]);
}

#[test]
fn no_safetensors() {
    for (name, words) in [
        ("pytorch_model.bin", ["pickle", "safe_serialization=True"]),
        ("consolidated.00.pth", ["pickle", "consolidated.00.pth"]),
        ("model.gguf", ["model.gguf", "original repository"]),
        ("tf_model.h5", ["tf_model.h5", "not read"]),
        ("adapter_model.safetensors", ["adapter", "merge"]),
        ("golden.safetensors", ["no weights", "model.safetensors"]),
    ] {
        refused(dir(&[(name, b"x")]).path(), Code::WeightsMissing, &words);
    }
}

#[test]
fn a_directory_in_place_of_a_file() {
    let dir = dir(&[]);
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(Checkpoint::open(dir.path()).is_err());
}

#[test]
fn configurations() {
    let open = |config: &[u8]| {
        let dir = dir(&[("config.json", config), ("model.safetensors", &good())]);
        Repository::open(dir.path())
    };
    let repository = open(br#"{"z": 1, "a": [0.0, Infinity]}"#).unwrap();
    assert_eq!(repository.config.keys().collect::<Vec<_>>(), ["z", "a"]);
    assert_eq!(repository.config["a"][1]["__float__"], "Infinity");
    for (config, words) in [
        (&b"{\n  \"a\": }"[..], vec!["config.json", "line 2 column 8"]),
        (b"[1]", vec!["a list", "object"]),
        (b"", vec!["line 1"]),
        (b"\xff", vec!["UTF-8"]),
        (b"{\"a\": 1e999}", vec!["out of range"]),
    ] {
        check(open(config).unwrap_err(), Code::ConfigInvalid, &words);
    }
    let deep = format!("{{\"a\": {}", "[".repeat(100_000));
    check(open(deep.as_bytes()).unwrap_err(), Code::ConfigInvalid, &["recursion"]);
}

#[test]
fn repositories_that_are_none() {
    let dir = dir(&[("file", b"x")]);
    let open = |path: &Path| Repository::open(path).unwrap_err();
    check(open(dir.path()), Code::ConfigMissing, &["config.json"]);
    check(open(&dir.path().join("file")), Code::Io, &["a file", "directory"]);
    check(open(&dir.path().join("none")), Code::Io, &["no such directory"]);
    check(open(Path::new("meta-llama/Llama-3.2-1B")), Code::Io, &["no such directory", "org/name@revision"]);
}

#[test]
fn hashes() {
    let dir = dir(&[("a", b"abc"), ("empty", b"")]);
    let hashes = hash_files(&[dir.path().join("empty"), dir.path().join("a")]).unwrap();
    assert_eq!((hashes[0].name.as_str(), hashes[0].size), ("empty", 0));
    assert_eq!(
        hashes[0].sha256.as_deref().unwrap(),
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    );
    assert_eq!(
        hashes[1].sha256.as_deref().unwrap(),
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
    check(hash_files(&[dir.path().join("b")]).unwrap_err(), Code::Io, &["b"]);
}

fn opens_without_panic(bytes: &[u8]) {
    let dir = dir(&[("model.safetensors", bytes)]);
    if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
        for tensor in checkpoint.tensors() {
            assert_eq!(checkpoint.bytes(tensor).unwrap().len() as u64, tensor.length);
        }
    }
}

proptest! {
    #[test]
    fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        opens_without_panic(&bytes);
    }

    #[test]
    fn random_headers(
        tensors in proptest::collection::vec(
            ("[a-c]", "F32|U8|F4|F6_E2M3|X", "\\[(0|1|2|8|18446744073709551615)?\\]", 0..9_u64, 0..9_u64), 0..4),
        data in 0..16_usize,
    ) {
        let tensors: Vec<_> = tensors.iter()
            .map(|(name, dtype, shape, begin, end)| tensor(name, dtype, shape, *begin, *end)).collect();
        opens_without_panic(&file(&header(&tensors), data));
    }

    #[test]
    fn random_damage(at in 0..100_usize, byte in any::<u8>(), cut in 0..150_usize) {
        let mut bytes = good();
        let length = bytes.len();
        bytes[at % length] = byte;
        bytes.truncate(cut.max(1));
        opens_without_panic(&bytes);
    }

    #[test]
    fn random_json(text in "[\\[\\]{}\":,aN0-9.eInfity\\\\ -]{0,60}") {
        let dir = dir(&[("config.json", text.as_bytes())]);
        let _ = json_file(&dir.path().join("config.json"));
    }
}
