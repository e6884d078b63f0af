//! Against references that are written straight from the definitions, one value at a time.
#![expect(clippy::cast_precision_loss, clippy::float_cmp, reason = "small numbers, and the very same ones")]

use half::{bf16, f16};
use proptest::prelude::*;
use pulp::Simd;

use super::*;

fn schemes() -> impl Strategy<Value = Scheme> {
    let bits = prop_oneof![Just(2), Just(4), Just(8)];
    let sizes = prop_oneof![Just(16), Just(32), Just(64), Just(128), Just(256)];
    let algorithms = prop_oneof![Just(Algorithm::Nearest), Just(Algorithm::Search)];
    let scales = prop_oneof![Just(ScaleType::Float32), Just(ScaleType::Float16), Just(ScaleType::BFloat16)];
    (bits, any::<bool>(), sizes, algorithms, scales).prop_map(|(bits, symmetric, size, algorithm, scales)| {
        Scheme::new(bits, symmetric, size, algorithm).expect("a scheme").with_scales(scales)
    })
}

/// A few rows whose columns are no multiple of anything, in one of several sizes; some values are zero.
fn matrices() -> impl Strategy<Value = (usize, Vec<f32>)> {
    let sizes = prop_oneof![6 => Just(1.0_f32), 1 => Just(1e4), 1 => Just(1e-3), 1 => Just(0.0)];
    (1_usize..4, 1_usize..300, sizes, -1.0_f32..1.0).prop_flat_map(|(rows, columns, size, shift)| {
        let value = prop_oneof![8 => -1.0_f32..1.0, 1 => Just(0.0), 1 => -4.0_f32..4.0];
        let values = prop::collection::vec(value.prop_map(move |x| (x + shift.max(0.0)) * size), rows * columns);
        values.prop_map(move |values| (columns, values))
    })
}

fn importances(columns: usize) -> Vec<f32> {
    (0..columns).map(|column| f32::from(u8::try_from(column * 37 % 11).expect("small")) / 4.0).collect()
}

/// The integer at a place in a little-endian string of bits.
fn naive_get(bytes: &[u8], index: usize, bits: u8) -> u32 {
    let bit = |at: usize| u32::from(bytes[at / 8] >> (at % 8) & 1);
    (0..usize::from(bits)).map(|b| bit(index * usize::from(bits) + b) << b).sum()
}

fn naive_zero(blocks: &Blocks, row: usize, block: usize, columns: usize, scheme: &Scheme) -> u32 {
    let Some(zeros) = &blocks.zero_points else { return 1 << (scheme.bits() - 1) };
    let bytes = (columns.div_ceil(scheme.block_size()) * usize::from(scheme.bits())).div_ceil(8);
    naive_get(&zeros[row * bytes..(row + 1) * bytes], block, scheme.bits())
}

/// What the operators compute, from their documentation.
fn naive_dequantize(blocks: &Blocks, rows: usize, columns: usize, scheme: &Scheme) -> Vec<f32> {
    let (size, count) = (scheme.block_size(), columns.div_ceil(scheme.block_size()));
    let mut values = Vec::new();
    for row in 0..rows {
        for column in 0..columns {
            let integer = naive_get(&blocks.data, (row * count + column / size) * size + column % size, scheme.bits());
            let zero = naive_zero(blocks, row, column / size, columns, scheme);
            let scale = blocks.scales[row * count + column / size];
            values.push((integer as f32 - zero as f32) * scale);
        }
    }
    values
}

fn naive_store(x: f32, scales: ScaleType) -> f32 {
    match scales {
        ScaleType::Float32 => x,
        ScaleType::Float16 => f16::from_f32(x).to_f32(),
        ScaleType::BFloat16 => bf16::from_f32(x).to_f32(),
    }
}

/// Scale, zero point and integers of plain rounding.
fn naive_nearest(block: &[f32], scheme: &Scheme) -> (f32, f32, Vec<f32>) {
    let (low, high) = block.iter().fold((0.0_f32, 0.0_f32), |(low, high), x| (low.min(*x), high.max(*x)));
    let top = f32::from(u8::MAX >> (8 - scheme.bits()));
    let middle = f32::midpoint(top, 1.0);
    let extreme = if -low >= high { low } else { high };
    let unrounded = if scheme.is_symmetric() { -extreme / middle } else { high / top - low / top };
    let scale = naive_store(unrounded, scheme.scales());
    let zero =
        if scheme.is_symmetric() || scale == 0.0 { middle } else { (-low / scale).round_ties_even().clamp(0.0, top) };
    let integer = |x: &f32| {
        let steps = if scale == 0.0 { 0.0 } else { x * (1.0 / scale) };
        steps.clamp(-zero, top - zero).round_ties_even() + zero
    };
    (scale, zero, block.iter().map(integer).collect())
}

/// Weighted squared error of each block.
fn errors(values: &[f32], found: &[f32], weights: &[f32], columns: usize, size: usize) -> Vec<f64> {
    let rows = values.chunks(columns).zip(found.chunks(columns));
    rows.flat_map(|(values, found)| {
        let parts = values.chunks(size).zip(found.chunks(size)).zip(weights.chunks(size));
        let of = |((values, found), weights): ((&[f32], &[f32]), &[f32])| {
            let each = values.iter().zip(found).zip(weights);
            each.map(|((a, b), w)| (f64::from(*a) - f64::from(*b)).powi(2) * f64::from(*w)).sum()
        };
        parts.map(of).collect::<Vec<f64>>()
    })
    .collect()
}

proptest! {
    #[test]
    fn the_layout_is_the_documented_one(scheme in schemes(), (columns, values) in matrices()) {
        let rows = values.len() / columns;
        let blocks = quantize_rows(&values, columns, None, &scheme).expect("quantises");
        let found = dequantize_rows(&blocks, columns, &scheme).expect("dequantises");
        prop_assert_eq!(&found, &naive_dequantize(&blocks, rows, columns, &scheme));
        prop_assert_eq!(blocks.zero_points.is_none(), scheme.is_symmetric());
        // a short last block ends with its zero point
        let (size, count) = (scheme.block_size(), scheme.blocks(columns));
        for row in 0..rows {
            let zero = naive_zero(&blocks, row, count - 1, columns, &scheme);
            for column in columns..count * size {
                prop_assert_eq!(naive_get(&blocks.data, row * count * size + column, scheme.bits()), zero);
            }
        }
        for scale in &blocks.scales {
            prop_assert_eq!(*scale, naive_store(*scale, scheme.scales()), "as it is stored");
        }
    }

    #[test]
    fn plain_rounding_is_its_definition(scheme in schemes(), (columns, values) in matrices()) {
        let scheme = scheme.with_algorithm(Algorithm::Nearest);
        let blocks = quantize_rows(&values, columns, None, &scheme).expect("quantises");
        let (size, count) = (scheme.block_size(), scheme.blocks(columns));
        for (row, values) in values.chunks(columns).enumerate() {
            for (index, part) in values.chunks(size).enumerate() {
                let (scale, zero, integers) = naive_nearest(part, &scheme);
                prop_assert_eq!(blocks.scales[row * count + index], scale);
                prop_assert_eq!(naive_zero(&blocks, row, index, columns, &scheme) as f32, zero);
                for (offset, integer) in integers.into_iter().enumerate() {
                    let at = (row * count + index) * size + offset;
                    prop_assert_eq!(naive_get(&blocks.data, at, scheme.bits()) as f32, integer);
                }
            }
        }
    }

    #[test]
    fn searching_is_never_worse(scheme in schemes(), (columns, values) in matrices(), weighted: bool) {
        let importance = importances(columns);
        let given = weighted.then_some(importance.as_slice());
        let run = |algorithm| {
            let scheme = scheme.with_algorithm(algorithm);
            let blocks = quantize_rows(&values, columns, given, &scheme).expect("quantises");
            dequantize_rows(&blocks, columns, &scheme).expect("dequantises")
        };
        let (plain, searched) = (run(Algorithm::Nearest), run(Algorithm::Search));
        let weights: Vec<f32> = column_weights(columns, given, &scheme).expect("weights").as_flattened().to_vec();
        let size = scheme.block_size();
        let plain = errors(&values, &plain, &weights, columns, size);
        let searched = errors(&values, &searched, &weights, columns, size);
        // Grids are compared by sums of squares in float32, which tells no errors apart that are nearer than its rounding.
        let sums = errors(&values, &vec![0.0; values.len()], &weights, columns, size);
        for ((plain, searched), sum) in plain.into_iter().zip(searched).zip(sums) {
            let rounding = sum * f64::from(f32::EPSILON);
            prop_assert!(searched <= plain * 1.0001 + rounding, "{searched} after {plain}, of {sum}");
        }
    }

    #[test]
    fn integers_that_are_known_are_packed_alike(scheme in schemes(), (columns, values) in matrices()) {
        let blocks = quantize_rows(&values, columns, None, &scheme).expect("quantises");
        let (bits, count, rows) = (scheme.bits(), scheme.blocks(columns), values.len() / columns);
        let packed = blocks.data.chunks(scheme.row_bytes(columns));
        let code = |row: &[u8], at: usize| u8::try_from(naive_get(row, at, bits)).expect("small");
        let codes: Vec<u8> = packed.flat_map(|row| (0..columns).map(move |at| code(row, at))).collect();
        let places = (0..rows).flat_map(|row| (0..count).map(move |block| (row, block)));
        let zeros: Vec<f32> =
            places.map(|(row, block)| naive_zero(&blocks, row, block, columns, &scheme) as f32).collect();
        let kind = if scheme.is_symmetric() { ZeroPoints::Implicit } else { ZeroPoints::Integers };
        let stored = Scheme::stored(bits, scheme.block_size(), kind, scheme.scales()).expect("a scheme");
        prop_assert_eq!(pack_rows(&codes, blocks.scales.clone(), &zeros, columns, &stored).expect("packs"), blocks);
        prop_assert!(quantize_rows(&values, columns, None, &stored).is_err());
    }

    #[test]
    fn rows_do_not_see_each_other(scheme in schemes(), (columns, values) in matrices()) {
        let importance = importances(columns);
        let whole = quantize_rows(&values, columns, Some(&importance), &scheme).expect("quantises");
        let mut joined = Blocks::zeroed(0, columns, &scheme);
        for row in values.chunks(columns) {
            let one = quantize_rows(row, columns, Some(&importance), &scheme).expect("quantises");
            joined.data.extend(one.data);
            joined.scales.extend(one.scales);
            if let (Some(all), Some(zeros)) = (&mut joined.zero_points, one.zero_points) {
                all.extend(zeros);
            }
        }
        prop_assert_eq!(whole, joined);
    }

    #[test]
    fn instruction_sets_give_the_same_bits(scheme in schemes(), (columns, values) in matrices(), even: bool) {
        let importance = Some(importances(columns)).filter(|_| !even);
        let importance = importance.as_deref();
        let weights = column_weights(columns, importance, &scheme).expect("weights");
        let detected = quantize_rows(&values, columns, importance, &scheme).expect("quantises");
        prop_assert_eq!(&run_on(pulp::Scalar::new(), &values, columns, (&weights, even), &scheme), &detected);
        // What is the same for every column need not be multiplied with.
        prop_assert_eq!(&run_on(pulp::Scalar::new(), &values, columns, (&weights, false), &scheme), &detected);
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V3::try_new() {
            prop_assert_eq!(&run_on(simd, &values, columns, (&weights, even), &scheme), &detected);
        }
    }

    #[test]
    fn scales_round_as_half_does(bits: u32) {
        let x = f32::from_bits(bits);
        prop_assume!(!x.is_nan());
        for scales in [ScaleType::Float32, ScaleType::Float16, ScaleType::BFloat16] {
            prop_assert_eq!(scales.round(x).to_bits(), naive_store(x, scales).to_bits(), "{} as {}", x, scales);
        }
    }
}

fn run_on(
    simd: impl Simd,
    values: &[f32],
    columns: usize,
    (weights, even): (&[Lanes], bool),
    scheme: &Scheme,
) -> Blocks {
    let mut blocks = Blocks::zeroed(values.len() / columns, columns, scheme);
    let zeros = blocks.zero_points.as_deref_mut().unwrap_or_default();
    let out = RowsMut { data: &mut blocks.data, scales: &mut blocks.scales, zeros };
    simd.vectorize(Job { values, columns, weights, scheme, grid: Grid::new(scheme, even), out }).expect("quantises");
    blocks
}

fn int4(symmetric: bool, algorithm: Algorithm) -> Scheme {
    Scheme::new(4, symmetric, 32, algorithm).expect("a scheme")
}

fn there_and_back(values: &[f32], columns: usize, scheme: &Scheme) -> Vec<f32> {
    let blocks = quantize_rows(values, columns, None, scheme).expect("quantises");
    dequantize_rows(&blocks, columns, scheme).expect("dequantises")
}

#[test]
fn only_what_operators_read_can_be_written() {
    for (bits, size) in [(3, 32), (16, 32), (4, 0), (4, 8), (4, 48), (4, 512)] {
        assert!(Scheme::new(bits, true, size, Algorithm::Nearest).is_err(), "{bits} bits, {size}");
    }
}

#[test]
fn integers_that_do_not_fit_are_refused() {
    let of = |kind| Scheme::stored(4, 16, kind, ScaleType::Float32).expect("a scheme");
    let pack = |code: u8, zero: f32, kind| pack_rows(&[code; 20], vec![1.0; 2], &[zero; 2], 20, &of(kind));
    for (code, zero, kind) in [
        (16, 8.0, ZeroPoints::Implicit),
        (0, 7.0, ZeroPoints::Implicit),
        (0, 16.0, ZeroPoints::Integers),
        (0, 0.5, ZeroPoints::Integers),
        (0, -1.0, ZeroPoints::Integers),
        (0, f32::NAN, ZeroPoints::Floats),
    ] {
        assert!(pack(code, zero, kind).is_err(), "{code}, {zero}, {kind:?}");
    }
    assert!(pack(15, 8.0, ZeroPoints::Implicit).is_ok() && pack(15, 0.5, ZeroPoints::Floats).is_ok());
    assert!(pack_rows(&[0; 20], vec![1.0; 1], &[8.0; 2], 20, &of(ZeroPoints::Implicit)).is_err(), "a scale too few");
    assert!(pack_rows(&[0; 21], vec![1.0; 2], &[8.0; 2], 20, &of(ZeroPoints::Implicit)).is_err(), "no whole rows");
}

#[test]
fn values_of_the_grid_come_back() {
    // every integer of a symmetric grid, and of one with a zero point of 3
    let symmetric: Vec<f32> = (-8..8).map(|x| x as f32 * 0.25).collect();
    let shifted: Vec<f32> = (-3..13).map(|x| x as f32 * 0.25).collect();
    for algorithm in [Algorithm::Nearest, Algorithm::Search] {
        assert_eq!(there_and_back(&symmetric, 16, &int4(true, algorithm)), symmetric);
        let mirrored: Vec<f32> = symmetric.iter().map(|x| -x).collect();
        assert_eq!(there_and_back(&mirrored, 16, &int4(true, algorithm)), mirrored, "a negative scale");
        assert_eq!(there_and_back(&shifted, 16, &int4(false, algorithm)), shifted);
    }
}

#[test]
fn blocks_of_one_value() {
    for algorithm in [Algorithm::Nearest, Algorithm::Search] {
        for x in [0.0, 0.3, -0.3, 1e-30, 3e37, -3e37, 1e-36] {
            let scheme = int4(true, algorithm);
            assert_eq!(there_and_back(&[x], 1, &scheme), [x], "alone");
            assert_eq!(there_and_back(&[x; 70], 35, &scheme), [x; 70], "in every column");
            let found = there_and_back(&[x; 70], 35, &int4(false, algorithm));
            assert!(found.iter().all(|y| (y - x).abs() <= x.abs() * 1e-6), "{x}: {found:?}");
        }
    }
    let blocks = quantize_rows(&[0.0; 64], 64, None, &int4(true, Algorithm::Search)).expect("quantises");
    assert_eq!((blocks.data, blocks.scales), (vec![0x88; 32], vec![0.0; 2]));
}

#[test]
fn values_without_a_scale_vanish() {
    // their scales would be subnormal, and their reciprocals infinite
    assert_eq!(there_and_back(&[1e-45, -1e-39], 2, &int4(true, Algorithm::Search)), [0.0; 2]);
    assert_eq!(there_and_back(&[1e-45, 1e-39], 2, &int4(false, Algorithm::Search)), [0.0; 2]);
    let half = int4(true, Algorithm::Search).with_scales(ScaleType::Float16);
    assert_eq!(there_and_back(&[1e-9, -1e-9], 2, &half), [0.0; 2]);
}

#[test]
fn what_is_no_number_is_refused() {
    let scheme = int4(true, Algorithm::Search);
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -f32::NAN] {
        let mut values = vec![0.5; 100 * 2048];
        values[77 * 2048 + 1234] = odd;
        let refused = quantize_rows(&values, 2048, None, &scheme).expect_err("refused");
        assert!(refused.contains("row 77, column 1234"), "{refused}");
        assert!(refused.contains(&odd.to_string()), "{refused}");
    }
    let half = scheme.with_scales(ScaleType::Float16);
    let refused = quantize_rows(&[1.0, 1e7], 1, None, &half).expect_err("refused");
    assert!(refused.contains("row 1, column 0") && refused.contains("float16"), "{refused}");
    assert!(quantize_rows(&[65504.0 * 8.0], 1, None, &half).is_ok());
}

#[test]
fn lengths_must_fit() {
    let scheme = int4(false, Algorithm::Search);
    assert!(quantize_rows(&[1.0; 7], 2, None, &scheme).is_err());
    assert!(quantize_rows(&[1.0; 7], 0, None, &scheme).is_err());
    assert!(quantize_rows(&[1.0; 4], 2, Some(&[1.0]), &scheme).is_err());
    assert!(quantize_rows(&[1.0; 4], 2, Some(&[1.0, -1.0]), &scheme).is_err());
    assert!(quantize_rows(&[1.0; 4], 2, Some(&[1.0, f32::NAN]), &scheme).is_err());
    assert_eq!(quantize_rows(&[], 2, None, &scheme).expect("no rows").data, Vec::<u8>::new());
    let mut blocks = quantize_rows(&[1.0; 4], 2, None, &scheme).expect("quantises");
    blocks.data.pop();
    assert!(dequantize_rows(&blocks, 2, &scheme).is_err());
}

#[test]
fn importance_moves_the_error_to_where_it_costs_less() {
    let values: Vec<f32> = (0..32).map(|x| ((x * 29 % 32) as f32 - 15.3) / 16.0).collect();
    let importance = importances(32);
    for (bits, symmetric) in [(2, true), (2, false), (4, true), (4, false)] {
        let scheme = Scheme::new(bits, symmetric, 32, Algorithm::Search).expect("a scheme");
        let error = |given| {
            let blocks = quantize_rows(&values, 32, given, &scheme).expect("quantises");
            let found = dequantize_rows(&blocks, 32, &scheme).expect("dequantises");
            errors(&values, &found, &importance, 32, 32)[0]
        };
        let (weighted, even) = (error(Some(&importance)), error(None));
        assert!(weighted < even, "{scheme}: {weighted}, not below {even}");
    }
}
