//! `hf2onnx bench`, and the decoding that it measures: past and present in one buffer give the same tokens.
#![allow(clippy::indexing_slicing)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::models::{TARGETS, build_with, options, runtime};
use common::{Case, TestResult, hf2onnx, kjv_llama, scratch};
use hf2onnx::session::{Decoder, IntMatrix, Options};
use hf2onnx::tokenizer::Tokenizer;
use serde_json::{Value, json};

fn open(dir: &Path) -> TestResult<Decoder> {
    runtime()?;
    Ok(Decoder::open(dir, &Options { threads: 1, ..Options::default() })?)
}

fn likeliest(logits: &[f32]) -> i64 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(index, _)| index);
    i64::try_from(best).unwrap_or(i64::MAX)
}

/// The trained model on every target, both ways, in buffers that have to grow and in such as fit.
#[test]
fn one_buffer_gives_the_same_tokens() -> TestResult {
    let texts: Vec<Value> = serde_json::from_slice(&fs::read(kjv_llama().join("greedy.json"))?)?;
    for target in TARGETS {
        let place = tempfile::tempdir_in(scratch())?;
        let dir = place.path().join("model");
        build_with(&options(&kjv_llama(), target)?, &dir)?;
        let (mut decoder, tokenizer) = (open(&dir)?, Tokenizer::open(&dir)?);
        assert_eq!(decoder.shares_buffers(), target == "ort-cpu", "{target}");
        for text in &texts {
            let wanted: Vec<i64> = serde_json::from_value(text["ids"].clone())?;
            let prompt = tokenizer.encode(text["prompt"].as_str().ok_or("no prompt")?, true)?;
            for (shared, room) in [(false, 0), (true, 0), (true, prompt.len() + 3), (true, 1024)] {
                let mut row = decoder.row(room, shared)?;
                let mut ids: Vec<i64> = prompt.iter().copied().map(i64::from).collect();
                while ids.len() < wanted.len() {
                    let new = ids[row.length()..].to_vec();
                    ids.push(likeliest(&decoder.extend(&mut row, &new)?));
                }
                assert_eq!(ids, wanted, "{target}, one buffer: {shared}, room {room}");
            }
        }
    }
    Ok(())
}

/// Caches of several sizes, layers that read the caches of others, no caches for positions: as the plain way has it.
#[test]
fn rows_continue_as_plain_runs_do() -> TestResult {
    for (case, target) in [
        ("llama", "ort-cpu"),
        ("gemma4_text", "ort-cpu"),
        ("gemma3n_text", "standard"),
        ("deepseek_v3", "primitive"),
        ("bloom", "ort-cpu"),
        ("mixtral", "ort-cpu"),
    ] {
        let place = tempfile::tempdir_in(scratch())?;
        let dir = place.path().join("model");
        build_with(&Case::named(case)?.options(target)?, &dir)?;
        let mut decoder = open(&dir)?;
        for shared in [false, true] {
            let (mut row, mut state) = (decoder.row(4, shared)?, decoder.empty_state(1)?);
            let mut mark = None;
            let ids: Vec<i64> = (0..24).map(|k| 3 + k * 7 % 50).collect();
            for (from, to) in [(0, 9), (9, 10), (10, 11), (11, 17), (17, 24)] {
                let got = decoder.extend(&mut row, &ids[from..to])?;
                let positions = (0_i64..).skip(from).take(to - from).collect();
                let mask = IntMatrix::from_row(vec![1; to]);
                let new = IntMatrix::from_row(ids[from..to].to_vec());
                let wanted = decoder.run_last(&new, &mask, &IntMatrix::from_row(positions), &mut state)?;
                assert!(close(&got, &wanted), "{case} on {target}, one buffer: {shared}, tokens {from}..{to}");
                if to == 10 {
                    mark = Some((row.mark(), got));
                }
            }
            // Back behind the tenth token, and along another way first.
            let (mark, _) = mark.ok_or("no mark")?;
            row.return_to(&mark);
            assert_eq!(row.length(), 10);
            let other = decoder.extend(&mut row, &[1, 2, 3])?;
            row.return_to(&mark);
            let again = decoder.extend(&mut row, &ids[10..24])?;
            let mut whole = decoder.row(24, shared)?;
            assert!(close(&again, &decoder.extend(&mut whole, &ids)?), "{case} on {target}, one buffer: {shared}");
            assert!(!close(&again, &other), "{case}: every row would do");
        }
    }
    Ok(())
}

/// Rows that are continued together come out as each does alone, also in buffers that grow.
#[test]
fn rows_of_a_batch_are_as_rows_alone() -> TestResult {
    for (case, target) in [("llama", "ort-cpu"), ("gemma4_text", "ort-cpu"), ("bloom", "standard")] {
        let place = tempfile::tempdir_in(scratch())?;
        let dir = place.path().join("model");
        build_with(&Case::named(case)?.options(target)?, &dir)?;
        let mut decoder = open(&dir)?;
        let ids: Vec<Vec<i64>> = (0..3).map(|r| (0..20).map(|k| 3 + (k * 7 + r * 11) % 50).collect()).collect();
        for shared in [false, true] {
            let mut batch = decoder.rows(3, 4, shared)?;
            let mut alone = [decoder.row(32, shared)?, decoder.row(32, shared)?, decoder.row(32, shared)?];
            // GroupQueryAttention takes several tokens behind others in one row only.
            for (from, to) in [(0, 9)].into_iter().chain((9..20).map(|at| (at, at + 1))) {
                let together: Vec<i64> = ids.iter().flat_map(|row| row[from..to].to_vec()).collect();
                let got = decoder.extend(&mut batch, &together)?;
                for (row, ids) in alone.iter_mut().zip(&ids).enumerate() {
                    let wanted = decoder.extend(ids.0, &ids.1[from..to])?;
                    let own = &got[row * wanted.len()..(row + 1) * wanted.len()];
                    assert!(close(own, &wanted), "{case} on {target}, one buffer: {shared}, row {row}, {from}..{to}");
                }
            }
            let refused = decoder.extend(&mut batch, &[1, 2]).err().ok_or("two tokens for three rows")?;
            assert!(refused.found.contains("2 tokens for 3 rows"), "{refused}");
        }
    }
    Ok(())
}

fn close(a: &[f32], b: &[f32]) -> bool {
    let largest = b.iter().fold(0_f32, |largest, x| largest.max(x.abs()));
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * largest)
}

/// Builds of the trained model, by target.
fn built(place: &Path) -> TestResult<Vec<PathBuf>> {
    let mut dirs = Vec::new();
    for target in TARGETS {
        let dir = place.join(target);
        build_with(&options(&kjv_llama(), target)?, &dir)?;
        dirs.push(dir);
    }
    Ok(dirs)
}

fn bench(dirs: [&Path; 1], more: &[&str]) -> TestResult<(Option<i32>, String, String)> {
    let mut arguments = vec!["bench".as_ref(), dirs[0].as_os_str()];
    let few = ["--prompt-tokens", "12", "--new-tokens", "5", "--repeat", "2", "--threads", "1"];
    let few = if more.contains(&few[0]) { &few[2..] } else { &few[..] };
    arguments.extend(few.iter().chain(more).map(AsRef::<std::ffi::OsStr>::as_ref));
    let ran = hf2onnx(arguments)?;
    Ok((ran.status.code(), String::from_utf8(ran.stdout)?, String::from_utf8(ran.stderr)?))
}

/// A spread in order, and above a bound.
fn sane(spread: &Value, above: f64) {
    let [min, median, max] = ["min", "median", "max"].map(|key| spread[key].as_f64().unwrap_or(f64::NAN));
    assert!(above < min && min <= median && median <= max && max.is_finite(), "{spread}");
}

#[test]
fn figures() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    for dir in built(place.path())? {
        let (code, text, errors) = bench([&dir], &["--json", "--past", "0,30"])?;
        assert_eq!(code, Some(0), "{errors}");
        let value: Value = serde_json::from_str(&text)?;
        assert_eq!((&value["prompt_tokens"], &value["repeat"], &value["threads"]), (&json!(12), &json!(2), &json!(1)));
        assert!(value["machine"]["platform"].as_str().is_some_and(|name| name.contains('-')), "{value:#}");
        assert!(value.get("ratio").is_none());
        let model = &value["models"][0];
        assert_eq!(model["shared_buffers"], json!(dir.ends_with("ort-cpu")));
        sane(&model["load_seconds"], 0.0);
        // The weights alone take 9 MB, and nothing of this size takes 4 GB.
        sane(&model["peak_bytes"], 9e6);
        assert!(model["peak_bytes"]["max"].as_f64() < Some(4e9), "{model:#}");
        let points = model["points"].as_array().ok_or("no points")?;
        assert_eq!(points.iter().map(|point| &point["past"]).collect::<Vec<_>>(), [&json!(0), &json!(30)]);
        for point in points {
            sane(&point["first_token_seconds"], 0.0);
            sane(&point["prefill_tokens_per_second"], 1.0);
            sane(&point["decode_tokens_per_second"], 1.0);
            let seconds = point["first_token_seconds"]["max"].as_f64().ok_or("no time")?;
            let rate = point["prefill_tokens_per_second"]["min"].as_f64().ok_or("no rate")?;
            assert!(12.0 / seconds <= rate * 1.000_001, "choosing a token takes time, too: {point:#}");
        }
    }
    Ok(())
}

#[test]
fn figures_of_a_batch() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let dir = place.path().join("model");
    build_with(&options(&kjv_llama(), "ort-cpu")?, &dir)?;
    for (past, prompt) in [("0", "12"), ("30", "1")] {
        let more = ["--json", "--past", past, "--prompt-tokens", prompt, "--batch", "3"];
        let (code, text, errors) = bench([&dir], &more)?;
        assert_eq!(code, Some(0), "{errors}");
        let value: Value = serde_json::from_str(&text)?;
        assert_eq!((&value["batch"], &value["provider"], &value["notes"]), (&json!(3), &json!("cpu"), &json!([])));
        let point = &value["models"][0]["points"][0];
        // Tokens of all three rows: the first token comes behind the prompts of all of them.
        let tokens = 3.0 * prompt.parse::<f64>()?;
        let seconds = point["first_token_seconds"]["max"].as_f64().ok_or("no time")?;
        let rate = point["prefill_tokens_per_second"]["min"].as_f64().ok_or("no rate")?;
        assert!(tokens / seconds <= rate * 1.000_001 && tokens / seconds > rate * 0.3, "{point:#}");
        sane(&point["decode_tokens_per_second"], 1.0);
        assert_eq!(value["models"][0]["peak_device_bytes"], Value::Null);
    }
    for (batch, words) in [("0", "--batch"), ("100000", "--batch")] {
        let (code, _, errors) = bench([&dir], &["--batch", batch])?;
        assert!(code == Some(1) && errors.contains(words), "{errors}");
    }
    Ok(())
}

#[test]
fn two_in_turns() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let dirs = built(place.path())?;
    let other = dirs[2].to_str().ok_or("no UTF-8")?;
    let (code, text, errors) = bench([&dirs[0]], &["--json", "--compare", other])?;
    assert_eq!(code, Some(0), "{errors}");
    let value: Value = serde_json::from_str(&text)?;
    assert_eq!(value["models"].as_array().map(Vec::len), Some(2));
    let ratio = &value["ratio"];
    for spread in [&ratio["load_seconds"], &ratio["peak_bytes"], &ratio["points"][0]["decode_tokens_per_second"]] {
        sane(spread, 0.0);
    }
    // With two rounds each figure is known, and so the ratio of the rounds lies between those of the extremes.
    let of = |model: usize, key: &str| value["models"][model]["points"][0]["decode_tokens_per_second"][key].as_f64();
    let (least, most) = (of(0, "min").zip(of(1, "max")), of(0, "max").zip(of(1, "min")));
    let median = ratio["points"][0]["decode_tokens_per_second"]["median"].as_f64().ok_or("no ratio")?;
    let (least, most) = least.zip(most).ok_or("no rates")?;
    assert!(least.0 / least.1 <= median * 1.000_001 && median <= most.0 / most.1 * 1.000_001, "{value:#}");
    let (_, text, _) = bench([&dirs[0]], &["--compare", other])?;
    for words in ["left / right", "decode tokens/s", "peak memory MiB", "one for past and present", "apart"] {
        assert!(text.contains(words), "{words} in\n{text}");
    }
    Ok(())
}

#[test]
fn plans_that_measure_nothing_or_too_much() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let dirs = built(place.path())?;
    for (more, words) in [
        (&["--past", "1020"] as &[&str], "the model's 1024 together"),
        (&["--past", "18446744073709551615"], "the model's 1024 together"),
        (&["--compare", "nowhere"], "nowhere"),
    ] {
        let (code, text, errors) = bench([&dirs[0]], more)?;
        assert_eq!((code, text.as_str()), (Some(1), ""), "{errors}");
        assert!(errors.contains(words), "{errors}");
    }
    let ran = hf2onnx(["bench".as_ref(), dirs[0].as_os_str(), "--repeat".as_ref(), "0".as_ref()])?;
    assert!(String::from_utf8(ran.stderr)?.contains("error[usage-invalid]: --repeat"));
    Ok(())
}
