//! A golden: what the reference computed for a model, in a safetensors file.

mod halves;

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::{Code, Error, Result};
use crate::session::{Floats, IntMatrix};

pub use halves::{Finding, HalfError, HalfErrors, Halves};

/// Positions lie below this: sizes are held in 32 bits with a sign.
const LONGEST: usize = 0x7fff_ffff;

/// The contents of a golden.
#[derive(Debug, Clone)]
pub struct Golden {
    /// The file.
    pub path: PathBuf,
    /// Prompts, left-padded.
    pub input_ids: IntMatrix,
    /// 1 for a token, 0 for padding.
    pub attention_mask: IntMatrix,
    /// Position of each token in its row.
    pub position_ids: IntMatrix,
    /// `[rows, length, vocabulary]`: the reference without a cache.
    pub logits: Floats,
    /// The first row and its greedy continuation.
    pub greedy_ids: Option<Vec<i64>>,
    /// `[1, new tokens, vocabulary]`: the logits of the continuation.
    pub greedy_logits: Option<Floats>,
    /// `[1, length, hidden]` after each layer, for the first row.
    pub hidden_states: Vec<Floats>,
    /// The first row token by token, where the reference's cached run differs from its full pass.
    pub logits_steps: Option<Floats>,
    /// The first row in two pieces, likewise.
    pub logits_chunks: Option<Floats>,
    /// How far the reference in half precision is from its own float32.
    pub halves: Halves,
    /// The metadata of the header.
    pub metadata: HashMap<String, String>,
}

/// A text and how well the reference predicts it.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// The text's file.
    pub text: PathBuf,
    /// Mean negative log-likelihood per token, in nats.
    pub nll_per_token: f64,
    /// Tokens that were predicted at a time.
    pub window: Option<usize>,
}

impl Golden {
    /// Reads a golden; a directory stands for the `golden.safetensors` in it.
    pub fn read(path: &Path) -> Result<Self> {
        let path = if path.is_dir() { path.join("golden.safetensors") } else { path.to_path_buf() };
        let bytes = crate::regular::read(&path, crate::regular::GOLDEN).map_err(|e| {
            Error::new(Code::GoldenInvalid, path.display())
                .found(e)
                .expected("a golden, as golden/record.py records it")
                .help("check the path, or record one")
        })?;
        Self::from_bytes(path, &bytes)
    }

    /// The golden that a safetensors file holds; `path` is where its texts lie beside, and names it in errors.
    pub fn from_bytes(path: PathBuf, bytes: &[u8]) -> Result<Self> {
        let subject = path.display().to_string();
        let invalid = |found: String| {
            Error::new(Code::GoldenInvalid, &subject)
                .found(found)
                .expected("a golden, as golden/record.py records it")
                .help("record it again")
        };
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| invalid(e.to_string()))?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| invalid(e.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if let Some(kind) = metadata.get("kind").filter(|k| *k != "decoder") {
            return Err(invalid(format!("a golden of kind `{kind}`, not of a decoder")));
        }
        let inside = |file: &str| Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
        if let Some(file) = metadata.get("eval_file").filter(|file| !inside(file)) {
            return Err(invalid(format!("an eval_file `{file}` that leads out of the golden's directory")));
        }
        let golden = Self::from_tensors(path, &tensors, metadata).map_err(invalid)?;
        golden.check().map_err(invalid)?;
        Ok(golden)
    }

    fn from_tensors(
        path: PathBuf,
        tensors: &SafeTensors<'_>,
        metadata: HashMap<String, String>,
    ) -> Result<Self, String> {
        let optional = |name: &str| tensors.tensor(name).ok().map(|view| floats(name, &view)).transpose();
        let matrix = |name: &str| integers(name, &tensors.tensor(name).map_err(|_| format!("no tensor {name}"))?);
        let mut hidden_states = Vec::new();
        while let Some(state) = optional(&format!("hidden_states_{}", hidden_states.len()))? {
            hidden_states.push(state);
        }
        let greedy = tensors.tensor("greedy_ids").ok().map(|view| integers("greedy_ids", &view)).transpose()?;
        Ok(Self {
            path,
            input_ids: matrix("input_ids")?,
            attention_mask: matrix("attention_mask")?,
            position_ids: matrix("position_ids")?,
            logits: optional("logits")?.ok_or("no tensor logits")?,
            greedy_ids: greedy.map(one_row).transpose()?,
            greedy_logits: optional("greedy_logits")?,
            hidden_states,
            logits_steps: optional("logits_steps")?,
            logits_chunks: optional("logits_chunks")?,
            halves: Halves::from_metadata(&metadata)?,
            metadata,
        })
    }

    /// The tensors fit one another.
    fn check(&self) -> Result<(), String> {
        let (rows, columns) = (self.input_ids.rows, self.input_ids.columns);
        if rows == 0 || columns < 2 {
            return Err(format!("input_ids is [{rows}, {columns}]"));
        }
        for (name, other) in [("attention_mask", &self.attention_mask), ("position_ids", &self.position_ids)] {
            if (other.rows, other.columns) != (rows, columns) {
                return Err(format!("{name} is [{}, {}], input_ids [{rows}, {columns}]", other.rows, other.columns));
            }
        }
        let vocabulary = self.vocabulary();
        let cached = [("logits_steps", &self.logits_steps), ("logits_chunks", &self.logits_chunks)];
        let cached = cached.into_iter().filter_map(|(name, t)| Some((name, t.as_ref()?, 1)));
        for (name, tensor, rows) in cached.chain([("logits", &self.logits, rows)]) {
            if tensor.shape != [rows, columns, vocabulary] || vocabulary == 0 {
                return Err(format!("{name} is {:?}, not {:?}", tensor.shape, [rows, columns, vocabulary]));
            }
            self.check_numbers(name, tensor)?;
        }
        for (name, matrix, end) in [
            ("input_ids", &self.input_ids, vocabulary),
            ("attention_mask", &self.attention_mask, 2),
            ("position_ids", &self.position_ids, LONGEST),
        ] {
            within(name, &matrix.data, end)?;
        }
        for (index, state) in self.hidden_states.iter().enumerate() {
            let name = format!("hidden_states_{index}");
            // The width may change on the way, and some models carry several streams: [.., 1, columns, width].
            let [.., row, length, width] = state.shape.as_slice() else {
                return Err(format!("{name} is {:?}", state.shape));
            };
            if (*row, *length) != (1, columns) || *width == 0 {
                return Err(format!("{name} is {:?}, not {:?}", state.shape, [1, columns, *width]));
            }
            self.check_numbers(&name, state)?;
        }
        self.check_greedy(columns, vocabulary)
    }

    /// The greedy continuation begins with the first row, and there are logits for each of its new tokens.
    fn check_greedy(&self, columns: usize, vocabulary: usize) -> Result<(), String> {
        let Some(ids) = &self.greedy_ids else {
            return match self.greedy_logits {
                None => Ok(()),
                Some(_) => Err("greedy_logits without greedy_ids".to_owned()),
            };
        };
        within("greedy_ids", ids, vocabulary)?;
        let new = ids.len().saturating_sub(columns);
        if new == 0 || ids.get(..columns) != Some(self.input_ids.row(0)) {
            return Err(format!("greedy_ids are {} tokens that do not continue the first row of {columns}", ids.len()));
        }
        match &self.greedy_logits {
            Some(logits) if logits.shape != [1, new, vocabulary] => {
                Err(format!("greedy_logits is {:?}, not {:?}", logits.shape, [1, new, vocabulary]))
            }
            Some(logits) if logits.data.iter().any(|logit| !logit.is_finite()) => {
                Err("greedy_logits holds a number that is not finite".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// All numbers of tokens are finite; what the reference computes for padding does not matter.
    fn check_numbers(&self, name: &str, tensor: &Floats) -> Result<(), String> {
        let width = tensor.shape.last().copied().unwrap_or(0).max(1);
        let mut positions = tensor.data.chunks(width).zip(&self.attention_mask.data).enumerate();
        match positions.find(|(_, (numbers, mask))| **mask != 0 && numbers.iter().any(|number| !number.is_finite())) {
            None => Ok(()),
            Some((at, _)) => Err(format!("{name} holds a number that is not finite, at position {at} of all rows")),
        }
    }

    /// The size of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.logits.shape.last().copied().unwrap_or(0)
    }

    /// The text that the reference scored, and how.
    pub fn evaluation(&self) -> Option<Evaluation> {
        let entry = |key: &str| self.metadata.get(key);
        Some(Evaluation {
            text: self.path.parent()?.join(entry("eval_file")?),
            nll_per_token: entry("eval_nll_per_token")?.parse().ok()?,
            window: entry("eval_window").and_then(|w| w.parse().ok()),
        })
    }
}

fn one_row(matrix: IntMatrix) -> Result<Vec<i64>, String> {
    if matrix.rows == 1 { Ok(matrix.data) } else { Err(format!("greedy_ids has {} rows, not one", matrix.rows)) }
}

/// Every number is from 0 up and below `end`.
fn within(name: &str, numbers: &[i64], end: usize) -> Result<(), String> {
    let fits = |number: i64| usize::try_from(number).is_ok_and(|number| number < end);
    match numbers.iter().find(|number| !fits(**number)) {
        None => Ok(()),
        Some(odd) => Err(format!("{name} holds {odd}, which is not from 0 up and below {end}")),
    }
}

fn integers(name: &str, view: &TensorView<'_>) -> Result<IntMatrix, String> {
    let ([rows, columns], Dtype::I64) = (view.shape(), view.dtype()) else {
        return Err(format!("{name} is {:?} {:?}, not a matrix of int64", view.dtype(), view.shape()));
    };
    let data = view.data().chunks_exact(8).filter_map(|b| b.try_into().ok()).map(i64::from_le_bytes).collect();
    IntMatrix::new(*rows, *columns, data).ok_or_else(|| format!("{name} is cut short"))
}

fn floats(name: &str, view: &TensorView<'_>) -> Result<Floats, String> {
    if view.dtype() != Dtype::F32 {
        return Err(format!("{name} is {:?}, not float32", view.dtype()));
    }
    let data = view.data().chunks_exact(4).filter_map(|b| b.try_into().ok()).map(f32::from_le_bytes).collect();
    Ok(Floats { shape: view.shape().to_vec(), data })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    type Part = (&'static str, Dtype, Vec<usize>, Vec<u8>);

    fn ints(name: &'static str, shape: [usize; 2], values: &[i64]) -> Part {
        (name, Dtype::I64, shape.to_vec(), values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    fn reals(name: &'static str, shape: [usize; 3], value: f32) -> Part {
        let count = shape.iter().product();
        (name, Dtype::F32, shape.to_vec(), std::iter::repeat_n(value.to_le_bytes(), count).flatten().collect())
    }

    fn parts() -> Vec<Part> {
        vec![
            ints("input_ids", [2, 2], &[0, 1, 2, 1]),
            ints("attention_mask", [2, 2], &[1, 1, 0, 1]),
            ints("position_ids", [2, 2], &[0, 1, 0, 0]),
            reals("logits", [2, 2, 3], 1.5),
            ints("greedy_ids", [1, 4], &[0, 1, 2, 2]),
            reals("greedy_logits", [1, 2, 3], 0.5),
            reals("hidden_states_0", [1, 2, 4], 0.25),
            reals("hidden_states_1", [1, 2, 4], 0.25),
        ]
    }

    fn file(parts: &[Part], eval_file: &str) -> Vec<u8> {
        let metadata = HashMap::from([
            ("eval_file".to_owned(), eval_file.to_owned()),
            ("eval_nll_per_token".to_owned(), "2.5".to_owned()),
        ]);
        let tensors: Vec<_> =
            parts.iter().map(|(n, d, s, b)| (*n, TensorView::new(*d, s.clone(), b).unwrap())).collect();
        safetensors::serialize(tensors, Some(metadata)).unwrap()
    }

    #[test]
    fn a_golden_is_read_with_its_metadata() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("golden.safetensors"), file(&parts(), "eval.txt")).unwrap();
        let golden = Golden::read(folder.path()).unwrap();
        assert_eq!(golden.input_ids.row(1), [2, 1]);
        assert_eq!((golden.vocabulary(), golden.hidden_states.len()), (3, 2));
        let evaluation = Evaluation { text: folder.path().join("eval.txt"), nll_per_token: 2.5, window: None };
        assert_eq!(golden.evaluation(), Some(evaluation));
        assert_eq!(Golden::read(&folder.path().join("none")).unwrap_err().code, Code::GoldenInvalid);
    }

    fn refused(parts: &[Part], eval_file: &str, words: &str) {
        let error = Golden::from_bytes("golden.safetensors".into(), &file(parts, eval_file)).unwrap_err();
        assert!(error.code == Code::GoldenInvalid && error.found.contains(words), "{words}: {error}");
    }

    #[test]
    fn tensors_that_are_missing_or_do_not_fit_are_refused_by_name() {
        for name in ["input_ids", "attention_mask", "position_ids", "logits"] {
            let rest: Vec<Part> = parts().into_iter().filter(|part| part.0 != name).collect();
            refused(&rest, "eval.txt", &format!("no tensor {name}"));
        }
        let not_a_number = reals("logits", [2, 2, 3], f32::NAN);
        for (part, words) in [
            (reals("logits", [2, 5, 3], 1.5), "logits is [2, 5, 3]"),
            (reals("logits", [2, 2, 0], 1.5), "logits is [2, 2, 0]"),
            (not_a_number, "logits holds a number that is not finite, at position 0"),
            (ints("input_ids", [2, 1], &[0, 1]), "input_ids is [2, 1]"),
            (ints("input_ids", [0, 2], &[]), "input_ids is [0, 2]"),
            (ints("input_ids", [2, 2], &[0, 1, 3, 1]), "input_ids holds 3"),
            (ints("input_ids", [2, 2], &[0, -1, 2, 1]), "input_ids holds -1"),
            (reals("input_ids", [1, 2, 2], 0.0), "input_ids is F32 [1, 2, 2], not a matrix of int64"),
            (ints("attention_mask", [2, 2], &[1, 1, 0, 2]), "attention_mask holds 2"),
            (ints("attention_mask", [1, 2], &[1, 1]), "attention_mask is [1, 2]"),
            (ints("position_ids", [2, 2], &[0, 1, 0, i64::MAX]), "position_ids holds 9223372036854775807"),
            (ints("greedy_ids", [1, 2], &[0, 1]), "do not continue the first row"),
            (ints("greedy_ids", [1, 4], &[1, 1, 2, 2]), "do not continue the first row"),
            (ints("greedy_ids", [1, 4], &[0, 1, 2, 3]), "greedy_ids holds 3"),
            (ints("greedy_ids", [2, 2], &[0, 1, 2, 2]), "greedy_ids has 2 rows"),
            (reals("greedy_logits", [1, 3, 3], 0.5), "greedy_logits is [1, 3, 3]"),
            (reals("greedy_logits", [1, 2, 3], f32::INFINITY), "greedy_logits holds a number"),
            (reals("hidden_states_1", [1, 3, 4], 0.5), "hidden_states_1 is [1, 3, 4]"),
            (reals("hidden_states_0", [1, 2, 4], f32::NAN), "hidden_states_0 holds a number"),
        ] {
            let parts: Vec<Part> =
                parts().into_iter().map(|old| if old.0 == part.0 { part.clone() } else { old }).collect();
            refused(&parts, "eval.txt", words);
        }
    }

    #[test]
    fn what_the_reference_computed_for_padding_does_not_matter() {
        let mut parts = parts();
        // Position 2 of all rows is the padding of the second one.
        let padding = parts[3].3.get_mut(6 * 4..9 * 4).unwrap();
        padding.copy_from_slice(&[f32::NAN.to_le_bytes(); 3].concat());
        assert!(Golden::from_bytes("golden.safetensors".into(), &file(&parts, "eval.txt")).is_ok());
    }

    #[test]
    fn files_that_are_none_and_texts_outside_are_refused() {
        for file in ["../eval.txt", "/etc/passwd", "a/../../b"] {
            refused(&parts(), file, "leads out");
        }
        let whole = file(&parts(), "eval.txt");
        for length in 0..whole.len() {
            let cut = Golden::from_bytes("golden.safetensors".into(), &whole[..length]);
            assert_eq!(cut.unwrap_err().code, Code::GoldenInvalid, "{length} bytes");
        }
    }
}
