//! Attention with a cache, in onnxruntime's operator, in ONNX's, or spelled out.

use super::cache::{Cache, no_cache, refused};
use super::{Form, Lowerer, Operator, Padding};
use crate::build::{AttentionOp, Model};
use crate::element::{CacheType, ElementType};
use crate::error::{Code, Error, Result};
use crate::graph::{Dim, Graph, Shape, ValueId};
use crate::spec::RopeLayout;

/// What an attention reads.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    pub(super) query: ValueId,
    /// New keys and values `[B, S, K*D]`, or all of another layer's `[B, K, T, D]`.
    pub(super) key: ValueId,
    pub(super) value: ValueId,
    pub(super) past: Option<(ValueId, ValueId)>,
    pub(super) sinks: Option<ValueId>,
    /// Added to the scores, `[B, 1, S, T]`
    pub(super) bias: Option<ValueId>,
    /// Cosine and sine of every place `[T, size / 2]`, and which elements pair up, if queries and keys are yet to be
    /// rotated.
    pub(super) rotation: Option<([ValueId; 2], RopeLayout)>,
}

/// Which places of the cache `GroupQueryAttention` sees, beside what its attributes say.
#[derive(Clone, Copy)]
pub(super) struct Places {
    /// The place of each row's last token, `[B]` in int32.
    pub(super) last: ValueId,
    /// Added to the scores, `[B, 1 or N, S, T]`; nothing where rows stand without gaps from the first place on.
    pub(super) bias: Option<ValueId>,
}

impl Operands {
    fn new(op: &AttentionOp, operands: &[ValueId]) -> Result<Self> {
        let mut rest = operands.iter().copied();
        let mut next = || {
            let missing = || Error::new(Code::SpecInvalid, "Attention").found(format!("{} operands", operands.len()));
            rest.next().ok_or_else(missing)
        };
        let (query, key, value) = (next()?, next()?, next()?);
        let past = if op.shared { None } else { Some((next()?, next()?)) };
        let _mask = next()?;
        let sinks = if op.sinks { Some(next()?) } else { None };
        let bias = if op.bias { Some(next()?) } else { None };
        Ok(Self { query, key, value, past, sinks, bias, rotation: None })
    }
}

impl Lowerer<'_> {
    pub(super) fn attention(
        &mut self,
        op: &AttentionOp,
        model: &Graph<Model>,
        ids: &[ValueId],
    ) -> Result<Vec<ValueId>> {
        let operands: Vec<ValueId> = ids.iter().map(|id| self.value(model, *id)).collect::<Result<_>>()?;
        let mut operands = Operands::new(op, &operands)?;
        if let Some(rotation) = self.inside.rotation(ids.first()).cloned() {
            operands.rotation = Some((self.place_table(model, &rotation)?, rotation.layout));
        }
        if let Cache::Quantized(kind, _) = self.options.cache {
            return self.attention_on_quantized(kind, op, operands);
        }
        self.first_form("attention", |s, form| match form {
            super::aligned::FORM => s.aligned_attention(op, operands),
            super::by_length::FORM => s.attention_by_length(op, operands),
            "GroupQueryAttention" => s.group_query_attention(op, operands),
            "Attention" if op.sinks => Ok(Form::Refused("the operator has no sinks".to_owned())),
            "Attention" if op.shared => s.standard_on_shared(op, operands).map(Form::Done),
            "Attention" => s.standard_attention(op, operands).map(Form::Done),
            _ => s.attention_spelled_out(op, operands).map(Form::Done),
        })
    }

    /// Why an attention does not become the fused operator; nothing if it does.
    pub(super) fn not_fused(&self, op: &AttentionOp) -> Result<Option<String>> {
        if self.order_kept.is_none() {
            return Ok(None);
        }
        if self.options.target.forms("attention")?.iter().all(|form| form != "GroupQueryAttention") {
            return Ok(Some("attention is of another form".to_owned()));
        }
        Ok(unfit(op))
    }

    /// All that is added to the scores.
    fn whole_mask(&mut self, op: &AttentionOp, bias: Option<ValueId>, element: ElementType) -> Result<ValueId> {
        let mask = self.score_mask(op, element)?;
        let mask = self.with_alibi(op, mask, element)?;
        self.with_bias(mask, bias, element)
    }

    /// A mask, and what an indexer adds to it; the layers that share an indexer share the sum.
    fn with_bias(&mut self, mask: ValueId, bias: Option<ValueId>, element: ElementType) -> Result<ValueId> {
        let Some(bias) = bias else { return Ok(mask) };
        let name = |s: &Self, id| s.e.graph.value(id).name.clone();
        let key = format!("mask/indexed/{}/{}", name(self, mask), name(self, bias));
        self.share(&key, |s| {
            let bias = s.e.cast(bias, element)?;
            s.e.add(Operator::new("Add"), &[mask, bias])
        })
    }

    fn with_alibi(&mut self, op: &AttentionOp, mask: ValueId, element: ElementType) -> Result<ValueId> {
        let Some(alibi) = op.alibi else { return Ok(mask) };
        let bias = self.alibi_bias(alibi, op.heads, element)?;
        let name = self.e.graph.value(mask).name.clone();
        self.share(&format!("mask/alibi_{}/{name}", op.heads), |s| s.e.add(Operator::new("Add"), &[mask, bias]))
    }

    /// `GroupQueryAttention` of onnxruntime. Its `seqlens_k` is the place of each row's last kept token and the
    /// padding is a bias: measured to be exact for left and right padding and through the cache. Without a bias rows are
    /// kept without gaps: the tokens after a prompt of a ragged batch take the places of its padding.
    fn group_query_attention(&mut self, op: &AttentionOp, operands: Operands) -> Result<Form<Vec<ValueId>>> {
        if let Some(reason) = unfit(op) {
            return Ok(Form::Refused(reason));
        }
        self.with_window(op, operands, |s, places| s.call_group_query(op, operands, places)).map(Form::Done)
    }

    /// Writes an attention whose window counts tokens. The operator's own counts places of the cache, which is the same
    /// where no window of a new token has a gap among its tokens, and far cheaper behind a long past: it leaves out what
    /// it does not see. Clients that pad on the right and go on behind the padding make such gaps; then the window is in
    /// the bias.
    pub(super) fn with_window(
        &mut self,
        op: &AttentionOp,
        operands: Operands,
        write: impl FnOnce(&mut Self, Places) -> Result<Vec<ValueId>>,
    ) -> Result<Vec<ValueId>> {
        let places = self.kept_places(op, &operands)?;
        let (Some(window), Some(_)) = (op.window, places.bias) else { return write(self, places) };
        let whole = self.windows_are_whole(window)?;
        self.total_sequence_length()?;
        let by_place = self.branch("then_branch", "window_by_place", |s| write(s, places))?;
        let unlimited = AttentionOp { window: None, ..*op };
        let by_token =
            self.branch("else_branch", "window_by_token", |s| s.call_group_query(&unlimited, operands, places))?;
        self.e.choose(whole, [by_place, by_token])
    }

    /// The place of each row's last token, and the bias that hides padding.
    fn kept_places(&mut self, op: &AttentionOp, operands: &Operands) -> Result<Places> {
        let bias = self.attention_bias(op, operands.bias, self.e.ty(operands.query).element)?;
        let last = if bias.is_none() {
            self.seqlens()?
        } else {
            let last = self.last_kept()?;
            self.share("mask/seqlens_k", |s| s.e.cast(last, ElementType::I32))?
        };
        Ok(Places { last, bias })
    }

    /// Tokens in the cache and new ones together, as the operator takes it.
    pub(super) fn total_sequence_length(&mut self) -> Result<ValueId> {
        let total = self.total_length()?;
        self.share("mask/total_sequence_length", |s| s.e.cast(total, ElementType::I32))
    }

    /// The same without a bias, on rows that are aligned to the left.
    fn aligned_attention(&mut self, op: &AttentionOp, operands: Operands) -> Result<Form<Vec<ValueId>>> {
        if let Some(reason) = &self.order_kept {
            return Ok(Form::Refused(reason.clone()));
        }
        let last = self.seqlens()?;
        self.call_group_query(op, operands, Places { last, bias: None }).map(Form::Done)
    }

    pub(super) fn call_group_query(
        &mut self,
        op: &AttentionOp,
        operands: Operands,
        Places { last, bias }: Places,
    ) -> Result<Vec<ValueId>> {
        let total = self.total_sequence_length()?;
        let mut call = Operator::microsoft("GroupQueryAttention")
            .size("num_heads", op.heads)
            .size("kv_num_heads", op.kv_heads)
            .float("scale", op.scale)
            .int("do_rotary", operands.rotation.is_some().into())
            .int(
                "rotary_interleaved",
                operands.rotation.is_some_and(|(_, layout)| layout == RopeLayout::Interleaved).into(),
            );
        if let Some(window) = op.window {
            call = call.size("local_window_size", window);
        }
        if let Some(cap) = op.softcap {
            call = call.float("softcap", cap);
        }
        let (past_key, past_value) = operands.past.unzip();
        let (call, scales) = self.quantized_cache(op, call, [past_key, past_value])?;
        let (cos, sin) = operands.rotation.map(|([cos, sin], _)| (cos, sin)).unzip();
        let packed = self.siblings.is_whole(operands.query);
        let [key, value] = [operands.key, operands.value].map(|id| (!packed).then_some(id));
        let mut inputs = vec![Some(operands.query), key, value, past_key, past_value];
        inputs.extend([Some(last), Some(total), cos, sin, None, bias, operands.sinks]);
        inputs.extend(scales.into_iter().flatten().map(Some));
        while inputs.last() == Some(&None) {
            inputs.pop();
        }
        Ok(self.e.call(call, &inputs, [true; 3])?.to_vec())
    }

    /// The same on a cache in 8 bits, which this operator alone has: another form would be another cache.
    fn attention_on_quantized(
        &mut self,
        kind: CacheType,
        op: &AttentionOp,
        operands: Operands,
    ) -> Result<Vec<ValueId>> {
        let target = self.options.target;
        let aligned = target.forms("attention")?.iter().any(|form| form == super::aligned::FORM);
        let form = match no_cache(target, kind, op.key_size) {
            Some(reason) => Form::Refused(reason),
            None if aligned => self.aligned_attention(op, operands)?,
            None => self.group_query_attention(op, operands)?,
        };
        match form {
            Form::Done(results) => Ok(results),
            Form::Refused(reason) => Err(refused(kind, &reason)),
        }
    }

    /// What `GroupQueryAttention` is not told by its attributes, `[B, 1 or N, S, T]`: its window too, where that has gaps.
    fn attention_bias(
        &mut self,
        op: &AttentionOp,
        bias: Option<ValueId>,
        element: ElementType,
    ) -> Result<Option<ValueId>> {
        if op.chunk.is_some() || bias.is_some() {
            return self.whole_mask(op, bias, element).map(Some);
        }
        if self.options.padding == Padding::Right && op.alibi.is_none() {
            return Ok(None);
        }
        let bias = match op.window {
            Some(window) => self.padding_or_window_bias(op, window, element)?,
            None => self.padding_bias(element)?,
        };
        self.with_alibi(op, bias, element).map(Some)
    }

    /// `Attention` of ONNX 23. All visibility is in an additive float mask: clients differ in how they read
    /// `is_causal` with a cache and boolean masks.
    fn standard_attention(&mut self, op: &AttentionOp, operands: Operands) -> Result<Vec<ValueId>> {
        let mask = self.whole_mask(op, operands.bias, self.e.ty(operands.query).element)?;
        let call = standard(op).size("q_num_heads", op.heads).size("kv_num_heads", op.kv_heads);
        let (past_key, past_value) = operands.past.unzip();
        let inputs = [Some(operands.query), Some(operands.key), Some(operands.value), Some(mask), past_key, past_value];
        Ok(self.e.call(call, &inputs, [true; 3])?.to_vec())
    }

    /// The same on another layer's keys and values: with four axes the operator takes them as they lie in the cache.
    fn standard_on_shared(&mut self, op: &AttentionOp, operands: Operands) -> Result<Vec<ValueId>> {
        let mask = self.whole_mask(op, operands.bias, self.e.ty(operands.query).element)?;
        let query = self.heads_first(operands.query, op.heads, op.key_size)?;
        let mixed = self.e.add(standard(op), &[query, operands.key, operands.value, mask])?;
        // [B, N, S, D] -> [B, S, N, D] -> [B, S, N * D]
        let mixed = self.e.add(Operator::new("Transpose").ints("perm", &[0, 2, 1, 3]), &[mixed])?;
        let mut shape = self.e.shape(mixed).clone();
        shape.truncate(2);
        shape.push(Dim::from(op.heads * op.value_size));
        Ok(vec![self.e.reshape(mixed, &shape)?])
    }

    /// Attention from matrix products. Query heads that share a key head are stacked along the sequence, so
    /// that keys and values are never repeated.
    ///
    /// ```text
    /// q [B, S, N*D] ─ [B, N, S, D] ─ [B, K, G*S, D] ┐
    /// k [B, S, K*D] ─ [B, K, S, D] ─ concat past ───┴ scores [B, K, G*S, T] ─ [B, N, S, T] + mask ─ softmax ┐
    /// v [B, S, K*D] ─ [B, K, S, D] ─ concat past ─────────────────────────────────────────────────────────┴ [B, S, N*D]
    /// ```
    fn attention_spelled_out(&mut self, op: &AttentionOp, operands: Operands) -> Result<Vec<ValueId>> {
        let Operands { query, mut key, mut value, .. } = operands;
        let element = self.e.ty(query).element;
        let query = self.heads_first(query, op.heads, op.key_size)?;
        if let Some((past_key, past_value)) = operands.past {
            key = self.heads_first(key, op.kv_heads, op.key_size)?;
            value = self.heads_first(value, op.kv_heads, op.value_size)?;
            let join = || Operator::new("Concat").int("axis", 2);
            key = self.e.add(join(), &[past_key, key])?;
            value = self.e.add(join(), &[past_value, value])?;
        }
        let weights = self.attention_weights(op, query, key, &operands)?;
        let weights = self.e.cast(weights, element)?;
        // [B, N, S, T] -> [B, K, G*S, T]
        let shape = self.e.shape(weights).clone();
        let (batch, stacked, total) = Self::stacked(op, &shape)?;
        let weights = self.reshape_scores(weights, &vec![batch, Dim::from(op.kv_heads), stacked, total])?;
        let mixed = self.e.add(Operator::new("MatMul"), &[weights, value])?;
        let output = self.tokens_first(mixed, op)?;
        Ok(if op.shared { vec![output] } else { vec![output, key, value] })
    }

    /// Batch, stacked query heads, and last axis of `[B, N, S, .]`.
    fn stacked(op: &AttentionOp, shape: &Shape) -> Result<(Dim, Dim, Dim)> {
        let [batch, _, sequence, last] = shape.as_slice() else {
            return Err(Error::new(Code::SpecInvalid, "Attention").found("a query that is not [B, N, S, D]"));
        };
        let groups = Dim::from(op.heads / op.kv_heads.max(1));
        Ok((batch.clone(), &groups * sequence, last.clone()))
    }

    /// `softmax(q · kᵀ · scale + mask)`, `[B, N, S, T]` in float32
    fn attention_weights(
        &mut self,
        op: &AttentionOp,
        query: ValueId,
        key: ValueId,
        operands: &Operands,
    ) -> Result<ValueId> {
        let mask = self.whole_mask(op, operands.bias, ElementType::F32)?;
        let element = self.e.ty(query).element;
        let shape = self.e.shape(query).clone();
        let (batch, stacked, size) = Self::stacked(op, &shape)?;
        let total = self.e.shape(key).get(2).cloned().unwrap_or_else(|| Dim::from(1));
        // [B, N, S, D] -> [B, K, G*S, D]
        let query = self.e.reshape(query, &vec![batch.clone(), Dim::from(op.kv_heads), stacked, size])?;
        let scale = self.e.scalar(element, op.scale);
        let query = self.e.add(Operator::new("Mul"), &[query, scale])?;
        let key = self.e.add(Operator::new("Transpose").ints("perm", &[0, 1, 3, 2]), &[key])?;
        let scores = self.e.add(Operator::new("MatMul"), &[query, key])?;
        let scores = self.e.cast(scores, ElementType::F32)?;
        // [B, K, G*S, T] -> [B, N, S, T]
        let sequence = shape.get(2).cloned().unwrap_or_else(|| Dim::from(1));
        let mut scores = self.reshape_scores(scores, &vec![batch, Dim::from(op.heads), sequence, total])?;
        if let Some(cap) = op.softcap {
            scores = self.softcap(cap, scores)?;
        }
        let scores = self.e.add(Operator::new("Add"), &[scores, mask])?;
        match operands.sinks {
            None => self.e.add(Operator::new("Softmax").int("axis", -1), &[scores]),
            Some(sinks) => self.softmax_with_sinks(scores, sinks),
        }
    }

    /// `exp(s - m) / (Σ exp(s - m) + exp(sink - m))` with `m` the largest of all.
    fn softmax_with_sinks(&mut self, scores: ValueId, sinks: ValueId) -> Result<ValueId> {
        let sinks = self.e.cast(sinks, ElementType::F32)?;
        let axes = self.e.ints(&[1, 2]);
        // [N] -> [N, 1, 1]
        let sinks = self.e.add(Operator::new("Unsqueeze"), &[sinks, axes])?;
        let largest = self.reduce("ReduceMax", scores, &[-1], true)?;
        let largest = self.e.add(Operator::new("Max"), &[largest, sinks])?;
        let e = &mut self.e;
        let shifted = e.add(Operator::new("Sub"), &[scores, largest])?;
        let exponentials = e.add(Operator::new("Exp"), &[shifted])?;
        let sink = e.add(Operator::new("Sub"), &[sinks, largest])?;
        let sink = e.add(Operator::new("Exp"), &[sink])?;
        let sum = self.reduce("ReduceSum", exponentials, &[-1], true)?;
        let sum = self.e.add(Operator::new("Add"), &[sum, sink])?;
        self.e.add(Operator::new("Div"), &[exponentials, sum])
    }

    /// `[B, S, N * D]` -> `[B, N, S, D]`
    pub(super) fn heads_first(&mut self, x: ValueId, heads: usize, size: usize) -> Result<ValueId> {
        let mut shape = self.e.shape(x).clone();
        shape.pop();
        shape.extend([Dim::from(heads), Dim::from(size)]);
        let x = self.e.reshape(x, &shape)?;
        self.e.add(Operator::new("Transpose").ints("perm", &[0, 2, 1, 3]), &[x])
    }

    /// `[B, K, G*S, D]` -> `[B, S, N * D]`
    fn tokens_first(&mut self, x: ValueId, op: &AttentionOp) -> Result<ValueId> {
        let shape = self.e.shape(x).clone();
        let (Some(batch), Some(stacked)) = (shape.first(), shape.get(2)) else {
            return Err(Error::new(Code::SpecInvalid, "Attention").found("an output without heads"));
        };
        let groups = Dim::from(op.heads / op.kv_heads.max(1));
        let sequence = stacked.divided_by(&groups).unwrap_or_else(|| stacked.clone());
        let (heads, size) = (Dim::from(op.heads), Dim::from(op.value_size));
        // [B, K, G*S, D] -> [B, N, S, D] -> [B, S, N, D] -> [B, S, N * D]
        let x = self.e.reshape(x, &vec![batch.clone(), heads, sequence.clone(), size])?;
        let x = self.e.add(Operator::new("Transpose").ints("perm", &[0, 2, 1, 3]), &[x])?;
        self.e.reshape(x, &vec![batch.clone(), sequence, Dim::from(op.heads * op.value_size)])
    }

    /// Between `[B, K, G*S, T]` and `[B, N, S, T]`: the last size is open, so it is given and the third follows.
    fn reshape_scores(&mut self, x: ValueId, shape: &Shape) -> Result<ValueId> {
        if self.e.shape(x) == shape {
            return Ok(x);
        }
        let heads = shape.get(1).and_then(Dim::value).unwrap_or(1);
        let total = self.total_length()?;
        let sizes = self.share(&format!("mask/scores_{heads}"), |s| {
            let (axis, leading) = (s.e.ints(&[0]), s.e.ints(&[0, heads, -1]));
            let total = s.e.add(Operator::new("Unsqueeze"), &[total, axis])?;
            s.e.add(Operator::new("Concat").int("axis", 0), &[leading, total])
        })?;
        self.e.add(Operator::new("Reshape"), &[x, sizes])
    }
}

/// Why `GroupQueryAttention` can not express an attention, whatever is added to its scores.
pub(super) fn unfit(op: &AttentionOp) -> Option<String> {
    if op.shared {
        return Some("the operator writes a cache, and this layer reads another's".to_owned());
    }
    if op.key_size != op.value_size {
        return Some(format!("key heads of {} and value heads of {} differ", op.key_size, op.value_size));
    }
    if !op.key_size.is_multiple_of(8) {
        return Some(format!("head size {} is not a multiple of 8", op.key_size));
    }
    None
}

/// `Attention` of ONNX without what depends on its operands' form.
fn standard(op: &AttentionOp) -> Operator {
    let call = Operator::new("Attention").float("scale", op.scale).int("is_causal", 0);
    match op.softcap {
        Some(cap) => call.float("softcap", cap),
        None => call,
    }
}
