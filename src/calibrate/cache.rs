//! What the caches of a model hold while it reads a text: the scales of caches in 8 bits.

use std::collections::BTreeMap;

use super::Calibration;
use crate::build::caches;
use crate::compile::Measured;
use crate::element::CacheType;
use crate::error::{Code, Error, Result};
use crate::lower::CacheScales;
use crate::recipe::Calibrated;
use crate::session::{self, Probe};
use crate::spec::{ModelSpec, Projection, RopeLayout};

/// How far beyond the largest magnitude of the text the codes reach: another text comes to a little more, and what does
/// not fit is cut off.
const MARGIN: f32 = 1.1;

/// A cache of keys or of values.
#[derive(Debug)]
pub(super) struct CacheSite {
    past: String,
    present: String,
    heads: usize,
    size: usize,
    /// The other element of each element's pair, where a head is rotated; otherwise the element itself.
    partners: Vec<usize>,
}

/// The caches that a model has.
pub(super) fn sites(spec: &ModelSpec) -> Vec<CacheSite> {
    let mut sites = Vec::new();
    for (index, layer) in spec.layers.iter().enumerate().filter(|(_, layer)| layer.attention.shares.is_none()) {
        let attention = &layer.attention;
        let [(past, present), (past_value, present_value)] = caches(index);
        let mut partners: Vec<usize> = (0..attention.key_size).collect();
        if let Some(rope) = &attention.rope {
            // A latent projection rotates the end of a head, every other one its start.
            let latent = matches!(attention.projection, Projection::Latent { .. });
            let start = if latent { attention.key_size.saturating_sub(rope.size) } else { 0 };
            for (at, partner) in partners.iter_mut().skip(start).take(rope.size).enumerate() {
                let half = rope.size / 2;
                *partner = start
                    + match rope.layout {
                        RopeLayout::Half if at < half => at + half,
                        RopeLayout::Half => at - half,
                        RopeLayout::Interleaved => at ^ 1,
                    };
            }
        }
        let heads = attention.kv_heads;
        sites.push(CacheSite { past, present, heads, size: attention.key_size, partners });
        let partners = (0..attention.value_size).collect();
        sites.push(CacheSite { past: past_value, present: present_value, heads, size: attention.value_size, partners });
    }
    sites
}

impl CacheSite {
    /// Raises the largest magnitudes, `[K * D]`, to those of a cache `[1, K, T, D]`.
    ///
    /// A rotation moves the length of a pair between its two elements, and at some position beyond the text all of it is
    /// in one of them: so both have the length as their magnitude.
    fn raise(&self, largest: &mut [f32], cache: &[f32]) {
        let size = self.size.max(1);
        let tokens = cache.len() / (self.heads * size).max(1);
        for (head, largest) in cache.chunks_exact((tokens * size).max(1)).zip(largest.chunks_exact_mut(size)) {
            for token in head.chunks_exact(size) {
                for (at, (largest, partner)) in largest.iter_mut().zip(&self.partners).enumerate() {
                    let own = token.get(at).copied().unwrap_or(f32::NAN);
                    let other = token.get(*partner).copied().unwrap_or(f32::NAN);
                    let magnitude = if *partner == at { own.abs() } else { own.hypot(other) };
                    // `max` would drop a NaN, which has to be seen.
                    *largest = if magnitude.is_nan() || magnitude > *largest { magnitude } else { *largest };
                }
            }
        }
    }
}

impl Calibration {
    /// The scales of the model's caches of a type, each element's by its largest magnitude while the model reads the text.
    ///
    /// # Errors
    /// onnxruntime fails, or a cache holds what is no number.
    pub fn cache_scales(&self, kind: CacheType) -> Result<Measured> {
        let names: Vec<String> = self.caches.iter().map(|site| site.present.clone()).collect();
        let mut largest: Vec<Vec<f32>> = self.caches.iter().map(|site| vec![0.0; site.heads * site.size]).collect();
        let mut probe = Probe::open(self.model.path(), &session::Options::default(), &names)?;
        for window in &self.windows {
            probe.run(window, |index, values| {
                if let (Some(site), Some(largest)) = (self.caches.get(index), largest.get_mut(index)) {
                    site.raise(largest, values);
                }
                Ok(())
            })?;
        }
        let mut scales = BTreeMap::new();
        for (site, largest) in self.caches.iter().zip(largest) {
            if largest.iter().any(|magnitude| !magnitude.is_finite()) {
                return Err(Error::new(Code::RuntimeFailed, &site.present)
                    .found("a number that is not finite")
                    .expected("finite keys and values while the model reads the calibration text")
                    .help(format!("build without --kv-cache {kind}")));
            }
            // An element that is always zero has any scale.
            let scale = |magnitude: f32| if magnitude > 0.0 { magnitude * MARGIN / kind.largest() } else { 1.0 };
            scales.insert(site.past.clone(), largest.into_iter().map(scale).collect());
        }
        let record = Calibrated { method: "largest magnitude", ..self.record.clone() };
        Ok(Measured { scales: CacheScales::new(scales), record })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(heads: usize, partners: Vec<usize>) -> CacheSite {
        CacheSite { past: "past".into(), present: "present".into(), heads, size: partners.len(), partners }
    }

    #[test]
    fn each_element_of_each_head_has_its_largest_magnitude_and_a_rotated_pair_its_length() {
        let plain = site(2, vec![0, 1]);
        let mut largest = vec![0.0; 4];
        // Two heads of three tokens.
        plain.raise(&mut largest, &[1.0, -5.0, 2.0, 0.0, -3.0, 4.0, 0.5, 0.0, 0.0, 0.25, 0.0, 0.0]);
        plain.raise(&mut largest, &[0.0, 0.0, 0.0, -7.0]);
        assert_eq!(largest, [3.0, 5.0, 0.5, 7.0]);
        let rotated = site(1, vec![2, 1, 0]);
        let mut largest = vec![0.0; 3];
        rotated.raise(&mut largest, &[3.0, 9.0, -4.0]);
        assert_eq!(largest, [5.0, 9.0, 5.0]);
        rotated.raise(&mut largest, &[f32::NAN, 0.0, 0.0]);
        assert_eq!([largest[0].is_nan(), largest[1].is_nan(), largest[2].is_nan()], [true, false, true]);
    }
}
