//! Every transform against a reference that follows its definition one element at a time, in any order and any part.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::weight::Split;

/// Sources `t0`, `t1`, ... whose elements are all different.
struct Sources {
    element: ElementType,
    shapes: Vec<Vec<usize>>,
}

impl Sources {
    fn index(name: &str) -> usize {
        name[1..].parse().unwrap()
    }

    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    fn value(source: usize, flat: usize) -> f32 {
        ((source * 31 + flat) % 256) as f32
    }
}

impl Tensors for Sources {
    type Error = String;

    fn describe(&self, name: &str) -> Result<(ElementType, Vec<usize>), String> {
        Ok((self.element, self.shapes.get(Self::index(name)).ok_or("no such tensor")?.clone()))
    }

    fn read(&self, name: &str, first: usize, out: &mut [u8]) -> Result<(), String> {
        let source = Self::index(name);
        let values: Vec<f32> = (0..out.len() / self.element.size()).map(|i| Self::value(source, first + i)).collect();
        assert!(first + values.len() <= self.shapes[source].iter().product(), "a read beyond the end");
        write_floats(&values, self.element, out)
    }
}

/// A random expression of the wanted shape.
fn expression(shape: &[usize], depth: usize, rng: &mut ChaCha8Rng, sources: &mut Sources) -> Weight {
    let source = |sources: &mut Sources| {
        sources.shapes.push(shape.to_vec());
        Weight::source(format!("t{}", sources.shapes.len() - 1))
    };
    if depth == 0 || shape.is_empty() {
        return source(sources);
    }
    let axis = rng.random_range(0..shape.len());
    let with_axis = |size: usize| {
        let mut shape = shape.to_vec();
        shape[axis] = size;
        shape
    };
    let divisors: Vec<usize> = (1..=shape[axis].max(1)).filter(|d| shape[axis].is_multiple_of(*d)).collect();
    let divisor = divisors[rng.random_range(0..divisors.len())];
    match rng.random_range(0..8) {
        0 => source(sources),
        1 => {
            let count: usize = shape.iter().product();
            let rows =
                (1..=count.max(1)).rev().find(|rows| rows * rows <= count && count.is_multiple_of(*rows)).unwrap_or(1);
            let other = if rng.random_bool(0.5) { vec![count] } else { vec![rows, count / rows] };
            Weight::Reshape(shape.to_vec(), Box::new(expression(&other, depth - 1, rng, sources)))
        }
        2 if shape.len() > 1 => {
            let mut other = shape.to_vec();
            let rank = other.len();
            other.swap(rank - 1, rank - 2);
            Weight::Transpose(Box::new(expression(&other, depth - 1, rng, sources)))
        }
        3 if shape[0] > 0 => {
            Weight::Stack((0..shape[0]).map(|_| expression(&shape[1..], depth - 1, rng, sources)).collect())
        }
        4 => {
            let first = rng.random_range(0..=shape[axis]);
            let sizes = [first, shape[axis] - first];
            Weight::Concat(axis, sizes.map(|size| expression(&with_axis(size), depth - 1, rng, sources)).into())
        }
        5 => {
            let rows = with_axis(shape[axis] / divisor);
            Weight::Interleave(axis, (0..divisor).map(|_| expression(&rows, depth - 1, rng, sources)).collect())
        }
        6 => {
            let (before, after) = (divisor * rng.random_range(0..3), divisor * rng.random_range(0..3));
            let split = Split { axis, groups: divisor, sizes: vec![before, shape[axis], after], index: 1 };
            let whole = with_axis(before + shape[axis] + after);
            Weight::Split(split, Box::new(expression(&whole, depth - 1, rng, sources)))
        }
        _ if sources.element == ElementType::F32 => {
            Weight::AddOne(Box::new(expression(shape, depth - 1, rng, sources)))
        }
        _ => source(sources),
    }
}

fn unravel(mut flat: usize, shape: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = shape
        .iter()
        .rev()
        .map(|size| {
            let i = flat % size;
            flat /= size;
            i
        })
        .collect();
    index.reverse();
    index
}

fn ravel(index: &[usize], shape: &[usize]) -> usize {
    index.iter().zip(shape).fold(0, |flat, (i, size)| flat * size + i)
}

/// One element of an expression, by its definition.
fn naive(weight: &Weight, index: &[usize], sources: &Sources) -> f32 {
    let shape =
        |weight: &Weight| weight.shape(&|name: &str| sources.shapes.get(Sources::index(name)).cloned()).unwrap();
    let with = |axis: usize, i: usize| {
        let mut index = index.to_vec();
        index[axis] = i;
        index
    };
    match weight {
        Weight::Source(name) => {
            let source = Sources::index(name);
            Sources::value(source, ravel(index, &sources.shapes[source]))
        }
        Weight::Reshape(seen, of) => naive(of, &unravel(ravel(index, seen), &shape(of)), sources),
        Weight::AddOne(of) => naive(of, index, sources) + 1.0,
        Weight::Transpose(of) => {
            let mut index = index.to_vec();
            let rank = index.len();
            index.swap(rank - 1, rank - 2);
            naive(of, &index, sources)
        }
        Weight::Stack(parts) => naive(&parts[index[0]], &index[1..], sources),
        Weight::Interleave(axis, parts) => {
            let row = index[*axis];
            naive(&parts[row % parts.len()], &with(*axis, row / parts.len()), sources)
        }
        Weight::Concat(axis, parts) => {
            let mut row = index[*axis];
            for part in parts {
                let length = shape(part)[*axis];
                if row < length {
                    return naive(part, &with(*axis, row), sources);
                }
                row -= length;
            }
            unreachable!("beyond the end")
        }
        Weight::Split(split, of) => {
            let each: Vec<usize> = split.sizes.iter().map(|size| size / split.groups).collect();
            let before: usize = each[..split.index].iter().sum();
            let (group, row) = (index[split.axis] / each[split.index], index[split.axis] % each[split.index]);
            naive(of, &with(split.axis, group * each.iter().sum::<usize>() + before + row), sources)
        }
    }
}

fn floats(bytes: &[u8], element: ElementType) -> Vec<f32> {
    let mut values = Vec::new();
    read_floats(bytes, element, &mut values).unwrap();
    values
}

fn check(weight: &Weight, shape: &[usize], sources: &Sources, cuts: &[usize]) {
    let evaluation = Evaluation::new(weight, sources).unwrap();
    assert_eq!(evaluation.shape, shape, "{weight}");
    let count = evaluation.count();
    let wanted: Vec<f32> = (0..count).map(|flat| naive(weight, &unravel(flat, shape), sources)).collect();
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (count + 1)).chain([0, count]).collect();
    ends.sort_unstable();
    for range in ends.windows(2) {
        let mut out = vec![0; (range[1] - range[0]) * evaluation.element.size()];
        evaluation.fill(sources, range[0], &mut out).unwrap();
        let found = floats(&out, evaluation.element);
        assert_eq!(found, wanted[range[0]..range[1]], "{weight}: elements {range:?} of {shape:?}");
    }
    check_origins(&evaluation, weight, &wanted);
}

/// True if nothing is computed or turned.
fn moved(weight: &Weight) -> bool {
    match weight {
        Weight::Source(_) => true,
        Weight::AddOne(_) | Weight::Transpose(_) => false,
        Weight::Concat(_, parts) | Weight::Stack(parts) | Weight::Interleave(_, parts) => parts.iter().all(moved),
        Weight::Split(_, of) | Weight::Reshape(_, of) => moved(of),
    }
}

/// Where elements come from, which is known of all but those that are computed or turned.
fn check_origins(evaluation: &Evaluation, weight: &Weight, wanted: &[f32]) {
    let moved = moved(weight);
    for (flat, wanted) in wanted.iter().enumerate() {
        match evaluation.origin(flat) {
            Some((name, at)) => {
                assert_eq!(Sources::value(Sources::index(name), at).to_bits(), wanted.to_bits(), "{weight}: {flat}");
            }
            None => assert!(!moved, "{weight}: the origin of {flat}"),
        }
    }
    let columns = evaluation.shape.last().copied().unwrap_or(1).max(1);
    if evaluation.moves_rows() {
        for flat in 0..wanted.len() {
            let (first, within) = (flat - flat % columns, flat % columns);
            let (name, at) = evaluation.origin(first).unwrap();
            assert!(evaluation.origin(flat) == Some((name, at + within)) && at % columns == 0, "{weight}: {flat}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_part_of_any_expression(
        shape in prop::collection::vec(0_usize..7, 0..4), depth in 1_usize..4, seed in any::<u64>(), narrow in any::<bool>(),
        cuts in prop::collection::vec(0_usize..400, 0..4),
    ) {
        let element = if narrow { ElementType::BF16 } else { ElementType::F32 };
        let mut sources = Sources { element, shapes: Vec::new() };
        let weight = expression(&shape, depth, &mut ChaCha8Rng::seed_from_u64(seed), &mut sources);
        check(&weight, &shape, &sources, &cuts);
    }
}

/// The table in words: what each transform does to two small matrices.
#[test]
fn by_hand() {
    let sources = Sources { element: ElementType::F32, shapes: vec![vec![2, 2], vec![2, 2]] };
    let (a, b) = (Weight::source("t0"), Weight::source("t1"));
    let all = |weight: &Weight| {
        let evaluation = Evaluation::new(weight, &sources).unwrap();
        let mut out = vec![0; evaluation.count() * 4];
        evaluation.fill(&sources, 0, &mut out).unwrap();
        (evaluation.shape, floats(&out, ElementType::F32))
    };
    let ab = || vec![a.clone(), b.clone()];
    assert_eq!(all(&Weight::Concat(1, ab())), (vec![2, 4], vec![0., 1., 31., 32., 2., 3., 33., 34.]));
    assert_eq!(all(&Weight::Interleave(0, ab())), (vec![4, 2], vec![0., 1., 31., 32., 2., 3., 33., 34.]));
    assert_eq!(all(&Weight::Interleave(1, ab())), (vec![2, 4], vec![0., 31., 1., 32., 2., 33., 3., 34.]));
    assert_eq!(all(&Weight::Stack(ab())), (vec![2, 2, 2], vec![0., 1., 2., 3., 31., 32., 33., 34.]));
    assert_eq!(all(&Weight::Transpose(Box::new(a.clone()))), (vec![2, 2], vec![0., 2., 1., 3.]));
    assert_eq!(all(&Weight::AddOne(Box::new(a.clone()))), (vec![2, 2], vec![1., 2., 3., 4.]));
    let split = Split { axis: 1, groups: 1, sizes: vec![1, 1], index: 1 };
    assert_eq!(all(&Weight::Split(split, Box::new(a.clone()))), (vec![2, 1], vec![1., 3.]));
    assert!(Evaluation::new(&Weight::Reshape(vec![5], Box::new(a.clone())), &sources).is_err());
    assert!(Evaluation::new(&Weight::source("t9"), &sources).is_err());
    let rows = |weight: &Weight| Evaluation::new(weight, &sources).unwrap().moves_rows();
    assert!(rows(&a) && rows(&Weight::Stack(ab())) && rows(&Weight::Interleave(0, ab())));
    assert!(!rows(&Weight::Concat(1, ab())) && !rows(&Weight::Transpose(Box::new(a.clone()))));
}
