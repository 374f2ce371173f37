//! The report as one page: a table and three plots.

use super::Report;
use super::svg::{Plot, Point, Series, escape};
use crate::decode::Knob;

const STYLE: &str = "
:root { color-scheme: light dark; --line: #8884; --text: light-dark(#222, #ddd); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: var(--text); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .25em .7em; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td:nth-child(2) { text-align: left; }
svg { width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--text); }
.grid { stroke: var(--line); }
.front { fill: none; stroke: #888; stroke-dasharray: 5 4; }
";

/// Points that no other beats in both ways: more tokens per second, less perplexity.
fn front(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let beaten =
        |&(x, y): &(f64, f64)| points.iter().any(|&(u, v)| u >= x && v <= y && (u, v) != (x, y));
    let mut front: Vec<_> = points.iter().copied().filter(|point| !beaten(point)).collect();
    front.sort_by(|a, b| a.0.total_cmp(&b.0));
    front
}

impl Report {
    /// Perplexity by tokens per second, a series for each strategy.
    fn trade_off(&self) -> Plot {
        let mut series: Vec<Series> = Vec::new();
        let mut points = Vec::new();
        for (name, row) in self.all() {
            let (Some(rate), Some(perplexity)) = (self.rate(row), row.perplexity) else {
                continue;
            };
            let settings = &row.arm.settings;
            let has_tau = settings.strategy.descriptor().knobs.contains(&Knob::Tau);
            let mark = if has_tau { Knob::Tau.words(settings) } else { String::new() };
            let (y, title) = (perplexity.value, row.arm.label.clone());
            let point = Point { x: rate, y, title, mark };
            points.push((rate, perplexity.value));
            match series.iter_mut().find(|known| known.name == name) {
                Some(known) => known.points.push(point),
                None => series.push(Series { name, points: vec![point], joined: true }),
            }
        }
        let front = front(&points);
        Plot { x: "tokens/s", y: "perplexity under the target", series, front, from_zero: false }
    }

    /// The share of rounds that accepted so far, by depth.
    fn depths(&self) -> Plot {
        let rows = self.all().filter(|(_, row)| row.statistics.drafted() > 0);
        let series = rows.map(|(_, row)| {
            let shares = row.statistics.acceptance_by_depth();
            let point = |(i, share): (usize, f64)| Point {
                x: i as f64 + 1.0,
                y: share,
                title: format!("{share:.3}"),
                mark: String::new(),
            };
            let points = shares.into_iter().enumerate().map(point).collect();
            Series { name: row.arm.label.clone(), points, joined: true }
        });
        let series = series.collect();
        Plot { x: "depth", y: "share accepted so far", series, front: Vec::new(), from_zero: true }
    }

    /// Joules per token by tokens per second.
    fn joules(&self) -> Plot {
        let series = self.all().filter_map(|(_, row)| {
            let (rate, joules) = (self.rate(row)?, row.joules_per_token?);
            let title = format!("{joules:.4} J/token");
            let points = vec![Point { x: rate, y: joules, title, mark: String::new() }];
            Some(Series { name: row.arm.label.clone(), points, joined: false })
        });
        let series = series.collect();
        Plot { x: "tokens/s", y: "J/token", series, front: Vec::new(), from_zero: true }
    }
}

pub(super) fn page(report: &Report) -> String {
    let mut body = String::new();
    let pair = match &report.draft {
        Some(draft) => format!("{} with {draft}", report.target),
        None => report.target.clone(),
    };
    body += &format!("<h1>{}</h1><p>{}</p><dl>", escape(&pair), escape(&report.device));
    for (key, text) in &report.method {
        body += &format!("<dt>{}</dt><dd>{}</dd>", escape(key), escape(text));
    }
    body += "</dl><table>";
    for (i, row) in report.table().iter().enumerate() {
        let tag = if i == 0 { "th" } else { "td" };
        let cells: String =
            row.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect();
        body += &format!("<tr>{cells}</tr>");
    }
    body += "</table>";
    for note in report.notes() {
        body += &format!("<p>{}</p>", escape(&note));
    }
    body += "<h2>Perplexity against speed</h2><p>Below and to the right is better; the dashed line joins \
             what nothing beats in both.</p>";
    body += &report.trade_off().svg();
    body += "<h2>Acceptance by depth</h2><p>Of the rounds that drafted so far, the share that accepted so far.</p>";
    body += &report.depths().svg();
    body += "<h2>Energy per token</h2>";
    body += &match &report.no_joules {
        Some(why) => format!("<p>Unavailable: {}</p>", escape(why)),
        None => report.joules().svg(),
    };
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>mtad eval: {}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body>{body}</body></html>\n",
        escape(&pair)
    )
}

#[cfg(test)]
mod tests {
    use super::front;

    #[test]
    fn the_front_is_what_nothing_beats_in_both_ways() {
        let points = [(1.0, 5.0), (2.0, 4.0), (1.5, 6.0), (3.0, 7.0), (0.5, 3.0)];
        assert_eq!(front(&points), [(0.5, 3.0), (2.0, 4.0), (3.0, 7.0)]);
    }
}
