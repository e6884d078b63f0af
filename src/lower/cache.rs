//! Caches of keys and values in 8 bits: integers, or floats.

use std::collections::BTreeMap;

use super::{Lowerer, Operator};
use crate::build::{AttentionOp, is_cache};
use crate::element::{CacheType, ElementType};
use crate::error::{Code, Error, Result};
use crate::graph::ValueId;
use crate::opset::Target;

/// What caches of keys and values are held in.
#[derive(Debug, Clone, Copy, Default)]
pub enum Cache<'s> {
    /// In what is computed in.
    #[default]
    Float,
    /// In 8 bits, with these scales. Without any the graph is whole but for its numbers, which are ones: what can not
    /// be lowered shows before anything is measured.
    Quantized(CacheType, Option<&'s CacheScales>),
}

/// What one step of a cache's codes stands for: a number for each element of each head, `[K * D]`, by the names of
/// the cache inputs. They are constants of the graph, because the operator quantises what it adds to a cache.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CacheScales(BTreeMap<String, Vec<f32>>);

impl CacheScales {
    /// Scales by the names of cache inputs.
    pub fn new(scales: BTreeMap<String, Vec<f32>>) -> Self {
        Self(scales)
    }

    /// A cache input's scales.
    pub fn get(&self, input: &str) -> Option<&[f32]> {
        self.0.get(input).map(Vec::as_slice)
    }
}

impl Lowerer<'_> {
    /// The element type of an input of the model.
    pub(super) fn input_element(&self, name: &str, own: ElementType) -> ElementType {
        match self.options.cache {
            Cache::Quantized(kind, _) if is_cache(name) => kind.element(),
            _ => own,
        }
    }

    /// The element type of caches.
    pub(super) fn cached(&self) -> ElementType {
        match self.options.cache {
            Cache::Quantized(kind, _) => kind.element(),
            Cache::Float => self.compute(),
        }
    }

    /// What `GroupQueryAttention` is told of an 8-bit cache: attributes, and the scales of keys and values.
    pub(super) fn quantized_cache(
        &mut self,
        op: &AttentionOp,
        call: Operator,
        pasts: [Option<ValueId>; 2],
    ) -> Result<(Operator, Option<[ValueId; 2]>)> {
        let (Cache::Quantized(_, scales), [Some(key), Some(value)]) = (self.options.cache, pasts) else {
            return Ok((call, None));
        };
        let call = call
            .string("k_quant_type", "PER_CHANNEL")
            .string("v_quant_type", "PER_CHANNEL")
            .int("kv_cache_bit_width", 8);
        let mut values = [key, value];
        for (value, size) in values.iter_mut().zip([op.key_size, op.value_size]) {
            let name = self.e.graph.value(*value).name.clone();
            let width = op.kv_heads * size;
            *value = match scales.map(|scales| scales.get(&name)) {
                None => self.e.filled(ElementType::F32, width, 1.0),
                Some(Some(scales)) if scales.len() == width => self.e.floats(scales),
                Some(found) => {
                    return Err(Error::new(Code::SpecInvalid, name)
                        .found(format!("{} scales", found.map_or(0, <[f32]>::len)))
                        .expected(format!("{width}, one for each element of each head"))
                        .help("measure them on this model"));
                }
            };
        }
        Ok((call, Some(values)))
    }
}

/// Why a target keeps no such cache for any attention with heads of this size; nothing if it does.
pub(super) fn no_cache(target: &Target, kind: CacheType, head: usize) -> Option<String> {
    if !target.kv_caches.contains(&kind) {
        let names: Vec<&str> = target.kv_caches.iter().map(|kind| kind.as_str()).collect();
        let has = if names.is_empty() {
            "float ones only".to_owned()
        } else {
            format!("float ones and {}", names.join(", "))
        };
        return Some(format!("target {}, which has {has}", target.name));
    }
    let largest = target.limits("GroupQueryAttention").quantized_head;
    (head > largest).then(|| format!("heads of {head}, and its kernels keep such a cache for at most {largest}"))
}

/// The error where an attention's cache can not be in 8 bits.
pub(super) fn refused(kind: CacheType, reason: &str) -> Error {
    let whose = match kind {
        CacheType::Int8 => "in float32 on --target ort-cpu, or --dtype f16 or bf16 on --target ort-cuda",
        CacheType::Fp8 => "--dtype f16 or bf16 on --target ort-cuda",
    };
    Error::new(Code::UsageInvalid, format!("--kv-cache {kind}"))
        .found(reason)
        .expected(format!("attention that GroupQueryAttention computes, in every layer: {whose}"))
        .help("leave --kv-cache away: the cache is then float")
}
