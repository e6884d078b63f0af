//! The knob test: every field of a resolved specification changes the computation, or the build refuses the change.
//!
//! A golden proves a field only if changing the field changes the golden. So each leaf of each case's specification is
//! changed, the model is built from the changed specification with the same weights, and its logits have to move.
//! Fields are found in the specification's JSON: new ones need no line here.
#![allow(clippy::print_stderr)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use common::models::runtime;
use common::{Case, TestResult, cases, scratch};
use hf2onnx::compile::{Options, compile, compile_description};
use hf2onnx::describe::Description;
use hf2onnx::golden::Golden;
use hf2onnx::read::Repository;
use hf2onnx::session::{self, Decoder, IntMatrix};
use hf2onnx::spec::ModelSpec;
use hf2onnx::write::stream;
use rayon::prelude::*;
use serde_json::{Value, json};

/// Fields that need not move anything: template (`*` for all), field, reason.
const EXEMPT: &[(&str, &str, &str)] = &[
    ("*", "model_type", "a name, for consumers"),
    ("*", "template", "a name, for the record"),
    ("*", "head.tied", "the weights decide it: tests/tensors.rs"),
    ("*", "context_length", "only consumers are told of it; RoPE has a length of its own"),
    // The case rotates four pairs, and its ramp begins before the first one whatever these say.
    ("deepseek_v3", "layers.attention.rope.scaling.yarn.beta_fast", "proven by the cases of llama, with eight pairs"),
    ("deepseek_v3", "layers.attention.rope.scaling.yarn.truncate", "proven by the cases of llama, with eight pairs"),
    // The gate is a squared ReLU: the scale of its input cancels in the norm behind it.
    ("bitnet", "layers.norms.feed_forward_input.eps", "the scale cancels in the norm before the down-projection"),
    ("deepseek_v2", "layers.attention.rope.scaling.yarn.beta_fast", "proven by the cases of llama, with eight pairs"),
    ("deepseek_v2", "layers.attention.rope.scaling.yarn.truncate", "proven by the cases of llama, with eight pairs"),
    (
        "gpt_oss",
        "layers.attention.rope.scaling.yarn.beta_fast",
        "its base is small: the ramp begins before the first pair",
    ),
    ("deepseek_v2", "layers.feed_forward.moe.routing.groups = none", "the best experts lie in the best groups here"),
    ("glm_moe_dsa", "layers.feed_forward.moe.routing.groups = none", "one group holds all experts"),
    ("glm_moe_dsa", "layers.feed_forward.moe.routing.groups.score_top", "one group holds all experts"),
    ("flex_olmo", "layers.feed_forward.moe.routing.normalize", "the norm on the mixture's output takes any scale out"),
    ("flex_olmo", "layers.feed_forward.moe.routing.scale", "the norm on the mixture's output takes any scale out"),
    ("gemma4_text", "layers.branch.moe.routing.normalize", "the norm on the mixture's output takes any scale out"),
    ("llama4_text", "layers.attention.qk_norm.after_rope", "a norm without weights does not see a rotation"),
    ("llama4_text", "layers.attention.qk_norm.span = each_head", "heads without weights are all normalised alike"),
    // The knob test runs the row without padding; the golden suite's left-padded rows prove these.
    ("llama4_text", "layers.attention.position_scale.padded", "the row has no padding"),
    ("ministral3", "layers.attention.position_scale.padded", "the row has no padding"),
    // transformers rotates by the short factors on both sides of the length, so the template gives them twice.
    ("phimoe", "layers.attention.rope.scaling.longrope.short_factor", "the case is beyond the length"),
    ("phimoe", "layers.attention.rope.scaling.longrope.original_context", "both lists of factors are the same"),
    ("ministral3", "layers.attention.position_scale.offset", "what is tried is too little to reach the next period"),
    ("nanochat", "layers.attention.qk_norm.span = each_head", "heads without weights are all normalised alike"),
];

/// A movement of the logits, relative to the largest, below which nothing moved.
const STILL: f32 = 1e-5;

/// The spelled-out graph is the most direct reading of a specification.
const TARGET: &str = "primitive";

/// A change of a specification.
struct Change {
    /// Path of the field without indices; for a choice also what was chosen.
    knob: String,
    /// What became of it, in words.
    words: String,
    spec: ModelSpec,
}

/// What is known of a template's knobs: those that never moved anything, with what was tried on them.
type Knobs = BTreeMap<String, Option<String>>;

#[test]
fn every_field_of_a_specification_moves_the_logits() -> TestResult {
    runtime()?;
    let start = Instant::now();
    let mut templates: BTreeMap<String, Knobs> = BTreeMap::new();
    let mut tried = 0;
    for case in cases()? {
        let model = Model::new(&case)?;
        let template = match case.template() {
            Some(_) => format!("{} of case {}", model.description.spec.template, case.name),
            None => model.description.spec.template.clone(),
        };
        let knobs = templates.entry(template).or_default();
        let mut changes: BTreeMap<String, Vec<Change>> = BTreeMap::new();
        for change in changes_of(&model.description.spec)? {
            changes.entry(change.knob.clone()).or_default().push(change);
        }
        changes.retain(|knob, _| !matches!(knobs.get(knob), Some(None)));
        tried += changes.len();
        let results: Vec<(String, TestResult<Option<String>>)> =
            changes.into_par_iter().map(|(knob, changes)| (knob, model.first_move(&case, &changes))).collect();
        for (knob, result) in results {
            let result = result.map_err(|error| format!("{}: {knob}: {error}", case.name))?;
            knobs.insert(knob, result);
        }
    }
    eprintln!("{tried} knobs of {} templates in {:.1} s", templates.len(), start.elapsed().as_secs_f64());
    let mut dead = Vec::new();
    for (template, knobs) in &templates {
        let still = knobs.iter().filter_map(|(knob, words)| words.as_ref().map(|words| (knob, words)));
        dead.extend(still.map(|(knob, words)| format!("{template}: {knob} moves nothing ({words})")));
    }
    assert!(dead.is_empty(), "no case proves these fields:\n{}", dead.join("\n"));
    Ok(())
}

/// A case with the logits of its own specification.
struct Model {
    options: Options,
    description: Description,
    prompt: [IntMatrix; 3],
    logits: Vec<f32>,
}

impl Model {
    fn new(case: &Case) -> TestResult<Self> {
        let golden = Golden::read(&case.golden())?;
        let prompt = [&golden.input_ids, &golden.attention_mask, &golden.position_ids].map(|m| m.first_rows(1));
        let options = case.options(TARGET)?;
        let description = compile(&options)?.description;
        let mut model = Self { options, description, prompt, logits: Vec::new() };
        let spec = model.description.spec.clone();
        model.logits = model.run(&spec)?.map_err(|refusal| format!("{}: {refusal}", case.name))?;
        Ok(model)
    }

    /// Nothing if one of the changes moves the logits or is refused; otherwise what was tried.
    fn first_move(&self, case: &Case, changes: &[Change]) -> TestResult<Option<String>> {
        let mut words = Vec::new();
        for change in changes {
            match self.run(&change.spec)? {
                Ok(logits) if !self.moved(&logits) => words.push(change.words.as_str()),
                _ => return Ok(None),
            }
        }
        words.dedup();
        Ok(Some(format!("{}: {}", case.name, words.join(", "))))
    }

    /// The logits of a specification with the case's weights, or why it is refused.
    fn run(&self, spec: &ModelSpec) -> TestResult<Result<Vec<f32>, String>> {
        let Description { rules, accounting, .. } = &self.description;
        let description = Description { spec: spec.clone(), rules: rules.clone(), accounting: accounting.clone() };
        let place = tempfile::tempdir_in(scratch())?;
        if let Err(refusal) = write(&self.options, description, place.path()) {
            return Ok(Err(refusal.to_string()));
        }
        let mut decoder =
            match Decoder::open(place.path(), &session::Options { threads: 1, ..session::Options::default() }) {
                Ok(decoder) => decoder,
                Err(refusal) => return Ok(Err(refusal.to_string())),
            };
        let [ids, mask, positions] = &self.prompt;
        let mut state = decoder.empty_state(1)?;
        let step = decoder.run(ids, mask, positions, &mut state);
        Ok(step.map(|step| step.logits.data).map_err(|refusal| refusal.to_string()))
    }

    fn moved(&self, logits: &[f32]) -> bool {
        let largest = self.logits.iter().fold(0.0_f32, |most, logit| most.max(logit.abs()));
        let most = logits.iter().zip(&self.logits).fold(0.0_f32, |most, (new, old)| most.max((new - old).abs()));
        // Logits that are no numbers have moved.
        logits.len() != self.logits.len() || most > STILL * largest || logits.iter().any(|logit| logit.is_nan())
    }
}

/// Writes a model without the files beside it.
fn write(options: &Options, description: Description, folder: &Path) -> hf2onnx::error::Result<()> {
    let compiled = compile_description(Repository::open(&options.repository)?, description, options)?;
    let (plan, layout) = (&compiled.plan, &compiled.layout);
    stream(plan, layout, &compiled.repository.checkpoint, (folder, "model.onnx"), false, None, |_| {})?;
    let bytes = compiled.encode(options);
    let path = folder.join("model.onnx");
    std::fs::write(&path, bytes).map_err(|error| hf2onnx::error::Error::io(&path, &error))
}

/// Every change of every field: of the first layer of each kind, of the last layer, and of everything else.
fn changes_of(spec: &ModelSpec) -> TestResult<Vec<Change>> {
    let json = serde_json::to_value(spec)?;
    let mut seen: Vec<&Value> = Vec::new();
    let mut skipped = Vec::new();
    let layers = json.get("layers").and_then(Value::as_array).ok_or("a specification without layers")?;
    for (index, layer) in layers.iter().enumerate() {
        if seen.contains(&layer) && index + 1 < layers.len() {
            skipped.push(format!("/layers/{index}"));
        }
        seen.push(layer);
    }
    let mut nodes = Vec::new();
    collect(&json, "", &mut nodes);
    let mut changes = Vec::new();
    for (pointer, value) in nodes {
        let knob = without_indices(&pointer);
        let within = |layer: &String| pointer == *layer || pointer.starts_with(&format!("{layer}/"));
        if skipped.iter().any(within) || exempt(&spec.template, &knob) || idle_name(&json, &pointer) {
            continue;
        }
        for (choice, new) in alternatives(&json, &pointer, value) {
            let Ok(changed) = serde_json::from_value::<ModelSpec>(replaced(&json, &pointer, new.clone())) else {
                continue;
            };
            let knob = if choice.is_empty() { knob.clone() } else { format!("{knob} = {choice}") };
            if changed != *spec && !exempt(&spec.template, &knob) {
                changes.push(Change { knob, words: format!("{value} -> {new}"), spec: changed });
            }
        }
    }
    Ok(changes)
}

fn exempt(template: &str, knob: &str) -> bool {
    EXEMPT.iter().any(|(of, name, _)| *name == knob && ["*", template].contains(of))
}

/// The name of a norm that has no parameters names no tensor.
fn idle_name(json: &Value, pointer: &str) -> bool {
    let norm = pointer.strip_suffix("/name").and_then(|norm| json.pointer(norm));
    norm.is_some_and(|norm| norm.get("weight") == Some(&json!(false)) && norm.get("bias") == Some(&json!(false)))
}

/// Path and value of every node below one.
fn collect<'v>(value: &'v Value, path: &str, nodes: &mut Vec<(String, &'v Value)>) {
    if !path.is_empty() {
        nodes.push((path.to_owned(), value));
    }
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                collect(value, &format!("{path}/{key}"), nodes);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                collect(item, &format!("{path}/{index}"), nodes);
            }
        }
        _ => {}
    }
}

/// `layers.attention.heads` for `/layers/3/attention/heads`.
fn without_indices(pointer: &str) -> String {
    let parts = pointer.split('/').filter(|part| !part.is_empty() && part.parse::<usize>().is_err());
    parts.collect::<Vec<_>>().join(".")
}

fn replaced(json: &Value, pointer: &str, new: Value) -> Value {
    let mut json = json.clone();
    if let Some(slot) = json.pointer_mut(pointer) {
        *slot = new;
    }
    json
}

/// Other values for a node, with the name of the choice where each has to count by itself. Those that are of no fitting
/// type fall out when they are read back.
fn alternatives(json: &Value, pointer: &str, value: &Value) -> Vec<(String, Value)> {
    let plain = |values: &[Value]| values.iter().map(|value| (String::new(), value.clone())).collect::<Vec<_>>();
    let mut all = match value {
        Value::Bool(flag) => plain(&[json!(!flag)]),
        Value::Number(number) => match (number.as_u64(), number.as_f64()) {
            // A float that is whole is written with its point, so integers are integers.
            (Some(n), _) => plain(&[json!(n + 1), json!(n * 2), json!(n / 2), json!(n * 4)]),
            (None, Some(x)) => plain(&[json!(x * 1.25), json!(x + 0.1), json!(x * 4.0), json!(x * 0.25)]),
            (None, None) => Vec::new(),
        },
        // Present where it was absent: the first of the plausible values that reads.
        Value::Null => plain(&[json!(3), json!(1.5), json!(true)]),
        Value::String(text) => plain(&[json!(format!("{text}x"))]),
        Value::Object(_) | Value::Array(_) => Vec::new(),
    };
    if !value.is_null() {
        all.push(("none".to_owned(), Value::Null));
    }
    let inner = value.as_object().filter(|fields| fields.len() == 1).and_then(|fields| fields.values().next());
    for variant in variants(json, pointer) {
        all.push((variant.clone(), json!(variant)));
        if let Some(inner) = inner {
            all.push((variant.clone(), json!({ &variant: inner })));
        }
    }
    all
}

/// The names that may stand at a place, if it is a choice: serde lists them when it is given an impossible one.
fn variants(json: &Value, pointer: &str) -> Vec<String> {
    let odd = "no such variant";
    let Err(error) = serde_json::from_value::<ModelSpec>(replaced(json, pointer, json!(odd))) else {
        return Vec::new();
    };
    let error = error.to_string();
    let Some((_, list)) = error.split_once(&format!("unknown variant `{odd}`, expected ")) else { return Vec::new() };
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn choices_are_found_by_name() -> TestResult {
    let case = Case::named("llama")?;
    let spec = serde_json::to_value(compile(&case.options(TARGET)?)?.description.spec)?;
    let scores = variants(&spec, "/layers/0/attention/rope/layout");
    assert_eq!(scores, ["half", "interleaved"]);
    assert!(variants(&spec, "/layers/0/attention/rope/scaling").contains(&"linear".to_owned()));
    assert_eq!(variants(&spec, "/layers/0/attention/heads"), [""; 0]);
    assert_eq!(without_indices("/layers/10/attention/heads"), "layers.attention.heads");
    Ok(())
}
