//! What one generation came to: a line of the journal.

use serde_json::{Value as Json, json};

use crate::decode::{Phase, Statistics};
use crate::lm::Token;
use crate::session::generation::Generation;

/// One generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The arm's label.
    pub arm: String,
    /// The task's place in its set.
    pub task: usize,
    /// Which time it was.
    pub repeat: u32,
    /// The text.
    pub text: String,
    /// Generated tokens.
    pub tokens: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Mean ln p of a token under the unwarped target, if there is a token.
    pub mean_log_prob: Option<f64>,
    /// Share of different ones among all runs of 1, 2 and 3 tokens.
    pub distinct: [Option<f64>; 3],
    /// Rounds, and what was accepted in them.
    pub statistics: Statistics,
    /// Seconds of the prompt.
    pub prompt_seconds: f64,
    /// Seconds of generating.
    pub seconds: f64,
    /// Why it ended.
    pub stop: String,
    /// 1 for a right answer, 0 for a wrong one; `None` where there is none to compare with.
    pub score: Option<f64>,
    /// What it consumed, where that was measured.
    pub joules: Option<f64>,
}

/// Different runs of `n` tokens by all of them.
fn distinct(tokens: &[Token], n: usize) -> Option<f64> {
    let runs = tokens.windows(n);
    let all = runs.len();
    let different: std::collections::HashSet<_> = runs.collect();
    (all > 0).then(|| different.len() as f64 / all as f64)
}

impl Outcome {
    /// Of a generation that has ended.
    pub fn new(arm: &str, task: usize, repeat: u32, text: String, g: &Generation<'_>) -> Self {
        let scores = g.scores();
        let mean = scores.iter().sum::<f64>() / scores.len() as f64;
        Outcome {
            arm: arm.to_owned(),
            task,
            repeat,
            text,
            tokens: g.tokens().len(),
            prompt_tokens: g.prompt_tokens(),
            mean_log_prob: (!scores.is_empty()).then_some(mean),
            distinct: [1, 2, 3].map(|n| distinct(g.tokens(), n)),
            statistics: g.statistics().clone(),
            prompt_seconds: g.seconds(Phase::Prefill),
            seconds: g.generating_seconds(),
            stop: g.stop_reason().map_or("", |reason| reason.name()).to_owned(),
            score: None,
            joules: None,
        }
    }

    /// Whether it is this generation.
    pub fn is(&self, arm: &str, task: usize, repeat: u32) -> bool {
        self.task == task && self.repeat == repeat && self.arm == arm
    }

    /// As a line of a journal.
    pub fn json(&self) -> Json {
        let ratio = self.statistics.min_log_ratio;
        json!({
            "arm": self.arm,
            "task": self.task,
            "repeat": self.repeat,
            "text": self.text,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "mean_log_prob": self.mean_log_prob,
            "distinct": self.distinct,
            "accepted_lengths": self.statistics.accepted_lengths,
            "drafted_lengths": self.statistics.drafted_lengths,
            "min_log_ratio": ratio.is_finite().then_some(ratio),
            "prompt_seconds": self.prompt_seconds,
            "seconds": self.seconds,
            "stop": self.stop,
            "score": self.score,
            "joules": self.joules,
        })
    }

    /// From a line of a journal; `None` if it is no such line.
    pub fn from_json(line: &Json) -> Option<Self> {
        let text = |key: &str| line[key].as_str().map(str::to_owned);
        let count = |key: &str| line[key].as_u64();
        let counts = |key: &str| -> Option<Vec<u64>> {
            line[key].as_array()?.iter().map(Json::as_u64).collect()
        };
        let tokens = count("tokens")?;
        Some(Outcome {
            arm: text("arm")?,
            task: usize::try_from(count("task")?).ok()?,
            repeat: u32::try_from(count("repeat")?).ok()?,
            text: text("text")?,
            tokens: usize::try_from(tokens).ok()?,
            prompt_tokens: usize::try_from(count("prompt_tokens")?).ok()?,
            mean_log_prob: line["mean_log_prob"].as_f64(),
            distinct: [0, 1, 2].map(|n| line["distinct"][n].as_f64()),
            statistics: Statistics {
                accepted_lengths: counts("accepted_lengths")?,
                drafted_lengths: counts("drafted_lengths")?,
                emitted: tokens,
                forced: 0,
                min_log_ratio: line["min_log_ratio"].as_f64().unwrap_or(f64::INFINITY),
            },
            prompt_seconds: line["prompt_seconds"].as_f64()?,
            seconds: line["seconds"].as_f64()?,
            stop: text("stop")?,
            score: line["score"].as_f64(),
            joules: line["joules"].as_f64(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetition_shows_in_runs_of_tokens() {
        assert_eq!(distinct(&[1, 2, 1, 2, 1], 1), Some(0.4));
        assert_eq!(distinct(&[1, 2, 1, 2, 1], 2), Some(0.5));
        assert_eq!(distinct(&[1, 2], 3), None);
    }
}
