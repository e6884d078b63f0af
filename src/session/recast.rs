//! Tensors of float8. This side of onnxruntime has no numbers for them, so it reads and writes them as another type:
//! float16 holds each of them exactly.

use ort::session::Session;
use ort::value::DynTensor;
use prost::Message as _;

use super::Options;
use super::open::{builder, environment};
use super::row::memory;
use crate::element::ElementType;
use crate::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TypeProto, TypeProtoTensor, ValueInfoProto,
};
use crate::runtime::Provider;

/// A session that casts tensors of one type to another, which lie on this side or where a provider computes.
#[derive(Debug)]
pub(super) struct Recast {
    session: Session,
}

impl Recast {
    /// From one type to another, by a provider on a device of that number.
    pub(super) fn new(from: ElementType, to: ElementType, (provider, device): (Provider, i32)) -> ort::Result<Self> {
        let provider_options = match provider {
            Provider::Cpu => Vec::new(),
            Provider::Cuda => vec![("device_id".to_owned(), device.to_string())],
        };
        let options = Options { threads: 1, provider, provider_options, ..Options::default() };
        let environment = environment().map_err(|e| ort::Error::new(e.to_string()))?;
        let session = builder(environment, &options, None)?.commit_from_memory(&model(from, to).encode_to_vec())?;
        Ok(Self { session })
    }

    /// The cast tensor in this side's memory.
    pub(super) fn read(&mut self, value: &DynTensor) -> ort::Result<DynTensor> {
        let mut binding = self.session.create_binding()?;
        binding.bind_input("x", value)?;
        binding.bind_output_to_device("y", &memory(Provider::Cpu, 0)?)?;
        let result = self.session.run_binding(&binding)?.remove("y");
        result.ok_or_else(|| ort::Error::new("the cast returned nothing"))?.downcast()
    }

    /// Casts into a tensor of as many elements.
    pub(super) fn write(&mut self, value: &DynTensor, into: &mut DynTensor) -> ort::Result<()> {
        let mut binding = self.session.create_binding()?;
        binding.bind_input("x", value)?;
        binding.bind_output("y", into)?;
        self.session.run_binding(&binding).map(drop)
    }
}

fn model(from: ElementType, to: ElementType) -> ModelProto {
    let value = |name: &str, element: ElementType| {
        let tensor = TypeProtoTensor { elem_type: element.onnx(), shape: None };
        ValueInfoProto { name: name.into(), r#type: Some(TypeProto { tensor_type: Some(tensor) }) }
    };
    let attribute = AttributeProto { name: "to".into(), i: to.onnx().into(), r#type: 2, ..Default::default() };
    let node = NodeProto {
        op_type: "Cast".into(),
        input: vec!["x".into()],
        output: vec!["y".into()],
        attribute: vec![attribute],
        ..Default::default()
    };
    let graph = GraphProto {
        node: vec![node],
        name: "cast".into(),
        input: vec![value("x", from)],
        output: vec![value("y", to)],
        ..Default::default()
    };
    // The first versions that have these types.
    let opset = OperatorSetIdProto { domain: String::new(), version: 19 };
    ModelProto { ir_version: 9, opset_import: vec![opset], graph: Some(graph), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use ort::memory::Allocator;
    use ort::value::Tensor;

    use super::super::row::move_over_float8;
    use super::super::value::element_type;
    use super::super::{Dim, StateSlot};
    use super::*;
    use crate::runtime::{Search, ensure};

    const HERE: (Provider, i32) = (Provider::Cpu, 0);

    fn floats(shape: [usize; 4], values: &[f32]) -> DynTensor {
        let values: Vec<f16> = values.iter().map(|x| f16::from_f32(*x)).collect();
        Tensor::from_array((shape, values)).unwrap().upcast()
    }

    fn float8(shape: [usize; 4], values: &[f32]) -> DynTensor {
        let mut tensor = DynTensor::new(&Allocator::default(), element_type(ElementType::F8E4M3), shape).unwrap();
        let mut cast = Recast::new(ElementType::F16, ElementType::F8E4M3, HERE).unwrap();
        cast.write(&floats(shape, values), &mut tensor).unwrap();
        tensor
    }

    fn read(tensor: &DynTensor) -> Vec<f32> {
        let halves = Recast::new(ElementType::F8E4M3, ElementType::F16, HERE).unwrap().read(tensor).unwrap();
        halves.try_extract_tensor::<f16>().unwrap().1.iter().map(|x| x.to_f32()).collect()
    }

    #[test]
    fn every_float8_comes_back() {
        ensure(&Search::default(), &mut |_| {}).unwrap();
        // Sign, four bits of exponent with a bias of 7, three of fraction; without the two that are no numbers.
        let values: Vec<f32> = (0..=0x7e_u8)
            .map(|code| {
                let (exponent, fraction) = (i32::from(code >> 3), f32::from(code & 7) / 8.0);
                if exponent == 0 { fraction * 2.0_f32.powi(-6) } else { (1.0 + fraction) * 2.0_f32.powi(exponent - 7) }
            })
            .flat_map(|value| [value, -value])
            .collect();
        assert!(values.contains(&448.0) && values.len() == 254);
        assert_eq!(read(&float8([1, 1, 2, values.len() / 2], &values)), values);
    }

    #[test]
    fn a_cache_in_float8_moves_into_a_longer_buffer() {
        ensure(&Search::default(), &mut |_| {}).unwrap();
        let shape = vec![Dim::Batch, Dim::Fixed(2), Dim::Length, Dim::Fixed(2)];
        let slot = StateSlot { past: "past".into(), present: "present".into(), element: ElementType::F8E4M3, shape };
        // One row, two heads, two places of which one is filled, two elements.
        let old = float8([1, 2, 2, 2], &[1.0, -2.0, 9.0, 9.0, 448.0, 0.5, 9.0, 9.0]);
        let mut new = float8([1, 2, 3, 2], &[7.0; 12]);
        move_over_float8(&slot, &old, &mut new, 1, [2, 3, 1], HERE).unwrap();
        assert_eq!(read(&new), [1.0, -2.0, 0.0, 0.0, 0.0, 0.0, 448.0, 0.5, 0.0, 0.0, 0.0, 0.0]);
        // A state begins as zeros.
        let zeros = super::super::value::zeros(ElementType::F8E4M3, vec![1, 2, 3, 2]).unwrap();
        assert_eq!(read(&zeros.downcast().unwrap()), [0.0; 12]);
    }
}
