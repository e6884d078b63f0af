//! The waist of the compiler: what a model is, fully resolved, layer by layer, as plain typed data.
//!
//! Templates and configurations end here and builders start here. Every field changes the computation;
//! the knob test perturbs each of them and requires the logits to move.

use serde::{Deserialize, Serialize};

mod particular;
pub use particular::{
    Alibi, AltUp, Differential, Indexer, Laurel, Mixture, Modules, MoeBranch, OutputGate, PerLayer, PositionScale,
    Positions,
};

/// A decoder, ready to be built.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// `model_type` of the configuration.
    pub model_type: String,
    /// Name of the template that described it.
    pub template: String,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Longest sequence that the model was made for.
    pub context_length: usize,
    /// From token ids to hidden states.
    pub embedding: Embedding,
    /// The decoder layers, in order.
    pub layers: Vec<Layer>,
    /// The norm before the head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub final_norm: Option<Norm>,
    /// From hidden states to logits.
    pub head: Head,
    /// A second embedding, of which every layer reads its own part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_layer: Option<PerLayer>,
    /// Several residual streams, of which a layer computes on one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub altup: Option<AltUp>,
}

/// Token embedding.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Embedding {
    /// Multiplier of the embedded tokens, rounded to the computation's element type as transformers does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Width of the table where it is not the model's; a projection leads from one to the other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<usize>,
    /// Absolute positions that are added to the tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub positions: Option<Positions>,
    /// A norm behind all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm: Option<Norm>,
}

/// Output projection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// The embedding matrix is the head's.
    pub tied: bool,
    /// The head adds a bias.
    #[serde(default)]
    pub bias: bool,
    /// Multiplier of the logits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// `tanh(logits / softcap) * softcap`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub softcap: Option<f64>,
    /// What the hidden states pass before the projection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transform: Option<HeadTransform>,
}

/// `norm(act(dense(x)))` before the output projection, the head of masked language models (Devlin et al. 2018).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadTransform {
    /// Non-linearity.
    pub activation: Activation,
    /// `dense` adds a bias.
    pub bias: bool,
    /// The norm behind them.
    pub norm: Norm,
}

/// One decoder layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Token mixing.
    pub attention: Attention,
    /// Channel mixing.
    pub feed_forward: FeedForward,
    /// Where the layer normalises.
    pub norms: LayerNorms,
    /// Both parts read the layer's input and are added to it together. Without a norm of its own the feed-forward
    /// part reads what attention reads.
    pub parallel: bool,
    /// Multiplier of each part before it is added to the residual.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual_scale: Option<f64>,
    /// The layer's result is multiplied by a learned scalar, `layer_scalar`.
    #[serde(default)]
    pub scalar: bool,
    /// Each part is added to its normalised input instead of to what was normalised, as Megatron's
    /// `apply_residual_connection_post_layernorm` has it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub normed_residual: bool,
    /// A low-rank path beside attention.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub laurel: Option<Laurel>,
    /// Experts beside the dense feed-forward part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<Box<MoeBranch>>,
    /// Experts that read what the feed-forward part reads and are added behind the next layer (`LongCat`'s shortcut).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shortcut: Option<Box<Moe>>,
    /// Where the checkpoint holds the layer, if not at its own index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<Modules>,
}

/// The norms of a layer, by the place where they stand; an absent one is no norm there.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerNorms {
    /// On the input of attention.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_input: Option<Norm>,
    /// On the output of attention, before it is added to the residual.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_output: Option<Norm>,
    /// On the residual after attention was added: the layout of the first transformers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_sum: Option<Norm>,
    /// On the input of the feed-forward part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feed_forward_input: Option<Norm>,
    /// On the output of the feed-forward part, before it is added to the residual.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feed_forward_output: Option<Norm>,
    /// On the residual after the feed-forward part was added.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feed_forward_sum: Option<Norm>,
}

/// A normalisation over the last axis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Norm {
    /// Name of the module that holds the weight, below its layer or the model.
    pub name: String,
    /// The formula.
    pub kind: NormKind,
    /// Added to the mean square (or variance) before the root.
    pub eps: f64,
    /// It has a weight.
    pub weight: bool,
    /// It has a bias.
    pub bias: bool,
    /// The weight is stored as its difference from one, as in Gemma.
    pub offset: bool,
}

/// Formulas of normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) * weight` (Zhang & Sennrich 2019).
    Rms,
    /// `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` (Ba et al. 2016).
    Layer,
}

/// Causal self-attention with a key-value cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Size of a query or key head.
    pub key_size: usize,
    /// Size of a value head.
    pub value_size: usize,
    /// How queries, keys and values come from the hidden states.
    pub projection: Projection,
    /// The output projection adds a bias.
    pub output_bias: bool,
    /// Multiplier of the query-key products.
    pub scale: f64,
    /// A query sees this many keys at most, itself included.
    pub window: Option<usize>,
    /// A query sees only keys of its own block of this many positions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunk: Option<usize>,
    /// Rotary position embedding; none for layers without positions.
    pub rope: Option<Rope>,
    /// Scores become `tanh(score / softcap) * softcap` before the mask.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub softcap: Option<f64>,
    /// Queries, keys and values are clamped to plus and minus this, behind norms that precede the rotation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// Norms on queries and keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qk_norm: Option<QkNorm>,
    /// A norm on each value head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value_norm: Option<Norm>,
    /// Multiplier of the values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value_scale: Option<f64>,
    /// A learned score per head, `sinks`, that takes part in the softmax and has no value.
    #[serde(default)]
    pub sinks: bool,
    /// Scores fall linearly with distance (Press et al. 2021).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alibi: Option<Alibi>,
    /// Queries grow with their position.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position_scale: Option<PositionScale>,
    /// The output is multiplied by a sigmoid of a projection of the input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_gate: Option<OutputGate>,
    /// A norm between attention and the output projection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_norm: Option<Norm>,
    /// Keys, values and their cache are this layer's, which comes before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shares: Option<usize>,
    /// The projection to keys is also that to values, before norms and rotation.
    #[serde(default)]
    pub keys_as_values: bool,
    /// Half of the heads are subtracted from the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub differential: Option<Differential>,
    /// Query and output projections are experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixture: Option<Mixture>,
    /// A query sees only the keys that an indexer chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub indexer: Option<Indexer>,
}

/// Norms on queries and keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QkNorm {
    /// On queries.
    pub query: Norm,
    /// On keys.
    pub key: Norm,
    /// Over what.
    pub span: NormSpan,
    /// After the rotation instead of before it.
    pub after_rope: bool,
}

/// What a norm on queries or keys runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormSpan {
    /// Each head, with one weight for all.
    Head,
    /// Each head, with a weight of its own.
    EachHead,
    /// All heads together.
    Full,
}

/// How queries, keys and values come from the hidden states.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Projection {
    /// One matrix each.
    Separate {
        /// The query's adds a bias.
        query_bias: bool,
        /// The key's adds a bias.
        key_bias: bool,
        /// The value's adds a bias.
        value_bias: bool,
    },
    /// Multi-head latent attention (DeepSeek-V2, 2024): keys and values from a shared low-rank latent,
    /// and one rotated key part for all heads.
    Latent {
        /// Rank of the query's latent; none for a full query matrix.
        query_rank: Option<usize>,
        /// Rank of the key-value latent.
        kv_rank: usize,
        /// Rotated part of a key head; the rest has no position.
        rope_size: usize,
        /// The down-projections add a bias.
        bias: bool,
        /// `eps` of the norms on the latents.
        norm_eps: f64,
        /// Multiplier of the query.
        #[serde(skip_serializing_if = "Option::is_none")]
        query_scale: Option<f64>,
        /// Multiplier of the key-value latent.
        #[serde(skip_serializing_if = "Option::is_none")]
        kv_scale: Option<f64>,
    },
}

/// Rotary position embedding (Su et al. 2021).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Which elements form a pair.
    pub layout: RopeLayout,
    /// Rotated elements of a head, from its start.
    pub size: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched to longer contexts.
    pub scaling: RopeScaling,
    /// Multiplier of cosine and sine.
    pub attention_factor: f64,
    /// Pairs turn the other way, `(a cos + b sin, b cos - a sin)`, as in nanochat.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reversed: bool,
    /// Another multiplier for sequences beyond a length (`PhimoeRotaryEmbedding`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beyond: Option<RopeBeyond>,
}

/// What changes beyond a length.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeBeyond {
    /// The longest sequence that is not beyond.
    pub length: usize,
    /// Multiplier of cosine and sine.
    pub attention_factor: f64,
}

/// Which elements of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeLayout {
    /// Element `i` with `i + size / 2` (GPT-NeoX, Llama).
    Half,
    /// Element `2i` with `2i + 1` (GPT-J, `DeepSeek`).
    Interleaved,
}

/// Frequencies for longer contexts, by the names of `rope_type`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RopeScaling {
    /// `theta^(-2i / size)`.
    Default,
    /// All frequencies divided.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// NTK-aware base that grows with the sequence beyond the original context.
    Dynamic {
        /// Growth.
        factor: f64,
        /// The length up to which nothing changes.
        original_context: usize,
    },
    /// Llama 3.1: long wavelengths divided, short ones kept, a ramp between.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context of pre-training.
        original_context: usize,
    },
    /// `YaRN` (Peng et al. 2023).
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided.
        beta_slow: f64,
        /// The ramp's ends are rounded to whole dimensions.
        truncate: bool,
        /// Context of pre-training.
        original_context: usize,
    },
    /// The first part of the frequencies divided, the rest zero: the whole head takes part, some of it unrotated.
    Proportional {
        /// The divisor.
        factor: f64,
        /// Pairs that turn.
        pairs: usize,
    },
    /// `LongRoPE` (Ding et al. 2024): a divisor per frequency, another set beyond the original context.
    Longrope {
        /// Divisors within the original context.
        short_factor: Vec<f64>,
        /// Divisors beyond it.
        long_factor: Vec<f64>,
        /// Context of pre-training.
        original_context: usize,
    },
}

/// Channel mixing of a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedForward {
    /// One MLP for every token.
    Dense(Mlp),
    /// A few of many MLPs for each token.
    Moe(Box<Moe>),
}

/// A multi-layer perceptron.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mlp {
    /// Width of the hidden layer.
    pub intermediate_size: usize,
    /// Non-linearity.
    pub activation: Activation,
    /// `down(act(gate(x)) * up(x))`; otherwise `down(act(up(x)))`.
    pub gated: bool,
    /// Its projections add a bias.
    pub bias: bool,
    /// A norm on the input of the down-projection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inner_norm: Option<Norm>,
    /// About this share of the gate's elements becomes zero: `relu(x − mean − std · Φ⁻¹(share))` (Gemma 3n).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f64>,
}

/// Non-linearities, by Hugging Face's names in `hidden_act`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x * sigmoid(x)`.
    #[serde(alias = "swish")]
    Silu,
    /// `x * Φ(x)`, exactly.
    Gelu,
    /// The tanh approximation of `gelu`.
    #[serde(
        alias = "gelu_new",
        alias = "gelu_fast",
        alias = "gelu_accurate",
        alias = "gelu_tanh",
        alias = "gelu_python_tanh"
    )]
    GeluPytorchTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²`.
    Relu2,
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
    /// `g * sigmoid(alpha g) * (u + 1)` of a gate clamped to at most `limit` and an up-projection clamped to plus and
    /// minus `limit` (`GptOssExperts`).
    ClampedSwiglu {
        /// Steepness of the sigmoid.
        alpha: f64,
        /// Where values are cut off.
        limit: f64,
    },
    /// Quadratic for positive and exponential for negative values, with two learned slopes, `alpha_p` and `alpha_n`,
    /// and `beta` and `eps` as they are stored (Huang 2024).
    Xielu,
}

/// Mixture of experts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Moe {
    /// Number of experts.
    pub experts: usize,
    /// Experts chosen for a token.
    pub top_k: usize,
    /// Each expert.
    pub expert: Mlp,
    /// From the hidden states to the chosen experts' weights.
    pub routing: Routing,
    /// The weights multiply an expert's input instead of its output.
    #[serde(default)]
    pub weigh_input: bool,
    /// An expert that sees every token.
    pub shared: Option<SharedExpert>,
    /// A dense MLP beside the experts reads the same input and is added.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dense: Option<Mlp>,
    /// A bias is added to the sum of the experts.
    #[serde(default)]
    pub output_bias: bool,
}

/// From the hidden states to the chosen experts and their weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "independent properties of a published architecture")]
pub struct Routing {
    /// From logits to scores.
    pub score: Score,
    /// The router adds a bias to its logits.
    #[serde(default)]
    pub bias: bool,
    /// A learned bias is added to the scores when choosing, not when weighting.
    pub correction_bias: bool,
    /// Experts come in groups, of which only the best are considered.
    pub groups: Option<Groups>,
    /// The chosen weights are divided by their sum.
    pub normalize: bool,
    /// Multiplier of the weights.
    pub scale: f64,
    /// That many more experts hand their input on; the router may choose them.
    #[serde(default)]
    pub identity_experts: usize,
    /// A norm on what the router reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub norm: Option<Norm>,
    /// Multiplier of what the router reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_scale: Option<f64>,
    /// Each expert's weight is multiplied by a learned `per_expert_scale`.
    #[serde(default)]
    pub expert_scale: bool,
}

/// From a router's logits to scores.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// Over all experts.
    Softmax,
    /// Of each expert on its own.
    Sigmoid,
    /// Phi-3.5-MoE's: two experts, each weighted among those that are close to the best.
    Sparsemixer {
        /// What counts as close.
        jitter: f64,
    },
}

/// Group-limited choice of experts (DeepSeek-V3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Groups {
    /// Number of groups, of equal size.
    pub count: usize,
    /// Groups that stay in the choice.
    pub top: usize,
    /// A group's score is the sum of this many of its best.
    pub score_top: usize,
}

/// An expert that sees every token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedExpert {
    /// Name of the module that holds its weights, below `mlp`.
    pub name: String,
    /// The expert.
    pub mlp: Mlp,
    /// Its output is multiplied by a learned sigmoid gate.
    pub gate: bool,
}
