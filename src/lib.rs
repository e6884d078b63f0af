//! `hf2onnx` compiles a Hugging Face model repository (config.json, safetensors, tokenizer) into an ONNX model
//! directory that onnxruntime deployments load unmodified, and checks what it built by running it.
//!
//! It does not trace `PyTorch` and runs no code from the repository. A **template** says what the architecture is,
//! **builders** write its graph, the weights are bound as initializers, and onnxruntime's result is compared with
//! reference logits.
//!
//! # The pipeline
//!
//! Modules in the order of reading; [`compile::compile`] and [`compile::write`] call them one after the other.
//!
//! ```text
//! hub       org/name -> a snapshot in the Hugging Face cache, downloaded if need be
//! read      repository -> config.json, safetensors shards (never loaded whole), quantised weights as floats
//! describe  template + config -> ModelSpec, tensor rules, accounting of every key
//! spec      THE WAIST: what the model is, layer by layer, plain typed data
//! build     ModelSpec -> graph of composite operations, and the parameters that each one needs
//! lower     composite operations -> operators that the target's opset has
//! bind      parameter <- tensors and a closed list of transforms: a plan, checked and printable
//! write     protobuf, external data, the files that consumers expect; all of it or nothing
//! verify    onnxruntime runs it, golden logits judge it
//! ```
//!
//! Beside the pipeline: [`graph`] is the form of both graphs and their symbolic shapes, [`weight`] the language of
//! transforms, [`chat`] special tokens and chat templates, `jinja` the language of the latter with Python's values,
//! [`quantize`] the arithmetic that turns matrices into small integers, [`recipe`] which matrices, [`calibrate`] what it is
//! told of their inputs and of caches, [`encoding`] how quantised checkpoints store theirs, [`opset`] the operators and targets as data, [`onnx`] the file format's messages; [`runtime`] finds onnxruntime, and
//! for a GPU CUDA's libraries, [`session`] runs a built directory on either and tells where its nodes run, [`generate`]
//! continues text with it, [`bench`] measures it, [`quant_report`] compares ways to quantise, [`diff`] compares two
//! directories, [`synth`] makes random checkpoints of a model's shapes, [`interrupt`] hears Ctrl-C, [`patterns`] are the
//! names that a user lets pass, `regular` opens files that others wrote, [`cli`] is the program.
//!
//! # Invariants
//!
//! **A template chooses, names and computes scalars.** It never wires nodes and never names an ONNX operator. If it
//! can not say something, a builder is missing.
//!
//! **Builders see [`spec::ModelSpec`] and nothing else**: no configuration, no tensor names, no files, no target.
//!
//! **Only [`lower`] and `opsets/` know targets**, and nothing asks which target it is: a target lists the forms of each
//! composite operation, best first, and a form that can not express a case says why. A target for one execution provider
//! lists its kernels as well, and what has none takes another form. Builders write what is meant, so nothing is ever
//! pattern-matched back.
//!
//! **Only downloading, reading, writing and verifying do I/O**, and binding asks the checkpoint for the values of the few
//! tensors on which the graph hangs: a head that is to be tied, buffers that a template leaves out. Everything between is
//! pure: the same input gives the same bytes.
//!
//! **Nothing from a repository is executed.** `auto_map` is reported, never imported; no pickle is read.
//!
//! **Nothing is ignored silently.** Every key of config.json is used, or listed as without effect, or an error. Every
//! tensor is bound, or dropped by a named rule, or an error. Every parameter is bound exactly once.
//!
//! **No panic on any input.** What comes from a file is never unwrapped, indexed or cast blindly.
//! minijinja and tokenizers are libraries that panic on a few files: what they make of one runs guarded, and a panic is an
//! error. What expressions and chat templates may ask for is bounded in time and memory; `tests/fuzz` has the fuzz targets.
//!
//! **An output directory appears whole or not at all.**
//!
//! # Where to start
//!
//! `graph_templates/llama.toml` beside [`spec`] shows what a model is made of; [`build`] how it becomes a graph;
//! `lower/attention.rs` how one composite operation becomes three different ones. The errors are one type,
//! [`error::Error`]: code, subject, found, expected, help.

pub mod bench;
pub mod bind;
pub mod build;
pub mod calibrate;
pub mod chat;
pub mod cli;
pub mod compile;
pub mod describe;
pub mod diff;
pub mod element;
pub mod encoding;
pub mod error;
pub mod generate;
pub mod golden;
pub mod graph;
mod guard;
pub mod hub;
pub mod inspect;
pub mod interrupt;
mod jinja;
pub mod lower;
pub mod onnx;
pub mod opset;
pub mod patterns;
pub mod quant_report;
pub mod quantize;
pub mod read;
pub mod recipe;
mod regular;
pub mod runtime;
pub mod scaffold;
pub mod session;
pub mod spec;
mod stage;
pub mod synth;
pub mod tokenizer;
#[cfg(test)]
mod toy;
pub mod verify;
pub mod weight;
pub mod write;
