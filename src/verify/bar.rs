//! What a quantised build may lose.

use std::fmt;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::folder_of;
use super::metrics::Comparison;
use super::quality::Quality;
use super::report::{Outcome, Verdict};
use crate::element::CacheType;

/// Nats that a reference's entropy has to lie below that of a uniform choice for its divergence to be judged.
///
/// Random weights come to 0.5 to 1, a trained model to 4 and more.
const INFORMED: f64 = 2.0;

/// What a model may lose against the float reference.
///
/// Two measures, because no limit of one serves both kinds of model. A trained one is sure of its tokens, and errors in
/// the logits of improbable ones cost it nothing: its divergence says what is lost. One of random weights, as tests
/// have, predicts nothing that could be lost, and its divergence only squares the error of its logits, which is three
/// times a trained model's: it is judged by that error alone.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bar {
    /// Bits of the narrowest weights.
    pub bits: u8,
    /// Largest mean Kullback-Leibler divergence, in nats, where the reference predicts anything.
    pub kl_mean: f64,
    /// Largest error of the logits, relative to their norm.
    pub error: f64,
    /// Largest change of the perplexity, relative to the reference's.
    pub perplexity: f64,
}

impl Bar {
    /// The bar for the narrowest weights' bits.
    ///
    /// Divergence and perplexity are some two times what a small trained model (2 million weights: larger ones lose
    /// less) loses by plain rounding; the error is a quarter above what the most sensitive model of random weights, one
    /// of experts, comes to. Wrong graphs come to errors of about 1.4, that of unrelated logits.
    pub fn of_bits(bits: u8) -> Self {
        match bits {
            // Divergence 0.46, perplexity +46 %; errors 0.33 trained, up to 1.15 random.
            0..=3 => Self { bits, kl_mean: 0.8, error: 1.25, perplexity: 0.8 },
            // 0.011 with 8 bits in the head, 0.019 in blocks of 32, 0.026 in blocks of 128; +1.6 %; 0.09 and 0.45.
            4..=7 => Self { bits, kl_mean: 0.05, error: 0.6, perplexity: 0.05 },
            // 0.0001, and activations rounded to 8 bits beside the weights add about as much again; 0.05 %; 0.005 and 0.065.
            8.. => Self { bits, kl_mean: 0.001, error: 0.08, perplexity: 0.005 },
        }
    }

    /// The bar for float weights with a cache of keys and values in 8 bits. A trained model loses less by int8 than by
    /// weights of as many bits, whose bar serves a build of both.
    pub fn of_cache(kind: CacheType) -> Self {
        match kind {
            // 0.00005 and 0.01 % in a small trained model. Random weights attend sharply: errors are 0.003 in the trained
            // one, 0.02 in most random ones, up to 0.2 in those of experts, which choose others then.
            CacheType::Int8 => Self { bits: 8, kl_mean: 0.0003, error: 0.25, perplexity: 0.002 },
            // No CPU runs it. With keys and values rounded so in a float graph: 0.0008, +0.05 %, and four times the errors
            // that int8 comes to in the same way.
            CacheType::Fp8 => Self { bits: 8, kl_mean: 0.003, error: 0.6, perplexity: 0.005 },
        }
    }

    /// Whether divergence and error are within it.
    fn admits(&self, (kl_mean, error, information): (f64, f64, f64)) -> bool {
        // Written so that NaN fails, whichever it is.
        let uninformed = information < INFORMED;
        kl_mean.is_finite() && error <= self.error && (uninformed || kl_mean <= self.kl_mean)
    }

    /// Whether a model's quality is within it.
    pub fn verdict(&self, quality: &Quality) -> Verdict {
        let Quality { kl_mean, error, information, .. } = *quality;
        let text = quality.perplexity.is_none_or(|p| p.change <= self.perplexity);
        if text && self.admits((kl_mean, error, information)) { Verdict::Holds } else { Verdict::Fails }
    }

    /// Judges a scenario by this bar, and not by the float tolerance.
    pub(super) fn judge(&self, outcome: &mut Outcome) {
        outcome.allowed = None;
        if outcome.greedy.is_some() {
            outcome.verdict = Verdict::NotCompared;
            outcome.note = Some("tokens are shown, not judged: a quantised model may choose others".into());
        } else if let Some(Comparison { kl_mean, error, information, .. }) = outcome.comparison {
            let holds = self.admits((kl_mean, error, information));
            outcome.verdict = if holds { Verdict::Holds } else { Verdict::Fails };
        }
    }
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bits, kl_mean, error, perplexity } = self;
        let (error, perplexity) = (100.0 * error, 100.0 * perplexity);
        write!(
            f,
            "for {bits} bits a mean KL of {kl_mean}, an error of the logits of {error:.0} %, a perplexity {perplexity:.1} % higher"
        )
    }
}

/// What `hf2onnx.json` says of a build's quantisation.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantisation {
    /// The scheme's name.
    pub scheme: String,
    /// Bits of the narrowest weights.
    pub bits: u8,
}

impl Quantisation {
    /// That of a built directory; nothing for a float build, and where no `hf2onnx.json` says anything.
    pub fn of(model: &Path) -> Option<Self> {
        let manifest = crate::read::json_file(&folder_of(model).join("hf2onnx.json")).ok()?;
        Self::from_json(manifest.get("quantization")?)
    }

    /// That which the manifest's `quantization` says: `{"scheme": "q4", "rules": ["*: int4 symmetric, ..."],
    /// "matrices": {"int4 symmetric, ...": ...}}`; nothing where no matrix is left in integers.
    pub fn from_json(value: &Value) -> Option<Self> {
        let scheme = value.as_object()?.get("scheme").and_then(Value::as_str).unwrap_or("unnamed").to_owned();
        // What was written says more than the rules, and those more than a name.
        let matrices = value.get("matrices").and_then(Value::as_object);
        // Floats throughout, whatever the checkpoint was.
        if matrices.is_some_and(serde_json::Map::is_empty) {
            return None;
        }
        let written = matrices.and_then(|matrices| matrices.keys().filter_map(|name| bits(name)).min());
        let rules = value.get("rules").and_then(Value::as_array);
        let ruled = rules.and_then(|rules| rules.iter().filter_map(|rule| rule_bits(rule.as_str()?)).min());
        // A scheme without bits in its name is held to what is the least to lose.
        let narrowest = written.or(ruled).or_else(|| bits(&scheme)).unwrap_or(8);
        Some(Self { scheme, bits: narrowest })
    }
}

/// What a built directory says that its caches hold, if they are not float.
pub(super) fn cache_of(model: &Path) -> Option<CacheType> {
    let manifest = crate::read::json_file(&folder_of(model).join("hf2onnx.json")).ok()?;
    CacheType::named(manifest.get("kv_cache")?.get("type")?.as_str()?)
}

/// The bits of `pattern: scheme` or `pattern=scheme`; the pattern may have numbers of its own.
fn rule_bits(rule: &str) -> Option<u8> {
    bits(rule.rsplit([':', '=']).find_map(|words| Some(words.trim()).filter(|words| bits(words).is_some()))?)
}

/// The bits that the name of a scheme says: `q4`, `q4-mixed`, `int8`, `uint2`.
fn bits(name: &str) -> Option<u8> {
    let name = name.to_ascii_lowercase();
    let rest = ["uint", "int", "q"].into_iter().find_map(|prefix| name.strip_prefix(prefix))?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok().filter(|bits| (1..=8).contains(bits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_narrowest_weights_set_the_bar() {
        let of = |value: Value| Quantisation::from_json(&value).map(|q| q.bits);
        assert_eq!(of(Value::Null), None);
        assert_eq!(of(json!({"scheme": "q4", "rules": []})), Some(4));
        assert_eq!(
            of(json!({"scheme": "int8", "rules": ["int2.*: int4 symmetric, blocks of 32", "lm_head=int8"]})),
            Some(4)
        );
        let rules = ["*: int4 symmetric, blocks of 32", "*: int8 symmetric, blocks of 32"];
        let matrices = json!({"int8 symmetric, blocks of 32": {"matrices": 9}});
        assert_eq!(of(json!({"scheme": "int4", "rules": rules, "matrices": matrices})), Some(8));
        assert_eq!(of(json!({"scheme": "own"})), Some(8));
        assert_eq!(of(json!({"scheme": "stored", "rules": [], "matrices": {}})), None, "all of it decoded");
    }

    #[test]
    fn a_model_that_predicts_nothing_is_judged_by_its_logits_alone() {
        let bar = Bar::of_bits(4);
        assert!(!bar.admits((0.1, 0.3, 4.0)) && bar.admits((0.1, 0.3, 0.7)));
        assert!(!bar.admits((0.01, 0.7, 0.7)) && !bar.admits((0.01, 0.7, 4.0)));
    }

    #[test]
    fn what_is_no_number_is_outside_of_every_bar() {
        for bits in [2, 4, 8] {
            let bar = Bar::of_bits(bits);
            assert!(bar.admits((bar.kl_mean, bar.error, 4.0)));
            for information in [0.5, 4.0, f64::NAN] {
                assert!(!bar.admits((f64::NAN, 0.0, information)) && !bar.admits((0.0, f64::NAN, information)));
            }
        }
        assert!(Bar::of_bits(2).kl_mean > Bar::of_bits(4).kl_mean && Bar::of_bits(4).kl_mean > Bar::of_bits(8).kl_mean);
    }
}
