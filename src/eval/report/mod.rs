//! The table of an evaluation, for people, as JSON, as CSV, and as a page with plots.

mod html;
mod svg;

use std::io::Write;
use std::path::Path;

use serde_json::{Value as Json, json};

use super::{Estimate, Summary};
use crate::decode::Strategy;
use crate::error::Result;
use crate::files::OutputFile;

/// What an evaluation found.
#[derive(Debug, Clone)]
pub struct Report {
    /// The target's name.
    pub target: String,
    /// The draft's name, if there is one.
    pub draft: Option<String>,
    /// Where they ran.
    pub device: String,
    /// What was done: tasks, repeats, seed, lengths.
    pub method: Vec<(&'static str, String)>,
    /// A row for each arm.
    pub rows: Vec<Summary>,
    /// Plain sampling, cooled to the perplexity of the arm that is named.
    pub cooled: Option<(String, Summary)>,
    /// Why there are no joules, if there are none.
    pub no_joules: Option<String>,
    /// Meters and how they were read.
    pub energy: Json,
    /// Whether everything that was asked for is in it.
    pub complete: bool,
}

/// The columns of the table.
const HEAD: [&str; 13] = [
    "strategy",
    "settings",
    "perplexity",
    "tokens/pass",
    "accepted",
    "tokens/s",
    "x plain",
    "J/token",
    "score",
    "distinct-1",
    "distinct-2",
    "distinct-3",
    "tokens",
];

fn number(x: Option<f64>, digits: usize) -> String {
    x.map_or("-".to_owned(), |x| format!("{x:.digits$}"))
}

fn estimate(x: Option<Estimate>, factor: f64, digits: usize) -> String {
    match x {
        Some(Estimate { value, error: Some(error) }) => {
            format!("{:.digits$} ±{:.digits$}", factor * value, factor * error)
        }
        Some(Estimate { value, error: None }) => format!("{:.digits$}", factor * value),
        None => "-".to_owned(),
    }
}

impl Report {
    /// All rows; the cooled one is the last.
    pub fn all(&self) -> impl Iterator<Item = (String, &Summary)> {
        let rows = self.rows.iter().map(|row| (row.arm.settings.strategy.to_string(), row));
        let cooled = self.cooled.iter().map(|(_, row)| ("sample, cooled".to_owned(), row));
        rows.chain(cooled)
    }

    /// Plain sampling, at the temperature of `row` if it is there.
    fn plain(&self, row: &Summary) -> Option<&Summary> {
        let temperature = row.arm.settings.warp.temperature;
        let plain = |row: &&Summary| row.arm.settings.strategy == Strategy::Sample;
        let alike = |row: &&Summary| row.arm.settings.warp.temperature == temperature;
        self.rows.iter().filter(plain).find(alike).or(self.rows.iter().find(plain))
    }

    /// Tokens per second. What took no turns with the others cannot be compared with them; it does
    /// the same work as plain sampling.
    pub fn rate(&self, row: &Summary) -> Option<f64> {
        let apart = self.cooled.as_ref().is_some_and(|(_, cooled)| std::ptr::eq(cooled, row));
        let timed = if apart { self.plain(row).unwrap_or(row) } else { row };
        timed.tokens_per_second
    }

    /// Tokens per second by those of plain sampling.
    pub fn ratio(&self, row: &Summary) -> Option<f64> {
        Some(self.rate(row)? / self.plain(row)?.tokens_per_second?)
    }

    /// Whether joules were computed from an assumed power: such figures go by another name.
    fn is_assumed(&self) -> bool {
        self.energy["assumed"] == true
    }

    fn joules_key(&self) -> &'static str {
        if self.is_assumed() { "assumed_joules_per_token" } else { "joules_per_token" }
    }

    fn cells(&self, name: String, row: &Summary) -> [String; 13] {
        let percent = |x: Option<f64>| x.map_or("-".to_owned(), |x| format!("{:.1}%", 100.0 * x));
        let joules = match row.joules_per_token {
            Some(joules) if self.is_assumed() => format!("{joules:.4} assumed"),
            Some(joules) => format!("{joules:.4}"),
            None => "unavailable".to_owned(),
        };
        let score = match row.score {
            Some(_) => estimate(row.score, 100.0, 1),
            None => "-".to_owned(),
        };
        let [one, two, three] = row.distinct.map(|share| number(share, 3));
        [
            name,
            row.arm.details().to_owned(),
            estimate(row.perplexity, 1.0, 3),
            number((row.texts > 0).then(|| row.statistics.block_efficiency()), 3),
            percent(row.statistics.acceptance_rate()),
            number(self.rate(row), 1),
            number(self.ratio(row), 2),
            joules,
            score,
            one,
            two,
            three,
            row.tokens.to_string(),
        ]
    }

    /// The table: a head, then the rows. Columns that are empty in all rows are left out.
    pub fn table(&self) -> Vec<Vec<String>> {
        let rows: Vec<[String; 13]> = self.all().map(|(name, row)| self.cells(name, row)).collect();
        let used = |column: usize| rows.iter().any(|row| !matches!(&*row[column], "" | "-"));
        let columns: Vec<usize> = (0..HEAD.len()).filter(|&column| used(column)).collect();
        let pick = |row: &[String; 13]| columns.iter().map(|&c| row[c].clone()).collect();
        let head = HEAD.map(str::to_owned);
        std::iter::once(&head).chain(&rows).map(pick).collect()
    }

    /// Remarks below the table.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some((of, _)) = &self.cooled {
            notes.push(format!(
                "sample, cooled: plain sampling at the temperature whose perplexity is nearest to that of {of}; \
                 drawn after the others, so its speed is that of sample"
            ));
        }
        if let Some(why) = &self.no_joules {
            notes.push(format!("J/token unavailable: {why}"));
        }
        if !self.complete {
            notes.push("interrupted: only what finished is counted".to_owned());
        }
        notes
    }

    /// All figures as one object.
    pub fn json(&self) -> Json {
        let value = |x: Option<Estimate>| x.map(|x| x.value);
        let error = |x: Option<Estimate>| x.and_then(|x| x.error);
        let rows = self.all().map(|(name, row)| {
            let s = &row.arm.settings;
            json!({
                "name": name,
                "label": row.arm.label,
                "strategy": s.strategy.to_string(),
                "tau": s.tau,
                "gamma": s.gamma,
                "beam_width": s.beam_width,
                "temperature": s.warp.temperature,
                "texts": row.texts,
                "tokens": row.tokens,
                "perplexity": value(row.perplexity),
                "perplexity_se": error(row.perplexity),
                "block_efficiency": row.statistics.block_efficiency(),
                "acceptance_rate": row.statistics.acceptance_rate(),
                "acceptance_by_depth": row.statistics.acceptance_by_depth(),
                "min_joint_ratio": row.statistics.min_ratio(),
                "tokens_per_second": self.rate(row),
                "ratio_to_plain": self.ratio(row),
                self.joules_key(): row.joules_per_token,
                "score": value(row.score),
                "score_se": error(row.score),
                "answers": row.answers,
                "distinct": row.distinct,
            })
        });
        let rows: Vec<Json> = rows.collect();
        let method: serde_json::Map<String, Json> = self
            .method
            .iter()
            .map(|(key, text)| ((*key).to_owned(), text.clone().into()))
            .collect();
        json!({
            "target": self.target,
            "draft": self.draft,
            "device": self.device,
            "method": method,
            "complete": self.complete,
            "rows": rows,
            "cooled_to": self.cooled.as_ref().map(|(of, _)| of),
            "joules_unavailable": self.no_joules,
            "energy": self.energy,
        })
    }

    /// A line for each row, a column for each figure.
    pub fn csv(&self) -> String {
        let columns = [
            "name",
            "label",
            "strategy",
            "tau",
            "gamma",
            "beam_width",
            "temperature",
            "texts",
            "tokens",
            "perplexity",
            "perplexity_se",
            "block_efficiency",
            "acceptance_rate",
            "tokens_per_second",
            "ratio_to_plain",
            self.joules_key(),
            "score",
            "score_se",
            "answers",
            "min_joint_ratio",
        ];
        let cell = |value: &Json| match value {
            Json::Null => String::new(),
            Json::String(text) if text.contains([',', '"']) => {
                format!("\"{}\"", text.replace('"', "\"\""))
            }
            Json::String(text) => text.clone(),
            other => other.to_string(),
        };
        let mut out = format!("{},distinct_1,distinct_2,distinct_3\n", columns.join(","));
        for row in self.json()["rows"].as_array().into_iter().flatten() {
            let distinct = (0..3).map(|n| cell(&row["distinct"][n]));
            let cells: Vec<String> =
                columns.iter().map(|key| cell(&row[key])).chain(distinct).collect();
            out.push_str(&cells.join(","));
            out.push('\n');
        }
        out
    }

    /// A page that needs nothing else.
    pub fn html(&self) -> String {
        html::page(self)
    }

    /// The names of the files that [`Report::write`] writes.
    pub const FILES: [&str; 3] = ["results.json", "results.csv", "report.html"];

    /// Writes results.json, results.csv and report.html to a folder. Each is there as a whole, or is
    /// the one before.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let texts = [format!("{}\n", self.json()), self.csv(), self.html()];
        for (name, text) in Self::FILES.into_iter().zip(texts) {
            let mut out = OutputFile::create_regular(&folder.join(name))?;
            out.write_all(text.as_bytes()).map_err(|e| out.error(e))?;
            out.finish()?;
        }
        Ok(())
    }
}
