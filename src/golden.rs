//! A golden: what the reference computed for a model, in a safetensors file.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::{Code, Error, Result};
use crate::session::{Floats, IntMatrix};

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
        let bytes = fs::read(&path).map_err(|e| {
            Error::new(Code::GoldenInvalid, path.display())
                .found(e)
                .expected("a golden, as golden/record.py records it")
                .help("check the path, or record one")
        })?;
        let invalid = |found: String| {
            Error::new(Code::GoldenInvalid, path.display())
                .found(found)
                .expected("a golden, as golden/record.py records it")
                .help("record it again")
        };
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| invalid(e.to_string()))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| invalid(e.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if let Some(kind) = metadata.get("kind").filter(|k| *k != "decoder") {
            return Err(invalid(format!("a golden of kind `{kind}`, not of a decoder")));
        }
        let golden = Self::from_tensors(path.clone(), &tensors, metadata).map_err(invalid)?;
        golden.check().map_err(|found| Error::new(Code::GoldenInvalid, golden.path.display()).found(found))?;
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
            greedy_ids: greedy.map(|m| m.row(0).to_vec()),
            greedy_logits: optional("greedy_logits")?,
            hidden_states,
            logits_steps: optional("logits_steps")?,
            logits_chunks: optional("logits_chunks")?,
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
        }
        Ok(())
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

    fn write(folder: &Path, columns: usize) -> PathBuf {
        let ids: Vec<u8> = (0..4_i64).flat_map(i64::to_le_bytes).collect();
        let logits: Vec<u8> = (0..2 * columns * 3).flat_map(|_| 1.5_f32.to_le_bytes()).collect();
        let matrix = || TensorView::new(Dtype::I64, vec![2, 2], &ids).unwrap();
        let logits = TensorView::new(Dtype::F32, vec![2, columns, 3], &logits).unwrap();
        let tensors =
            [("input_ids", matrix()), ("attention_mask", matrix()), ("position_ids", matrix()), ("logits", logits)];
        let metadata = HashMap::from([
            ("eval_file".to_owned(), "eval.txt".to_owned()),
            ("eval_nll_per_token".to_owned(), "2.5".to_owned()),
        ]);
        let path = folder.join("golden.safetensors");
        fs::write(&path, safetensors::serialize(tensors, Some(metadata)).unwrap()).unwrap();
        path
    }

    #[test]
    fn a_golden_is_read_with_its_metadata() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 2);
        let golden = Golden::read(folder.path()).unwrap();
        assert_eq!(golden.input_ids.row(1), [2, 3]);
        assert_eq!((golden.vocabulary(), golden.hidden_states.len()), (3, 0));
        let evaluation = Evaluation { text: folder.path().join("eval.txt"), nll_per_token: 2.5, window: None };
        assert_eq!(golden.evaluation(), Some(evaluation));
    }

    #[test]
    fn tensors_that_do_not_fit_and_files_that_are_none_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = write(folder.path(), 5);
        assert!(Golden::read(&path).unwrap_err().found.contains("logits is [2, 5, 3]"));
        fs::write(&path, b"short").unwrap();
        assert_eq!(Golden::read(&path).unwrap_err().code, Code::GoldenInvalid);
        assert_eq!(Golden::read(&folder.path().join("none")).unwrap_err().code, Code::GoldenInvalid);
    }
}
