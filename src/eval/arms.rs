//! Strategies with their settings: what is compared.

use crate::decode::{Settings, Strategy};
use crate::error::Result;

/// A strategy with its settings.
#[derive(Debug, Clone, PartialEq)]
pub struct Arm {
    /// What sets it apart from other arms; the same for the same settings.
    pub label: String,
    /// All settings; the seed is each generation's own.
    pub settings: Settings,
}

/// The settings of an arm that matter to its strategy, in words.
fn describe(settings: &Settings) -> String {
    let knobs = settings.strategy.descriptor().knobs.iter();
    let words: Vec<_> = knobs.map(|knob| knob.words(settings)).filter(|w| !w.is_empty()).collect();
    words.join(" ")
}

impl Arm {
    /// An arm. Greedy decoding is that of temperature 0, so it has no temperature of its own.
    pub fn new(settings: Settings) -> Self {
        let mut settings = settings;
        if settings.strategy == Strategy::Greedy {
            settings.warp.temperature = 0.0;
        }
        let mut label = settings.strategy.to_string();
        let own = describe(&settings);
        if !own.is_empty() {
            label = format!("{label} {own}");
        }
        if settings.strategy != Strategy::Greedy && settings.warp.temperature != 1.0 {
            label = format!("{label} T {}", settings.warp.temperature);
        }
        Arm { label, settings }
    }

    /// What comes after the strategy's name in the label.
    pub fn details(&self) -> &str {
        self.label.split_once(' ').map_or("", |(_, details)| details)
    }

    /// Whether it writes the same text whatever the seed.
    pub fn is_deterministic(&self) -> bool {
        self.settings.warp.is_greedy()
    }
}

/// Lists of settings, of which each strategy is combined with those that it has.
#[derive(Debug, Clone)]
pub struct Grid {
    /// The strategies.
    pub strategies: Vec<Strategy>,
    /// Thresholds of joint acceptance.
    pub taus: Vec<f64>,
    /// Draft lengths.
    pub gammas: Vec<usize>,
    /// Numbers of beams.
    pub widths: Vec<usize>,
    /// Temperatures.
    pub temperatures: Vec<f32>,
    /// Everything else.
    pub base: Settings,
}

impl Grid {
    /// All arms, each once, strategy by strategy.
    ///
    /// # Errors
    /// A setting is outside its range.
    pub fn arms(&self) -> Result<Vec<Arm>> {
        let mut arms: Vec<Arm> = Vec::new();
        for &temperature in &self.temperatures {
            for &strategy in &self.strategies {
                for &tau in &self.taus {
                    for &gamma in &self.gammas {
                        for &beam_width in &self.widths {
                            let mut settings = self.base.clone();
                            settings.warp.temperature = temperature;
                            let settings =
                                Settings { strategy, tau, gamma, beam_width, ..settings };
                            settings.validate()?;
                            let arm = Arm::new(settings);
                            if arms.iter().all(|known| known.label != arm.label) {
                                arms.push(arm);
                            }
                        }
                    }
                }
            }
        }
        Ok(arms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strategy_is_combined_with_the_settings_that_it_has() {
        use Strategy::*;
        let grid = Grid {
            strategies: vec![Greedy, Sample, Speculative, Mtad, Auto],
            taus: vec![0.1, 0.5],
            gammas: vec![4, 6],
            widths: vec![4],
            temperatures: vec![1.0, 0.5],
            base: Settings::default(),
        };
        let arms = grid.arms().unwrap();
        let count = |s| arms.iter().filter(|arm| arm.settings.strategy == s).count();
        assert_eq!([Greedy, Sample, Speculative, Mtad, Auto].map(count), [1, 2, 4, 8, 4]);
        assert_eq!(arms[0].label, "greedy");
        assert!(arms.iter().any(|arm| arm.label == "mtad tau 0.5 gamma 6 width 4 T 0.5"));
        let wrong = Grid { taus: vec![-1.0], ..grid };
        assert!(wrong.arms().unwrap_err().to_string().starts_with("tau"));
    }
}
