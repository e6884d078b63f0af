//! The options of `hf2onnx build` that quantise.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::calibrate::{self, Text};
use crate::compile::KvCache;
use crate::element::CacheType;
use crate::error::{Code, Error, Result};
use crate::quantize;
use crate::recipe::{Changes, Recipe};

/// How matrices are quantised.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Quantisation")]
pub(super) struct QuantizationOptions {
    /// Quantise matrices: int8, int4, int2, or a preset: q4 (small and fast), q4-mixed (the head in 8 bits). Without it,
    /// a quantised checkpoint keeps its integers where the target reads them (stored); float decodes them all
    #[arg(long, value_name = "SCHEME")]
    quant: Option<String>,
    /// Another scheme for some matrices, the last match wins: `lm_head=int8`, `layers.{0,-1}.*=int8`, `*.down_proj=float`
    #[arg(long, value_name = "PATTERN=SCHEME", requires = "quant")]
    quant_rule: Vec<String>,
    /// Weights that share a scale: 16, 32, 64, 128 or 256 of a row [default: the scheme's]
    #[arg(long, value_name = "N", requires = "quant")]
    block_size: Option<usize>,
    /// Without zero points, or with them [default: the scheme's]
    #[arg(long, value_enum, requires = "quant")]
    zero_points: Option<ZeroPoints>,
    /// How scales are found [default: search, and nearest for 8 bits]
    #[arg(long, value_enum, requires = "quant")]
    quant_algorithm: Option<Algorithm>,
    /// Type of the scales
    #[arg(long, value_enum, requires = "quant")]
    quant_scales: Option<Scales>,
    /// How products are computed: 0 open, 1 float32, 4 with 8-bit activations, the fastest on CPUs [default: 4]
    #[arg(long, value_name = "LEVEL")]
    accuracy_level: Option<i64>,
    /// Weigh errors by what a matrix is multiplied with while the model reads this text, and measure the scales of a
    /// cache in 8 bits
    #[arg(long, value_name = "FILE")]
    calibrate: Option<PathBuf>,
    /// Tokens of that text to read at most
    #[arg(long, value_name = "N", requires = "calibrate", default_value_t = calibrate::TOKENS)]
    calibrate_tokens: usize,
    /// What caches of keys and values are held in
    #[arg(long, value_enum, default_value_t = CacheOption::Float)]
    kv_cache: CacheOption,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CacheOption {
    /// What is computed in
    Float,
    /// int8, a quarter of float32, with a scale for each channel that --calibrate measures; ort-cpu and ort-cuda
    Int8,
    /// float8e4m3fn, as many bytes with scales of the same kind; ort-cuda
    Fp8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ZeroPoints {
    /// Symmetric: none are stored
    No,
    /// Asymmetric: one for each block
    Yes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Algorithm {
    /// The largest magnitude of a block decides
    Nearest,
    /// The scale of the least squared error
    Search,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scales {
    /// float32
    F32,
    /// float16: a smaller file; kernels that want float32 get it when the model loads
    F16,
}

impl QuantizationOptions {
    /// The text to calibrate on, if there is one.
    pub(super) fn text(&self) -> Option<Text<'_>> {
        self.calibrate.as_deref().map(|path| Text { path, tokens: self.calibrate_tokens })
    }

    /// What caches are held in; scales are still to be measured.
    pub(super) fn cache(&self) -> Result<KvCache> {
        let error = |flag: &str| Error::new(Code::UsageInvalid, flag);
        match (self.kv_cache, &self.calibrate, &self.quant) {
            (CacheOption::Float, Some(_), None) => Err(error("--calibrate")
                .found("neither --quant nor --kv-cache int8 or fp8 beside it")
                .expected("something that is quantised by what the text shows")
                .help("name a scheme: --quant SCHEME")),
            (CacheOption::Float, ..) => Ok(KvCache::Float),
            (CacheOption::Int8, ..) => Ok(KvCache::Quantized(CacheType::Int8, None)),
            (CacheOption::Fp8, ..) => Ok(KvCache::Quantized(CacheType::Fp8, None)),
        }
    }

    /// The recipe, if one was asked for.
    pub(super) fn recipe(&self) -> Result<Option<Recipe>> {
        let changes = Changes {
            block_size: self.block_size,
            symmetric: self.zero_points.map(|zero_points| zero_points == ZeroPoints::No),
            algorithm: self.quant_algorithm.map(|algorithm| match algorithm {
                Algorithm::Nearest => quantize::Algorithm::Nearest,
                Algorithm::Search => quantize::Algorithm::Search,
            }),
            scales: self.quant_scales.map(|scales| match scales {
                Scales::F32 => quantize::ScaleType::Float32,
                Scales::F16 => quantize::ScaleType::Float16,
            }),
            accuracy_level: self.accuracy_level,
            rules: self.quant_rule.clone(),
        };
        let stored = self.accuracy_level.map(|_| "stored");
        self.quant.as_deref().or(stored).map(|name| Recipe::new(name, &changes)).transpose()
    }
}
