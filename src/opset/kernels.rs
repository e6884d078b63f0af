//! Which operators an execution provider computes, by type: the tables `opsets/*-kernels.json`.
//!
//! A provider's kernels are fewer than the schemas allow. A node without one runs on the CPU, with copies of its
//! operands there and back, so a target that is for one provider writes only nodes that it has kernels for.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;

use super::{Parameter, Schema, Target, onnx_name, schema_for};
use crate::element::ElementType;

/// One kernel: a line of a table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kernel {
    /// Operator.
    name: String,
    /// Its domain, if not ONNX's.
    #[serde(default)]
    domain: String,
    /// First version of the operator that it computes.
    since: u32,
    /// The last one; without it, it computes only the version in which it began.
    until: Option<u32>,
    /// Types that the operator's type variables, or parameters without one, may have.
    types: BTreeMap<String, Vec<String>>,
}

/// The kernels of a provider.
#[derive(Debug, Clone)]
pub struct Kernels {
    by_operator: HashMap<(String, String), Vec<Kernel>>,
}

impl Kernels {
    /// Reads a table, one kernel a line.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut by_operator: HashMap<_, Vec<Kernel>> = HashMap::new();
        for line in text.lines() {
            let kernel: Kernel = serde_json::from_str(line).map_err(|error| format!("{error}: {line}"))?;
            by_operator.entry((kernel.domain.clone(), kernel.name.clone())).or_default().push(kernel);
        }
        Ok(Self { by_operator })
    }

    /// The operators that have any kernel: domain and name, sorted.
    pub fn operators(&self) -> Vec<(&str, &str)> {
        let mut all: Vec<_> = self.by_operator.keys().map(|(domain, name)| (domain.as_str(), name.as_str())).collect();
        all.sort_unstable();
        all
    }

    fn compute(&self, domain: &str, schema: &Schema, types: &HashMap<&str, ElementType>) -> bool {
        let kernels = self.by_operator.get(&(domain.to_owned(), schema.name.clone()));
        kernels.is_some_and(|kernels| kernels.iter().any(|kernel| kernel.computes(schema.since, types)))
    }
}

impl Kernel {
    fn computes(&self, version: u32, types: &HashMap<&str, ElementType>) -> bool {
        let fits = match self.until {
            None => self.since == version,
            Some(until) => (self.since..=until).contains(&version),
        };
        // A type that the node does not have constrains nothing.
        let takes = |(name, allowed): (&String, &Vec<String>)| {
            types.get(name.as_str()).is_none_or(|element| allowed.iter().any(|name| name == onnx_name(*element)))
        };
        fits && self.types.iter().all(takes)
    }
}

/// True if the target's provider has a kernel for a node; every target that names no provider has all of them.
/// `None` is an input or output that is left out.
pub fn runs(
    target: &Target,
    domain: &str,
    op_type: &str,
    inputs: &[Option<ElementType>],
    outputs: &[Option<ElementType>],
) -> bool {
    let Some(kernels) = &target.kernels else { return true };
    let Ok(schema) = schema_for(target, domain, op_type) else { return false };
    let mut types = HashMap::new();
    let mut bind = |parameters: &'static [Parameter], values: &[Option<ElementType>]| {
        for (at, element) in values.iter().enumerate() {
            let parameter = parameters.get(at).or(parameters.last());
            if let Some((parameter, element)) = parameter.zip(*element) {
                // Kernels name a type variable, or the parameter where there is none.
                types.entry(parameter.ty.as_str()).or_insert(element);
                types.entry(parameter.name.as_str()).or_insert(element);
            }
        }
    };
    bind(&schema.inputs, inputs);
    bind(&schema.outputs, outputs);
    kernels.compute(domain, schema, &types)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Result;
    use ElementType::{BF16, Bool, F8E4M3, F16, F32, I8, I32, I64, U8};

    /// Whether a node of these inputs and outputs has a kernel.
    fn on_cuda(domain: &str, op_type: &str, inputs: &[ElementType], output: ElementType) -> Result<bool> {
        let inputs: Vec<Option<ElementType>> = inputs.iter().copied().map(Some).collect();
        Ok(runs(Target::named("ort-cuda")?, domain, op_type, &inputs, &[Some(output)]))
    }

    #[test]
    fn kernels_are_found_by_type() -> Result<()> {
        for element in [F32, F16, BF16] {
            assert!(on_cuda("", "Add", &[element, element], element)?);
            assert!(on_cuda("com.microsoft", "RotaryEmbedding", &[element, I64, element, element], element)?);
        }
        assert!(on_cuda("", "Clip", &[F16], F16)? && !on_cuda("", "Clip", &[BF16], BF16)?);
        assert!(on_cuda("", "ArgMax", &[F32], I64)? && !on_cuda("", "ArgMax", &[I64], I64)?);
        let mixed = |x, weight, y| on_cuda("", "SimplifiedLayerNormalization", &[x, weight], y);
        assert!(mixed(F16, F32, F32)? && mixed(BF16, BF16, BF16)? && !mixed(BF16, F32, F32)?);
        assert!(on_cuda("com.microsoft", "MatMulNBits", &[BF16, U8, BF16, U8], BF16)?);
        assert!(on_cuda("", "Where", &[Bool, BF16, BF16], BF16)? && !on_cuda("", "Where", &[Bool, Bool, Bool], Bool)?);
        Ok(())
    }

    #[test]
    fn the_fused_attention_has_no_float32() -> Result<()> {
        let attention =
            |x, cache| on_cuda("com.microsoft", "GroupQueryAttention", &[x, x, x, cache, cache, I32, I32], x);
        assert!(attention(F16, F16)? && attention(BF16, BF16)? && !attention(F32, F32)?);
        for cache in [I8, F8E4M3] {
            assert!(attention(F16, cache)? && attention(BF16, cache)? && !attention(F32, cache)?, "{cache}");
        }
        assert!(!attention(F16, BF16)?);
        Ok(())
    }

    /// An open-ended kernel computes the version in which it began, as onnxruntime has it.
    #[test]
    fn a_kernel_without_an_end_is_of_one_version() {
        let kernels = Kernels::parse(r#"{"name":"Add","since":14,"types":{"T":["float"]}}"#).unwrap();
        let kernel = &kernels.by_operator[&(String::new(), "Add".to_owned())][0];
        let types = HashMap::from([("T", F32)]);
        assert!(kernel.computes(14, &types) && !kernel.computes(13, &types) && !kernel.computes(15, &types));
        let ending = Kernel { until: Some(16), ..kernel.clone() };
        assert!(ending.computes(15, &types) && !ending.computes(17, &types));
    }

    #[test]
    fn a_target_without_a_provider_runs_everything() -> Result<()> {
        let target = Target::named("primitive")?;
        assert!(runs(target, "", "Clip", &[Some(BF16)], &[Some(BF16)]));
        let operators = Target::named("ort-cuda")?.kernels.as_ref().map(Kernels::operators).unwrap_or_default();
        assert!(operators.contains(&("com.microsoft", "QMoE")) && operators.contains(&("", "Softmax")));
        Ok(())
    }
}
