//! Mechanisms of a few models only.

use serde::{Deserialize, Serialize};

use super::{Activation, Moe, Norm, RopeLayout};

/// Per-layer embeddings (Gemma 3n): `(norm(projection(x) · projection_scale) + table[id] · token_scale) · scale`, from
/// which each layer adds `output_norm(up(act(gate(x)) · part))`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PerLayer {
    /// Rows of the table; ids beyond it read row 0.
    pub rows: usize,
    /// Width of a layer's part.
    pub size: usize,
    /// Multiplier of the table's rows.
    pub token_scale: f64,
    /// Multiplier of the projected embedding.
    pub projection_scale: f64,
    /// Multiplier of the sum.
    pub scale: f64,
    /// Norm on the projected embedding, part by part.
    pub norm: Norm,
    /// Non-linearity of a layer's gate.
    pub activation: Activation,
    /// Norm on what a layer adds.
    pub output_norm: Norm,
}

/// Alternating updates (Baykal et al. 2023, as `Gemma3nTextAltUp`): a layer predicts all streams, computes the active
/// one, and corrects the others by how far it was off.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AltUp {
    /// Streams.
    pub inputs: usize,
    /// The stream that layers compute.
    pub active: usize,
    /// The corrected stream is scaled before the per-layer embedding reads it.
    pub correct_scale: bool,
    /// Norm on what chooses the coefficients.
    pub norm: Norm,
}

/// Names of a layer's modules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Modules {
    /// Index below `layers`.
    pub layer: usize,
    /// Name of the attention.
    pub attention: String,
    /// Name of the feed-forward part.
    pub feed_forward: String,
}

/// Learned augmented residual (Gemma 3n): `(x + attention + y + norm(right(left(y)))) / √2` with `y` what attention reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Laurel {
    /// Width between the two projections.
    pub rank: usize,
    /// Norm on their result.
    pub norm: Norm,
}

/// Experts beside a dense MLP (Gemma 4): both read the residual, each through norms of its own, and are added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoeBranch {
    /// The experts; their router reads the residual itself.
    pub moe: Moe,
    /// On the dense part's output.
    pub dense_norm: Norm,
    /// On the experts' input.
    pub input_norm: Norm,
    /// On the experts' output.
    pub output_norm: Norm,
}

/// Differential attention (Ye et al. 2024, as `DiffLlamaAttention`): `norm(A₁ − λ A₂) · (1 − lambda_init)` with
/// `λ = exp(λq₁·λk₁) − exp(λq₂·λk₂) + lambda_init`. A value head is a pair of heads, `value_size = 2 · key_size`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Differential {
    /// Where λ starts.
    pub lambda_init: f64,
    /// `eps` of the norm on each pair of heads.
    pub eps: f64,
}

/// Mixture of attention heads (`JetMoe`): `top_k` experts make a token's queries, `kv_heads` heads each, and
/// project their output, weighted by the softmax of their logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mixture {
    /// Number of experts.
    pub experts: usize,
    /// Experts of a token.
    pub top_k: usize,
}

/// Which keys a query sees (`DeepSeek` sparse attention).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Indexer {
    /// Those with the largest `Σ_h w_h · relu(q_h · k · size^-1/2) · heads^-1/2`.
    Own {
        /// Query heads of the indexer; all read one key.
        heads: usize,
        /// Size of a head.
        size: usize,
        /// Keys that stay.
        top_k: usize,
        /// Pairs of its rotation, which turns the start of each head.
        layout: RopeLayout,
    },
    /// Those that the nearest indexer before this layer chose.
    Previous,
}

/// Attention with linear biases.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alibi {
    /// Exponent range of the slopes, `2^(-max · h / heads)`.
    pub max: f64,
    /// Multiplier of the bias.
    pub scale: f64,
    /// The biases are rounded to bfloat16, as Falcon does.
    pub rounded: bool,
}

/// Queries are multiplied by `1 + coefficient · ln(1 + floor((position + offset) / period))`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PositionScale {
    /// Growth.
    pub coefficient: f64,
    /// Positions to a step.
    pub period: f64,
    /// Added to the position.
    pub offset: f64,
    /// Padding counts, wherever it stands: transformers counts places in a left-padded batch (`Llama4TextAttention`).
    #[serde(default)]
    pub padded: bool,
}

/// A gate on the output of attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputGate {
    /// Name of the projection, below `self_attn`.
    pub name: String,
    /// One gate for each head instead of one for each element.
    pub per_head: bool,
    /// The projection adds a bias.
    #[serde(default)]
    pub bias: bool,
}

/// Absolute positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Positions {
    /// A learned table, `embed_positions`.
    Learned {
        /// Rows of the table.
        rows: usize,
        /// Row of position 0.
        offset: usize,
    },
    /// Sines, then cosines, of frequencies from 1 down to 1/10000 (Vaswani et al. 2017, as fairseq orders them).
    Sinusoidal {
        /// Added to a position.
        offset: usize,
    },
}
