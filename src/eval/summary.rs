//! Outcomes of an arm as a row of the table.

use super::{Arm, Outcome, Task};
use crate::decode::Statistics;

/// A mean with its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The mean.
    pub value: f64,
    /// Its standard error; `None` from one value.
    pub error: Option<f64>,
}

impl Estimate {
    /// Of independent values, if there are any.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        let value = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|x| (x - value) * (x - value)).sum();
        let error = (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt());
        (!values.is_empty()).then_some(Estimate { value, error })
    }
}

/// What an arm did.
#[derive(Debug, Clone)]
pub struct Summary {
    /// The arm.
    pub arm: Arm,
    /// Texts that the figures below are from: those of tasks without a right answer, if there are
    /// such tasks, and all otherwise.
    pub texts: usize,
    /// Tokens in them.
    pub tokens: usize,
    /// exp(-mean over texts of the mean ln p of their tokens), under the unwarped target.
    pub perplexity: Option<Estimate>,
    /// Rounds, and what was accepted in them.
    pub statistics: Statistics,
    /// Generated tokens per second of generating.
    pub tokens_per_second: Option<f64>,
    /// Mean over texts of the share of different runs of 1, 2 and 3 tokens.
    pub distinct: [Option<f64>; 3],
    /// Joules per generated token, prompts included, over what was measured.
    pub joules_per_token: Option<f64>,
    /// Answers that were scored.
    pub answers: usize,
    /// Share of right answers; the standard error takes questions as independent.
    pub score: Option<Estimate>,
}

/// The row of an arm.
pub fn summarize(arm: &Arm, tasks: &[Task], outcomes: &[Outcome]) -> Summary {
    let own = || outcomes.iter().filter(|outcome| outcome.arm == arm.label);
    let has_open = tasks.iter().any(|task| task.answer.is_none());
    let texts: Vec<&Outcome> =
        own().filter(|o| !has_open || tasks[o.task].answer.is_none()).collect();
    let tokens = texts.iter().map(|o| o.tokens).sum();
    let seconds: f64 = texts.iter().map(|o| o.seconds).sum();
    let mut statistics = Statistics::default();
    texts.iter().for_each(|o| statistics.merge(&o.statistics));
    let means: Vec<f64> = texts.iter().filter_map(|o| o.mean_log_prob).collect();
    let perplexity = Estimate::of(&means).map(|mean| {
        let value = (-mean.value).exp();
        Estimate { value, error: mean.error.map(|error| error * value) }
    });
    let distinct = [0, 1, 2].map(|n| {
        let shares: Vec<f64> = texts.iter().filter_map(|o| o.distinct[n]).collect();
        Estimate::of(&shares).map(|mean| mean.value)
    });
    let measured: Vec<_> = texts.iter().filter_map(|o| Some((o.joules?, o.tokens))).collect();
    let joules: f64 = measured.iter().map(|(joules, _)| joules).sum();
    let paid: usize = measured.iter().map(|(_, tokens)| tokens).sum();
    // Repeats of a question are not independent of each other.
    let by_question: Vec<f64> = (0..tasks.len())
        .filter_map(|task| {
            let scores: Vec<f64> =
                own().filter(|o| o.task == task).filter_map(|o| o.score).collect();
            Estimate::of(&scores).map(|mean| mean.value)
        })
        .collect();
    Summary {
        arm: arm.clone(),
        texts: texts.len(),
        tokens,
        perplexity,
        statistics,
        tokens_per_second: (seconds > 0.0).then(|| tokens as f64 / seconds),
        distinct,
        joules_per_token: (paid > 0).then(|| joules / paid as f64),
        answers: own().filter(|o| o.score.is_some()).count(),
        score: Estimate::of(&by_question),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_has_its_standard_error() {
        assert_eq!(Estimate::of(&[]), None);
        assert_eq!(Estimate::of(&[3.0]), Some(Estimate { value: 3.0, error: None }));
        let found = Estimate::of(&[1.0, 2.0, 3.0, 4.0]).unwrap();
        assert_eq!(found.value, 2.5);
        assert!((found.error.unwrap() - (5.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-12);
    }
}
