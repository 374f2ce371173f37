//! Plots as SVG.

/// A point.
#[derive(Debug, Clone)]
pub(super) struct Point {
    pub x: f64,
    pub y: f64,
    /// What it is, where a pointer rests on it.
    pub title: String,
    /// Beside it, if not empty.
    pub mark: String,
}

/// One line or cloud of points.
#[derive(Debug, Clone)]
pub(super) struct Series {
    /// In the legend.
    pub name: String,
    /// The points, in the order in which a line joins them.
    pub points: Vec<Point>,
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

const WIDTH: f64 = 880.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 260.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 48.0;
/// Colours that people with colour blindness can tell apart (Okabe and Ito 2008).
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#a0a000"];

/// Text as it may stand in XML.
pub(super) fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('"', "&quot;").replace('\'', "&#39;")
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
        let points = self.series.iter().flat_map(|s| s.points.iter().map(|p| (p.x, p.y)));
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
        let frame = Frame { xs: self.ticks(|p| p.0), ys: self.ticks(|p| p.1) };
        let mut out = format!(
            "<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{} by {}'>",
            escape(self.y),
            escape(self.x)
        );
        out += &frame.axes(self.x, self.y);
        if self.front.len() > 1 {
            let points = frame.path(self.front.iter().copied());
            out += &format!("<polyline class='front' points='{points}'/>");
        }
        for (i, series) in self.series.iter().enumerate() {
            out += &frame.series(i, series);
        }
        out + "</svg>"
    }
}

/// The axes: their ticks, of which the first and the last are the ends.
struct Frame {
    xs: Vec<f64>,
    ys: Vec<f64>,
}

impl Frame {
    fn x(&self, x: f64) -> f64 {
        LEFT + share(&self.xs, x) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, y: f64) -> f64 {
        HEIGHT - BOTTOM - share(&self.ys, y) * (HEIGHT - TOP - BOTTOM)
    }

    fn path(&self, points: impl Iterator<Item = (f64, f64)>) -> String {
        let points = points.map(|(x, y)| format!("{:.1},{:.1}", self.x(x), self.y(y)));
        points.collect::<Vec<_>>().join(" ")
    }

    fn axes(&self, x_name: &str, y_name: &str) -> String {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        let line = |x1: f64, x2: f64, y1: f64, y2: f64| {
            format!("<line class='grid' x1='{x1:.1}' x2='{x2:.1}' y1='{y1:.1}' y2='{y2:.1}'/>")
        };
        let mut out = String::new();
        for &x in &self.xs {
            let at = self.x(x);
            out += &line(at, at, TOP, bottom);
            out += &text(at, bottom + 18.0, "middle", &label(x));
        }
        for &y in &self.ys {
            let at = self.y(y);
            out += &line(LEFT, right, at, at);
            out += &text(LEFT - 8.0, at + 4.0, "end", &label(y));
        }
        out += &text((LEFT + right) / 2.0, HEIGHT - 8.0, "middle", x_name);
        let turned = text(0.0, 0.0, "middle", y_name);
        let (x, y) = (14.0, (TOP + bottom) / 2.0);
        out + &format!("<g transform='translate({x} {y}) rotate(-90)'>{turned}</g>")
    }

    /// A series, with its line in the legend.
    fn series(&self, i: usize, series: &Series) -> String {
        let colour = COLOURS[i % COLOURS.len()];
        // What has the colour of another is dashed.
        let dash = if i < COLOURS.len() { "" } else { " stroke-dasharray='2 3'" };
        let mut out = String::new();
        if series.joined {
            let points = self.path(series.points.iter().map(|p| (p.x, p.y)));
            out += &format!("<polyline fill='none' stroke='{colour}'{dash} points='{points}'/>");
        }
        let circle = |x: f64, y: f64, title: &str| {
            let title = escape(title);
            format!(
                "<circle cx='{x:.1}' cy='{y:.1}' r='4' fill='{colour}'><title>{title}</title></circle>"
            )
        };
        for point in &series.points {
            let (x, y) = (self.x(point.x), self.y(point.y));
            out += &circle(x, y, &point.title);
            if !point.mark.is_empty() {
                out += &text(x + 8.0, y - 6.0, "start", &point.mark);
            }
        }
        let (x, y) = (WIDTH - RIGHT + 16.0, TOP + 12.0 + 18.0 * i as f64);
        out + &circle(x, y, &series.name) + &text(x + 10.0, y + 4.0, "start", &series.name)
    }
}

/// Where a value lies between the first tick and the last.
fn share(ticks: &[f64], value: f64) -> f64 {
    let (first, last) = (ticks[0], ticks[ticks.len() - 1]);
    (value - first) / (last - first)
}

fn text(x: f64, y: f64, anchor: &str, text: &str) -> String {
    format!("<text x='{x:.1}' y='{y:.1}' text-anchor='{anchor}'>{}</text>", escape(text))
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
        let (title, mark) = ("\"&".to_owned(), "'".to_owned());
        let point = Point { x: 1.0, y: 1.0, title, mark };
        let series = Series { name: "<b>".to_owned(), points: vec![point], joined: true };
        let plot = Plot { x: "x", y: "y", series: vec![series], front: vec![], from_zero: false };
        let svg = plot.svg();
        assert!(svg.contains("&lt;b&gt;") && svg.contains("&quot;&amp;") && !svg.contains("<b>"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}
