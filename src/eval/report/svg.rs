//! Plots as SVG.

use std::fmt::Write;

/// One line or cloud of points.
#[derive(Debug, Clone)]
pub(super) struct Series {
    /// In the legend.
    pub name: String,
    /// (x, y, what the point is).
    pub points: Vec<(f64, f64, String)>,
    /// Joined by a line.
    pub joined: bool,
}

/// A plot.
#[derive(Debug, Clone)]
pub(super) struct Plot {
    pub x: &'static str,
    pub y: &'static str,
    pub series: Vec<Series>,
    /// A dashed line, for what is best.
    pub front: Vec<(f64, f64)>,
    /// Whether both axes begin at 0.
    pub from_zero: bool,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 220.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 48.0;
/// Colours that people with colour blindness can tell apart (Okabe and Ito 2008).
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#a0a000"];

/// Text as it may stand in XML.
pub(super) fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('"', "&quot;")
}

/// Some 5 round numbers that cover a range.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = ((high - low) / 5.0).max(1e-12);
    let power = 10f64.powf(rough.log10().floor());
    let round = [1.0, 2.0, 5.0, 10.0].into_iter().find(|m| m * power >= rough).unwrap_or(10.0);
    let step = round * power;
    let first = (low / step).floor();
    let count = ((high / step).ceil() - first) as usize;
    (0..=count.min(20)).map(|i| (first + i as f64) * step).collect()
}

/// A number without the noise of binary fractions.
fn label(x: f64) -> String {
    let text = format!("{x:.6}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl Plot {
    fn ticks(&self, axis: impl Fn(&(f64, f64)) -> f64) -> Vec<f64> {
        let points = self.series.iter().flat_map(|s| s.points.iter().map(|p| (p.0, p.1)));
        let values: Vec<f64> = points.map(|point| axis(&point)).collect();
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let low = if self.from_zero { 0.0 } else { low };
        ticks(low, if high > low { high } else { low + 1.0 })
    }

    /// The plot; a sentence if it has no point.
    pub(super) fn svg(&self) -> String {
        if self.series.iter().all(|series| series.points.is_empty()) {
            return "<p>Nothing to show.</p>".to_owned();
        }
        let (xs, ys) = (self.ticks(|p| p.0), self.ticks(|p| p.1));
        let scale = |ticks: &[f64], value: f64| {
            let (first, last) = (ticks[0], ticks[ticks.len() - 1]);
            (value - first) / (last - first)
        };
        let at_x = |x: f64| LEFT + scale(&xs, x) * (WIDTH - LEFT - RIGHT);
        let at_y = |y: f64| HEIGHT - BOTTOM - scale(&ys, y) * (HEIGHT - TOP - BOTTOM);
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        let mut out = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{} by {}\">",
            escape(self.y),
            escape(self.x)
        );
        // (Writing to a string does not fail.)
        let mut put = |text: std::fmt::Arguments<'_>| out.write_fmt(text).unwrap_or_default();
        for &x in &xs {
            let (at, text) = (at_x(x), label(x));
            put(format_args!(
                "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\"/>"
            ));
            put(format_args!(
                "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{text}</text>",
                bottom + 18.0
            ));
        }
        for &y in &ys {
            let (at, text) = (at_y(y), label(y));
            put(format_args!(
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>"
            ));
            put(format_args!(
                "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
                LEFT - 8.0,
                at + 4.0
            ));
        }
        let middle = (LEFT + right) / 2.0;
        put(format_args!(
            "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            HEIGHT - 8.0,
            escape(self.x)
        ));
        put(format_args!(
            "<text transform=\"translate(14 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            (TOP + bottom) / 2.0,
            escape(self.y)
        ));
        let path = |points: &mut dyn Iterator<Item = (f64, f64)>| {
            let points = points.map(|(x, y)| format!("{:.1},{:.1}", at_x(x), at_y(y)));
            points.collect::<Vec<_>>().join(" ")
        };
        if self.front.len() > 1 {
            let points = path(&mut self.front.iter().copied());
            put(format_args!("<polyline class=\"front\" points=\"{points}\"/>"));
        }
        for (i, series) in self.series.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            if series.joined {
                let points = path(&mut series.points.iter().map(|p| (p.0, p.1)));
                put(format_args!(
                    "<polyline fill=\"none\" stroke=\"{colour}\" points=\"{points}\"/>"
                ));
            }
            for (x, y, what) in &series.points {
                let (cx, cy, what) = (at_x(*x), at_y(*y), escape(what));
                put(format_args!(
                    "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"4\" fill=\"{colour}\"><title>{what}</title></circle>"
                ));
            }
            let y = TOP + 12.0 + 18.0 * i as f64;
            let (x, name) = (right + 16.0, escape(&series.name));
            put(format_args!("<circle cx=\"{x}\" cy=\"{y}\" r=\"4\" fill=\"{colour}\"/>"));
            put(format_args!("<text x=\"{}\" y=\"{}\">{name}</text>", x + 10.0, y + 4.0));
        }
        out.push_str("</svg>");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(ticks(0.0, 1.0), [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(label(0.6000000000000001), "0.6");
        for (low, high) in [(3.1, 7.3), (-2.0, 900.0), (1e-3, 1.1e-3)] {
            let found = ticks(low, high);
            assert!(found[0] <= low && found[found.len() - 1] >= high, "{found:?}");
            assert!((3..=12).contains(&found.len()), "{found:?}");
        }
    }

    #[test]
    fn what_users_name_cannot_break_the_page() {
        let series = Series {
            name: "<b>".to_owned(),
            points: vec![(1.0, 1.0, "\"&".to_owned())],
            joined: true,
        };
        let plot = Plot { x: "x", y: "y", series: vec![series], front: vec![], from_zero: false };
        let svg = plot.svg();
        assert!(svg.contains("&lt;b&gt;") && svg.contains("&quot;&amp;") && !svg.contains("<b>"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}
