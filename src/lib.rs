//! hf2onnx

pub mod bind;
pub mod build;
pub mod cli;
pub mod compile;
pub mod describe;
pub mod element;
pub mod error;
pub mod generate;
pub mod golden;
pub mod graph;
pub mod inspect;
pub mod lower;
pub mod onnx;
pub mod opset;
pub mod read;
pub mod runtime;
pub mod scaffold;
pub mod session;
pub mod spec;
pub mod tokenizer;
#[cfg(test)]
mod toy;
pub mod verify;
pub mod weight;
pub mod write;
