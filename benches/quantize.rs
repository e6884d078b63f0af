//! Speed of quantisation on one core: `cargo bench --bench quantize`, millions of weights per second.
//!
//! Each figure is the best of many short runs, so that what else the machine does counts little.
#![expect(clippy::print_stdout, reason = "the table is the result")]

use std::time::{Duration, Instant};

use hf2onnx::quantize::{Algorithm, Inputs, ScaleType, Scheme, quantize_rows, quantize_with_inputs};

const COLUMNS: usize = 2048;
const ROWS: usize = 128;
const RUNS: usize = 60;

fn main() -> Result<(), String> {
    let values = noise(ROWS * COLUMNS);
    // Work on this thread alone: figures per core.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().map_err(|e| e.to_string())?;
    pool.install(|| {
        for bits in [4, 8, 2] {
            for (symmetric, block_size) in [(true, 32), (true, 128), (false, 32), (false, 128)] {
                for algorithm in [Algorithm::Nearest, Algorithm::Search] {
                    let scheme = Scheme::new(bits, symmetric, block_size, algorithm)?;
                    let float32 = speed(&values, RUNS, || quantize_rows(&values, COLUMNS, None, &scheme))?;
                    let scheme = scheme.with_scales(ScaleType::Float16);
                    let float16 = speed(&values, RUNS, || quantize_rows(&values, COLUMNS, None, &scheme))?;
                    println!("{scheme}, {algorithm:?}: {float32:.0} M/s, float16 scales {float16:.0} M/s");
                }
            }
        }
        calibrated(&values)
    })
}

/// The mode that uses data, whose cost grows with the number of columns.
fn calibrated(values: &[f32]) -> Result<(), String> {
    let mut moments = vec![0.0; COLUMNS * COLUMNS];
    moments.iter_mut().step_by(COLUMNS + 1).for_each(|value| *value = 1.0);
    let start = Instant::now();
    let inputs = Inputs::new(moments, COLUMNS)?;
    println!("factoring {COLUMNS} columns: {:.2} s", start.elapsed().as_secs_f64());
    let scheme = Scheme::new(4, true, 128, Algorithm::Search)?;
    let speed = speed(values, 3, || quantize_with_inputs(values, &inputs, &scheme))?;
    println!("{scheme}, error feedback over {COLUMNS} columns: {speed:.1} M/s");
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a count")]
fn speed<T>(values: &[f32], runs: usize, run: impl Fn() -> Result<T, String>) -> Result<f64, String> {
    let mut best = Duration::MAX;
    for _ in 0..runs {
        let start = Instant::now();
        std::hint::black_box(run()?);
        best = best.min(start.elapsed());
    }
    Ok(values.len() as f64 / best.as_secs_f64() / 1e6)
}

/// Values like a layer's: bell-shaped, the same in every run.
fn noise(count: usize) -> Vec<f32> {
    let mut state = 1_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        f32::from(u16::try_from(state >> 48).unwrap_or(0)) / 65536.0 - 0.5
    };
    (0..count).map(|_| (uniform() + uniform() + uniform() + uniform()) * 0.02).collect()
}
