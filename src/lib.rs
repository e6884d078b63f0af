//! hf2onnx

pub mod build;
pub mod element;
pub mod error;
pub mod graph;
pub mod onnx;
pub mod spec;
pub mod weight;
