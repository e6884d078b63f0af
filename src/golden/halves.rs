//! How far the reference in float16 or bfloat16 is from its own float32, as a golden's metadata has it.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::element::ElementType;

/// The reference's errors in both half types, where they were recorded.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Halves {
    /// In float16.
    pub float16: Option<HalfErrors>,
    /// In bfloat16.
    pub bfloat16: Option<HalfErrors>,
}

/// The reference's errors in one type, scenario by scenario.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HalfErrors {
    /// All of it computed in the type.
    pub computed: BTreeMap<String, Finding>,
    /// Computed in float32, with matrices rounded to the type.
    pub rounded: BTreeMap<String, Finding>,
}

/// What one scenario gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Finding {
    /// Numbers.
    Error(HalfError),
    /// Why there are none: the reference did not run, or overflowed.
    None(String),
}

/// How far one scenario's logits are from those of float32, over the positions that hold a token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HalfError {
    /// Largest absolute difference, relative to the largest float32 logit.
    pub max: f64,
    /// Norm of the difference by that of the float32 logits, both without each position's mean.
    pub error: f64,
    /// Median of that over the positions, each by itself.
    pub typical: f64,
}

impl Halves {
    /// Reads the entries `errors_float16` and `errors_bfloat16`; `Err` says what is wrong with one that is there.
    pub(super) fn from_metadata(metadata: &HashMap<String, String>) -> Result<Self, String> {
        let entry = |key: &str| -> Result<Option<HalfErrors>, String> {
            let Some(text) = metadata.get(key) else { return Ok(None) };
            let errors: HalfErrors = serde_json::from_str(text).map_err(|e| format!("{key}: {e}"))?;
            let all = || errors.computed.iter().chain(&errors.rounded);
            match all().find(|(_, finding)| matches!(finding, Finding::Error(error) if !error.is_sound())) {
                Some((scenario, _)) => Err(format!("{key}: {scenario} has an error that is negative or not finite")),
                None => Ok(Some(errors)),
            }
        };
        Ok(Self { float16: entry("errors_float16")?, bfloat16: entry("errors_bfloat16")? })
    }

    /// The errors in a type; nothing for one that is no half.
    pub fn of(&self, element: ElementType) -> Option<&HalfErrors> {
        match element {
            ElementType::F16 => self.float16.as_ref(),
            ElementType::BF16 => self.bfloat16.as_ref(),
            _ => None,
        }
    }
}

impl HalfError {
    fn is_sound(&self) -> bool {
        [self.max, self.error, self.typical].iter().all(|number| number.is_finite() && *number >= 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOUND: &str = r#"{"computed": {"prefill": {"max": 0.002, "error": 0.001, "typical": 0.0008},
        "decode": "logits that are not finite"}, "rounded": {}}"#;

    fn read(key: &str, text: &str) -> Result<Halves, String> {
        Halves::from_metadata(&HashMap::from([(key.to_owned(), text.to_owned())]))
    }

    #[test]
    fn numbers_and_reasons_are_read_for_their_type_alone() {
        let halves = read("errors_float16", SOUND).unwrap();
        let errors = halves.of(ElementType::F16).unwrap();
        let prefill = HalfError { max: 0.002, error: 0.001, typical: 0.0008 };
        assert_eq!(errors.computed.get("prefill"), Some(&Finding::Error(prefill)));
        assert_eq!(errors.computed.get("decode"), Some(&Finding::None("logits that are not finite".into())));
        assert_eq!((halves.of(ElementType::BF16), halves.of(ElementType::F32)), (None, None));
        assert!(read("errors_bfloat16", SOUND).unwrap().of(ElementType::BF16).is_some());
        assert_eq!(read("note", "no errors"), Ok(Halves::default()));
    }

    #[test]
    fn what_is_no_error_is_refused_by_name() {
        for (from, to, words) in [
            ("0.002", "-0.002", "prefill has an error"),
            ("0.001", "1e999", "errors_bfloat16"),
            ("\"typical\": 0.0008", "\"median\": 0.0008", "errors_bfloat16"),
            ("}", "", "errors_bfloat16"),
        ] {
            let problem = read("errors_bfloat16", &SOUND.replace(from, to)).unwrap_err();
            assert!(problem.contains(words), "{from} -> {to}: {problem}");
        }
    }
}
