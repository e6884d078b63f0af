//! Rotary position embedding inside of attention.
//!
//! `GroupQueryAttention` rotates queries and keys by itself, at places that it counts from the lengths of the rows. So
//! it may where positions are counted from the mask, and where the tokens of each row stand without gaps.

use std::collections::{HashMap, HashSet};

use super::{Lowerer, Operator, POSITIONS, Padding};
use crate::build::{AttentionOp, Composite, Model};
use crate::error::Result;
use crate::graph::{Graph, Node, ValueId};
use crate::opset::Positions;
use crate::spec::{Rope, RopeLayout, RopeScaling};

/// The form of a rotation that attention does.
pub(super) const FORM: &str = "GroupQueryAttention";
/// What the rotated elements of a head come in: the kernels read tables in vectors of half as many.
const VECTOR: usize = 16;

/// A rotation of queries and keys by attention.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rotation {
    rope: Rope,
    pub(super) layout: RopeLayout,
    /// Positions in the model's graph.
    positions: ValueId,
}

/// Which rotations attention does.
#[derive(Debug, Default)]
pub(super) struct Inside {
    /// By what a rotation results in: it, or why it stays outside.
    rotations: HashMap<ValueId, std::result::Result<Rotation, String>>,
    /// First results of tables that nothing else reads.
    tables: HashSet<ValueId>,
    /// Tables of all places that are written already.
    places: Vec<(Rope, [ValueId; 2])>,
}

impl Inside {
    /// The rotation that attention does to the result of a node.
    pub(super) fn rotation(&self, result: Option<&ValueId>) -> Option<&Rotation> {
        self.rotations.get(result?)?.as_ref().ok()
    }

    /// True of a node whose result attention rotates instead.
    pub(super) fn turns(&self, node: &Node<Composite>) -> bool {
        self.rotation(node.outputs.first().and_then(Option::as_ref)).is_some()
    }

    /// Why a rotation stays outside.
    pub(super) fn why_not(&self, node: &Node<Composite>) -> String {
        let result = node.outputs.first().copied().flatten().and_then(|result| self.rotations.get(&result));
        let reason = result.and_then(|rotation| rotation.as_ref().err());
        reason.map_or("attention does not read it as it is".to_owned(), String::clone)
    }

    /// True of a table that only attention reads, which has its own.
    pub(super) fn needs_no_table(&self, node: &Node<Composite>) -> bool {
        node.outputs.first().copied().flatten().is_some_and(|cos| self.tables.contains(&cos))
    }
}

impl Lowerer<'_> {
    /// Finds the rotations that attention does. Either it does both, of queries and of keys, or none.
    pub(super) fn rotations_inside(&self, model: &Graph<Model>) -> Result<Inside> {
        let mut inside = Inside::default();
        if !self.options.target.forms("rotary")?.iter().any(|form| form == FORM) {
            return Ok(inside);
        }
        let uses = uses(model);
        let made = makers(model);
        let turned = |id: ValueId| made.get(&id).filter(|node| matches!(node.op, Composite::Rotate { .. }));
        for node in &model.nodes {
            let (Composite::Attention(op), [Some(query), Some(key), ..]) = (&node.op, node.inputs.as_slice()) else {
                continue;
            };
            let alone = [query, key].iter().all(|id| uses.get(id) == Some(&1));
            let rotation = match (turned(*query), turned(*key)) {
                (Some(query), Some(key)) if alone && same_turn(query, key) => self.rotation(model, op, query, &made)?,
                _ => Err("attention does not read rotated queries and keys as they are".to_owned()),
            };
            for id in [query, key].into_iter().filter(|id| turned(**id).is_some()) {
                inside.rotations.insert(*id, rotation.clone());
            }
        }
        let mut left = uses;
        for node in model.nodes.iter().filter(|node| inside.turns(node)) {
            if let Some(count) = node.inputs.get(1).copied().flatten().and_then(|cos| left.get_mut(&cos)) {
                *count = count.saturating_sub(1);
            }
        }
        let tables = model.nodes.iter().filter(|node| matches!(node.op, Composite::RopeTable(_)));
        let unread = tables.filter_map(|node| node.outputs.first().copied().flatten());
        inside.tables = unread.filter(|cos| left.get(cos) == Some(&0)).collect();
        Ok(inside)
    }

    /// The rotation of an attention's queries, or why the operator can not do it.
    fn rotation(
        &self,
        model: &Graph<Model>,
        op: &AttentionOp,
        node: &Node<Composite>,
        made: &HashMap<ValueId, &Node<Composite>>,
    ) -> Result<std::result::Result<Rotation, String>> {
        let (Composite::Rotate { size, layout, .. }, [_, Some(cos), ..]) = (&node.op, node.inputs.as_slice()) else {
            return Ok(Err("it is no rotation".to_owned()));
        };
        let table = made.get(cos).map(|table| (&table.op, table.inputs.as_slice()));
        let Some((Composite::RopeTable(rope), [Some(positions), ..])) = table else {
            return Ok(Err("its table is not computed from positions".to_owned()));
        };
        let refusal = if self.options.positions == Positions::Ids {
            "position_ids is an input, and the operator counts places by itself (--positions mask leaves them to it)"
        } else if model.value(*positions).name != POSITIONS {
            "its positions are not those of the tokens"
        } else if !size.is_multiple_of(VECTOR) {
            "the operator rotates multiples of 16 elements of a head"
        } else if let Some(reason) = self.not_without_gaps(op)? {
            return Ok(Err(reason));
        } else {
            return Ok(Ok(Rotation { rope: rope.clone(), layout: *layout, positions: *positions }));
        };
        Ok(Err(refusal.to_owned()))
    }

    /// Why an attention is not the operator's, or its rows may have gaps.
    fn not_without_gaps(&self, op: &AttentionOp) -> Result<Option<String>> {
        let gaps = self.order_kept.is_some() && self.options.padding == Padding::Any;
        let gaps = gaps.then(|| "padding on the left would count as places (--padding right)".to_owned());
        Ok(self.not_fused(op)?.or(gaps))
    }

    /// Cosine and sine of every place up to the last one, `[T, size / 2]` each.
    pub(super) fn place_table(&mut self, model: &Graph<Model>, rotation: &Rotation) -> Result<[ValueId; 2]> {
        let Rotation { rope, positions, .. } = rotation;
        let grows = matches!(rope.scaling, RopeScaling::Dynamic { .. } | RopeScaling::Longrope { .. });
        if let Some((_, table)) = self.inside.places.iter().find(|(known, _)| known == rope) {
            return Ok(*table);
        }
        let index = self.key_index()?;
        let ids = if grows || rope.beyond.is_some() { self.value(model, *positions)? } else { index };
        let scope = self.e.enter("/model/rotary_emb");
        let axis = self.e.ints(&[0]);
        // [T] -> [1, T]
        let places = self.e.add(Operator::new("Unsqueeze"), &[index, axis])?;
        let mut table = [places; 2];
        // [1, T, size / 2] -> [T, size / 2]
        for (slot, value) in table.iter_mut().zip(self.rope_table(rope, places, ids)?) {
            *slot = self.table_rows(value)?;
        }
        self.e.enter(&scope);
        self.inside.places.push((rope.clone(), table));
        Ok(table)
    }
}

/// How often each value is read, by nodes and as an output.
pub(super) fn uses(model: &Graph<Model>) -> HashMap<ValueId, usize> {
    let read = model.nodes.iter().flat_map(|node| node.inputs.iter().flatten()).chain(&model.outputs);
    read.fold(HashMap::new(), |mut uses, id| {
        *uses.entry(*id).or_default() += 1;
        uses
    })
}

/// The node that makes each value.
pub(super) fn makers(model: &Graph<Model>) -> HashMap<ValueId, &Node<Composite>> {
    model.nodes.iter().flat_map(|node| node.outputs.iter().flatten().map(move |id| (*id, node))).collect()
}

/// True of two rotations by the same angles.
fn same_turn(query: &Node<Composite>, key: &Node<Composite>) -> bool {
    let kind = |node: &Node<Composite>| match node.op {
        Composite::Rotate { size, layout, .. } => Some((size, layout)),
        _ => None,
    };
    kind(query) == kind(key) && query.inputs.get(1..) == key.inputs.get(1..)
}
