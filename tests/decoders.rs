//! The decoders against theory, on bigram tables whose distributions are known exactly.
//!
//! Probabilities are computed here a second time, in plain f64 and without any of the library's
//! sampling code.

mod common;
#[allow(dead_code)]
#[path = "../examples/table_model.rs"]
mod table_model;

use mtad::decode::{Block, Decoding, Models, Phase, Settings, Strategy};
use mtad::model::lm::{Batch, Lm, MAX_TREE, Outputs, Row, Token};
use mtad::model::table::TableLm;
use mtad::sampling::{Rng, Warp};
use mtad::{Error, Result};

/// A table model that writes down what is asked of it, token by token, and fails on demand.
struct Recorder {
    inner: TableLm,
    /// The tokens of the line.
    line: Vec<Token>,
    /// The tokens of the tree with their parents.
    tree: Vec<(Token, Option<Row>)>,
    /// The tokens of each pass.
    passes: Vec<Vec<Token>>,
    /// Passes until one fails.
    fails_in: Option<usize>,
}

impl Recorder {
    fn new(table: Vec<Vec<f32>>) -> Self {
        Self::with_capacity(table, usize::MAX)
    }

    fn with_capacity(table: Vec<Vec<f32>>, capacity: usize) -> Self {
        let inner = TableLm::new(table).unwrap().with_capacity(capacity);
        Recorder { inner, line: vec![], tree: vec![], passes: vec![], fails_in: None }
    }
}

impl Lm for Recorder {
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    fn committed(&self) -> usize {
        self.inner.committed()
    }

    fn capacity(&self) -> usize {
        self.inner.capacity()
    }

    fn eval(&mut self, batch: &Batch<'_>) -> Result<&Outputs> {
        if let Some(left) = &mut self.fails_in {
            if *left == 0 {
                self.fails_in = None;
                return Err(Error::invalid("the plug was pulled"));
            }
            *left -= 1;
        }
        let outputs = self.inner.eval(batch)?;
        self.passes.push(batch.tokens.clone());
        self.tree.extend(batch.tokens.iter().copied().zip(batch.parents.iter().copied()));
        Ok(outputs)
    }

    fn keep(&mut self, tip: Option<Row>) -> Result<()> {
        self.inner.keep(tip)?;
        let mut path = Vec::new();
        let mut at = tip;
        while let Some(row) = at {
            let (token, parent) = self.tree[row.0 as usize];
            path.push(token);
            at = parent;
        }
        self.line.extend(path.iter().rev());
        self.tree.clear();
        assert_eq!(self.line.len(), self.inner.committed());
        Ok(())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.inner.truncate(len)?;
        self.line.truncate(len);
        self.tree.clear();
        Ok(())
    }
}

/// A target and a draft that resembles it, more or less.
struct Pair {
    target: Recorder,
    draft: Recorder,
}

impl Pair {
    fn random(vocab: usize, rng: &mut Rng) -> Self {
        let likeness = rng.uniform() as f32;
        let target = random_table(vocab, rng);
        let mut draft = random_table(vocab, rng);
        for (d, t) in draft.iter_mut().flatten().zip(target.iter().flatten()) {
            *d = likeness * t + (1.0 - likeness) * *d;
        }
        Pair { target: Recorder::new(target), draft: Recorder::new(draft) }
    }

    fn models(&mut self) -> Models<'_> {
        Models::pair(&mut self.target, &mut self.draft)
    }

    /// Another pair of the same tables, which has evaluated nothing.
    fn fresh(&self) -> Self {
        Pair::of(table_of(&self.target.inner), table_of(&self.draft.inner))
    }

    fn of(target: Vec<Vec<f32>>, draft: Vec<Vec<f32>>) -> Self {
        Pair { target: Recorder::new(target), draft: Recorder::new(draft) }
    }

    fn assert_lines_are_prefixes(&self, text: &[Token]) {
        for model in [&self.target, &self.draft] {
            assert!(model.line.len() < text.len(), "the last token is pending");
            assert_eq!(model.line, text[..model.line.len()]);
            assert!(model.tree.is_empty());
        }
    }

    /// Generates at least `tokens` tokens, with a look at the lines after each round.
    fn decode(&mut self, settings: &Settings, prompt: &[Token], tokens: usize) -> Vec<Token> {
        let mut decoding = Decoding::new(settings.clone()).unwrap();
        decoding.start(&mut self.models(), prompt).unwrap();
        while decoding.generated().len() < tokens {
            decoding.next_block(&mut self.models()).unwrap().expect("room for a block");
            self.assert_lines_are_prefixes(decoding.text());
        }
        decoding.generated()[..tokens].to_vec()
    }
}

/// Normally distributed logits (the sum of twelve uniform numbers, nearly).
fn random_table(vocab: usize, rng: &mut Rng) -> Vec<Vec<f32>> {
    let scale = 0.5 + 2.0 * rng.uniform();
    let mut normal = || ((0..12).map(|_| rng.uniform()).sum::<f64>() - 6.0) * scale;
    (0..vocab).map(|_| (0..vocab).map(|_| normal() as f32).collect()).collect()
}

fn table_of(lm: &TableLm) -> Vec<Vec<f32>> {
    (0..lm.vocab_size() as Token).map(|t| lm.logits_after(t).to_vec()).collect()
}

fn random_warp(rng: &mut Rng) -> Warp {
    let mut one_of = |values: &[f32]| values[rng.below(values.len() as u32) as usize];
    Warp {
        temperature: one_of(&[0.0, 0.4, 1.0, 1.0, 1.5]),
        top_k: one_of(&[0.0, 0.0, 3.0, 7.0]) as usize,
        top_p: one_of(&[1.0, 1.0, 0.9, 0.5]),
        min_p: one_of(&[0.0, 0.0, 0.1]),
        repeat_penalty: one_of(&[1.0, 1.0, 1.3]),
        repeat_last_n: one_of(&[64.0, 5.0]) as usize,
    }
}

/// The warped probabilities of what follows `path`, by their definition.
fn probabilities(lm: &TableLm, warp: &Warp, path: &[Token]) -> Vec<f64> {
    let mut logits: Vec<f64> =
        lm.logits_after(*path.last().unwrap()).iter().map(|&x| f64::from(x)).collect();
    let recent = &path[path.len().saturating_sub(warp.repeat_last_n)..];
    let penalty = f64::from(warp.repeat_penalty);
    for (token, x) in logits.iter_mut().enumerate() {
        if recent.contains(&(token as Token)) {
            *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
        }
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let mut p = vec![0.0; logits.len()];
    if warp.temperature == 0.0 {
        p[order[0]] = 1.0;
        return p;
    }
    if warp.top_k > 0 {
        order.truncate(warp.top_k);
    }
    let weight = |t: usize| (logits[t] / f64::from(warp.temperature)).exp();
    let total: f64 = order.iter().map(|&t| weight(t)).sum();
    let mut before = 0.0;
    order.retain(|&t| {
        let keep = before < f64::from(warp.top_p) * total;
        before += weight(t);
        keep
    });
    let least = f64::from(warp.min_p) * weight(order[0]);
    order.retain(|&t| weight(t) >= least);
    let total: f64 = order.iter().map(|&t| weight(t)).sum();
    for t in order {
        p[t] = weight(t) / total;
    }
    p
}

/// A chi-square statistic and its degrees of freedom, to which tables of counts add theirs.
#[derive(Default)]
struct ChiSquare {
    statistic: f64,
    freedom: f64,
}

impl ChiSquare {
    /// Adds counts of outcomes with these probabilities. Rare outcomes are taken together.
    fn add(&mut self, counts: &[f64], probabilities: &[f64]) {
        let n: f64 = counts.iter().sum();
        let mut rare = (0.0, 0.0);
        let mut cells = Vec::new();
        for (&count, &p) in counts.iter().zip(probabilities) {
            assert!(p > 0.0 || count == 0.0, "an outcome of probability 0");
            if p * n < 5.0 {
                rare = (rare.0 + count, rare.1 + p * n);
            } else {
                cells.push((count, p * n));
            }
        }
        if rare.1 >= 5.0 {
            cells.push(rare);
        }
        self.statistic += cells.iter().map(|(o, e)| (o - e) * (o - e) / e).sum::<f64>();
        self.freedom += cells.len().saturating_sub(1) as f64;
    }

    /// How far the statistic is from its expectation, in standard deviations.
    fn z(&self) -> f64 {
        (self.statistic - self.freedom) / (2.0 * self.freedom.max(1.0)).sqrt()
    }
}

#[test]
fn the_reference_figures_are_reached() {
    let Some(file) = common::shared("vectors/mtad_reference.json") else { return };
    let file = file.to_str().unwrap();
    let entries = table_model::read(file).unwrap();
    let json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!(entries.len(), 8);
    for (i, entry) in entries.iter().enumerate() {
        let mut nlls = Vec::new();
        for strategy in table_model::STRATEGIES {
            let found = table_model::run(entry, strategy, 600, 20).unwrap();
            let reference = &json[i]["stats"][strategy.to_string()];
            let number = |key: &str| reference[key].as_f64().unwrap();
            for (name, value, se) in [
                ("block_efficiency", found.block_efficiency, found.block_efficiency_se),
                ("nll", found.nll, found.nll_se),
            ] {
                let z = (value - number(name)) / se.hypot(number(&format!("{name}_se")));
                println!("entry {i} {strategy} {name}: {value:.4}, z {z:+.2}");
                assert!(z.abs() < 4.0, "entry {i} {strategy} {name}: {value}, z {z}");
                assert!(se < number(&format!("{name}_se")));
            }
            nlls.push(found.nll);
        }
        assert!(nlls[1] < nlls[0], "MTAD's text is more likely than speculative sampling's");
    }
}

#[test]
fn speculative_sampling_is_lossless() {
    let mut rng = Rng::new(11);
    for (strategy, gamma) in
        [(Strategy::Sample, 1), (Strategy::Speculative, 1), (Strategy::Speculative, 4)]
    {
        for (top_k, top_p, min_p, temperature) in
            [(0, 1.0, 0.0, 1.0), (5, 1.0, 0.0, 0.8), (0, 0.8, 0.0, 1.4), (6, 0.9, 0.05, 1.0)]
        {
            let vocab = 8;
            let mut pair = Pair::random(vocab, &mut rng);
            let warp = Warp { top_k, top_p, min_p, temperature, ..Warp::default() };
            let settings = Settings { strategy, gamma, warp, seed: 5, ..Settings::default() };
            let text = pair.decode(&settings, &[0], 60_000);
            let p: Vec<Vec<f64>> = (0..vocab as Token)
                .map(|last| probabilities(&pair.target.inner, &warp, &[last]))
                .collect();
            // Trigrams too: a fault at the borders of blocks would make the text remember more
            // than one token.
            for n in [2, 3] {
                let mut counts = vec![vec![0.0; vocab]; vocab.pow(n - 1)];
                for gram in text.windows(n as usize) {
                    let (next, context) = gram.split_last().unwrap();
                    let context = context.iter().fold(0, |i, &t| i * vocab + t as usize);
                    counts[context][*next as usize] += 1.0;
                }
                let mut chi = ChiSquare::default();
                for (context, counts) in counts.iter().enumerate() {
                    chi.add(counts, &p[context % vocab]);
                }
                println!("{strategy} {gamma} {warp:?} {n}-grams: {:+.2}", chi.z());
                assert!(chi.z() < 4.5, "{strategy} gamma {gamma} {warp:?}: {}", chi.z());
            }
        }
    }
}

#[test]
fn every_accepted_block_clears_the_threshold_and_no_longer_one_would() {
    let mut rng = Rng::new(12);
    let (mut blocks, mut gaps, mut undecided) = (0, 0, 0);
    for case in 0..400 {
        let vocab = 2 + rng.below(20) as usize;
        let mut pair = Pair::random(vocab, &mut rng);
        let settings = Settings {
            strategy: Strategy::Mtad,
            gamma: 1 + rng.below(6) as usize,
            beam_width: 1 + rng.below(8) as usize,
            tau: [0.0, 0.01, 0.3, 0.9, 1.0, 2.0][rng.below(6) as usize],
            with_replacement: rng.below(2) == 0,
            warp: random_warp(&mut rng),
            seed: case,
            score: true,
        };
        let mut decoding = Decoding::new(settings.clone()).unwrap();
        decoding.start(&mut pair.models(), &[0, rng.below(vocab as u32)]).unwrap();
        for _ in 0..40 {
            let before = decoding.text().to_vec();
            let block = decoding.next_block(&mut pair.models()).unwrap().unwrap().clone();
            pair.assert_lines_are_prefixes(decoding.text());
            let drafted = &pair.target.passes.last().unwrap()[1..];
            assert_eq!((drafted.len(), block.drafted), (settings.gamma, settings.gamma));
            assert_eq!(block.tokens.len(), block.accepted + 1);
            assert_eq!(block.tokens[..block.accepted], drafted[..block.accepted]);
            // Nothing that a model has evaluated of the text is evaluated again.
            assert_eq!(pair.target.committed(), before.len() + block.accepted);
            let in_draft = block.accepted.min(settings.gamma - 1);
            assert_eq!(pair.draft.committed(), before.len() + in_draft);

            // q stays unwarped, but for the penalty, where the target is greedy.
            let q_warp = if settings.warp.temperature > 0.0 {
                settings.warp
            } else {
                let Warp { repeat_penalty, repeat_last_n, .. } = settings.warp;
                Warp { repeat_penalty, repeat_last_n, ..Warp::default() }
            };
            let mut path = before.clone();
            let (mut log_p, mut log_q) = (vec![0.0], vec![0.0]);
            for &token in drafted {
                let p = probabilities(&pair.target.inner, &settings.warp, &path);
                let q = probabilities(&pair.draft.inner, &q_warp, &path);
                log_p.push(log_p.last().unwrap() + p[token as usize].ln());
                log_q.push(log_q.last().unwrap() + q[token as usize].ln());
                path.push(token);
            }
            let ratio = |i: usize| log_p[i] - log_q[i];
            let depths = 1..=settings.gamma;
            if depths.clone().any(|i| (ratio(i) - settings.tau.ln()).abs() < 1e-5) {
                // At a temperature near the border rounding may go either way.
                undecided += 1;
                continue;
            }
            let passes: Vec<usize> = depths.filter(|&i| ratio(i) > settings.tau.ln()).collect();
            let accepted = passes.last().copied().unwrap_or(0);
            assert_eq!(block.accepted, accepted, "{settings:?}");
            assert!((block.log_p - log_p[accepted]).abs() < 1e-5);
            assert!((block.log_q - log_q[accepted]).abs() < 1e-5);
            if let Some(log_ratio) = block.log_ratio() {
                assert!(log_ratio > settings.tau.ln());
            }
            assert!(block.is_drafted(0) == (accepted > 0) && !block.is_drafted(accepted));

            // What is emitted has probability, also after an accepted block, and is scored.
            path = before;
            for (&token, &score) in block.tokens.iter().zip(&block.scores) {
                let p = probabilities(&pair.target.inner, &settings.warp, &path);
                assert!(p[token as usize] > 0.0, "{settings:?}");
                let unwarped = probabilities(&pair.target.inner, &Warp::default(), &path);
                assert!((score - unwarped[token as usize].ln()).abs() < 1e-5);
                path.push(token);
            }
            blocks += 1;
            gaps += usize::from(passes.len() < accepted);
        }
        let statistics = decoding.statistics();
        assert_eq!(statistics.rounds(), 40);
        assert_eq!(statistics.drafted(), 40 * settings.gamma as u64);
        assert_eq!(statistics.emitted, decoding.generated().len() as u64);
        assert_eq!(statistics.emitted, statistics.rounds() + statistics.accepted());
        assert!(statistics.min_ratio().is_none_or(|ratio| ratio > settings.tau));
        assert_eq!(decoding.scores().len(), decoding.generated().len());
    }
    println!("{blocks} blocks, {gaps} with a failed prefix before the accepted, {undecided} near");
    assert!(blocks > 10_000 && gaps > 100);
}

/// The probability of each drafted pair of tokens after `start`, for two beams, by going through
/// all that may be drawn.
fn two_beams_of_two(draft: &TableLm, start: Token, with_replacement: bool) -> Vec<f64> {
    let q = |token: Token| probabilities(draft, &Warp::default(), &[token]);
    let vocab = draft.vocab_size();
    let mut outcomes = vec![0.0; vocab * vocab];
    // Every ordered pair of draws of these, with its probability.
    let draws = |weights: &[f64]| {
        let mut pairs = Vec::new();
        for (i, a) in weights.iter().enumerate() {
            for (j, b) in weights.iter().enumerate() {
                if with_replacement {
                    pairs.push((i, j, a * b));
                } else if i != j {
                    pairs.push((i, j, a * b / (1.0 - a)));
                }
            }
        }
        pairs
    };
    let first = q(start);
    for (i, j, prob) in draws(&first) {
        let sum = first[i] + first[j];
        let mut weights: Vec<f64> = q(i as Token).iter().map(|x| x * first[i] / sum).collect();
        weights.extend(q(j as Token).iter().map(|x| x * first[j] / sum));
        for (a, b, then) in draws(&weights) {
            let best = if weights[b] > weights[a] { b } else { a };
            let parent = if best < vocab { i } else { j };
            outcomes[parent * vocab + best % vocab] += prob * then;
        }
    }
    outcomes
}

#[test]
fn beams_are_sampled_by_joint_probability() {
    let mut rng = Rng::new(13);
    for case in 0..6 {
        let mut pair = Pair::random(4, &mut rng);
        let with_replacement = case % 2 == 0;
        let settings = Settings {
            gamma: 2,
            beam_width: 2,
            with_replacement,
            seed: case,
            ..Settings::default()
        };
        let mut decoding = Decoding::new(settings).unwrap();
        let mut counts = vec![0.0; 16];
        let runs = 40_000;
        for _ in 0..runs {
            decoding.start(&mut pair.models(), &[1]).unwrap();
            decoding.next_block(&mut pair.models()).unwrap();
            let drafted = &pair.target.passes.pop().unwrap()[1..];
            counts[drafted[0] as usize * 4 + drafted[1] as usize] += 1.0;
            pair.draft.passes.clear();
        }
        let exact = two_beams_of_two(&pair.draft.inner, 1, with_replacement);
        assert!((exact.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        let mut chi = ChiSquare::default();
        chi.add(&counts, &exact);
        let z = chi.z();
        println!("with replacement {with_replacement}: {z:+.2}");
        assert!(z < 5.0, "with replacement {with_replacement}: {z}");
    }
}

#[test]
fn beams_that_hold_everything_end_with_the_most_probable_path() {
    let mut rng = Rng::new(14);
    for case in 0..60 {
        let mut pair = Pair::random(6, &mut rng);
        // Two tokens have mass after each, so eight beams hold all paths of three. Or beam search
        // as wide as the vocabulary, for two.
        let (gamma, warp) = if case % 2 == 0 {
            (3, Warp { top_k: 2, ..Warp::default() })
        } else {
            (2, Warp { temperature: 0.0, ..Warp::default() })
        };
        let settings =
            Settings { gamma, beam_width: 8, warp, seed: case, tau: 0.0, ..Settings::default() };
        pair.decode(&settings, &[3], 1);
        let drafted = &pair.target.passes.last().unwrap()[1..];
        let q_warp = if case % 2 == 0 { warp } else { Warp::default() };
        let joint = |path: &[Token]| -> f64 {
            (0..path.len())
                .map(|i| {
                    let last = if i == 0 { 3 } else { path[i - 1] };
                    probabilities(&pair.draft.inner, &q_warp, &[last])[path[i] as usize]
                })
                .product()
        };
        let paths = (0..6u32.pow(gamma as u32))
            .map(|n| (0..gamma as u32).map(|i| n / 6u32.pow(i) % 6).collect::<Vec<_>>());
        let most = paths.max_by(|a, b| joint(a).total_cmp(&joint(b))).unwrap();
        assert_eq!(drafted, most);
    }
}

#[test]
fn at_temperature_0_every_strategy_writes_the_greedy_text() {
    let mut rng = Rng::new(15);
    for case in 0..120 {
        let vocab = 2 + rng.below(30) as usize;
        let mut pair = Pair::random(vocab, &mut rng);
        let mut warp = random_warp(&mut rng);
        let greedy = Settings { strategy: Strategy::Greedy, warp, ..Settings::default() };
        warp.temperature = 0.0;
        let expected = pair.decode(&greedy, &[0, 1], 60);
        let mut path = vec![0, 1];
        for &token in &expected {
            assert_eq!(probabilities(&pair.target.inner, &warp, &path)[token as usize], 1.0);
            path.push(token);
        }
        for strategy in [Strategy::Sample, Strategy::Speculative, Strategy::Mtad] {
            let settings = Settings {
                strategy,
                gamma: 1 + case % 7,
                beam_width: 1 + case % 5,
                tau: [0.0, 0.1, 1.0, 3.0][case % 4],
                warp,
                seed: case as u64,
                ..Settings::default()
            };
            assert_eq!(pair.fresh().decode(&settings, &[0, 1], 60), expected, "{settings:?}");
        }
    }
}

/// Adds padding: tokens beyond the vocabulary, with logits that would win.
fn padded(mut table: Vec<Vec<f32>>, padding: usize) -> Vec<Vec<f32>> {
    for row in &mut table {
        row.extend(std::iter::repeat_n(60.0, padding));
    }
    let len = table[0].len();
    table.extend((0..padding).map(|_| vec![0.0; len]));
    table
}

#[test]
fn padding_at_the_end_of_a_vocabulary_is_never_drawn() {
    let mut rng = Rng::new(16);
    for strategy in [Strategy::Greedy, Strategy::Sample, Strategy::Speculative, Strategy::Mtad] {
        for (temperature, top_k) in [(0.0, 0), (1.0, 0), (1.0, 4)] {
            let pair = Pair::random(9, &mut rng);
            let warp = Warp { temperature, top_k, ..Warp::default() };
            let settings = Settings { strategy, warp, ..Settings::default() };
            let (target, draft) = (table_of(&pair.target.inner), table_of(&pair.draft.inner));
            let expected = pair.fresh().decode(&settings, &[2], 50);
            assert!(expected.iter().all(|&t| t < 9));
            let longer_target = Pair::of(padded(target.clone(), 3), draft.clone());
            let longer_draft = Pair::of(target, padded(draft, 5));
            for mut other in [longer_target, longer_draft] {
                let text = other.decode(&settings, &[2], 50);
                assert!(text.iter().all(|&t| t < 9), "{strategy} {warp:?}");
                if temperature == 0.0 {
                    assert_eq!(text, expected);
                }
            }
        }
    }
}

#[test]
fn the_draft_shrinks_as_the_context_fills_and_the_end_is_reported() {
    let mut rng = Rng::new(17);
    let plain = Pair::random(12, &mut rng);
    let greedy = Settings { strategy: Strategy::Greedy, ..Settings::default() };
    let long = plain.fresh().decode(&greedy, &[1, 2, 3], 70);
    for strategy in [Strategy::Greedy, Strategy::Speculative, Strategy::Mtad] {
        for (target, draft) in [(20, 20), (21, 64), (64, 20), (3, 3), (4, 1), (5, 3), (20, 4)] {
            let mut pair = Pair {
                target: Recorder::with_capacity(table_of(&plain.target.inner), target),
                draft: Recorder::with_capacity(table_of(&plain.draft.inner), draft),
            };
            let warp = Warp { temperature: 0.0, ..Warp::default() };
            let settings = Settings { strategy, gamma: 5, warp, ..Settings::default() };
            let mut decoding = Decoding::new(settings).unwrap();
            decoding.start(&mut pair.models(), &[1, 2, 3]).unwrap();
            while let Some(block) = decoding.next_block(&mut pair.models()).unwrap() {
                assert!(block.accepted <= block.drafted && block.drafted <= 5);
                pair.assert_lines_are_prefixes(decoding.text());
            }
            // The last token needs no row.
            assert_eq!(decoding.text().len(), target + 1, "{strategy} {target} {draft}");
            assert_eq!(decoding.generated(), &long[..target - 2]);
            assert!(decoding.next_block(&mut pair.models()).unwrap().is_none());
            let too_long = vec![0; target + 1];
            let error = decoding.start(&mut pair.models(), &too_long).unwrap_err();
            assert!(matches!(error, Error::ContextFull { .. }), "{error}");
        }
    }
}

#[test]
fn a_session_goes_on_after_a_cut_and_reuses_what_prompts_share() {
    let mut rng = Rng::new(18);
    for strategy in [Strategy::Greedy, Strategy::Speculative, Strategy::Mtad] {
        let mut pair = Pair::random(10, &mut rng);
        let warp = Warp { temperature: 0.0, ..Warp::default() };
        let settings = Settings { strategy, warp, score: true, ..Settings::default() };
        let mut decoding = Decoding::new(settings.clone()).unwrap();
        decoding.start(&mut pair.models(), &[1, 2, 3, 4]).unwrap();
        for _ in 0..300 {
            let before = decoding.text().len();
            let tokens = decoding.next_block(&mut pair.models()).unwrap().unwrap().tokens.len();
            let used = 1 + rng.below(tokens as u32) as usize;
            decoding.truncate_text(&mut pair.models(), before + used).unwrap();
            pair.assert_lines_are_prefixes(decoding.text());
            assert_eq!(decoding.statistics().emitted as usize, decoding.generated().len());
            assert_eq!(decoding.scores().len(), decoding.generated().len());
        }
        let len = decoding.generated().len();
        let expected = pair.fresh().decode(&settings, &[1, 2, 3, 4], len);
        assert_eq!(decoding.generated(), expected);

        let mut next = decoding.text()[..100].to_vec();
        next.extend([0, 0, 5]);
        let shared = decoding.text().iter().zip(&next).take_while(|(a, b)| a == b).count();
        let prefill = decoding.start(&mut pair.models(), &next).unwrap();
        assert_eq!((prefill.reused, prefill.evaluated), (shared, next.len() - 1 - shared));
        assert!(decoding.generated().is_empty() && decoding.statistics().rounds() == 0);
        for _ in 0..10 {
            decoding.next_block(&mut pair.models()).unwrap().unwrap();
            pair.assert_lines_are_prefixes(decoding.text());
        }
        let expected = pair.fresh().decode(&settings, &next, decoding.generated().len());
        assert_eq!(decoding.generated(), expected);
        // The same prompt again, and one that is a prefix: its last token is pending.
        for prompt in [&next[..], &next[..50]] {
            let prefill = decoding.start(&mut pair.models(), prompt).unwrap();
            assert_eq!((prefill.reused, prefill.evaluated), (prompt.len() - 1, 0));
            pair.assert_lines_are_prefixes(decoding.text());
        }
        assert!(decoding.truncate_text(&mut pair.models(), 0).is_err());
        assert!(decoding.truncate_text(&mut pair.models(), 51).is_err());
    }
}

#[test]
fn a_draft_that_lags_catches_up() {
    let mut rng = Rng::new(19);
    for strategy in [Strategy::Speculative, Strategy::Mtad] {
        for lag in [1, 5, 100, 3 * MAX_TREE] {
            let mut pair = Pair::random(10, &mut rng);
            let warp = Warp { temperature: 0.0, ..Warp::default() };
            let plain = Settings { strategy: Strategy::Greedy, warp, ..Settings::default() };
            // As many rows as a tree holds, so that a lag of one more does not fit beside them.
            let (gamma, beam_width) = (8, (MAX_TREE - 1) / 7);
            let settings = Settings { strategy, gamma, beam_width, ..plain.clone() };
            let mut decoding = Decoding::new(plain.clone()).unwrap();
            decoding.start(&mut pair.models(), &[7, 7]).unwrap();
            for _ in 0..lag {
                decoding.next_block(&mut pair.models()).unwrap();
            }
            assert_eq!(pair.draft.committed(), 0);
            decoding.configure(settings).unwrap();
            for _ in 0..20 {
                decoding.next_block(&mut pair.models()).unwrap();
                pair.assert_lines_are_prefixes(decoding.text());
                assert!(pair.draft.committed() + 2 >= decoding.text().len());
            }
            let expected = pair.fresh().decode(&plain, &[7, 7], decoding.generated().len());
            assert_eq!(decoding.generated(), expected);
        }
    }
}

#[test]
fn a_failed_pass_leaves_the_text_as_it_was() {
    let mut rng = Rng::new(20);
    for strategy in [Strategy::Greedy, Strategy::Speculative, Strategy::Mtad] {
        let mut pair = Pair::random(10, &mut rng);
        let warp = Warp { temperature: 0.0, ..Warp::default() };
        let settings = Settings { strategy, warp, ..Settings::default() };
        let mut decoding = Decoding::new(settings.clone()).unwrap();
        let long: Vec<Token> = (0..300).map(|i| i % 10).collect();
        pair.target.fails_in = Some(1);
        assert!(decoding.start(&mut pair.models(), &long).is_err());
        decoding.start(&mut pair.models(), &long).unwrap();
        assert_eq!(pair.target.committed(), 299);
        for i in 0..60 {
            let before = decoding.text().to_vec();
            let failing = if i % 2 == 0 { &mut pair.target } else { &mut pair.draft };
            failing.fails_in = Some(i / 2 % 4);
            if decoding.next_block(&mut pair.models()).is_err() {
                assert_eq!(decoding.text(), before);
            }
            pair.assert_lines_are_prefixes(decoding.text());
        }
        (pair.target.fails_in, pair.draft.fails_in) = (None, None);
        let expected = pair.fresh().decode(&settings, &long, decoding.generated().len());
        assert_eq!(decoding.generated(), expected);
    }
}

#[test]
fn the_same_seed_writes_the_same_text() {
    let mut rng = Rng::new(21);
    let pair = Pair::random(40, &mut rng);
    for strategy in [Strategy::Sample, Strategy::Speculative, Strategy::Mtad] {
        let text = |seed| {
            let settings = Settings { strategy, seed, ..Settings::default() };
            pair.fresh().decode(&settings, &[0], 100)
        };
        assert_eq!(text(1), text(1));
        assert_ne!(text(1), text(2));
    }
    // A seed's numbers begin anew with the settings, and go on with another prompt.
    let mut pair = pair.fresh();
    let settings = Settings { strategy: Strategy::Sample, seed: 3, ..Settings::default() };
    let mut decoding = Decoding::new(settings.clone()).unwrap();
    let mut texts = Vec::new();
    for anew in [false, true, false] {
        if anew {
            decoding.configure(settings.clone()).unwrap();
        }
        decoding.start(&mut pair.models(), &[0]).unwrap();
        for _ in 0..50 {
            decoding.next_block(&mut pair.models()).unwrap();
        }
        texts.push(decoding.generated().to_vec());
    }
    assert_eq!(texts[0], texts[1]);
    assert_ne!(texts[1], texts[2]);
}

#[test]
fn what_cannot_be_done_is_refused_with_a_reason() {
    let mut rng = Rng::new(22);
    let mut pair = Pair::random(5, &mut rng);
    let mut decoding = Decoding::new(Settings::default()).unwrap();
    let message = |result: Result<Option<&Block>>| result.unwrap_err().to_string();
    assert!(message(decoding.next_block(&mut pair.models())).contains("start"));
    let error = decoding.start(&mut pair.models(), &[]).unwrap_err();
    assert!(error.to_string().contains("prompt is empty"), "{error}");
    let error = decoding.start(&mut Models::alone(&mut pair.target), &[0]).unwrap_err();
    assert!(error.to_string().contains("needs a draft"), "{error}");
    decoding.start(&mut pair.models(), &[0]).unwrap();
    let alone = &mut Models::alone(&mut pair.target);
    assert!(message(decoding.next_block(alone)).contains("needs a draft"));
    assert!(decoding.configure(Settings { gamma: 0, ..Settings::default() }).is_err());
    assert_eq!(decoding.settings(), &Settings::default());
    assert!(Decoding::new(Settings { tau: -0.5, ..Settings::default() }).is_err());
}

#[test]
fn time_goes_to_the_phases_that_a_strategy_has() {
    let mut rng = Rng::new(23);
    let mut pair = Pair::random(50, &mut rng);
    for strategy in [Strategy::Sample, Strategy::Mtad] {
        let mut decoding = Decoding::new(Settings { strategy, ..Settings::default() }).unwrap();
        decoding.start(&mut pair.models(), &[0, 1, 2]).unwrap();
        for _ in 0..5 {
            decoding.next_block(&mut pair.models()).unwrap();
        }
        let spent = |phase| decoding.timeline().seconds(phase) > 0.0;
        assert!(spent(Phase::Prefill) && spent(Phase::Verify) && spent(Phase::Sample));
        assert_eq!(spent(Phase::Draft), strategy == Strategy::Mtad);
    }
}
