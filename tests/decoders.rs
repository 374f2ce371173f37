//! The decoders against theory, on bigram tables whose distributions are known exactly.
//!
//! Probabilities are computed here a second time, in plain f64 and without any of the library's
//! sampling code.

mod common;
#[allow(dead_code)]
#[path = "../examples/table_model.rs"]
mod table_model;

use std::sync::Arc;

use mtad::decode::{
    Block, CostTable, Decoding, Models, Origin, Phase, Settings, Strategy, Vocabulary,
};
use mtad::lm::table::TableLm;
use mtad::lm::{Batch, Lm, MAX_TREE, Outputs, Row, Token};
use mtad::sampling::{Constraint, Mask, Matcher, Rng, Score, Warp};
use mtad::{Error, Result};

/// The strategies that draft in one way, whose text at temperature 0 is the greedy one.
const DRAFTING: [Strategy; 7] = [
    Strategy::Speculative,
    Strategy::Mtad,
    Strategy::Mmtad,
    Strategy::SpecInfer,
    Strategy::Bild,
    Strategy::Typical,
    Strategy::Dsbd,
];

/// Every strategy.
fn all() -> impl Iterator<Item = Strategy> {
    Strategy::ALL.into_iter().map(|(strategy, _)| strategy)
}

/// Every strategy whose text at temperature 0 is the greedy one.
fn greedy_at_0() -> impl Iterator<Item = Strategy> {
    all().filter(|strategy| !matches!(strategy, Strategy::Beam | Strategy::Mtjd))
}

/// The cost table of a draft that is worth it.
fn cheap_draft() -> Option<Arc<CostTable>> {
    let table = CostTable::new(vec![(1, 10.0), (32, 20.0)], vec![(1, 1.0), (8, 1.2)]);
    Some(Arc::new(table.unwrap()))
}

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

    fn commit(&mut self, tip: Option<Row>) -> Result<()> {
        self.inner.commit(tip)?;
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
        presence_penalty: one_of(&[0.0, 0.0, 0.6, -0.4]),
        frequency_penalty: one_of(&[0.0, 0.0, 0.3]),
        repeat_last_n: one_of(&[64.0, 5.0]) as usize,
    }
}

/// The warped probabilities of what follows `path`, by their definition.
fn probabilities(lm: &TableLm, warp: &Warp, path: &[Token]) -> Vec<f64> {
    held(lm, warp, path, |_| true)
}

/// The same where only some tokens may follow.
fn held(lm: &TableLm, warp: &Warp, path: &[Token], may: impl Fn(Token) -> bool) -> Vec<f64> {
    let mut logits: Vec<f64> =
        lm.logits_after(*path.last().unwrap()).iter().map(|&x| f64::from(x)).collect();
    let recent = &path[path.len().saturating_sub(warp.repeat_last_n)..];
    let penalty = f64::from(warp.repeat_penalty);
    for (token, x) in logits.iter_mut().enumerate() {
        let count = recent.iter().filter(|t| **t == token as Token).count();
        if count > 0 {
            *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
            *x -= f64::from(warp.presence_penalty);
            *x -= count as f64 * f64::from(warp.frequency_penalty);
        }
    }
    let mut order: Vec<usize> = (0..logits.len()).filter(|&t| may(t as Token)).collect();
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
            let found = table_model::run(entry, &entry.settings(strategy), 600, 20).unwrap();
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
        assert!(nlls[1] < nlls[0] && nlls[2] < nlls[0], "joint decoding gives likelier text");
    }
}

#[test]
fn speculative_sampling_is_lossless() {
    let mut rng = Rng::new(11);
    let tree = |branching: &[usize], with_replacement| Settings {
        strategy: Strategy::SpecInfer,
        branching: branching.to_vec(),
        with_replacement,
        ..Settings::default()
    };
    let chain = |strategy, gamma| Settings { strategy, gamma, ..Settings::default() };
    for settings in [
        chain(Strategy::Sample, 1),
        chain(Strategy::Speculative, 1),
        chain(Strategy::Speculative, 4),
        tree(&[1, 1, 1, 1], false),
        tree(&[4, 2, 2], false),
        tree(&[4, 2, 2], true),
        tree(&[9, 3], false),
        Settings { beam_width: 1, ..chain(Strategy::Dsbd, 4) },
    ] {
        let Settings { strategy, gamma, .. } = settings;
        for (top_k, top_p, min_p, temperature) in
            [(0, 1.0, 0.0, 1.0), (5, 1.0, 0.0, 0.8), (0, 0.8, 0.0, 1.4), (6, 0.9, 0.05, 1.0)]
        {
            let vocab = 8;
            let mut pair = Pair::random(vocab, &mut rng);
            let warp = Warp { top_k, top_p, min_p, temperature, ..Warp::default() };
            let settings = Settings { warp, seed: 5, ..settings.clone() };
            let text = pair.decode(&settings, &[0], 40_000);
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

/// At least `tokens` tokens of a target whose draft has other tokens; what the draft was given to
/// read.
fn decode_unlike(
    pair: &mut Pair,
    vocabulary: Vocabulary,
    settings: &Settings,
    tokens: usize,
) -> Vec<Token> {
    let mut decoding = Decoding::new(settings.clone()).unwrap();
    decoding.start(&mut pair.models().with_vocabulary(vocabulary), &[7, 0]).unwrap();
    while decoding.generated().len() < tokens {
        decoding.next_block(&mut pair.models().with_vocabulary(vocabulary)).unwrap().unwrap();
        let text = decoding.text();
        assert_eq!(pair.target.line, text[..pair.target.line.len()]);
        let read =
            |&t: &Token| if (t as usize) < vocabulary.shared { t } else { vocabulary.stand_in };
        let known: Vec<Token> = text[..pair.draft.line.len()].iter().map(read).collect();
        assert_eq!(pair.draft.line, known);
    }
    decoding.generated()[..tokens].to_vec()
}

/// Vocabularies of 8 tokens of which the draft has 5: it has no others, or others, which would win.
fn unlike(rng: &mut Rng) -> Vec<(Pair, Vocabulary)> {
    let vocabulary = Vocabulary { tokens: 8, shared: 5, stand_in: 1 };
    [5, 8, 11]
        .map(|rows| {
            let target = random_table(8, rng);
            let mut draft = padded(random_table(5, rng), rows - 5);
            for (d, t) in draft.iter_mut().zip(&target) {
                d.iter_mut().zip(t).take(5).for_each(|(d, t)| *d = 0.5 * (*d + t));
            }
            (Pair::of(target, draft), vocabulary)
        })
        .into()
}

#[test]
fn a_draft_of_fewer_tokens_leaves_the_target_its_own() {
    let mut rng = Rng::new(31);
    let chain = |strategy, gamma| Settings { strategy, gamma, ..Settings::default() };
    for settings in [
        chain(Strategy::Sample, 1),
        chain(Strategy::Speculative, 4),
        Settings { branching: vec![3, 2], ..chain(Strategy::SpecInfer, 2) },
        Settings { with_replacement: true, ..chain(Strategy::SpecInfer, 3) },
        Settings { beam_width: 1, ..chain(Strategy::Dsbd, 4) },
    ] {
        for (top_k, temperature, repeat_penalty) in [(0, 1.0, 1.0), (6, 0.8, 1.0), (0, 1.0, 1.3)] {
            for (mut pair, vocabulary) in unlike(&mut rng) {
                let penalised = Warp { repeat_penalty, repeat_last_n: 1, ..Warp::default() };
                let warp = Warp { top_k, temperature, ..penalised };
                let settings = Settings { warp, seed: 5, ..settings.clone() };
                let text = decode_unlike(&mut pair, vocabulary, &settings, 20_000);
                let mut counts = vec![vec![0.0; 8]; 8];
                text.windows(2).for_each(|two| counts[two[0] as usize][two[1] as usize] += 1.0);
                let mut chi = ChiSquare::default();
                for (last, counts) in counts.iter().enumerate() {
                    let p = probabilities(&pair.target.inner, &warp, &[last as Token]);
                    chi.add(counts, &p);
                }
                println!("{} {warp:?}: {:+.2}", settings.strategy, chi.z());
                assert!(chi.z() < 4.5, "{} {warp:?}: {}", settings.strategy, chi.z());
            }
        }
    }
}

#[test]
fn greedy_text_is_the_target_s_whatever_the_draft_has() {
    let mut rng = Rng::new(32);
    let mut beyond = 0;
    for strategy in greedy_at_0() {
        for (pair, vocabulary) in unlike(&mut rng) {
            for repeat_penalty in [1.0, 1.2] {
                let warp = Warp { temperature: 0.0, repeat_penalty, ..Warp::default() };
                let greedy = Settings { strategy: Strategy::Greedy, warp, ..Settings::default() };
                let expected = decode_unlike(&mut pair.fresh(), vocabulary, &greedy, 60);
                beyond += expected.iter().filter(|&&t| t >= 5).count();
                let settings = Settings { strategy, costs: cheap_draft(), ..greedy };
                let text = decode_unlike(&mut pair.fresh(), vocabulary, &settings, 60);
                assert_eq!(text, expected, "{strategy}");
            }
        }
    }
    assert!(beyond > 500, "these texts have {beyond} tokens that the draft does not have");
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
            ..Settings::default()
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

            // q stays unwarped, but for the penalties, where the target is greedy.
            let q_warp = if settings.warp.temperature > 0.0 {
                settings.warp
            } else {
                let Warp { temperature, top_k, top_p, min_p, .. } = Warp::default();
                Warp { temperature, top_k, top_p, min_p, ..settings.warp }
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
            assert_eq!(block.origin(0) == Origin::Draft, accepted > 0);
            assert_eq!(block.origin(accepted), Origin::Target);

            // What is emitted has probability, also after an accepted block, and is scored.
            path = before;
            for (&token, score) in block.tokens.iter().zip(&block.scores) {
                let p = probabilities(&pair.target.inner, &settings.warp, &path);
                assert!(p[token as usize] > 0.0, "{settings:?}");
                check_score(score, token, &pair.target.inner, &path, settings.alternatives);
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
        for strategy in greedy_at_0() {
            let settings = Settings {
                strategy,
                branching: [vec![4, 2, 2], vec![1], vec![40], vec![2, 1, 3, 1]][case % 4].clone(),
                fallback: [0.5, 0.0, 1.0][case % 3],
                rollback: [3.0, 0.0, 50.0][case % 3],
                costs: cheap_draft(),
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
    for strategy in all() {
        for (temperature, top_k) in [(0.0, 0), (1.0, 0), (1.0, 4)] {
            let pair = Pair::random(9, &mut rng);
            let warp = Warp { temperature, top_k, ..Warp::default() };
            let costs = cheap_draft();
            let settings = Settings { strategy, warp, costs, ..Settings::default() };
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
    for strategy in greedy_at_0() {
        for (target, draft) in [(20, 20), (21, 64), (64, 20), (3, 3), (4, 1), (5, 3), (20, 4)] {
            let mut pair = Pair {
                target: Recorder::with_capacity(table_of(&plain.target.inner), target),
                draft: Recorder::with_capacity(table_of(&plain.draft.inner), draft),
            };
            let warp = Warp { temperature: 0.0, ..Warp::default() };
            let costs = cheap_draft();
            let settings = Settings { strategy, gamma: 5, warp, costs, ..Settings::default() };
            let mut decoding = Decoding::new(settings).unwrap();
            decoding.start(&mut pair.models(), &[1, 2, 3]).unwrap();
            while let Some(block) = decoding.next_block(&mut pair.models()).unwrap() {
                assert!(block.accepted <= block.drafted && block.drafted <= 8);
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
    for strategy in greedy_at_0() {
        let mut pair = Pair::random(10, &mut rng);
        let warp = Warp { temperature: 0.0, ..Warp::default() };
        let costs = cheap_draft();
        let settings = Settings { strategy, warp, score: true, costs, ..Settings::default() };
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
    for strategy in DRAFTING {
        for lag in [1, 5, 100, 3 * MAX_TREE] {
            let mut pair = Pair::random(10, &mut rng);
            let warp = Warp { temperature: 0.0, ..Warp::default() };
            let plain = Settings { strategy: Strategy::Greedy, warp, ..Settings::default() };
            // As many rows as a tree holds, so that a lag of one more does not fit beside them.
            let verified = matches!(strategy, Strategy::Mmtad | Strategy::Dsbd);
            let (gamma, beam_width) = (8, (MAX_TREE - 1) / if verified { 8 } else { 7 });
            let branching = vec![9, 3, 3];
            let settings = Settings { strategy, gamma, beam_width, branching, ..plain.clone() };
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
    for strategy in greedy_at_0() {
        let mut pair = Pair::random(10, &mut rng);
        let warp = Warp { temperature: 0.0, ..Warp::default() };
        let costs = cheap_draft();
        let settings = Settings { strategy, warp, costs, ..Settings::default() };
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
    for strategy in all().filter(|&strategy| strategy != Strategy::Greedy) {
        let text = |seed| {
            let costs = cheap_draft();
            let settings = Settings { strategy, seed, costs, ..Settings::default() };
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

/// Settings in which anything may be, within what is allowed.
fn random_settings(strategy: Strategy, rng: &mut Rng) -> Settings {
    let alternatives = [0, 1, 3][rng.below(3) as usize];
    let mut one_of = |values: &[f64]| values[rng.below(values.len() as u32) as usize];
    Settings {
        strategy,
        gamma: one_of(&[1.0, 2.0, 4.0, 7.0]) as usize,
        beam_width: one_of(&[1.0, 2.0, 5.0, 16.0]) as usize,
        tau: one_of(&[0.0, 0.05, 0.5, 1.0, 3.0]),
        with_replacement: one_of(&[0.0, 1.0]) > 0.0,
        branching: vec![one_of(&[1.0, 6.0]) as usize, 2, one_of(&[1.0, 3.0]) as usize],
        fallback: one_of(&[0.0, 0.3, 0.9]),
        rollback: one_of(&[0.5, 3.0, f64::INFINITY]),
        epsilon: one_of(&[0.0, 0.1, 0.5]),
        delta: one_of(&[0.0, 0.3, 1.0]),
        costs: cheap_draft(),
        warp: random_warp(rng),
        constraint: None,
        seed: u64::from(rng.below(1000)),
        score: true,
        alternatives,
    }
}

/// That a score is what the unwarped target makes of a token after `path`, and of the most probable ones.
fn check_score(score: &Score, token: Token, lm: &TableLm, path: &[Token], alternatives: usize) {
    let p = probabilities(lm, &Warp::default(), path);
    let is_of = |token: Token, log_prob: f64| {
        assert!((log_prob - p[token as usize].ln()).abs() < 1e-5, "{token} {log_prob} {p:?}");
    };
    is_of(token, score.log_prob);
    let mut order: Vec<Token> = (0..p.len() as Token).collect();
    order.sort_by(|&a, &b| p[b as usize].total_cmp(&p[a as usize]).then(a.cmp(&b)));
    let found: Vec<Token> = score.alternatives.iter().map(|a| a.0).collect();
    assert_eq!(found, order[..alternatives.min(p.len())]);
    score.alternatives.iter().for_each(|&(token, log_prob)| is_of(token, log_prob));
}

#[test]
fn what_is_emitted_was_kept_has_probability_and_is_scored() {
    let mut rng = Rng::new(24);
    for strategy in all() {
        for _ in 0..60 {
            let vocab = 2 + rng.below(20) as usize;
            let mut pair = Pair::random(vocab, &mut rng);
            let settings = random_settings(strategy, &mut rng);
            let mut decoding = Decoding::new(settings.clone()).unwrap();
            decoding.start(&mut pair.models(), &[0, rng.below(vocab as u32)]).unwrap();
            // The target searches among what it has unwarped.
            let alone = matches!(strategy, Strategy::Beam | Strategy::Mtjd);
            let warp = match alone {
                true => settings.warp.for_draft(),
                false => decoding.settings().warp,
            };
            for _ in 0..25 {
                let mut path = decoding.text().to_vec();
                let block = decoding.next_block(&mut pair.models()).unwrap().unwrap().clone();
                pair.assert_lines_are_prefixes(decoding.text());
                assert!(!block.tokens.is_empty() && block.accepted <= block.drafted);
                let mut log_p = 0.0;
                for (i, (&token, score)) in block.tokens.iter().zip(&block.scores).enumerate() {
                    let p = probabilities(&pair.target.inner, &warp, &path)[token as usize];
                    assert!(p > 0.0, "{settings:?}");
                    log_p += if block.origin(i) == Origin::Draft { p.ln() } else { 0.0 };
                    check_score(score, token, &pair.target.inner, &path, settings.alternatives);
                    path.push(token);
                }
                assert_eq!(block.scores.len(), block.tokens.len());
                assert!((block.log_p - log_p).abs() < 1e-4, "{settings:?} {block:?}");
                if let (Strategy::Mtad | Strategy::Mmtad, Some(ratio)) =
                    (strategy, block.log_ratio())
                {
                    assert!(ratio > settings.tau.ln());
                }
            }
        }
    }
}

#[test]
fn the_tree_of_mmtad_gives_the_deepest_and_likeliest_path() {
    let mut rng = Rng::new(25);
    let mut elsewhere = 0;
    for case in 0..150 {
        let mut pair = Pair::random(8, &mut rng);
        let settings = Settings {
            gamma: 1 + case % 4,
            beam_width: 1 + case % 5,
            tau: [0.01, 0.3, 0.9][case % 3],
            seed: case as u64,
            ..Settings::default()
        };
        // The same draws in both: MTAD verifies the best beam alone.
        let of = |pair: &mut Pair, strategy| {
            let settings = Settings { strategy, ..settings.clone() };
            let mut decoding = Decoding::new(settings).unwrap();
            decoding.start(&mut pair.models(), &[1]).unwrap();
            decoding.next_block(&mut pair.models()).unwrap().unwrap().clone()
        };
        let chain = of(&mut pair.fresh(), Strategy::Mtad);
        let tree = of(&mut pair, Strategy::Mmtad);
        assert_eq!(chain.steps, tree.steps);
        assert!(tree.accepted >= chain.accepted);
        if tree.accepted == chain.accepted {
            assert!(tree.log_p >= chain.log_p);
        }
        elsewhere += usize::from(tree.accepted > chain.accepted || tree.log_p > chain.log_p);
        let log_q: f64 = tree.steps[..tree.accepted].iter().map(|step| step.1).sum();
        assert!((tree.log_q - log_q).abs() < 1e-9);
        if settings.beam_width == 1 {
            assert_eq!(chain, tree);
        }
    }
    assert!(elsewhere > 20, "{elsewhere}");
}

#[test]
fn strategies_meet_where_their_settings_do() {
    let mut rng = Rng::new(26);
    for case in 0..20 {
        let mut pair = Pair::random(12, &mut rng);
        let warp = Warp { top_k: [0, 5][case % 2], ..Warp::default() };
        let base = Settings { beam_width: 1, warp, seed: case as u64, ..Settings::default() };
        // One candidate per node, one beam: the same draws, so the same text.
        let text = |strategy| {
            let branching = vec![1; base.gamma];
            let settings = Settings { strategy, branching, ..base.clone() };
            pair.fresh().decode(&settings, &[3], 200)
        };
        assert_eq!(text(Strategy::Mmtad), text(Strategy::Mtad));
        assert_eq!(text(Strategy::SpecInfer), text(Strategy::Speculative));

        // Thresholds that let everything through.
        for settings in [
            Settings { strategy: Strategy::Typical, epsilon: 0.0, ..base.clone() },
            Settings {
                strategy: Strategy::Bild,
                rollback: f64::INFINITY,
                fallback: 0.0,
                ..base.clone()
            },
        ] {
            // Where the target has no zeros.
            let settings = Settings { warp: Warp::default(), ..settings };
            let mut decoding = Decoding::new(settings).unwrap();
            decoding.start(&mut pair.models(), &[3]).unwrap();
            for _ in 0..50 {
                decoding.next_block(&mut pair.models()).unwrap();
            }
            assert_eq!(decoding.statistics().acceptance_rate(), Some(1.0));
        }
    }
    // A draft that is never sure hands over at once.
    let mut pair = Pair::random(12, &mut rng);
    let settings = Settings { strategy: Strategy::Bild, fallback: 1.0, ..Settings::default() };
    let mut decoding = Decoding::new(settings).unwrap();
    decoding.start(&mut pair.models(), &[3]).unwrap();
    for _ in 0..50 {
        decoding.next_block(&mut pair.models()).unwrap();
    }
    assert_eq!((decoding.statistics().drafted(), decoding.statistics().emitted), (0, 50));
}

/// Mean negative log-likelihood under the unwarped target, and block efficiency.
fn quality(pair: &Pair, settings: &Settings, sequences: u64) -> (f64, f64) {
    let (mut nll, mut tokens, mut efficiency) = (0.0, 0, 0.0);
    let mut pair = pair.fresh();
    for seed in 0..sequences {
        let settings = Settings { seed, score: true, ..settings.clone() };
        let mut decoding = Decoding::new(settings).unwrap();
        decoding.start(&mut pair.models(), &[seed as Token % 20]).unwrap();
        while decoding.generated().len() < 200 {
            decoding.next_block(&mut pair.models()).unwrap();
        }
        nll -= decoding.scores().iter().sum::<f64>();
        tokens += decoding.scores().len();
        efficiency += decoding.statistics().block_efficiency();
    }
    (nll / tokens as f64, efficiency / sequences as f64)
}

#[test]
fn joint_decoding_lies_between_sampling_and_the_targets_own_beams() {
    let Some(file) = common::shared("vectors/mtad_reference.json") else { return };
    for entry in &table_model::read(file.to_str().unwrap()).unwrap()[..6] {
        let (target, draft) = entry.tables();
        let pair = Pair::of(target, draft);
        let nll = |strategy| {
            quality(&pair, &Settings { strategy, tau: 0.3, ..Settings::default() }, 60).0
        };
        let [sample, mtad, dsbd, mtjd, beam] =
            [Strategy::Sample, Strategy::Mtad, Strategy::Dsbd, Strategy::Mtjd, Strategy::Beam]
                .map(nll);
        println!("sample {sample:.3} mtad {mtad:.3} dsbd {dsbd:.3} mtjd {mtjd:.3} beam {beam:.3}");
        assert!(mtjd < mtad && mtad < sample && beam < sample && dsbd < sample);
    }
}

/// What follows one token, by drawing W = 2 pairs of two tokens from the target's own joint
/// distribution: DSBD's last layer, where everything is accepted or drawn anew.
#[test]
fn beams_of_dsbd_are_the_targets() {
    let mut rng = Rng::new(27);
    for case in 0..6 {
        let with_replacement = case % 2 == 0;
        let mut pair = Pair::random(4, &mut rng);
        // One layer, whose best of however many beams is committed. The width of a layer depends on
        // p and q alone, so it is the same each time.
        let settings = Settings {
            strategy: Strategy::Dsbd,
            gamma: 1,
            beam_width: 3,
            with_replacement,
            seed: case,
            ..Settings::default()
        };
        let mut decoding = Decoding::new(settings).unwrap();
        let mut counts = vec![0.0; 4];
        for _ in 0..40_000 {
            decoding.start(&mut pair.models(), &[1]).unwrap();
            let block = decoding.next_block(&mut pair.models()).unwrap().unwrap();
            counts[block.tokens[0] as usize] += 1.0;
            pair.draft.passes.clear();
            pair.target.passes.clear();
        }
        let p = probabilities(&pair.target.inner, &Warp::default(), &[1]);
        // The best of w draws, for each width that may have been; one of them must fit.
        let fits = (1..=3).any(|width| {
            let exact = best_of(&p, width, with_replacement);
            let mut chi = ChiSquare::default();
            chi.add(&counts, &exact);
            println!("width {width}, with replacement {with_replacement}: {:+.2}", chi.z());
            chi.z() < 5.0
        });
        assert!(fits, "with replacement {with_replacement}: {counts:?} {p:?}");
    }
}

/// The probabilities of the most probable of `width` draws.
fn best_of(p: &[f64], width: usize, with_replacement: bool) -> Vec<f64> {
    fn go(
        p: &[f64],
        left: &[f64],
        width: usize,
        again: bool,
        best: Option<usize>,
        prob: f64,
        out: &mut [f64],
    ) {
        let mass: f64 = left.iter().sum();
        if width == 0 || mass <= 0.0 {
            out[best.unwrap()] += prob;
            return;
        }
        for i in 0..p.len() {
            if left[i] > 0.0 {
                let mut after = left.to_vec();
                if !again {
                    after[i] = 0.0;
                }
                let best = best.filter(|&b| p[b] >= p[i]).or(Some(i));
                go(p, &after, width - 1, again, best, prob * left[i] / mass, out);
            }
        }
    }
    let mut out = vec![0.0; p.len()];
    go(p, p, width, with_replacement, None, 1.0, &mut out);
    out
}

#[test]
fn the_targets_own_beams_end_with_the_context() {
    let mut rng = Rng::new(28);
    for strategy in [Strategy::Beam, Strategy::Mtjd] {
        for capacity in [3, 4, 9, 40] {
            for beam_width in [1, 3, 60] {
                let mut pair = Pair::random(12, &mut rng);
                let target = table_of(&pair.target.inner);
                pair.target = Recorder::with_capacity(target, capacity);
                let settings = Settings { strategy, beam_width, gamma: 3, ..Settings::default() };
                if settings.validate().is_err() {
                    continue;
                }
                let mut decoding = Decoding::new(settings).unwrap();
                decoding.start(&mut pair.models(), &[1, 2, 3]).unwrap();
                while decoding.next_block(&mut pair.models()).unwrap().is_some() {
                    pair.assert_lines_are_prefixes(decoding.text());
                }
                assert_eq!(decoding.text().len(), capacity + 1);
            }
        }
    }
}

#[test]
fn beam_search_finds_what_greedy_decoding_misses() {
    // After 0 the likelier token leads to nothing likely.
    let ln = |rows: [[f32; 4]; 4]| rows.map(|row| row.map(f32::ln).to_vec()).to_vec();
    let target = ln([
        [0.01, 0.55, 0.43, 0.01],
        [0.25, 0.25, 0.25, 0.25],
        [0.01, 0.01, 0.01, 0.97],
        [0.97, 0.01, 0.01, 0.01],
    ]);
    let warp = Warp { temperature: 0.0, ..Warp::default() };
    for strategy in [Strategy::Beam, Strategy::Mtjd] {
        let mut pair = Pair::of(target.clone(), target.clone());
        let settings = Settings { strategy, gamma: 3, warp, ..Settings::default() };
        assert_eq!(pair.decode(&settings, &[0], 6), [2, 3, 0, 2, 3, 0]);
    }
}

/// A model whose passes take the time that a table says, on a clock of their own.
struct Timed<'t> {
    inner: TableLm,
    cost: Box<dyn Fn(usize) -> f64 + Send + 't>,
    clock: f64,
}

impl Lm for Timed<'_> {
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
        self.clock += (self.cost)(batch.len());
        self.inner.eval(batch)
    }

    fn commit(&mut self, tip: Option<Row>) -> Result<()> {
        self.inner.commit(tip)
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.inner.truncate(len)
    }
}

/// Seconds on the virtual clock for so many tokens with each of the drafts, one after the other.
fn virtual_seconds(
    settings: &Settings,
    costs: &CostTable,
    target: &[Vec<f32>],
    drafts: &[Vec<Vec<f32>>],
    tokens: usize,
) -> f64 {
    let timed = |table: &[Vec<f32>], cost: Box<dyn Fn(usize) -> f64 + Send>| Timed {
        inner: TableLm::new(table.to_vec()).unwrap(),
        cost,
        clock: 0.0,
    };
    let table = costs.clone();
    let mut target = timed(target, Box::new(move |rows| table.target(rows)));
    let mut decoding = Decoding::new(settings.clone()).unwrap();
    let mut total = 0.0;
    for (i, draft) in drafts.iter().enumerate() {
        let table = costs.clone();
        let mut draft = timed(draft, Box::new(move |rows| table.draft(rows)));
        if i == 0 {
            decoding.start(&mut Models::pair(&mut target, &mut draft), &[0]).unwrap();
        } else {
            // What the last draft had evaluated, this one has, too.
            let line = &decoding.text()[..decoding.text().len() - 1];
            mtad::lm::extend(&mut draft, line).unwrap();
        }
        (target.clock, draft.clock) = (0.0, 0.0);
        let until = tokens * (i + 1);
        while decoding.generated().len() < until {
            decoding.next_block(&mut Models::pair(&mut target, &mut draft)).unwrap();
        }
        total += target.clock + draft.clock;
    }
    total / decoding.generated().len() as f64 * (tokens * drafts.len()) as f64
}

#[test]
fn the_controller_is_about_as_fast_as_the_best_fixed_choice() {
    let mut rng = Rng::new(29);
    let vocab = 24;
    let target = random_table(vocab, &mut rng);
    let other = random_table(vocab, &mut rng);
    let like = |likeness: f32| -> Vec<Vec<f32>> {
        let mix = |t: &f32, o: &f32| likeness * t + (1.0 - likeness) * o;
        target
            .iter()
            .zip(&other)
            .map(|(t, o)| t.iter().zip(o).map(|(t, o)| mix(t, o)).collect())
            .collect()
    };
    let (useful, fair, useless) = (like(0.9), like(0.6), like(0.0));
    // Passes whose rows are nearly free, and others that cost more than half a pass each.
    let cheap = CostTable::new(
        vec![(1, 10.0), (2, 10.2), (4, 10.6), (8, 11.5), (16, 13.0), (32, 17.0)],
        vec![(1, 1.0), (2, 1.05), (4, 1.1), (8, 1.3)],
    )
    .unwrap();
    let dear_rows = CostTable::new(
        vec![(1, 10.0), (2, 14.0), (4, 21.0), (8, 36.0), (16, 70.0), (32, 140.0)],
        vec![(1, 1.0), (2, 1.5), (4, 2.5), (8, 4.5)],
    )
    .unwrap();
    let dear_draft = CostTable::new(cheap.target_entries().to_vec(), vec![(1, 10.0), (8, 12.0)]);
    let dear_draft = dear_draft.unwrap();
    let cases = [
        ("useful draft", &cheap, vec![&useful]),
        ("fair draft", &cheap, vec![&fair]),
        ("useless draft", &cheap, vec![&useless]),
        ("useful draft, dear rows", &dear_rows, vec![&useful]),
        ("useless draft, dear rows", &dear_rows, vec![&useless]),
        ("draft as dear as the target", &dear_draft, vec![&useful]),
        ("draft that gets worse", &cheap, vec![&useful, &useless]),
        ("draft that gets better", &cheap, vec![&useless, &useful]),
    ];
    let mut worst: f64 = 0.0;
    for tau in [0.1, 0.7] {
        for (name, costs, drafts) in &cases {
            let drafts: Vec<_> = drafts.iter().map(|&draft| draft.clone()).collect();
            let tokens = 6000 / drafts.len();
            let seconds = |settings: Settings| {
                let settings = Settings { tau, ..settings };
                virtual_seconds(&settings, costs, &target, &drafts, tokens)
            };
            let auto = Settings {
                strategy: Strategy::Auto,
                costs: Some(Arc::new((*costs).clone())),
                ..Settings::default()
            };
            let auto = seconds(auto);
            let sample = Settings { strategy: Strategy::Sample, ..Settings::default() };
            let mut best = (seconds(sample), "sample".to_owned());
            for strategy in [Strategy::Speculative, Strategy::Mtad, Strategy::Mmtad] {
                for gamma in 2..=8 {
                    let settings = Settings { strategy, gamma, ..Settings::default() };
                    let found = seconds(settings);
                    if found < best.0 {
                        best = (found, format!("{strategy} {gamma}"));
                    }
                }
            }
            let ratio = auto / best.0;
            println!("tau {tau} {name}: {ratio:.3} of {}", best.1);
            worst = worst.max(ratio);
        }
    }
    assert!(worst < 1.05, "{worst}");
}

#[test]
fn the_controller_decides_by_counts_alone() {
    let mut rng = Rng::new(30);
    let pair = Pair::random(30, &mut rng);
    let settings =
        Settings { strategy: Strategy::Auto, costs: cheap_draft(), ..Settings::default() };
    let run = || {
        let mut pair = pair.fresh();
        let mut decoding = Decoding::new(settings.clone()).unwrap();
        decoding.start(&mut pair.models(), &[0]).unwrap();
        for i in 0..100 {
            if i % 20 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            decoding.next_block(&mut pair.models()).unwrap();
        }
        (decoding.text().to_vec(), decoding.decisions().unwrap())
    };
    let (text, decisions) = run();
    assert_eq!((text, decisions.clone()), run());
    assert_eq!(decisions.rounds.iter().map(|(_, rounds)| rounds).sum::<u64>(), 100);
    // Without a table one is measured, and used again by the next start.
    let mut pair = pair.fresh();
    let mut decoding = Decoding::new(Settings { costs: None, ..settings }).unwrap();
    decoding.start(&mut pair.models(), &[0, 1, 2]).unwrap();
    let measured = decoding.settings().costs.clone().expect("it was measured");
    assert_eq!(measured.target_entries().len(), CostTable::TARGET_ROWS.len());
    pair.assert_lines_are_prefixes(decoding.text());
    decoding.next_block(&mut pair.models()).unwrap().unwrap();
    let passes = pair.target.passes.len();
    decoding.start(&mut pair.models(), &[0, 1, 2]).unwrap();
    assert_eq!(decoding.settings().costs.as_deref(), Some(&*measured));
    assert_eq!(pair.target.passes.len(), passes);
    assert!(decoding.plain_seconds(&mut pair.models()).unwrap().unwrap() > 0.0);
}

/// A language of which each token says what may follow it.
#[derive(Debug, Clone)]
struct Follows {
    /// What may follow each token.
    after: Vec<Vec<Token>>,
    /// The token before the text.
    first: Token,
    end: Option<Token>,
}

struct At {
    language: Follows,
    tokens: Vec<Token>,
}

impl Constraint for Follows {
    fn matcher(&self) -> Result<Box<dyn Matcher>> {
        Ok(Box::new(At { language: self.clone(), tokens: vec![self.first] }))
    }

    fn is_end(&self, token: Token) -> bool {
        self.end == Some(token)
    }
}

impl Matcher for At {
    fn advance(&mut self, token: Token) -> Result<()> {
        let last = self.tokens[self.tokens.len() - 1];
        if !self.language.after[last as usize].contains(&token) {
            return Err(Error::Grammar(format!("{token} may not follow {last}")));
        }
        self.tokens.push(token);
        Ok(())
    }

    fn retreat(&mut self, tokens: usize) -> Result<()> {
        self.tokens.truncate(self.tokens.len() - tokens);
        Ok(())
    }

    fn allow(&mut self, mask: &mut Mask) -> Result<()> {
        let last = self.tokens[self.tokens.len() - 1];
        self.language.after[last as usize].iter().for_each(|&token| mask.allow(token));
        Ok(())
    }
}

impl Follows {
    /// Half of the tokens after most tokens; after some, one. `first` stands before the text.
    fn random(vocab: usize, first: Token, rng: &mut Rng) -> Self {
        let mut after: Vec<Vec<Token>> = (0..vocab)
            .map(|i| match i % 4 {
                3 => vec![],
                _ => (0..vocab as Token).filter(|_| rng.below(2) == 0).collect(),
            })
            .collect();
        for tokens in &mut after {
            if tokens.is_empty() {
                tokens.push(rng.below(vocab as u32));
            }
        }
        // All can be reached.
        for (token, after) in after.iter_mut().enumerate() {
            let next = ((token + 1) % vocab) as Token;
            if token % 4 != 3 && !after.contains(&next) {
                after.push(next);
            }
        }
        Follows { after, first, end: None }
    }

    fn may(&self, last: Token) -> impl Fn(Token) -> bool + '_ {
        move |token| self.after[last as usize].contains(&token)
    }

    fn holds(&self, text: &[Token]) -> bool {
        let before = std::iter::once(&self.first).chain(text);
        before.zip(text).all(|(&last, &token)| self.may(last)(token))
    }
}

/// The lossless strategies.
fn lossless() -> Vec<Settings> {
    let chain = |strategy, gamma| Settings { strategy, gamma, ..Settings::default() };
    let tree = |branching: &[usize], with_replacement| Settings {
        branching: branching.to_vec(),
        with_replacement,
        ..chain(Strategy::SpecInfer, 4)
    };
    vec![
        chain(Strategy::Sample, 1),
        chain(Strategy::Speculative, 1),
        chain(Strategy::Speculative, 4),
        tree(&[4, 2, 2], false),
        tree(&[4, 2, 2], true),
        Settings { beam_width: 1, ..chain(Strategy::Dsbd, 4) },
    ]
}

#[test]
fn text_that_is_held_has_the_target_s_distribution_over_what_may_follow() {
    let mut rng = Rng::new(41);
    for settings in lossless() {
        for (top_k, top_p, temperature) in [(0, 1.0, 1.0), (3, 1.0, 0.8), (0, 0.8, 1.4)] {
            let vocab = 8;
            let mut pair = Pair::random(vocab, &mut rng);
            let language = Follows::random(vocab, 0, &mut rng);
            let warp = Warp { top_k, top_p, temperature, ..Warp::default() };
            let constraint: Option<Arc<dyn Constraint>> = Some(Arc::new(language.clone()));
            let settings = Settings { warp, seed: 5, constraint, ..settings.clone() };
            let text = pair.decode(&settings, &[0], 40_000);
            assert!(language.holds(&text));
            for n in [2, 3] {
                let mut counts = vec![vec![0.0; vocab]; vocab.pow(n - 1)];
                for gram in text.windows(n as usize) {
                    let (next, context) = gram.split_last().unwrap();
                    let context = context.iter().fold(0, |i, &t| i * vocab + t as usize);
                    counts[context][*next as usize] += 1.0;
                }
                let mut chi = ChiSquare::default();
                for (context, counts) in counts.iter().enumerate() {
                    let last = (context % vocab) as Token;
                    let p = held(&pair.target.inner, &warp, &[last], language.may(last));
                    chi.add(counts, &p);
                }
                println!("{} {warp:?} {n}-grams: {:+.2}", settings.strategy, chi.z());
                assert!(chi.z() < 4.5, "{} {warp:?}: {}", settings.strategy, chi.z());
            }
        }
    }
}

#[test]
fn a_draft_without_the_tokens_that_may_follow_drafts_less() {
    let mut rng = Rng::new(42);
    let rest = [Strategy::Mtad, Strategy::Mmtad, Strategy::Bild, Strategy::Typical, Strategy::Auto];
    let lossy = rest.map(|strategy| Settings { strategy, ..Settings::default() });
    for (exact, settings) in
        lossless().into_iter().map(|s| (true, s)).chain(lossy.map(|s| (false, s)))
    {
        for (pair, vocabulary) in unlike(&mut rng) {
            // The draft has the first five alone.
            let after = [&[5, 6, 7][..], &[0, 6], &[1, 3, 7], &[7], &[0, 1, 2, 3, 4, 5, 6, 7]];
            let after = after.into_iter().chain([&[1, 2][..], &[4, 5, 6], &[0, 3, 4, 5]]);
            let after: Vec<Vec<Token>> = after.map(<[Token]>::to_vec).collect();
            let language = Follows { after, first: 0, end: None };
            for temperature in [1.0, 0.0] {
                let constraint: Option<Arc<dyn Constraint>> = Some(Arc::new(language.clone()));
                let warp = Warp { temperature, ..Warp::default() };
                let costs = cheap_draft();
                let settings = Settings { warp, constraint, costs, seed: 6, ..settings.clone() };
                let tokens = if exact { 8_000 } else { 300 };
                let text = decode_unlike(&mut pair.fresh(), vocabulary, &settings, tokens);
                assert!(language.holds(&text), "{}", settings.strategy);
                let mut counts = vec![vec![0.0; 8]; 8];
                text.windows(2).for_each(|two| counts[two[0] as usize][two[1] as usize] += 1.0);
                let mut chi = ChiSquare::default();
                for (last, counts) in (0..).zip(&counts) {
                    let p = held(&pair.target.inner, &warp, &[last], language.may(last));
                    if exact || temperature == 0.0 {
                        chi.add(counts, &p);
                    }
                }
                assert!(chi.z() < 4.5, "{} {warp:?}: {}", settings.strategy, chi.z());
            }
        }
    }
}

#[test]
fn held_blocks_clear_the_threshold_under_held_distributions() {
    let mut rng = Rng::new(43);
    let (mut blocks, mut forced) = (0, 0);
    for case in 0..200 {
        let vocab = 4 + rng.below(16) as usize;
        let mut pair = Pair::random(vocab, &mut rng);
        let language = Follows::random(vocab, 1, &mut rng);
        let settings = Settings {
            strategy: Strategy::Mtad,
            gamma: 1 + rng.below(6) as usize,
            beam_width: 1 + rng.below(8) as usize,
            tau: [0.0, 0.01, 0.3, 0.9, 2.0][rng.below(5) as usize],
            with_replacement: rng.below(2) == 0,
            warp: Warp {
                repeat_penalty: 1.0,
                presence_penalty: 0.0,
                frequency_penalty: 0.0,
                ..random_warp(&mut rng)
            },
            constraint: Some(Arc::new(language.clone())),
            seed: case,
            ..Settings::default()
        };
        let greedy = settings.warp.temperature == 0.0;
        let q_warp = if greedy { Warp::default() } else { settings.warp };
        let mut decoding = Decoding::new(settings.clone()).unwrap();
        decoding.start(&mut pair.models(), &[0, 1]).unwrap();
        for _ in 0..40 {
            let mut path = decoding.text().to_vec();
            let passes = pair.target.passes.len();
            let block = decoding.next_block(&mut pair.models()).unwrap().unwrap().clone();
            assert_eq!(pair.target.passes.len() - passes, usize::from(block.forced == 0));
            let (mut log_p, mut log_q) = (0.0, 0.0);
            for (i, &token) in block.tokens.iter().enumerate() {
                let last = path[path.len() - 1];
                let p = held(&pair.target.inner, &settings.warp, &path, language.may(last));
                let q = held(&pair.draft.inner, &q_warp, &path, language.may(last));
                assert!(p[token as usize] > 0.0, "{settings:?}");
                if block.origin(i) == Origin::Draft {
                    log_p += p[token as usize].ln();
                    log_q += q[token as usize].ln();
                }
                if block.forced > 0 {
                    assert_eq!(p[token as usize], 1.0);
                    assert_eq!(language.after[last as usize], [token]);
                }
                path.push(token);
            }
            assert!((block.log_p - log_p).abs() < 1e-5 && (block.log_q - log_q).abs() < 1e-5);
            assert!(block.accepted == 0 || log_p - log_q > settings.tau.ln() - 1e-5);
            blocks += usize::from(block.accepted > 0);
        }
        let statistics = decoding.statistics();
        let made = statistics.rounds() + statistics.accepted() + statistics.forced;
        assert_eq!(statistics.emitted, made);
        forced += statistics.forced;
    }
    assert!(blocks > 2000 && forced > 1000, "{blocks} {forced}");
}

#[test]
fn at_temperature_0_held_text_is_the_greedy_one_of_what_may_follow() {
    let mut rng = Rng::new(44);
    for case in 0..60 {
        let vocab = 2 + rng.below(30) as usize;
        let mut pair = Pair::random(vocab, &mut rng);
        let language = Follows::random(vocab, 1, &mut rng);
        let warp = Warp { temperature: 0.0, ..random_warp(&mut rng) };
        let mut path = vec![0, 1];
        for _ in 0..60 {
            let last = path[path.len() - 1];
            let p = held(&pair.target.inner, &warp, &path, language.may(last));
            path.push(p.iter().position(|&p| p == 1.0).unwrap() as Token);
        }
        for strategy in greedy_at_0() {
            let settings = Settings {
                strategy,
                warp,
                seed: case,
                costs: cheap_draft(),
                constraint: Some(Arc::new(language.clone())),
                score: rng.below(2) == 0,
                ..Settings::default()
            };
            let text = pair.decode(&settings, &[0, 1], 60);
            assert_eq!(text, path[2..], "{strategy} {warp:?}");
        }
    }
}

#[test]
fn forced_tokens_are_evaluated_with_the_next_round() {
    let mut rng = Rng::new(45);
    for strategy in all().filter(|&strategy| strategy != Strategy::Beam) {
        let mut pair = Pair::random(8, &mut rng);
        // 0 to 6 in their order, then any of two, and 7 ends.
        let mut after: Vec<Vec<Token>> = (1..7).map(|next| vec![next]).collect();
        after.extend([vec![0, 7], vec![]]);
        let language = Follows { after, first: 0, end: Some(7) };
        let settings = Settings {
            strategy,
            costs: cheap_draft(),
            constraint: Some(Arc::new(language)),
            gamma: 1,
            branching: vec![2],
            ..Settings::default()
        };
        let mut decoding = Decoding::new(settings).unwrap();
        decoding.start(&mut pair.models(), &[3, 0]).unwrap();
        let passes = pair.target.passes.len();
        while !decoding.generated().contains(&7) && decoding.generated().len() < 500 {
            decoding.next_block(&mut pair.models()).unwrap().unwrap();
            pair.assert_lines_are_prefixes(decoding.text());
        }
        let statistics = decoding.statistics();
        let rounds = pair.target.passes.len() - passes;
        if !matches!(strategy, Strategy::Mtjd) {
            assert_eq!(rounds as u64, statistics.rounds(), "{strategy}");
        }
        assert!(statistics.forced >= 6, "{strategy}");
        // The end is not forced again and again.
        let len = decoding.text().len();
        if decoding.generated().contains(&7) {
            let block = decoding.next_block(&mut pair.models()).unwrap().unwrap();
            assert_eq!(block.forced, 0, "{strategy}");
            assert!(block.tokens.iter().all(|&token| token == 7), "{strategy}");
            decoding.truncate_text(&mut pair.models(), len).unwrap();
        }
    }
}

#[test]
fn a_language_without_a_way_on_is_an_error_and_not_the_end_of_the_session() {
    let mut rng = Rng::new(46);
    // (Beams avoid the way that leads nowhere.)
    for strategy in all().filter(|&strategy| strategy != Strategy::Beam) {
        let mut pair = Pair::random(4, &mut rng);
        let after = vec![vec![1, 2], vec![0, 2], vec![], vec![0]];
        let language = Arc::new(Follows { after, first: 0, end: None });
        let constraint: Option<Arc<dyn Constraint>> = Some(language);
        let costs = cheap_draft();
        let settings = Settings { strategy, costs, constraint, ..Settings::default() };
        let mut decoding = Decoding::new(settings.clone()).unwrap();
        decoding.start(&mut pair.models(), &[0]).unwrap();
        let error = loop {
            match decoding.next_block(&mut pair.models()) {
                Ok(block) => drop(block.unwrap()),
                Err(error) => break error,
            }
            assert!(decoding.text().len() < 2000, "{strategy}");
        };
        assert!(matches!(error, Error::Grammar(_)), "{strategy}: {error}");
        pair.assert_lines_are_prefixes(decoding.text());
        let settings = Settings { constraint: None, ..settings };
        decoding.configure(settings).unwrap();
        decoding.resume(&mut pair.models()).unwrap();
        for _ in 0..10 {
            decoding.next_block(&mut pair.models()).unwrap().unwrap();
        }
    }
}
