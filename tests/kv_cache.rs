//! Caches of keys and values in 8 bits: what they cost, that every way of running them agrees, and where they are refused.
//! What is for the CUDA provider runs on the CPU here in float16, but for float8, which the CPU has no attention for: of
//! that the types and scales are held against what the kernel reads.
#![allow(clippy::print_stderr)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::models::{build_with, options, runtime};
use common::{Case, TestResult, hf2onnx, kjv_llama, repository, scratch};
use hf2onnx::build::{self, Logits};
use hf2onnx::calibrate::{Calibration, Text};
use hf2onnx::compile::{KvCache, Options, compile};
use hf2onnx::describe::{choose, describe};
use hf2onnx::element::{CacheType, ElementType};
use hf2onnx::error::Code;
use hf2onnx::golden::Golden;
use hf2onnx::lower::{self, Attribute};
use hf2onnx::opset::Target;
use hf2onnx::read::Repository;
use hf2onnx::session::{self, Decoder, IntMatrix};
use hf2onnx::tokenizer::Tokenizer;
use hf2onnx::verify::{self, WINDOW, against_golden, compare_builds, text_windows};

/// What the trained model itself wrote: nothing of what it is measured on.
fn text() -> PathBuf {
    repository().join("tests").join("calibration.txt")
}

/// A cache whose scales were measured on the text.
fn measured(kind: CacheType, options: &Options, output: &Path) -> TestResult<KvCache> {
    let text = Text { path: &text(), tokens: 4096 };
    let calibration = Calibration::new(options, &text, &output.with_extension("float"))?;
    Ok(KvCache::Quantized(kind, Some(calibration.cache_scales(kind)?)))
}

/// Builds with such a cache.
fn with_cache(kind: CacheType, options: &Options, output: &Path) -> TestResult {
    build_with(&Options { cache: measured(kind, options, output)?, ..options.clone() }, output)?;
    Ok(())
}

/// The options of a build for the CUDA provider, in float16.
fn for_cuda(repo: &Path) -> TestResult<Options> {
    Ok(Options { element: ElementType::F16, ..options(repo, "ort-cuda")? })
}

#[test]
fn a_trained_model_loses_next_to_nothing() -> TestResult {
    runtime()?;
    let place = tempfile::tempdir_in(scratch())?;
    let (float, int8) = (place.path().join("reference"), place.path().join("int8"));
    let options = options(&kjv_llama(), "ort-cpu")?;
    build_with(&options, &float)?;
    with_cache(CacheType::Int8, &options, &int8)?;
    let open = |model: &Path| Decoder::open(model, &session::Options { threads: 1, ..session::Options::default() });
    let windows = text_windows(&Tokenizer::open(&float)?, &kjv_llama().join("eval.txt"), WINDOW)?;
    let mut models = vec![open(&int8)?];
    assert!(models.iter().flat_map(Decoder::slots).all(|slot| slot.element == ElementType::I8));
    let loss = compare_builds(&mut open(&float)?, &mut models, &windows)?.pop().ok_or("no loss")?.quality;
    eprintln!("int8 cache: {loss:?}");
    // Another text than the scales are of: were it cut off, this is where it would show.
    assert!(loss.kl_mean > 0.0 && loss.kl_mean < 2e-4, "{}", loss.kl_mean);
    assert!(loss.top1 > 0.99 && loss.perplexity.is_some_and(|p| p.change.abs() < 1e-3), "{loss:?}");
    let report = against_golden(&int8, &Golden::read(&kjv_llama())?, &verify::Options::default())?;
    assert!(report.holds(), "{report}");
    let cost = report.cost.ok_or("a quantised cache has a cost")?;
    assert_eq!((cost.scheme.as_str(), cost.bar), ("an int8 cache", verify::Bar::of_cache(CacheType::Int8)));
    same_in_place(&mut open(&int8)?)
}

/// Past and present in one buffer that grows, and apart: the same logits to the last bit.
fn same_in_place(decoder: &mut Decoder) -> TestResult {
    assert!(decoder.shares_buffers());
    let mut rows = [decoder.row(4, true)?, decoder.row(4, false)?];
    for piece in [&[5_i64, 9, 400, 1000, 77][..], &[12], &[3, 1500, 8], &[42]] {
        let logits: Vec<Vec<f32>> = rows.iter_mut().map(|row| decoder.extend(row, piece)).collect::<Result<_, _>>()?;
        assert_eq!(logits.first(), logits.last(), "after {piece:?}");
    }
    Ok(())
}

/// Random weights attend sharply and lose most. Windows, experts, sinks, falling scores, and a head that is no power of two.
#[test]
fn cases_of_random_weights_hold_in_every_scenario() -> TestResult {
    let names =
        ["llama", "mistral", "mixtral", "llama-headdim", "gptj", "gpt_oss", "gemma2", "smollm3", "falcon-alibi"];
    hold_in_every_scenario(&names, false, |repo| options(repo, "ort-cpu"))
}

/// The graphs that are meant for a GPU, and in one buffer as caches in 8 bits have to be there.
#[test]
fn cases_for_the_cuda_provider_hold_in_every_scenario() -> TestResult {
    let names = ["llama", "mistral", "mixtral", "llama-headdim", "gptj", "gpt_oss", "gemma2", "smollm3"];
    hold_in_every_scenario(&names, true, for_cuda)
}

fn hold_in_every_scenario(names: &[&str], in_place: bool, of: fn(&Path) -> TestResult<Options>) -> TestResult {
    runtime()?;
    let place = tempfile::tempdir_in(scratch())?;
    for name in names {
        // The tokenizer that some cases have fits them all: they share a vocabulary of 320.
        let repo = place.path().join(format!("{name}-repo"));
        let case = Case::named(name)?;
        copy(&case.repo()?, &repo)?;
        copy_tokenizer(&repo)?;
        let output = place.path().join(name);
        with_cache(CacheType::Int8, &of(&repo)?, &output)?;
        let options = verify::Options { in_place, ..verify::Options::default() };
        let report = against_golden(&output, &Golden::read(&case.golden())?, &options)?;
        let errors: Vec<String> = report
            .scenarios
            .iter()
            .filter_map(|o| Some(format!("{} {:.1e}", o.scenario, o.comparison?.error)))
            .collect();
        eprintln!("{name}: {}", errors.join(", "));
        assert!(report.holds(), "{name}: {report}");
    }
    Ok(())
}

/// Rows with padding on either side, through the cache: in one buffer to the last bit what they are apart.
#[test]
fn runs_in_one_buffer_are_what_they_are_apart() -> TestResult {
    runtime()?;
    let place = tempfile::tempdir_in(scratch())?;
    let matrix = |columns: usize, data: &[i64]| IntMatrix::new(2, columns, data.to_vec()).ok_or("a matrix");
    // A prompt of two rows, and two tokens after it.
    let ids = [(4, vec![0, 0, 5, 9, 400, 77, 12, 0]), (1, vec![33, 8]), (1, vec![1000, 41])];
    let (left, right) = ([0, 0, 1, 1], [1, 1, 1, 0]);
    let positions = [(4, vec![0, 0, 0, 1, 0, 1, 2, 0]), (1, vec![2, 3]), (1, vec![3, 4])];
    for options in [options(&kjv_llama(), "ort-cpu")?, for_cuda(&kjv_llama())?] {
        let model = place.path().join(&options.target.name);
        with_cache(CacheType::Int8, &options, &model)?;
        let mut logits = Vec::new();
        for in_place in [false, true] {
            let options = session::Options { threads: 1, in_place, ..session::Options::default() };
            let mut decoder = Decoder::open(&model, &options)?;
            let mut state = decoder.empty_state(2)?;
            let mut steps = Vec::new();
            let mut mask = [left.to_vec(), right.to_vec()];
            for (step, (ids, positions)) in ids.iter().zip(&positions).enumerate() {
                if step > 0 {
                    for row in &mut mask {
                        row.push(1);
                    }
                }
                let mask = matrix(4 + step, &mask.concat())?;
                steps.push(
                    decoder.run(&matrix(ids.0, &ids.1)?, &mask, &matrix(ids.0, &positions.1)?, &mut state)?.logits,
                );
            }
            logits.push(steps);
        }
        // What stands at padding is nobody's: the prompt's last kept positions, and all of the steps.
        let [apart, one] = logits.as_slice() else { return Err("two runs".into()) };
        let row = apart[0].shape[2];
        for kept in [2..4, 4..7] {
            let range = kept.start * row..kept.end * row;
            assert_eq!(apart[0].data[range.clone()], one[0].data[range], "{}", options.target.name);
        }
        assert_eq!(apart[1..], one[1..], "{}", options.target.name);
    }
    Ok(())
}

fn copy(from: &Path, into: &Path) -> TestResult {
    fs::create_dir_all(into)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), into.join(entry.file_name()))?;
    }
    Ok(())
}

fn copy_tokenizer(into: &Path) -> TestResult {
    let from = Case::named("llama")?.dir;
    for name in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
        fs::copy(from.join(name), into.join(name))?;
    }
    Ok(())
}

/// Refused before anything is measured, with the reason.
#[test]
fn what_has_no_such_cache_is_refused_by_name() -> TestResult {
    use CacheType::{Fp8, Int8};
    use ElementType::{BF16, F16, F32};
    for (case, target, element, kind, words) in [
        ("llama", "standard", F32, Int8, "target standard"),
        ("llama", "primitive", F32, Fp8, "target primitive"),
        ("llama", "ort-cpu", F32, Fp8, "target ort-cpu, which has float ones and int8"),
        ("llama", "ort-cuda", F32, Int8, "no kernel of the operator for f32 with a cache of i8"),
        ("llama", "ort-cuda", F32, Fp8, "no kernel of the operator for f32 with a cache of f8e4m3"),
        ("deepseek_v3", "ort-cpu", F32, Int8, "key heads of 24 and value heads of 12 differ"),
        ("deepseek_v3", "ort-cuda", F16, Fp8, "key heads of 24 and value heads of 12 differ"),
        ("gemma3n_text", "ort-cpu", F32, Int8, "reads another's"),
        ("gemma3n_text", "ort-cuda", BF16, Int8, "reads another's"),
        ("bloom", "ort-cuda", F16, Int8, "adds a bias to its scores"),
    ] {
        let cache = KvCache::Quantized(kind, None);
        let options = Options { cache, element, ..Case::named(case)?.options(target)? };
        let error = compile(&options).map(|_| ()).err().ok_or(format!("{case} on {target} compiled"))?;
        assert_eq!(error.code, Code::UsageInvalid);
        let text = error.to_string();
        assert!(text.contains(&format!("--kv-cache {kind}")) && text.contains(words), "{case} on {target}: {text}");
    }
    Ok(())
}

/// Flash attention, which every prompt on such a cache takes, ends at heads of 256.
#[test]
fn the_largest_head() -> TestResult {
    let case = Case::named("llama")?;
    let mut config = Repository::open(&case.repo()?)?.config;
    for (size, target, kind, refused) in [
        (256, "ort-cuda", CacheType::Int8, false),
        (264, "ort-cuda", CacheType::Int8, true),
        (264, "ort-cuda", CacheType::Fp8, true),
        (264, "ort-cpu", CacheType::Int8, false),
    ] {
        config.insert("head_dim".into(), size.into());
        let description = describe(&choose(&config, None)?, &config, &[])?;
        let lowering = lower::Options {
            element: ElementType::F16,
            cache: lower::Cache::Quantized(kind, None),
            ..lower::Options::plain(Target::named(target)?)
        };
        let error = lower::lower(&build::decoder(&description.spec, Logits::All)?, &lowering).err();
        assert_eq!(error.is_some(), refused, "heads of {size} on {target}: {error:?}");
        if let Some(error) = error {
            let text = error.to_string();
            assert!(text.contains("heads of 264") && text.contains("at most 256"), "{text}");
        }
    }
    Ok(())
}

/// What the CUDA kernel reads: codes of a type in, the same out, and a float32 scale for each element of each head, which
/// for float8 takes the largest magnitude to 448 as for int8 to 127.
#[test]
fn caches_for_the_cuda_provider_are_as_its_kernel_reads_them() -> TestResult {
    runtime()?;
    let place = tempfile::tempdir_in(scratch())?;
    let options = for_cuda(&kjv_llama())?;
    let mut scales = Vec::new();
    for kind in CacheType::ALL {
        let cache = measured(kind, &options, &place.path().join(kind.as_str()))?;
        let KvCache::Quantized(_, Some(found)) = &cache else { return Err("no scales".into()) };
        scales.push(found.scales.get("past_key_values.0.key").ok_or("no scales of keys")?.to_vec());
        for element in [ElementType::F16, ElementType::BF16] {
            let compiled = compile(&Options { cache: cache.clone(), element, ..options.clone() })?;
            let graph = &compiled.lowered.graph;
            let ty = |id: &hf2onnx::graph::ValueId| graph.ty(*id).element;
            let named = |id: &&hf2onnx::graph::ValueId| graph.value(**id).name.starts_with("past_key_values");
            let caches = graph.inputs.iter().filter(named).chain(&graph.outputs[1..]);
            assert!(caches.clone().count() > 4 && caches.clone().all(|id| ty(id) == kind.element()), "{kind}");
            let attention: Vec<_> = graph.nodes.iter().filter(|n| n.op.op_type == "GroupQueryAttention").collect();
            assert_eq!(attention.len(), compiled.description.spec.layers.len());
            for node in attention {
                let types: Vec<_> = node.inputs.iter().map(|id| id.as_ref().map(ty)).collect();
                let (x, cache, scale) = (Some(element), Some(kind.element()), Some(ElementType::F32));
                assert_eq!((types[0], &types[3..5], types[5]), (x, [cache; 2].as_slice(), Some(ElementType::I32)));
                // No bias and no sinks before the scales.
                assert_eq!(types[10..], [None, None, scale, scale]);
                let (channel, bits) = (Attribute::String("PER_CHANNEL"), Attribute::Int(8));
                for told in [("k_quant_type", channel.clone()), ("v_quant_type", channel), ("kv_cache_bit_width", bits)]
                {
                    assert!(node.op.attributes.contains(&told), "{told:?} in {:?}", node.op.attributes);
                }
            }
        }
    }
    let [int8, fp8] = scales.as_slice() else { return Err("two types".into()) };
    assert!(int8.iter().zip(fp8).all(|(a, b)| (a * 127.0 - b * 448.0).abs() <= a * 1e-3 && *a > 0.0));
    Ok(())
}

/// What only a GPU runs is built, described and recorded, and refused by the CPU with a way out.
#[test]
fn a_float8_build_says_what_it_is_and_where_it_runs() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let (model, repo, text) = (place.path().join("model"), kjv_llama(), text());
    let options = ["build", "--target", "ort-cuda", "--dtype", "f16", "--kv-cache", "fp8", "--calibrate-tokens", "600"];
    let places = ["--calibrate".as_ref(), text.as_os_str(), repo.as_os_str(), "--output".as_ref(), model.as_os_str()];
    let ran = hf2onnx(options.map(std::ffi::OsStr::new).into_iter().chain(places))?;
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let json =
        |name: &str| -> TestResult<serde_json::Value> { Ok(serde_json::from_slice(&fs::read(model.join(name))?)?) };
    let manifest = json("hf2onnx.json")?;
    assert_eq!((&manifest["kv_cache"]["type"], &manifest["target"]), (&"fp8".into(), &"ort-cuda".into()));
    assert_eq!(json("genai_config.json")?["search"]["past_present_share_buffer"], true);
    for words in
        [&["verify", "--golden", "GOLDEN"][..], &["generate", "--prompt", "In the"], &["bench", "--new-tokens", "1"]]
    {
        let golden = repo.join("golden.safetensors");
        let words = words.iter().map(|word| if *word == "GOLDEN" { golden.as_os_str() } else { (*word).as_ref() });
        let ran = hf2onnx(words.clone().chain([model.as_os_str()]))?;
        let stderr = String::from_utf8_lossy(&ran.stderr);
        let named = stderr.contains("GroupQueryAttention") && stderr.contains("--provider cuda");
        assert!(ran.status.code() == Some(1) && named && !stderr.contains("panicked"), "{stderr}");
    }
    Ok(())
}

#[test]
fn the_command_line_measures_and_records() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let (model, repo, text) = (place.path().join("model"), kjv_llama(), text());
    let places = || [repo.as_os_str(), "--output".as_ref(), model.as_os_str(), "--kv-cache".as_ref(), "int8".as_ref()];
    let refused = hf2onnx(std::iter::once("build".as_ref()).chain(places()))?;
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && stderr.contains("--calibrate FILE"), "{stderr}");
    let foretold = hf2onnx(["build", "--dry-run"].map(std::ffi::OsStr::new).into_iter().chain(places()))?;
    assert!(foretold.status.success() && !model.exists());
    let arguments = ["build", "--calibrate-tokens", "600", "--verify", "--calibrate"].map(std::ffi::OsStr::new);
    let ran = hf2onnx(arguments.into_iter().chain([text.as_os_str()]).chain(places()))?;
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(model.join("hf2onnx.json"))?)?;
    assert_eq!(manifest["kv_cache"]["type"], "int8");
    assert_eq!(manifest["kv_cache"]["calibration"]["tokens"], 600);
    assert_eq!(manifest["verification"]["holds"], true);
    Ok(())
}
