//! Products with the same input, computed as one: queries, keys and values, or gate and up, with their matrices joined.
//!
//! A kernel is started once and reads its input once. `GroupQueryAttention` takes the joined queries, keys and values as
//! they are; whoever else reads results gets them from a `Split`.

use std::collections::{HashMap, HashSet};

use super::inside::{makers, uses};
use super::quantized::{named, unfit as unfit_integers};
use super::{Cache, Form, Lowerer};
use crate::build::{Composite, Kind, Model};
use crate::error::Result;
use crate::graph::{Dim, Graph, Node, Source, Type, ValueId};
use crate::quantize::Scheme;
use crate::weight::Weight;

/// Most results of one product.
const MOST: usize = 4;

/// Products that are computed as one.
#[derive(Debug, Default)]
pub(super) struct Siblings {
    groups: Vec<Group>,
    /// Group and place within it, by the result in the model's graph.
    places: HashMap<ValueId, (usize, usize)>,
    /// Lowered results that are handed on joined.
    whole: HashSet<ValueId>,
}

#[derive(Debug, Default)]
struct Group {
    members: Vec<Member>,
    scheme: Option<Scheme>,
    /// Attention takes the results as they are joined.
    whole: bool,
    /// Lowered results, once the product is written.
    results: Vec<ValueId>,
}

/// A product `x · weightᵀ + bias` of the model.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Member {
    x: ValueId,
    weight: ValueId,
    bias: Option<ValueId>,
    result: ValueId,
}

impl Siblings {
    /// True of a lowered value that holds queries, keys and values.
    pub(super) fn is_whole(&self, value: ValueId) -> bool {
        self.whole.contains(&value)
    }

    /// Says that a value holds what another one does.
    pub(super) fn like(&mut self, value: ValueId, other: ValueId) {
        if self.is_whole(other) {
            self.whole.insert(value);
        }
    }

    fn add(&mut self, group: Group) {
        let index = self.groups.len();
        self.places.extend(group.members.iter().enumerate().map(|(place, member)| (member.result, (index, place))));
        self.groups.push(group);
    }
}

impl Lowerer<'_> {
    /// Finds the products that are computed as one.
    pub(super) fn find_siblings(&mut self, model: &Graph<Model>) -> Result<Siblings> {
        let uses = uses(model);
        let alone = |id: ValueId| uses.get(&id) == Some(&1);
        let own = |id: ValueId| alone(id) && matches!(model.value(id).source, Source::Literal(_));
        let members: Vec<Member> = model.nodes.iter().filter_map(member).filter(|member| own(member.weight)).collect();
        let mut siblings = Siblings::default();
        let by_result: HashMap<ValueId, Member> = members.iter().map(|member| (member.result, *member)).collect();
        let made = makers(model);
        for node in &model.nodes {
            let read = self.read_whole(node, &made)?.filter(|read| read.iter().all(|id| alone(*id)));
            let found: Vec<Member> = read.iter().flatten().filter_map(|id| by_result.get(id).copied()).collect();
            if found.len() == 3 {
                self.join_siblings(model, &mut siblings, found, true)?;
            }
        }
        let mut by_input: Vec<(ValueId, Vec<Member>)> = Vec::new();
        for member in members.iter().filter(|member| !siblings.places.contains_key(&member.result)) {
            match by_input.iter_mut().find(|(x, _)| *x == member.x) {
                Some((_, found)) => found.push(*member),
                None => by_input.push((member.x, vec![*member])),
            }
        }
        for (_, found) in by_input {
            let mut rest = found;
            while let Some(first) = rest.first().copied() {
                let (alike, others) = rest.into_iter().partition(|member| self.alike(model, &first, member));
                rest = others;
                let alike: Vec<Member> = alike;
                for some in alike.chunks(MOST).filter(|some| some.len() > 1) {
                    self.join_siblings(model, &mut siblings, some.to_vec(), false)?;
                }
            }
        }
        Ok(siblings)
    }

    /// Queries, keys and values as an attention reads them, where it takes them joined.
    fn read_whole(
        &self,
        node: &Node<Composite>,
        made: &HashMap<ValueId, &Node<Composite>>,
    ) -> Result<Option<[ValueId; 3]>> {
        let (Composite::Attention(op), [Some(query), Some(key), Some(value), ..]) = (&node.op, node.inputs.as_slice())
        else {
            return Ok(None);
        };
        if !matches!(self.options.cache, Cache::Float) || self.not_fused(op)?.is_some() {
            return Ok(None);
        }
        let unrotated = |id: ValueId| {
            let turn = made.get(&id).filter(|node| self.inside.turns(node));
            turn.and_then(|turn| turn.inputs.first().copied().flatten()).unwrap_or(id)
        };
        Ok(Some([unrotated(*query), unrotated(*key), *value]))
    }

    /// True of products that can be computed as one.
    fn alike(&self, model: &Graph<Model>, a: &Member, b: &Member) -> bool {
        let scheme = |member: &Member| self.scheme(&model.value(member.weight).name);
        let kind = |member: &Member| model.ty(member.weight).element;
        let order = |member: &Member| self.order(&model.value(member.weight).name);
        let same = scheme(a) == scheme(b) && order(a) == order(b);
        a.x == b.x && a.bias.is_some() == b.bias.is_some() && same && kind(a) == kind(b)
    }

    /// Joins products, if the target has a form for that.
    fn join_siblings(
        &mut self,
        model: &Graph<Model>,
        siblings: &mut Siblings,
        members: Vec<Member>,
        whole: bool,
    ) -> Result<()> {
        let Some(first) = members.first().copied() else { return Ok(()) };
        if !members.iter().all(|member| self.alike(model, &first, member)) {
            return Ok(());
        }
        let scheme = self.scheme(&model.value(first.weight).name);
        let composite = if scheme.is_some() { "quantized_projections" } else { "projections" };
        let linked = self.options.stored.is_some();
        let joined = self.first_form(composite, |s, form| match (form, scheme) {
            ("joined", None) if linked => {
                Ok(Form::Refused("the checkpoint's files, from which weights are taken, hold them apart".to_owned()))
            }
            ("joined", Some(scheme)) => Ok(match s.options.target.forms("quantized_linear")?.first() {
                Some(form) if form == "MatMulNBits" => unfit_integers(&scheme).map_or(Form::Done(true), Form::Refused),
                _ => Form::Refused("the target has no product with integers".to_owned()),
            }),
            (form, _) => Ok(Form::Done(form == "joined")),
        })?;
        if joined {
            siblings.add(Group { members, scheme, whole, results: Vec::new() });
        }
        Ok(())
    }

    /// The result of a product that is computed with others; none for any other.
    pub(super) fn joined_linear(&mut self, model: &Graph<Model>, node: &Node<Composite>) -> Result<Option<ValueId>> {
        let result = node.outputs.first().copied().flatten();
        let Some((index, place)) = result.and_then(|result| self.siblings.places.get(&result)).copied() else {
            return Ok(None);
        };
        let Some(mut group) = self.siblings.groups.get_mut(index).map(std::mem::take) else { return Ok(None) };
        if group.results.is_empty() {
            group.results = self.write_joined(model, &group)?;
        }
        let result = group.results.get(place).copied();
        if let Some(slot) = self.siblings.groups.get_mut(index) {
            *slot = group;
        }
        Ok(result)
    }

    fn write_joined(&mut self, model: &Graph<Model>, group: &Group) -> Result<Vec<ValueId>> {
        let Some(first) = group.members.first() else { return Ok(Vec::new()) };
        let x = self.value(model, first.x)?;
        let parts = |of: &dyn Fn(&Member) -> Option<ValueId>| -> Vec<(String, Vec<usize>)> {
            group.members.iter().filter_map(of).map(|id| named(model, id)).collect()
        };
        let weights = parts(&|member| Some(member.weight));
        let rows: Vec<usize> = weights.iter().map(|(_, shape)| shape.first().copied().unwrap_or(0)).collect();
        let columns = weights.first().and_then(|(_, shape)| shape.get(1)).copied().unwrap_or(0);
        let kind = model.ty(first.weight).element;
        let scopes = group.members.iter().map(|member| scope(&model.value(member.result).name)).collect::<Vec<_>>();
        self.e.enter(&joined_name(&scopes, '/'));
        let (name, weight) = joined(&weights);
        let biases = parts(&|member| member.bias);
        let bias = if biases.is_empty() { None } else { Some(self.joined_parameter(&biases, kind)?) };
        let product = if let Some(scheme) = &group.scheme {
            // Members have one order of columns.
            let x = self.in_order(&model.value(first.weight).name, x)?;
            self.matmul_nbits((x, bias), (&name, &[rows.iter().sum(), columns]), &weight, scheme)?
        } else {
            let weight = self.joined_parameter(&weights, kind)?;
            self.linear(x, weight, bias)?
        };
        if group.whole {
            self.siblings.whole.insert(product);
            // It is not the queries, which come first, and keeps its own name.
            self.named.insert(product);
            return Ok(vec![product; group.members.len()]);
        }
        self.split(product, &rows)
    }

    /// Parameters joined along their first axis.
    fn joined_parameter(&mut self, parts: &[(String, Vec<usize>)], kind: Kind) -> Result<ValueId> {
        let (name, weight) = joined(parts);
        let rows = parts.iter().filter_map(|(_, shape)| shape.first()).sum::<usize>();
        let rest = parts.first().and_then(|(_, shape)| shape.get(1..)).unwrap_or_default();
        let shape = std::iter::once(rows).chain(rest.iter().copied()).map(Dim::from);
        self.parameter(&name, Type::new(self.element(kind), shape), kind, weight)
    }
}

/// A product with a parameter of its own.
fn member(node: &Node<Composite>) -> Option<Member> {
    let ([Some(x), Some(weight), bias @ ..], [Some(result)]) = (node.inputs.as_slice(), node.outputs.as_slice()) else {
        return None;
    };
    let bias = bias.first().copied().flatten();
    (node.op == Composite::Linear).then_some(Member { x: *x, weight: *weight, bias, result: *result })
}

/// `/model/layers.0/mlp/up_proj/Linear/output` -> `/model/layers.0/mlp/up_proj`
fn scope(result: &str) -> &str {
    result.rsplitn(3, '/').nth(2).unwrap_or(result)
}

fn joined(parts: &[(String, Vec<usize>)]) -> (String, Weight) {
    let names: Vec<&str> = parts.iter().map(|(name, _)| name.as_str()).collect();
    let sources = names.iter().map(|name| Weight::source(*name)).collect();
    (joined_name(&names, '.'), Weight::Concat(0, sources))
}

/// `a.q.weight`, `a.k.weight` -> `a.q+k.weight`
fn joined_name(names: &[&str], separator: char) -> String {
    let parts: Vec<Vec<&str>> = names.iter().map(|name| name.split(separator).collect()).collect();
    let Some(first) = parts.first() else { return String::new() };
    let shortest = parts.iter().map(Vec::len).min().unwrap_or(0);
    let same = |at: &dyn Fn(&Vec<&str>) -> Option<String>| parts.iter().all(|part| at(part) == at(first));
    let before = (0..shortest).take_while(|i| same(&|part| part.get(*i).map(ToString::to_string))).count();
    let behind = (0..shortest.saturating_sub(before + 1))
        .take_while(|i| same(&|part| part.iter().rev().nth(*i).map(ToString::to_string)))
        .count();
    let own = |part: &Vec<&str>| part.get(before..part.len() - behind).unwrap_or_default().join(&separator.to_string());
    let middle = parts.iter().map(own).collect::<Vec<_>>().join("+");
    let (head, tail) = (first.iter().take(before), first.iter().skip(first.len() - behind));
    let all: Vec<&str> = head.copied().chain([middle.as_str()]).chain(tail.copied()).collect();
    all.join(&separator.to_string())
}
