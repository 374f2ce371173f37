//! The decoders on the built-in pair: greedy text, and caches that hold what was kept.
#![cfg(feature = "builtin-pair")]

use std::sync::Arc;

use mtad::decode::{CostTable, Decoding, Models, Settings, Strategy};
use mtad::model::lm::{Batch, Lm, MAX_TREE, Row, Token, Want};
use mtad::{LoadOptions, Pair, SessionOptions, Warp};

fn pair() -> Pair {
    let options = LoadOptions { threads: 2, ..LoadOptions::default() };
    Pair::builtin(true, &options, &mut |_, _| true).unwrap()
}

fn prompt(pair: &Pair) -> Vec<Token> {
    pair.tokenizer().encode("One day a girl named Lily went to", Default::default())
}

fn settings(strategy: Strategy) -> Settings {
    let costs = CostTable::new(vec![(1, 10.0), (32, 20.0)], vec![(1, 1.0), (8, 1.2)]).unwrap();
    Settings { strategy, costs: Some(Arc::new(costs)), ..Settings::default() }
}

#[test]
fn at_temperature_0_drafts_do_not_change_the_text() {
    let pair = pair();
    let (mut target, mut draft) = {
        let options = SessionOptions::default();
        (pair.target().session(&options), pair.draft().unwrap().session(&options))
    };
    let prompt = prompt(&pair);
    let mut text = |strategy| {
        let warp = Warp { temperature: 0.0, ..Warp::default() };
        let mut models = Models::pair(&mut *target, &mut *draft);
        models.target.truncate(0).unwrap();
        models.draft.as_mut().unwrap().truncate(0).unwrap();
        let mut decoding = Decoding::new(Settings { warp, ..settings(strategy) }).unwrap();
        decoding.start(&mut models, &prompt).unwrap();
        while decoding.generated().len() < 80 {
            decoding.next_block(&mut models).unwrap().unwrap();
        }
        decoding.generated()[..80].to_vec()
    };
    let greedy = text(Strategy::Greedy);
    for (strategy, _) in Strategy::ALL {
        if !matches!(strategy, Strategy::Beam | Strategy::Mtjd) {
            assert_eq!(text(strategy), greedy, "{strategy}");
        }
    }
}

/// The logits of a few tokens after the line, as bits; the line stays as it is.
fn probe(lm: &mut dyn Lm) -> Vec<u32> {
    let mut batch = Batch::new();
    batch.push(300, None, Want::Logits);
    batch.push(400, Some(Row(0)), Want::Logits);
    let outputs = lm.eval(&batch).unwrap();
    let bits = (0..2).flat_map(|i| outputs.logits(i).iter().map(|x| x.to_bits())).collect();
    lm.keep(None).unwrap();
    bits
}

#[test]
fn what_was_kept_is_in_the_cache_as_if_it_had_been_evaluated_plainly() {
    let pair = pair();
    let options = SessionOptions::default();
    let prompt = prompt(&pair);
    for (strategy, _) in Strategy::ALL {
        let mut target = pair.target().session(&options);
        let mut draft = pair.draft().unwrap().session(&options);
        let mut decoding = Decoding::new(settings(strategy)).unwrap();
        {
            let mut models = Models::pair(&mut *target, &mut *draft);
            decoding.start(&mut models, &prompt).unwrap();
            while decoding.generated().len() < 150 {
                decoding.next_block(&mut models).unwrap().unwrap();
            }
        }
        for (model, lm) in [(pair.target(), &mut target), (pair.draft().unwrap(), &mut draft)] {
            let line = &decoding.text()[..lm.committed()];
            for size in [MAX_TREE, 7] {
                let mut fresh = model.session(&options);
                for piece in line.chunks(size) {
                    let last = Row(piece.len() as u32 - 1);
                    fresh.eval(&Batch::chain(piece, None, Row(0), Want::Nothing)).unwrap();
                    fresh.keep(Some(last)).unwrap();
                }
                assert!(probe(&mut **lm) == probe(&mut *fresh), "{strategy}, pieces of {size}");
            }
        }
    }
}
