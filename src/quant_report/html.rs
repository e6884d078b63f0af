//! The report as one HTML page that needs nothing else: no scripts, no fonts, no network.

use std::fmt::Write as _;

use super::display::HEADS;
use super::{Report, Scheme, chart, megabytes};
use crate::verify::LayerError;

/// Colours are told apart by lightness too, and each reaches 3:1 against its background, letters 4.5:1.
const STYLE: &str = "\
:root{color-scheme:light dark;--page:#fff;--card:#f6f7f9;--ink:#1a1f26;--soft:#545e6b;--rule:#d3d9e0;\
--point:#0b62a8;--carried:#7d8b9b;--added:#b8430a}\
@media(prefers-color-scheme:dark){:root{--page:#12161b;--card:#1b2128;--ink:#e8ecf1;--soft:#a7b2bf;--rule:#39434e;\
--point:#6cb6f5;--carried:#76879a;--added:#ff9a57}}\
*{box-sizing:border-box}\
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}\
main{max-width:1120px;margin:0 auto;padding:1.25rem 1rem 3rem}\
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .25rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .25rem}\
h3{font-size:1rem;margin:0 0 .35rem;overflow-wrap:anywhere}p{margin:.25rem 0 .75rem}.soft{color:var(--soft);font-size:.9rem}\
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem;min-width:100%}\
th,td{padding:.4rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}\
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--page)}\
thead th{color:var(--soft);font-weight:600}tbody th{font-weight:600}\
.grid2{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:1rem}\
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:.75rem}\
figure.wide{max-width:640px}svg{display:block;width:100%;height:auto}\
svg text{font:11px system-ui,sans-serif;fill:var(--ink)}svg .tick,svg .axis{fill:var(--soft)}svg .label{font-weight:600}\
.grid{stroke:var(--rule);stroke-width:1}.leader{stroke:var(--soft);stroke-width:.75}.point{fill:var(--point)}\
.carried{fill:var(--carried)}.added{fill:var(--added)}\
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .35em 0 0}.key.c{background:var(--carried)}\
.key.a{background:var(--added)}.one{white-space:nowrap}.keys span{margin-right:1.25rem;white-space:nowrap}";

/// A page with the table, sizes against divergences, and the layers' errors.
pub fn page(report: &Report) -> String {
    let title = format!("What quantisation costs: {}", report.model);
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<title>{0}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{0}</h1>\n<p class=\"soft\">{1}</p>\n",
        escape(&title),
        escape(&report.setting()),
    );
    for sentence in report.calibrations() {
        let _ = writeln!(html, "<p class=\"soft\">{}</p>", escape(&sentence));
    }
    table(&mut html, report);
    let _ = write!(
        html,
        "<h2>Size against divergence</h2>\n<p class=\"soft\">Lower and further left is better; each line is ten times \
         the one below it or more. The float build takes {:.2} MB.</p>\n<figure class=\"wide\">{}</figure>\n",
        megabytes(report.reference.bytes),
        chart::scatter(&report.schemes),
    );
    html.push_str(
        "<h2>Errors by layer</h2>\n<p class=\"soft\">Norm of the difference of a layer's output by the norm of the \
         float build's, mean over the positions. Each chart has a scale of its own.</p>\n<p class=\"soft keys\">\
         <span><i class=\"key c\"></i>already in the layer's input</span><span><i class=\"key a\"></i>added by the \
         layer</span></p>\n<div class=\"grid2\">\n",
    );
    for scheme in &report.schemes {
        figure(&mut html, scheme);
    }
    html.push_str("</div>\n</main>\n</body>\n</html>\n");
    html
}

fn table(html: &mut String, report: &Report) {
    html.push_str("<div class=\"scroll\"><table>\n<thead><tr>");
    for head in HEADS {
        let _ = write!(html, "<th scope=\"col\">{head}</th>");
    }
    html.push_str("</tr></thead>\n<tbody>\n");
    for row in report.rows() {
        html.push_str("<tr>");
        for (column, cell) in row.iter().enumerate() {
            let (open, close) = if column == 0 { ("<th scope=\"row\">", "</th>") } else { ("<td>", "</td>") };
            html.extend([open, &escape(cell), close]);
        }
        html.push_str("</tr>\n");
    }
    html.push_str(
        "</tbody>\n</table></div>\n<p class=\"soft\">KL: Kullback-Leibler divergence KL(float || scheme) per position, \
         in nats. Top-1: positions where both put the same token first. Change: of the perplexity.</p>\n",
    );
}

fn figure(html: &mut String, scheme: &Scheme) {
    let name = escape(&scheme.name);
    if scheme.loss.layers.is_empty() {
        let _ =
            writeln!(html, "<figure><h3>{name}</h3><p class=\"soft\">This graph names no hidden states.</p></figure>");
        return;
    }
    let most: Vec<String> = scheme.loss.layers.iter().take(3).map(named).collect();
    let _ = writeln!(
        html,
        "<figure><h3>{name}</h3>{}<figcaption class=\"soft\">Most: {}</figcaption></figure>",
        chart::layers(scheme),
        most.join(", "),
    );
}

/// A layer's error, in one piece.
fn named(layer: &LayerError) -> String {
    format!("<span class=\"one\">{}</span>", escape(&layer.to_string()))
}

/// Text that stands for itself in an element and in a quoted attribute.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            // Of these XML knows none, and a browser shows nothing.
            _ if letter.is_control() && !letter.is_whitespace() => safe.push('\u{fffd}'),
            _ => safe.push(letter),
        }
    }
    safe
}
