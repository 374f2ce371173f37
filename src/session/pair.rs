//! A pair of models: the facade's entry.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::decode::Vocabulary;
use crate::engine::{Budget, CacheType, Cpu, Device, Isa, Model, NoteListener, SessionOptions};
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::session::generation::Session;
use crate::tokenizer::Tokenizer;

/// How a pair is loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Where the target runs: `cpu`, `gpu`, `gpu:N`, a part of an adapter's name, or `auto`; see
    /// [`Device::named`].
    pub device: String,
    /// Where the draft runs; `None` is where the target does.
    pub draft_device: Option<String>,
    /// How many layers of the target the GPU runs, the last ones; `None` is all of them.
    pub gpu_layers: Option<usize>,
    /// The instruction set of the CPU that is used; `None` is the best. (The command line and the functions for C
    /// take the one that `MTAD_CPU` names: [`Isa::from_env`].)
    pub isa: Option<Isa>,
    /// CPU threads; 0 is one for each physical core.
    pub threads: usize,
    /// Whether the CPU packs weights for its kernels when they are loaded; see
    /// [`Cpu::without_repacking`].
    pub repack: bool,
    /// The most bytes of memory that weights, caches and activations may take together; `None` for what the
    /// system has free. See [`Budget`].
    pub memory: Option<u64>,
    /// Whether files are mapped; otherwise they are read into memory: see [`Gguf::read`].
    pub mmap: bool,
    /// How words are cut, in place of what the target's file says; see
    /// [`Tokenizer::with_pre_tokenizer`].
    pub pre_tokenizer: Option<String>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            device: "auto".to_owned(),
            draft_device: None,
            gpu_layers: None,
            isa: None,
            threads: 0,
            repack: true,
            memory: None,
            mmap: true,
            pre_tokenizer: None,
        }
    }
}

impl LoadOptions {
    /// The device that the options name for a target, or a model alone.
    ///
    /// # Errors
    /// As [`Device::named`].
    pub fn device(&self) -> Result<Device> {
        Device::named(&self.device, self.cpu()?, self.gpu_layers)
    }

    /// The memory that may be taken.
    pub fn budget(&self) -> Budget {
        self.memory.map_or_else(Budget::available, Budget::of)
    }

    /// Opens a model's file as the options say.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Gguf> {
        if self.mmap { Gguf::open(path) } else { Gguf::read(path) }
    }

    fn cpu(&self) -> Result<Cpu> {
        let cpu = Cpu::with_isa(self.threads, self.isa.unwrap_or(Isa::best()))?;
        Ok(if self.repack { cpu } else { cpu.without_repacking() })
    }

    /// The device that the options name for a draft, whose target is on `target`: with all of its
    /// layers, and one that is open already is shared.
    ///
    /// # Errors
    /// As [`Device::named`].
    pub fn draft_device(&self, target: &Device) -> Result<Device> {
        match (&self.draft_device, target) {
            (Some(name), _) if *name != self.device => Device::named(name, self.cpu()?, None),
            #[cfg(feature = "gpu")]
            (_, Device::Gpu(on_gpu)) => {
                Ok(Device::Gpu(crate::engine::device::OnGpu { layers: None, ..on_gpu.clone() }))
            }
            (_, Device::Cpu(_)) => Ok(target.clone()),
        }
    }
}

/// A target model, and a draft model that speaks the same tokens. Weights are shared by all
/// sessions.
#[derive(Clone)]
pub struct Pair {
    target: Model,
    draft: Option<Model>,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    /// What is to be said of the vocabulary; taken once.
    notes: Arc<Mutex<Vec<String>>>,
    load_seconds: f64,
}

impl Pair {
    /// Opens a target file and, for strategies that draft, a draft file.
    ///
    /// `progress` is told bytes done and bytes in all, and stops the loading by returning false.
    ///
    /// # Errors
    /// A file cannot be read or run; [`Error::Vocabulary`] if the draft's tokens differ;
    /// [`Error::Cancelled`].
    pub fn open(
        target: impl AsRef<Path>,
        draft: Option<impl AsRef<Path>>,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Self> {
        let draft = draft.map(|draft| options.open(draft)).transpose()?;
        Self::from_files(options.open(target)?, draft, options, progress)
    }

    /// The pair that is part of the program, without its draft if `with_draft` is false.
    ///
    /// # Errors
    /// As [`Pair::open`]; [`Error::Invalid`] if the program was built without it.
    pub fn builtin(
        with_draft: bool,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Self> {
        let target = builtin_file("target")?;
        let draft = with_draft.then(|| builtin_file("draft")).transpose()?;
        Self::from_files(target, draft, options, progress)
    }

    /// A pair from open files.
    ///
    /// # Errors
    /// As [`Pair::open`].
    pub fn from_files(
        target: Gguf,
        draft: Option<Gguf>,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Self> {
        let start = Instant::now();
        // Vocabularies first: a pair that does not fit is refused before gigabytes are read.
        let fitting = fitting(&target, draft.as_ref(), options.pre_tokenizer.as_deref())?;
        let device = options.device()?;
        let draft_device = match draft {
            Some(_) => options.draft_device(&device)?,
            None => device.clone(),
        };
        let draft = draft.map(|draft| (draft, &draft_device));
        Self::load(start, fitting, (target, &device), draft, &options.budget(), progress)
    }

    /// A pair from open files, each on a device that is open already.
    ///
    /// # Errors
    /// As [`Pair::open`].
    pub fn on_devices(
        target: (Gguf, &Device),
        draft: Option<(Gguf, &Device)>,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Self> {
        let start = Instant::now();
        let fitting = fitting(&target.0, draft.as_ref().map(|(file, _)| file), None)?;
        Self::load(start, fitting, target, draft, &Budget::available(), progress)
    }

    fn load(
        start: Instant,
        (tokenizer, shared): (Tokenizer, usize),
        (target, device): (Gguf, &Device),
        draft: Option<(Gguf, &Device)>,
        budget: &Budget,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Self> {
        let weights = |file: &Gguf| file.tensors().map(|t| t.bytes.len() as u64).sum::<u64>();
        let first = weights(&target);
        let total = first + draft.as_ref().map_or(0, |(file, _)| weights(file));
        let mut loaded = |file, device, before: u64| {
            Model::load_within(Arc::new(file), device, budget, &mut |done, _| {
                progress(before + done, total)
            })
        };
        let target = loaded(target, device, 0)?;
        let draft = draft.map(|(file, device)| loaded(file, device, first)).transpose()?;
        let tokens = tokenizer.len().min(target.shape().vocab_size);
        let rows = draft.as_ref().map_or(tokens, |draft| draft.shape().vocab_size);
        let shared = shared.min(tokens).min(rows);
        // Where the draft does not have a token, that is mostly one which ends or begins
        // something.
        let roles = [tokenizer.eos(), tokenizer.bos(), tokenizer.unk()];
        let stand_in = roles.into_iter().flatten().find(|&id| (id as usize) < shared);
        let stand_in = stand_in.unwrap_or(0);
        let notes = Arc::new(Mutex::new(tokenizer.notes().to_vec()));
        let vocabulary = Vocabulary { tokens, shared, stand_in };
        let load_seconds = start.elapsed().as_secs_f64();
        Ok(Pair { target, draft, tokenizer, vocabulary, notes, load_seconds })
    }

    /// The large model, whose text it is.
    pub fn target(&self) -> &Model {
        &self.target
    }

    /// The small model that proposes tokens, if there is one.
    pub fn draft(&self) -> Option<&Model> {
        self.draft.as_ref()
    }

    /// Whether both are of the very same models.
    pub(crate) fn has_models_of(&self, other: &Pair) -> bool {
        self.target.is(&other.target)
            && match (&self.draft, &other.draft) {
                (Some(draft), Some(other)) => draft.is(other),
                (None, None) => true,
                _ => false,
            }
    }

    /// The files that the models are from, which no output may replace.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        let models = [Some(&self.target), self.draft.as_ref()];
        models.into_iter().flatten().flat_map(|model| model.file().files()).map(Path::new)
    }

    /// What a person should know of the vocabulary ([`Tokenizer::notes`]) and of where the models
    /// run ([`Model::take_notes`]). Each note is handed out once.
    pub fn take_notes(&self) -> Vec<String> {
        let models = [Some(&self.target), self.draft.as_ref()];
        let mut notes =
            std::mem::take(&mut *self.notes.lock().unwrap_or_else(PoisonError::into_inner));
        notes.extend(models.into_iter().flatten().flat_map(Model::take_notes));
        notes
    }

    /// Has such notes heard by `listener`, as they come up, on the threads on which they do; see
    /// [`Model::on_note`].
    pub fn on_note(&self, listener: NoteListener) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *notes).iter().for_each(|note| listener(note));
        drop(notes);
        self.target.on_note(listener.clone());
        if let Some(draft) = &self.draft {
            draft.on_note(listener);
        }
    }

    /// The target's vocabulary. The draft has the same tokens, or fewer, or more.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// How many tokens the models have and share.
    pub fn vocabulary(&self) -> Vocabulary {
        self.vocabulary
    }

    /// Seconds that loading took.
    pub fn load_seconds(&self) -> f64 {
        self.load_seconds
    }

    /// Bytes that a session takes for each row of its context, in both models.
    pub fn row_bytes(&self, cache_type: CacheType) -> u64 {
        let models = [Some(&self.target), self.draft.as_ref()];
        models.into_iter().flatten().map(|model| model.row_bytes(cache_type)).sum()
    }

    /// The rows that each of so many sessions may have at the same time: what `options` ask for, or what the target
    /// was trained for, as far as memory holds it with room for one more.
    pub fn context_for(&self, options: &SessionOptions, sessions: usize) -> usize {
        let shape = self.target.shape();
        let limit = shape.position_limit.unwrap_or(usize::MAX);
        let wanted = options.context.unwrap_or(shape.context).min(limit);
        let row = self.row_bytes(options.cache_type);
        match (options.context, self.target.budget().left()) {
            (None, Some(left)) => {
                let fits = left / (sessions as u64 + 1) / row.max(1);
                wanted.min(usize::try_from(fits).unwrap_or(usize::MAX))
            }
            _ => wanted,
        }
    }

    /// A new session with empty caches.
    ///
    /// # Errors
    /// As [`Model::session`].
    pub fn session(&self, options: &SessionOptions) -> Result<Session> {
        Session::new(self, options)
    }
}

/// The tokenizer of a target, if its draft speaks the same tokens, and how many they share.
fn fitting(target: &Gguf, draft: Option<&Gguf>, pre: Option<&str>) -> Result<(Tokenizer, usize)> {
    let tokenizer = Tokenizer::with_pre_tokenizer(target, pre)?;
    let shared = match draft {
        Some(draft) => tokenizer.check_draft_file(draft)?,
        None => tokenizer.len(),
    };
    Ok((tokenizer, shared))
}

/// A file of the built-in pair: `target` or `draft`.
///
/// # Errors
/// [`Error::Invalid`] for another name, or if the program was built without the pair.
pub fn builtin_file(name: &str) -> Result<Gguf> {
    #[cfg(feature = "builtin-pair")]
    {
        /// Aligned like a mapped file.
        #[repr(C, align(64))]
        struct Aligned<T: ?Sized>(T);
        static TARGET: &Aligned<[u8]> = &Aligned(*include_bytes!("../../models/target.gguf"));
        static DRAFT: &Aligned<[u8]> = &Aligned(*include_bytes!("../../models/draft.gguf"));
        match name {
            "target" => Gguf::from_static("builtin:target", &TARGET.0),
            "draft" => Gguf::from_static("builtin:draft", &DRAFT.0),
            _ => Err(Error::invalid(format!(
                "there is no built-in model `{name}`; there are `target` and `draft`"
            ))),
        }
    }
    #[cfg(not(feature = "builtin-pair"))]
    Err(Error::invalid(format!(
        "this program was built without the built-in pair (`builtin:{name}`); use a file"
    )))
}

/// The held-out questions of the built-in pair: a line of JSON with `prompt` and `answer` for each.
///
/// # Errors
/// [`Error::Invalid`] if the program was built without the pair.
pub fn builtin_questions() -> Result<&'static str> {
    #[cfg(feature = "builtin-pair")]
    return Ok(include_str!("../../models/questions.jsonl"));
    #[cfg(not(feature = "builtin-pair"))]
    Err(Error::invalid(
        "this program was built without the built-in pair and its questions; use a file of prompts",
    ))
}
