//! What quantisation costs: measures with values worked out by hand, rankings, bars, and the report of it.
#![allow(clippy::indexing_slicing, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;

use approx::assert_relative_eq;
use common::models::{build_with, options, runtime};
use common::rounding::rounded;
use common::{Case, TestResult, hf2onnx, kjv_llama, scratch};
use hf2onnx::compile::Options;
use hf2onnx::golden::Golden;
use hf2onnx::quant_report::{self, Entry, Plan, Tokens};
use hf2onnx::quantize::{Algorithm, Scheme};
use hf2onnx::recipe::{Changes, Recipe};
use hf2onnx::session::{self, Decoder, Floats};
use hf2onnx::tokenizer::Tokenizer;
use hf2onnx::verify::{self, Bar, Loss, Report, Tally, Verdict, Window, against_golden, compare_builds, text_windows};

fn logits(positions: &[&[f32]]) -> Floats {
    Floats { shape: vec![1, positions.len(), positions[0].len()], data: positions.concat() }
}

fn loss(reference: &[&[f32]], model: &[&[f32]], targets: &[i64]) -> TestResult<Loss> {
    let mut tally = Tally::default();
    tally.add(&logits(reference), &logits(model), targets);
    Ok(tally.finish().ok_or("no positions")?)
}

/// p = (1/2, 1/2) and q = (3/4, 1/4): KL(p || q) = ln 2 - (ln 3)/2, whatever is added to all logits.
#[test]
fn measures_are_those_of_their_definitions() -> TestResult {
    let three = 3.0_f32.ln();
    let found = loss(&[&[5.0, 5.0], &[0.0, 2.0]], &[&[three, 0.0], &[0.0, 2.0]], &[1, 0])?.quality;
    let kl = 2.0_f64.ln() - 3.0_f64.ln() / 2.0;
    assert_eq!(found.positions, 2);
    assert_relative_eq!(found.kl_mean, kl / 2.0, epsilon = 1e-7);
    assert_relative_eq!(found.kl_max, kl, epsilon = 1e-7);
    assert_relative_eq!(found.top1, 1.0);
    // The reference gives 1/2 to the first target and 1/(1+e^2) to the second; the model 1/4 and the same.
    let other = (1.0 + 2.0_f64.exp()).ln();
    let perplexity = found.perplexity.ok_or("no perplexity")?;
    assert_relative_eq!(perplexity.reference, f64::midpoint(2.0_f64.ln(), other).exp(), epsilon = 1e-6);
    assert_relative_eq!(perplexity.model, f64::midpoint(4.0_f64.ln(), other).exp(), epsilon = 1e-6);
    assert_relative_eq!(perplexity.change, 2.0_f64.sqrt() - 1.0, epsilon = 1e-6);
    // Without its mean the difference of the first position is (ln 3)/2 on either side; the reference's norm is 2/sqrt 2.
    assert_relative_eq!(found.error, 3.0_f64.ln() / 2.0, epsilon = 1e-6);
    assert_relative_eq!(found.logit_max, 5.0, epsilon = 1e-6);
    assert_relative_eq!(found.logit_mean, (10.0 - 3.0_f64.ln()) / 4.0, epsilon = 1e-6);
    // Uniform: no information; (0, 2): ln 2 less the entropy.
    let p = 1.0 / (1.0 + 2.0_f64.exp());
    let entropy = -(p * p.ln() + (1.0 - p) * (1.0 - p).ln());
    assert_relative_eq!(found.information, (2.0_f64.ln() - entropy) / 2.0, epsilon = 1e-6);
    // The other direction is another number.
    let reversed = loss(&[&[three, 0.0]], &[&[5.0, 5.0]], &[])?.quality;
    assert_relative_eq!(reversed.kl_mean, 0.75 * 1.5_f64.ln() + 0.25 * 0.5_f64.ln(), epsilon = 1e-6);
    assert!(reversed.perplexity.is_none());
    Ok(())
}

#[test]
fn percentiles_and_first_tokens_are_counted() -> TestResult {
    // Of 200 positions, 99 % are 198: with three bad ones the 198th smallest is one of them, with two it is not.
    for (bad, p99_is_bad) in [(3, true), (2, false)] {
        let reference: Vec<&[f32]> = vec![&[1.0, 0.0]; 200];
        let model: Vec<&[f32]> =
            (0..200).map(|k| if k % 60 == 7 && k < 60 * bad { &[0.0_f32, 1.0][..] } else { &[1.0, 0.0] }).collect();
        let found = loss(&reference, &model, &[])?.quality;
        assert_eq!(found.kl_p99 > 0.0, p99_is_bad, "{bad}");
        assert!(found.kl_max > 0.4);
        assert_relative_eq!(found.top1, 1.0 - f64::from(bad) / 200.0);
    }
    Ok(())
}

#[test]
fn what_is_no_number_is_the_worst_and_what_both_exclude_is_nothing() -> TestResult {
    let found = loss(&[&[1.0, 0.0]], &[&[f32::NAN, 0.0]], &[0])?;
    assert!(found.quality.kl_max.is_infinite() && found.quality.error.is_infinite());
    assert_eq!(Bar::of_bits(2).verdict(&found.quality), Verdict::Fails);
    assert!(serde_json::to_value(&found)?["kl_mean"].is_null());
    let hidden = f32::NEG_INFINITY;
    let found = loss(&[&[1.0, hidden, 0.0]], &[&[1.0, hidden, 0.0]], &[])?.quality;
    assert!(found.kl_max == 0.0 && found.error == 0.0 && found.logit_max == 0.0, "{found}");
    // A padded vocabulary is cut; one that lacks tokens is not.
    assert_relative_eq!(loss(&[&[1.0, 0.0]], &[&[1.0, 0.0, 9.0]], &[])?.quality.kl_max, 0.0);
    assert!(loss(&[&[1.0, 0.0, 9.0]], &[&[1.0, 0.0]], &[])?.quality.kl_max.is_infinite());
    Ok(())
}

fn open(dir: &Path) -> TestResult<Decoder> {
    runtime()?;
    Ok(Decoder::open(dir, &session::Options { threads: 1, hidden_states: true, ..session::Options::default() })?)
}

/// The trained model, quantised by a recipe or as it is.
fn build(into: &Path, recipe: Option<&str>) -> TestResult {
    let recipe = recipe.map(|name| Recipe::new(name, &Changes::default())).transpose()?;
    build_with(&Options { recipe, ..options(&kjv_llama(), "ort-cpu")? }, into)?;
    Ok(())
}

fn some_text() -> TestResult<Vec<Window>> {
    let mut windows = text_windows(&Tokenizer::open(&kjv_llama())?, &kjv_llama().join("eval.txt"), 128)?;
    windows.truncate(3);
    Ok(windows)
}

#[test]
fn equal_builds_lose_nothing_and_a_disturbed_layer_is_named() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let [float, bent] = ["float", "bent"].map(|name| place.path().join(name));
    build(&float, None)?;
    let repo = place.path().join("repo");
    let scheme = Scheme::new(2, true, 32, Algorithm::Nearest)?;
    rounded(&kjv_llama(), &repo, |name| name.starts_with("model.layers.2.").then_some(scheme))?;
    build_with(&options(&repo, "ort-cpu")?, &bent)?;
    let losses = compare_builds(&mut open(&float)?, &mut [open(&float)?, open(&bent)?], &some_text()?)?;
    let (same, other) = (&losses[0], &losses[1]);
    let quality = &same.quality;
    assert!(quality.kl_max == 0.0 && quality.error == 0.0 && quality.logit_max == 0.0, "{quality}");
    assert_relative_eq!(quality.top1, 1.0);
    assert_relative_eq!(quality.perplexity.ok_or("no perplexity")?.change, 0.0);
    assert_eq!((quality.positions, same.layers.len()), (3 * 128, 7));
    assert!(same.layers.iter().all(|layer| layer.error == 0.0));

    assert_eq!(other.layers[0].name, "layers.2", "{:?}", other.layers);
    assert_relative_eq!(other.layers[0].increase, other.layers[0].error);
    for layer in &other.layers {
        assert_eq!(layer.error > 0.0, !["embedding", "layers.0", "layers.1"].contains(&layer.name.as_str()), "{layer}");
    }
    assert!(other.quality.kl_mean > 0.001 && other.quality.top1 < 1.0);
    Ok(())
}

fn check(dir: &Path, settings: verify::Options) -> TestResult<Report> {
    runtime()?;
    let golden = Golden::read(&kjv_llama().join("golden.safetensors"))?;
    Ok(against_golden(dir, &golden, &verify::Options { threads: 1, ..settings })?)
}

/// A quantised build is held to its own bar; a finer one it does not meet, and then the layers are named.
#[test]
fn a_quantised_build_is_judged_by_the_bar_of_its_scheme() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let float = place.path().join("float");
    build(&float, None)?;
    assert!(check(&float, verify::Options::default())?.cost.is_none());
    let text = place.path().join("text.txt");
    fs::write(&text, fs::read_to_string(kjv_llama().join("eval.txt"))?.get(..4000).ok_or("a short text")?)?;
    let mut divergences = Vec::new();
    for (recipe, bits) in [("int8", 8), ("int4", 4), ("int2", 2)] {
        let dir = place.path().join(recipe);
        build(&dir, Some(recipe))?;
        let (text, reference) = (Some(text.clone()), Some(float.clone()));
        let report = check(&dir, verify::Options { text, reference, ..verify::Options::default() })?;
        assert!(report.holds() && report.divergence.is_none(), "{report}");
        let cost = report.cost.as_ref().ok_or("no cost")?;
        assert_eq!((cost.scheme.as_str(), cost.bar, cost.compared.len()), (recipe, Bar::of_bits(bits), 2));
        assert_eq!(
            cost.bytes,
            fs::read_dir(dir.join("onnx"))?.map(|f| Ok(f?.metadata()?.len())).sum::<TestResult<u64>>()?
        );
        assert!(report.scenarios.iter().any(|outcome| outcome.scenario == "decode, itself"));
        assert!(report.to_string().contains("what costs most: "), "{report}");
        divergences.push(cost.compared[1].quality.kl_mean);
        if bits == 4 {
            let finer = verify::Options { bar: Some(Bar::of_bits(8)), ..verify::Options::default() };
            let report = check(&dir, finer)?;
            assert!(report.failures().contains(&"golden rows".to_owned()), "{report}");
        }
    }
    assert!(divergences.is_sorted() && divergences[0] > 0.0 && divergences[2] > 0.1, "{divergences:?}");
    Ok(())
}

/// Models of random weights are held to bars too, and a wrong one is told from a quantised one.
#[test]
fn small_random_models_are_within_the_bars_and_other_models_are_not() -> TestResult {
    runtime()?;
    for name in ["llama", "mixtral", "gpt2", "gemma3_text"] {
        let (case, place) = (Case::named(name)?, tempfile::tempdir_in(scratch())?);
        let golden = Golden::read(&case.golden())?;
        for bits in [8, 4, 2] {
            let scheme = Scheme::new(bits, true, 32, Algorithm::Search)?;
            let (repo, dir) = (place.path().join(format!("repo{bits}")), place.path().join(format!("{bits}")));
            rounded(&case.repo()?, &repo, |_| Some(scheme))?;
            build_with(&Options { repository: repo, ..case.options("ort-cpu")? }, &dir)?;
            let bar = Some(Bar::of_bits(bits));
            let settings = verify::Options { threads: 1, bar, ..verify::Options::default() };
            let report = against_golden(&dir, &golden, &settings)?;
            assert!(report.holds(), "{name}, {bits} bits: {report}");
        }
        // Unrelated logits are within none.
        let mut wrong = golden.clone();
        wrong.logits.data.rotate_right(golden.vocabulary() * 7 + 5);
        let settings = verify::Options { threads: 1, bar: Some(Bar::of_bits(2)), ..verify::Options::default() };
        assert!(!against_golden(&place.path().join("8"), &wrong, &settings)?.holds(), "{name}");
    }
    Ok(())
}

/// Every element that is opened is closed, in order; attributes are quoted.
fn well_formed(html: &str) -> TestResult {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = html.strip_prefix("<!doctype html>").ok_or("no doctype")?;
    while let Some((text, after)) = rest.split_once('<') {
        assert!(!text.contains('>') || open.last() == Some(&"style"), "a loose > in {text:?}");
        let (tag, after) = after.split_once('>').ok_or("a tag without an end")?;
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
        } else if !tag.ends_with('/') {
            open.push(tag.split_whitespace().next().ok_or("a tag without a name")?);
        }
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
    }
    assert!(open.is_empty(), "{open:?} stay open");
    Ok(())
}

#[test]
fn the_report_shows_every_scheme_and_escapes_names() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let entry = |name: &str, dir: &str| Entry { name: name.to_owned(), dir: place.path().join(dir), calibration: None };
    let reference = entry("float32", "float");
    build(&reference.dir, None)?;
    let entries = [entry("<b>\"q\" & 'x'", "int4"), entry("int8", "int8"), entry("same", "float")];
    for recipe in ["int4", "int8"] {
        build(&place.path().join(recipe), Some(recipe))?;
    }
    runtime()?;
    let tokens = Tokens { name: "a <text>".to_owned(), windows: some_text()? };
    let plan = Plan { threads: 1, speed: None };
    let report = quant_report::run("kjv & co".to_owned(), None, &reference, &entries, &tokens, &plan)?;
    let table = report.to_string();
    let rows: Vec<&str> = table.lines().skip(2).take(5).collect();
    for (row, name) in rows.iter().zip(["scheme", "float32", "<b>\"q\" & 'x'", "int8", "same"]) {
        assert!(row.starts_with(name), "{table}");
    }
    assert!(rows[2].len() == rows[3].len() || rows[0].chars().count() == rows[3].chars().count(), "{table}");
    let html = quant_report::page(&report);
    well_formed(&html)?;
    assert!(!html.contains("<b>") && !html.contains("<text>") && !html.contains("<script") && !html.contains("http"));
    assert!(html.contains("kjv &amp; co") && html.contains("a &lt;text&gt;"));
    for name in ["&lt;b&gt;&quot;q&quot; &amp; &#39;x&#39;", "int8", "same"] {
        // In the table, as a title and a label of a point, and over its layers.
        assert!(html.matches(name).count() >= 4, "{name}: {}", html.matches(name).count());
    }
    assert_eq!(html.matches("<circle").count(), 3);
    assert_eq!(html.matches("class=\"carried\"").count(), 3 * 7);
    Ok(())
}

#[test]
fn the_command_builds_compares_and_draws() -> TestResult {
    let place = tempfile::tempdir_in(scratch())?;
    let html = place.path().join("report.html");
    let other = place.path().join("other");
    build(&other, Some("int4"))?;
    let (kjv, with) = (kjv_llama(), format!("other={}", other.display()));
    let (kjv, page) = (kjv.to_string_lossy(), html.to_string_lossy());
    let arguments = ["--json", "quant-report", &kjv, "--schemes", "int4:nearest,int4", "--with", &with];
    let more = ["--tokens", "600", "--repeat", "1", "--new-tokens", "4", "--threads", "1", "--html", &page];
    let ran = hf2onnx(arguments.into_iter().chain(more))?;
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let json: serde_json::Value = serde_json::from_slice(&ran.stdout)?;
    let schemes = json["schemes"].as_array().ok_or("no schemes")?;
    assert_eq!(
        schemes.iter().map(|s| s["name"].as_str()).collect::<Vec<_>>(),
        [Some("int4:nearest"), Some("int4"), Some("other")]
    );
    let number = |scheme: usize, pointer: &str| schemes[scheme].pointer(pointer).and_then(serde_json::Value::as_f64);
    for (scheme, all) in schemes.iter().enumerate() {
        for pointer in
            ["/kl_mean", "/kl_p99", "/kl_max", "/perplexity/change", "/bytes", "/speed/decode_tokens_per_second/median"]
        {
            assert!(number(scheme, pointer).is_some(), "{pointer} of {scheme}");
        }
        assert_eq!(all["positions"], 600);
        assert_eq!(all["layers"].as_array().map(Vec::len), Some(7));
    }
    // The same build twice, and a better one than plain rounding at the same size.
    assert_eq!(number(1, "/kl_mean"), number(2, "/kl_mean"));
    assert!(number(1, "/kl_mean") < number(0, "/kl_mean") && number(1, "/bytes") == number(0, "/bytes"));
    well_formed(&fs::read_to_string(&html)?)?;

    let ran = hf2onnx(["quant-report", &kjv, "--schemes", "int4:odd"])?;
    assert!(String::from_utf8_lossy(&ran.stderr).contains("`odd` in `int4:odd`"), "{ran:?}");
    Ok(())
}
