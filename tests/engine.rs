//! Sequences that share passes: each gets the bits that it gets alone, on every device.

mod common;

use std::sync::{Arc, Barrier};
use std::thread;

use mtad::engine::{Budget, Device, Model, SessionOptions};
use mtad::exec::CacheType;
use mtad::exec::cpu::{Cpu, Isa};
use mtad::exec::wgpu::{Gpu, Variants};
use mtad::gguf::Gguf;
use mtad::lm::{Batch, Lm, MAX_TREE, Output, Row, Token, Want};

use common::{adapter, shared, tiny_llama};

/// Numbers that are the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }
}

/// What one user does: lines and trees of random lengths, of which paths are kept. Returns the bits of all that came
/// back.
fn script(lm: &mut dyn Lm, seed: u64, vocab_size: usize) -> Vec<u32> {
    let mut random = Random(seed);
    let mut bits = Vec::new();
    for _ in 0..6 {
        let most = if random.below(4) == 0 { 90 } else { 9 };
        let len = 1 + random.below(most);
        let listed: Vec<Token> = (0..3).map(|_| random.below(vocab_size) as Token).collect();
        let mut batch = Batch::new();
        for i in 0..len.min(MAX_TREE) {
            let parent = match random.below(5) {
                0 => random.below(i + 1).checked_sub(1),
                _ => i.checked_sub(1),
            };
            // (All of a device's ways to answer.)
            let want = match random.below(5) {
                0 => Want::Nothing,
                1 => Want::LogProbs { tokens: &listed, temperature: 0.7 },
                2 => Want::Top { k: 5, temperature: Some(0.9) },
                _ => Want::Logits,
            };
            let want = if seed.is_multiple_of(3) {
                Want::Top { k: 5, temperature: Some(0.9) }
            } else {
                want
            };
            let token = random.below(vocab_size) as Token;
            batch.push(token, parent.map(|p| Row(p as u32)), want);
        }
        let outputs = lm.eval(&batch).unwrap();
        for i in 0..batch.len() {
            match outputs.get(i) {
                Output::Nothing => {}
                Output::Logits(logits) => bits.extend(logits.iter().map(|x| x.to_bits())),
                Output::Top { top, log_sum_exp } => {
                    bits.extend(top.iter().flat_map(|(token, x)| [*token, x.to_bits()]));
                    bits.extend(log_sum_exp.map(|x| x.to_bits() as u32));
                }
                Output::LogProbs(ps) => bits.extend(ps.iter().map(|p| p.to_bits() as u32)),
            }
        }
        let tip = random.below(batch.len() + 1).checked_sub(1).map(|row| Row(row as u32));
        lm.commit(tip).unwrap();
        if random.below(4) == 0 {
            lm.truncate(lm.committed() / 2).unwrap();
        }
    }
    bits
}

fn check(file: &Arc<Gguf>, device: &Device, counts: &[usize]) {
    let model = Model::load(file.clone(), device, &mut |_, _| true).unwrap();
    let vocab_size = model.shape().vocab_size;
    let (mut all_passes, mut all_posts) = (0, 0);
    for cache_type in [CacheType::F16, CacheType::F32] {
        let options = SessionOptions { context: Some(512), cache_type };
        for &count in counts {
            let seeds: Vec<u64> = (0..count).map(|i| (100 * count + i) as u64).collect();
            let alone: Vec<_> = seeds
                .iter()
                .map(|&seed| script(&mut *model.session(&options).unwrap(), seed, vocab_size))
                .collect();
            let before = model.pass_counts();
            let begin = Barrier::new(count);
            let together: Vec<_> = thread::scope(|scope| {
                let users: Vec<_> = seeds
                    .iter()
                    .map(|&seed| {
                        let (model, options, begin) = (&model, &options, &begin);
                        scope.spawn(move || {
                            let mut lm = model.session(options).unwrap();
                            begin.wait();
                            script(&mut *lm, seed, vocab_size)
                        })
                    })
                    .collect();
                users.into_iter().map(|user| user.join().unwrap()).collect()
            });
            let after = model.pass_counts();
            let what = format!("{count} sequences, {cache_type:?}, {}", model.describe());
            for (i, (a, b)) in alone.iter().zip(&together).enumerate() {
                assert!(a == b, "{what}: sequence {i} has other bits than alone");
            }
            let (passes, posts) = (after.passes - before.passes, after.posts - before.posts);
            println!("{what}: {posts} posts in {passes} passes");
            assert_eq!(posts, 6 * count as u64);
            (all_passes, all_posts) = (all_passes + passes, all_posts + posts);
        }
    }
    // (On a busy machine two threads may miss each other all the time, but not all of them do.)
    assert!(all_passes < all_posts, "no pass was shared");
}

#[test]
fn sequences_have_their_own_bits_on_every_instruction_set() {
    let mut files = vec![Arc::new(common::gguf(&tiny_llama()))];
    if let Some(golden) = shared("vectors/golden/rand-gqa-Q4_K_M.gguf") {
        files.push(Arc::new(Gguf::open(golden).unwrap()));
    }
    for file in files {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let device = Device::Cpu(Arc::new(Cpu::with_isa(2, isa).unwrap()));
            check(&file, &device, &[1, 2, 3, 5, 8]);
        }
    }
}

/// Whether lines that begin with rows of another have the bits that they have alone, whatever becomes of the others.
fn check_kept(file: &Arc<Gguf>, device: &Device, seeds: u64) {
    let model = Model::load(file.clone(), device, &mut |_, _| true).unwrap();
    let vocab_size = model.shape().vocab_size;
    for cache_type in [CacheType::F16, CacheType::F32] {
        let options = SessionOptions { context: Some(1 << 14), cache_type };
        let session = || model.session(&options).unwrap();
        for seed in 0..seeds {
            let mut first = session();
            for round in 0.. {
                script(&mut *first, 10 * seed + round, vocab_size);
                if first.committed() >= 70 {
                    break;
                }
            }
            let committed = first.committed();
            let kept = first.keep_rows(committed).unwrap();
            assert_eq!(
                (kept.count(), kept.bytes()),
                (committed, (committed * first.row_bytes()) as u64)
            );
            let mut bytes = Vec::new();
            first.save_rows(0..committed, &mut bytes).unwrap();
            // Parts of any length, of which one takes its rows from the other's copy of them, and the line that
            // they are from goes on in between.
            for len in [committed, 64, 50, 33, 1, 0] {
                let tokens = vec![0; len];
                let mut whole = session();
                whole.load_rows(committed, &bytes).unwrap();
                whole.truncate(len).unwrap();
                let mut part = session();
                script(&mut *part, seed, vocab_size);
                part.adopt_rows(&kept, &tokens).unwrap();
                assert_eq!(part.committed(), len);
                for round in 1..3 {
                    script(&mut *first, 10 * seed + round, vocab_size);
                    let [a, b] = [&mut whole, &mut part]
                        .map(|lm| script(&mut **lm, 1000 + seed + round, vocab_size));
                    assert!(a == b, "{len} of {committed} rows on {}", model.describe());
                }
                let again = part.keep_rows(part.committed().min(40)).unwrap();
                drop(part);
                let mut third = session();
                third.adopt_rows(&again, &vec![0; again.count()]).unwrap();
                let rows = 0..again.count();
                let saved = [third, whole].map(|lm| {
                    let mut bytes = Vec::new();
                    lm.save_rows(rows.clone(), &mut bytes).unwrap();
                    bytes
                });
                assert!(saved[0] == saved[1]);
            }
            let mut last = session();
            last.adopt_rows(&kept, &vec![0; committed]).unwrap();
            let mut unchanged = Vec::new();
            last.save_rows(0..committed, &mut unchanged).unwrap();
            assert!(unchanged == bytes, "rows that were kept have changed on {}", model.describe());
        }
    }
    // What does not fit is refused, and nothing has changed.
    let mut first = model.session(&SessionOptions::default()).unwrap();
    first.eval(&Batch::chain(&[1, 2, 3], None, Row(0), Want::Nothing)).unwrap();
    first.commit(Some(Row(2))).unwrap();
    assert!(first.keep_rows(4).is_err());
    let kept = first.keep_rows(3).unwrap();
    let other = Model::load(file.clone(), device, &mut |_, _| true).unwrap();
    let single = SessionOptions { cache_type: CacheType::F32, ..SessionOptions::default() };
    let small = SessionOptions { context: Some(2), ..SessionOptions::default() };
    for (mut lm, tokens, words) in [
        (other.session(&SessionOptions::default()).unwrap(), &[1, 2, 3][..], "another model"),
        (model.session(&single).unwrap(), &[1, 2, 3], "type f16, not f32"),
        (model.session(&SessionOptions::default()).unwrap(), &[1, 2, 3, 4], "3 were kept"),
        (model.session(&small).unwrap(), &[1, 2, 3], "context is full"),
    ] {
        lm.eval(&Batch::chain(&[5], None, Row(0), Want::Nothing)).unwrap();
        lm.commit(Some(Row(0))).unwrap();
        let error = lm.adopt_rows(&kept, tokens).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(lm.committed(), 1);
    }
}

#[test]
fn lines_that_begin_alike_have_their_own_bits() {
    let file = Arc::new(common::gguf(&tiny_llama()));
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        check_kept(&file, &Device::Cpu(Arc::new(Cpu::with_isa(2, isa).unwrap())), 8);
    }
    let Some(adapter) = adapter() else { return };
    let gpu = Arc::new(Gpu::with(&adapter, Variants::parse("").unwrap()).unwrap());
    let cpu = Arc::new(Cpu::new(1).unwrap());
    let on_gpu = mtad::engine::device::OnGpu { gpu, cpu, layers: None, may_fall_back: false };
    check_kept(&file, &Device::Gpu(on_gpu), 1);
}

#[test]
fn sequences_have_their_own_bits_on_a_gpu() {
    let Some(adapter) = adapter() else { return };
    let file = Arc::new(common::gguf(&tiny_llama()));
    for words in ["f32", "int8"] {
        let gpu = Arc::new(Gpu::with(&adapter, Variants::parse(words).unwrap()).unwrap());
        let cpu = Arc::new(Cpu::new(1).unwrap());
        let on_gpu = mtad::engine::device::OnGpu { gpu, cpu, layers: None, may_fall_back: false };
        check(&file, &Device::Gpu(on_gpu), &[1, 4]);
    }
}

#[test]
fn memory_that_is_not_there_is_refused_with_the_sum() {
    let file = Arc::new(common::gguf(&tiny_llama()));
    let device = Device::Cpu(Arc::new(Cpu::new(1).unwrap()));
    let load =
        |bytes| Model::load_within(file.clone(), &device, &Budget::of(bytes), &mut |_, _| true);
    // Nothing fits.
    let error = load(1 << 10).err().unwrap().to_string();
    for words in ["not enough memory", "activations", "there are 1 KiB"] {
        assert!(error.contains(words), "{error}");
    }
    // Activations fit, packed weights do not: it runs from its file, and says so.
    let (mut too_little, mut activations) = (0u64, 64 << 20);
    while activations - too_little > 1 {
        let middle = too_little.midpoint(activations);
        match load(middle) {
            Ok(_) => activations = middle,
            Err(_) => too_little = middle,
        }
    }
    let model = load(activations).unwrap();
    let notes = model.take_notes();
    assert!(notes.iter().any(|note| note.contains("runs from its file")), "{notes:?}");
    assert!(model.describe().contains("not repacked"), "{}", model.describe());
    // All fits, but not a cache as large as that.
    let model = load(64 << 20).unwrap();
    assert!(!model.describe().contains("not repacked"));
    let options = SessionOptions { context: Some(1 << 24), ..SessionOptions::default() };
    let error = model.session(&options).err().unwrap().to_string();
    assert!(error.contains("a context of 16777216 rows"), "{error}");
    // What was not asked for in so many rows becomes as many as there is room for.
    let mut small = load(activations + (700 << 10)).unwrap();
    let mut session = small.session(&SessionOptions::default()).unwrap();
    assert!((1..=512).contains(&session.capacity()), "{}", session.capacity());
    script(&mut *session, 1, 264);
    drop(session);
    // What ends gives its memory back.
    small = load(64 << 20).unwrap();
    let options = SessionOptions { context: Some(100_000), ..SessionOptions::default() };
    for _ in 0..20 {
        small.session(&options).unwrap();
    }
}
