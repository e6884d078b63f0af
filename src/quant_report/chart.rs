//! Drawings of a report, as SVG in the page's own colours.
//!
//! They are drawn as narrow as a phone, and grow with the page: letters stay readable on both.

use std::fmt::Write as _;

use super::display::small;
use super::html::escape;
use super::{Scheme, megabytes};
use crate::verify::LayerError;

const WIDTH: f64 = 360.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 16.0;
/// Height of a line of letters.
const LINE: f64 = 13.0;
/// Width of a letter, on the safe side.
const LETTER: f64 = 7.4;
/// Longest label beside a point.
const LABEL: usize = 26;

/// Size against divergence; both axes named, each point labelled.
pub(super) fn scatter(schemes: &[Scheme]) -> String {
    const HEIGHT: f64 = 320.0;
    const BOTTOM: f64 = HEIGHT - 44.0;
    const TOP: f64 = 30.0;
    let drawn: Vec<&Scheme> = schemes.iter().filter(|s| s.loss.quality.kl_mean.is_finite()).collect();
    let logs = || drawn.iter().map(|s| s.loss.quality.kl_mean).filter(|kl| *kl > 0.0).map(f64::log10);
    let lowest = logs().fold(f64::INFINITY, f64::min).floor();
    let highest = logs().fold(f64::NEG_INFINITY, f64::max) + 0.25;
    let (lowest, highest) = if lowest.is_finite() { (lowest, highest.max(lowest + 1.0)) } else { (-4.0, 0.0) };
    let sizes = || drawn.iter().map(|s| megabytes(s.bytes));
    let (least, most) = (sizes().fold(f64::INFINITY, f64::min).min(1e15), sizes().fold(1e-6, f64::max));
    let step = round_step((most - least).max(most * 0.1) * 1.2, 4.0);
    let start = ((least - step / 3.0) / step).floor().max(0.0) * step;
    let end = ((most + step / 3.0) / step).ceil() * step;
    let x = |size: f64| LEFT + (size - start) / (end - start) * (WIDTH - LEFT - RIGHT);
    // What is nothing lies on the floor.
    let y = |kl: f64| BOTTOM - (kl.max(1e-300).log10().max(lowest) - lowest) / (highest - lowest) * (BOTTOM - TOP);
    let mut svg = open(HEIGHT, "Mean KL divergence of each scheme against its size on disk");
    let mut decade = lowest;
    while decade <= highest {
        let at = y(10_f64.powf(decade));
        horizontal(&mut svg, at, &decade_label(decade));
        decade += ((highest - lowest) / 6.0).ceil().max(1.0);
    }
    let mut tick = start;
    while tick <= end + step / 2.0 {
        text(&mut svg, (x(tick), BOTTOM + LINE + 2.0), "middle", "tick", &number(tick, step));
        tick += step;
    }
    text(&mut svg, (WIDTH / 2.0, HEIGHT - 8.0), "middle", "axis", "size on disk, MB");
    text(&mut svg, (2.0, 11.0), "start", "axis", "mean KL, nats");
    let places: Vec<(f64, f64)> = drawn.iter().map(|s| (x(megabytes(s.bytes)), y(s.loss.quality.kl_mean))).collect();
    let mut labels: Vec<Label> = Vec::new();
    for (scheme, place) in drawn.iter().zip(&places) {
        let label = Label::beside(&scheme.name, *place, &places, &labels, (TOP, BOTTOM));
        point(&mut svg, scheme, *place, &label);
        labels.push(label);
    }
    svg.push_str("</svg>");
    svg
}

/// Where a name stands.
struct Label {
    text: String,
    /// Its left edge.
    from: f64,
    width: f64,
    /// The middle of its height.
    at: f64,
}

impl Label {
    /// The nearest place to a point that neither other points nor other labels take; beside it where there is none.
    fn beside(
        name: &str,
        point: (f64, f64),
        points: &[(f64, f64)],
        labels: &[Self],
        (top, bottom): (f64, f64),
    ) -> Self {
        let text = shortened(name);
        let width = length(&text) * LETTER;
        let apart = |from: f64, at: f64, left: f64, wide: f64, middle: f64| {
            from > left + wide || from + width < left || (at - middle).abs() >= LINE - 1.0
        };
        let free = |from: f64, at: f64| {
            let inside = from >= LEFT && from + width <= WIDTH && at > top - LINE && at < bottom - 4.0;
            // A label right beside another point would seem to be that one's.
            let mut others = points.iter().filter(|other| **other != point);
            inside
                && others.all(|(x, y)| apart(from, at, x - 14.0, 28.0, *y))
                && labels.iter().all(|other| apart(from, at, other.from, other.width, other.at))
        };
        let rows = [0.0, -1.0, 1.0, -2.0, 2.0, -3.0, 3.0, -4.0, 4.0, -5.0, 5.0].map(|row| row * LINE);
        let (x, y) = point;
        let mut places = rows.iter().flat_map(|row| {
            let away = 9.0 + row.abs() / 2.0;
            [(x + away, y + row), (x - away - width, y + row)]
        });
        let (from, at) = places.find(|(from, at)| free(*from, *at)).unwrap_or((x + 9.0, y));
        Self { text, from, width, at }
    }
}

/// A point with its label.
fn point(svg: &mut String, scheme: &Scheme, (x, y): (f64, f64), label: &Label) {
    let _ = write!(
        svg,
        "<g><title>{}: {:.2} MB, mean KL {}</title>",
        escape(&scheme.name),
        megabytes(scheme.bytes),
        small(scheme.loss.quality.kl_mean)
    );
    if (label.at - y).abs() > 1.0 {
        let near = if label.from > x { label.from - 2.0 } else { label.from + label.width + 2.0 };
        let _ =
            write!(svg, "<line class=\"leader\" x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{near:.1}\" y2=\"{:.1}\"/>", label.at);
    }
    let _ = write!(svg, "<circle class=\"point\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\"/>");
    // A label on the left ends where its point begins.
    let (anchor, edge) = if label.from > x { ("start", label.from) } else { ("end", label.from + label.width) };
    text(svg, (edge, label.at + 4.0), anchor, "label", &label.text);
    svg.push_str("</g>");
}

/// A bar for each layer, in the model's order: the error of its output, and what of that its input did not have.
pub(super) fn layers(scheme: &Scheme) -> String {
    const HEIGHT: f64 = 190.0;
    const BOTTOM: f64 = HEIGHT - 38.0;
    let mut layers: Vec<&LayerError> = scheme.loss.layers.iter().filter(|layer| layer.error.is_finite()).collect();
    layers.sort_by_key(|layer| place(&layer.name));
    let most = layers.iter().map(|layer| 100.0 * layer.error).fold(0.0, f64::max).max(1e-9);
    let step = round_step(most, 4.0);
    let end = (most / step).ceil() * step;
    let y = |percent: f64| BOTTOM - percent / end * (BOTTOM - TOP);
    let mut svg = open(HEIGHT, &format!("Error of each layer's output with {}", scheme.name));
    let mut tick = 0.0;
    while tick <= end + step / 2.0 {
        horizontal(&mut svg, y(tick), &format!("{} %", number(tick, step)));
        tick += step;
    }
    let slot = (WIDTH - LEFT - RIGHT) / length_of(layers.len()).max(1.0);
    let wide = (slot * 0.76).min(34.0);
    // As many names as there is room for.
    let every = (4.0 * LETTER / slot).ceil().max(1.0);
    let mut x = LEFT + slot / 2.0;
    for (index, layer) in layers.iter().enumerate() {
        let (error, added) = (100.0 * layer.error, 100.0 * layer.increase.clamp(0.0, layer.error));
        let _ = write!(svg, "<g><title>{}</title>", escape(&layer.to_string()));
        bar(&mut svg, "carried", (x - wide / 2.0, wide), (y(error - added), y(0.0)));
        bar(&mut svg, "added", (x - wide / 2.0, wide), (y(error), y(error - added)));
        svg.push_str("</g>");
        if length_of(index) % every < 0.5 || index + 1 == layers.len() {
            text(&mut svg, (x, BOTTOM + LINE), "middle", "tick", short(&layer.name));
        }
        x += slot;
    }
    text(&mut svg, (WIDTH / 2.0, HEIGHT - 8.0), "middle", "axis", "layer");
    svg.push_str("</svg>");
    svg
}

fn open(height: f64, says: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">", escape(says))
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, class: &str, words: &str) {
    let words = escape(words);
    let _ = write!(svg, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>");
}

/// A line across, and what it stands for.
fn horizontal(svg: &mut String, y: f64, words: &str) {
    let end = WIDTH - RIGHT;
    let _ = write!(svg, "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{end}\" y2=\"{y:.1}\"/>");
    text(svg, (LEFT - 5.0, y + 4.0), "end", "tick", words);
}

fn bar(svg: &mut String, class: &str, (x, width): (f64, f64), (top, bottom): (f64, f64)) {
    let height = (bottom - top).max(0.0);
    let _ = write!(
        svg,
        "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>"
    );
}

/// Where a layer stands in the model.
fn place(name: &str) -> usize {
    match name.strip_prefix("layers.").map(str::parse::<usize>) {
        Some(Ok(layer)) => layer.saturating_add(1),
        _ if name == "embedding" => 0,
        _ => usize::MAX,
    }
}

/// A layer's name under its bar.
fn short(name: &str) -> &str {
    match name {
        "embedding" => "emb",
        "lm_head" => "head",
        _ => name.strip_prefix("layers.").unwrap_or(name),
    }
}

/// A step of 1, 2 or 5 times a power of ten, of which some `count` reach `end`.
fn round_step(end: f64, count: f64) -> f64 {
    let rough = end / count;
    let power = 10_f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|digit| digit * power).find(|step| *step >= rough * 0.999).unwrap_or(10.0 * power)
}

/// A tick's number, with the digits that its step has.
fn number(value: f64, step: f64) -> String {
    let digits = [1.0, 0.1, 0.01, 0.001].into_iter().position(|unit| step >= unit * 0.999).unwrap_or(4);
    format!("{value:.digits$}")
}

fn decade_label(decade: f64) -> String {
    if decade >= -3.0 { format!("{}", 10_f64.powf(decade)) } else { format!("1e{decade}") }
}

fn shortened(name: &str) -> String {
    if name.chars().count() <= LABEL {
        return name.to_owned();
    }
    name.chars().take(LABEL - 1).chain(['…']).collect()
}

fn length(text: &str) -> f64 {
    length_of(text.chars().count())
}

fn length_of(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}
